"""Volumes larger than memory, on many workers: from slices to a mask, numbered objects and a table of them.

`segment_volume` does it, and `mitoseg volume` from the command line. The rooms behind this door: `layout` (what is on
the disk), `sums` and `joining` (objects that are numbered slab by slab), `pyramid`, `job` and `work` (what a worker is
told, and does), `engine` (Dask), `table`, `verify` and `plan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mitoseg_lib.errors import FilePath
from mitoseg_lib.volumes.engine import Step, connected_cluster, local_cluster
from mitoseg_lib.volumes.job import VolumeError
from mitoseg_lib.volumes.layout import LABELS, MASK, PROBABILITIES, TABLE, open_level
from mitoseg_lib.volumes.plan import DEFAULTS, VolumeOptions, VolumePlan, plan_volume, steps_of
from mitoseg_lib.volumes.table import Measurement, measure_objects, read_table
from mitoseg_lib.volumes.verify import Verification, verify_volume

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "LABELS",
    "MASK",
    "PROBABILITIES",
    "TABLE",
    "Measurement",
    "Step",
    "Verification",
    "VolumeError",
    "VolumeOptions",
    "VolumePlan",
    "connected_cluster",
    "local_cluster",
    "measure_objects",
    "open_level",
    "plan_volume",
    "read_table",
    "segment_volume",
    "steps_of",
    "verify_volume",
]


def segment_volume(
    source: FilePath,
    target: FilePath,
    options: VolumeOptions = DEFAULTS,
    *,
    client: Client | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Measurement]:
    """Segment a volume of any size, and measure its mitochondria.

    Interrupted at any time and in any way, the same call goes on, and ends with the same bytes.

    Parameters
    ----------
    source
        OME-Zarr, Zarr, TIFF or a folder of slices; see `mitoseg_lib.readers.open_reader`.
    target
        Path of the OME-Zarr to write; see `mitoseg_lib.volumes.layout`. Until it is finished, it is in a folder beside
        it whose name ends in .unfinished.
    options
        Model, voxel size, and what is wanted.
    client
        Of a Dask cluster whose workers see the same files. None: workers on this machine, as many as it has cores and
        memory for. They are new processes, so a script must call this under ``if __name__ == "__main__":``.
    overwrite
        Replace a finished volume, and begin an unfinished one anew if its input or settings were others.
    progress
        Show bars on stderr.

    Returns
    -------
    list of Measurement
        One for each mitochondrion.

    Raises
    ------
    StackError
        If the input can't be used, or isn't what an unfinished or finished volume of this name was made from.
    VolumeError
        If workers died twice of the same slab, or the scheduler is gone. What is done is kept.
    """
    plan = plan_volume(source, target, options, overwrite=overwrite, progress=progress)
    if plan.is_finished or client is not None:
        plan.run(client, progress=progress)
    else:
        with local_cluster(plane=plan.job.shape[1:], device=plan.job.device) as started:
            plan.run(started, progress=progress)
    return read_table(plan.target)
