"""The end of a volume: a table of its objects, and what it says of itself."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mitoseg_lib.shapes import capsule_diameter, crofton_weights, find_axis, sphericity
from mitoseg_lib.volumes.job import Job
from mitoseg_lib.volumes.layout import TABLE
from mitoseg_lib.volumes.sums import ObjectSums, sum_objects, with_margin
from mitoseg_lib.writers import flush, flush_folder

__all__ = ["Measurement", "finish_group", "measure_objects", "measurements", "read_provenance", "read_table"]

KEY, FORMAT = "mitoseg", 1
NM_UM = 1e-3


@dataclass(frozen=True)
class Measurement:
    """One mitochondrion: a row of measurements.csv.

    Attributes
    ----------
    id
        Its number in the labels, from 1, in the order of first voxels (z, then y, then x).
    volume_um3
        Voxels times the volume of a voxel.
    surface_um2
        By the Crofton formula; see `mitoseg_lib.shapes.crofton_weights`. Where an object is cut off by the volume's
        border, the cut counts as surface.
    length_um
        From end to end along its axis; see `mitoseg_lib.shapes.find_axis`. Empty where it is too thin for the
        resolution at which an object that large is looked at.
    diameter_um
        Mean diameter: that of the capsule with the same volume and the length of axis and branches together; see
        `mitoseg_lib.shapes.capsule_diameter`.
    sphericity
        1 for a ball, and less for all else; see `mitoseg_lib.shapes.sphericity`.
    branches
        Side branches off the axis.
    z_min, y_min, x_min, z_max, y_max, x_max
        The box around it in voxels; the last ones are in it.
    z_um, y_um, x_um
        Centroid; 0 is the centre of the volume's first voxel.
    mean_grey
        Of the input, as it was stored.
    touches_border
        1 if it reaches the volume's border, where it may have been cut off.
    """

    id: int
    volume_um3: float
    surface_um2: float
    length_um: float | None
    diameter_um: float | None
    sphericity: float
    branches: int | None
    z_min: int
    y_min: int
    x_min: int
    z_max: int
    y_max: int
    x_max: int
    z_um: float
    y_um: float
    x_um: float
    mean_grey: float
    touches_border: int


def measurements(
    sums: ObjectSums,
    axes: np.ndarray,
    voxel_size_nm: tuple[float, float, float],
    shape: tuple[int, int, int],
) -> list[Measurement]:
    """Turn sums and axes into a table.

    Parameters
    ----------
    sums
        Of n objects.
    axes
        float64 (n, 3): length of the axis in nm, of axis and branches together, number of branches; NaN: not known.
    voxel_size_nm
        (z, y, x).
    shape
        Of the volume.
    """
    size = np.array(voxel_size_nm)
    volumes = sums.voxels * size.prod()
    surfaces = sums.crossings @ crofton_weights(voxel_size_nm)
    centroids = sums.position / sums.voxels[:, None] * size * NM_UM
    borders = ((sums.lower == 0) | (sums.upper == np.array(shape))).any(axis=1)
    rows = []
    for i in range(len(sums)):
        volume, surface, (length, whole, branches) = float(volumes[i]), float(surfaces[i]), axes[i].tolist()
        known = np.isfinite(length)
        rows.append(
            Measurement(
                i + 1,
                volume * NM_UM**3,
                surface * NM_UM**2,
                length * NM_UM if known else None,
                capsule_diameter(volume, whole) * NM_UM if known else None,
                sphericity(volume, surface),
                int(branches) if known else None,
                *sums.lower[i].tolist(),
                *(sums.upper[i] - 1).tolist(),
                *centroids[i].tolist(),
                float(sums.grey[i] / sums.voxels[i]),
                int(borders[i]),
            )
        )
    return rows


def measure_objects(
    labels: NDArray[np.integer], image: NDArray, voxel_size_nm: tuple[float, float, float]
) -> list[Measurement]:
    """Measure the objects of labels that are in memory, as `segment_volume` measures those of a volume.

    Parameters
    ----------
    labels
        Numbers of objects, 1 to n without gaps, 0 for background, (z, y, x); each connected by faces, edges or corners.
    image
        Grey levels of the same shape.
    voxel_size_nm
        (z, y, x).

    Raises
    ------
    ValueError
        If the shapes differ, a number is missing, or an object isn't connected.
    """
    boxes = ndimage.find_objects(labels)
    if labels.shape != image.shape or None in boxes:
        raise ValueError(
            f"Labels of {labels.shape} and an image of {image.shape} were given, but the same (z, y, x) and numbers"
            " without gaps were expected; number a mask's objects with label_instances."
        )
    sums = sum_objects(labels, with_margin(labels), image, (0, 0, 0), labels.shape)
    axes = [find_axis(labels[box] == number, voxel_size_nm) for number, box in enumerate(boxes, 1)]
    rows = np.array([(axis.length_nm, axis.total_length_nm, axis.branches) for axis in axes]).reshape(-1, 3)
    return measurements(sums, rows, voxel_size_nm, labels.shape)


def read_table(path: str | os.PathLike[str]) -> list[Measurement]:
    """Read the measurements.csv of a volume, given its path or the table's own."""
    path = Path(path)
    types = {field.name: int if field.type.startswith("int") else float for field in fields(Measurement)}
    with open(path / TABLE if path.is_dir() else path, newline="", encoding="ascii") as stream:
        return [
            Measurement(**{name: types[name](value) if value else None for name, value in row.items()})
            for row in csv.DictReader(stream)
        ]


def finish_group(job: Job, fingerprint: dict) -> dict:
    """Write the table, and into the group's metadata what it was made from; return the latter."""
    ordered = job.load("order")
    sums = ObjectSums(**ordered)
    axes = np.full((len(sums), 3), np.nan)
    digests = [str(job.load(f"segment-{i}")["input"]) for i in range(len(job.predicted_slabs))]
    for batch in range(job.n_batches):
        found = job.load(f"measure-{batch}")
        axes[found["number"] - 1] = found["axes"]
    table = _as_csv(measurements(sums, axes, job.voxel_size_nm, job.shape))
    (job.group / TABLE).write_bytes(table)
    about = {"format": FORMAT} | fingerprint
    about["input"] = fingerprint["input"] | {"sha256": digests}
    about |= {"objects": len(sums), "table_sha256": hashlib.sha256(table).hexdigest()}
    _describe(job.group, about)
    _sweep(job.group)
    flush(job.group / TABLE)
    flush(job.group / "zarr.json")
    flush_folder(job.group)
    return about


def read_provenance(path: Path) -> dict | None:
    """What a volume says of how it was made; None if `finish_group` didn't make it."""
    import zarr

    try:
        about = zarr.open_group(path, mode="r").attrs.get(KEY)
    except (OSError, ValueError, KeyError):
        return None
    return about if isinstance(about, dict) and about.get("format") == FORMAT else None


def _describe(path: Path, about: dict) -> None:
    import zarr

    zarr.open_group(path, mode="r+").attrs[KEY] = about


def _sweep(path: Path) -> None:
    """Remove what processes that were killed have left of files that they hadn't finished."""
    for left in path.rglob("*.partial"):
        left.unlink()


def _as_csv(rows: list[Measurement]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([field.name for field in fields(Measurement)])
    for row in rows:
        writer.writerow([_cell(value) for value in asdict(row).values()])
    return stream.getvalue().encode("ascii")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
