"""Is a volume on the disk what was written?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from mitoseg_lib.errors import FilePath, StackError
from mitoseg_lib.volumes.layout import LABELS, MASK, NO_NUMBER, PROBABILITIES, TABLE, chunk_paths, open_level
from mitoseg_lib.volumes.table import read_provenance
from mitoseg_lib.writers import NOT_COMPUTED

__all__ = ["Verification", "verify_volume"]


@dataclass(frozen=True)
class Verification:
    """What `verify_volume` found.

    Attributes
    ----------
    n_chunks
        How many chunks there should be.
    faults
        Paths in the volume of what is missing, damaged or not computed, with the reason.
    """

    n_chunks: int
    faults: tuple[str, ...]


def verify_volume(path: FilePath, *, progress: bool = False) -> Verification:
    """Read every chunk of a finished volume and compare it with its checksum, and the table with its sha256.

    Parameters
    ----------
    path
        Of the OME-Zarr.
    progress
        Show a bar on stderr.

    Raises
    ------
    StackError
        If there is no finished volume.
    """
    path = Path(path)
    about = read_provenance(path)
    if about is None:
        raise StackError(
            f"{path.name} isn't a finished volume, but one that `mitoseg volume` has made was expected; check the path."
        )
    whats = {MASK: NOT_COMPUTED, LABELS: NO_NUMBER}
    if about["output"]["probabilities"]:
        whats[PROBABILITIES] = NOT_COMPUTED
    arrays = [(what, level, fill) for what, fill in whats.items() for level in range(_n_levels(path, what))]
    faults, n = [], 0
    for what, level, fill in tqdm(arrays, "verifying", disable=not progress, leave=False):
        folder, array = path / what / str(level), open_level(path, what, level)
        for chunk, place in chunk_paths(folder, array.shape, range(array.shape[0])):
            n += 1
            fault = "is missing" if not chunk.is_file() else _fault(array, place, fill)
            if fault:
                faults.append(f"{chunk.relative_to(path)} {fault}")
    return Verification(n, (*faults, *_table_fault(path, about["table_sha256"])))


def _n_levels(path: Path, what: str) -> int:
    import zarr

    return len(zarr.open_group(path / what, mode="r").attrs["ome"]["multiscales"][0]["datasets"])


def _fault(array: object, place: tuple[slice, ...], fill: int) -> str | None:
    """What is wrong with a chunk that is there."""
    try:
        values = array[place]
    except Exception as error:  # decoders raise errors of many kinds
        return f"is damaged ({' '.join(str(error).split())[:100]})"
    return "holds voxels that weren't computed" if (values == fill).any() else None


def _table_fault(path: Path, expected: str) -> Iterator[str]:
    try:
        found = hashlib.sha256((path / TABLE).read_bytes()).hexdigest()
    except OSError:
        yield f"{TABLE} is missing"
        return
    if found != expected:
        yield f"{TABLE} has changed"
