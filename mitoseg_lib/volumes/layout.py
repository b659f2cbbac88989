"""What a segmented volume is on the disk: one OME-NGFF group, and how each array is cut into chunks and levels.

::

    NAME.zarr                   image of the mask: 0, 1, 2, ... are its levels (uint8: 0 and 1)
        labels/mitochondria     the same levels, with the number of each mitochondrion (uint32: 0 is background)
        probabilities           the same levels (uint8: 254 is 1), if they were asked for
        measurements.csv        a row for each mitochondrion

A missing chunk of a Zarr reads as its fill value. So that is a value that nothing computed can have: what was not
computed can't be taken for background. Each chunk has a checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.writers import (
    NGFF_VERSION,
    NOT_COMPUTED,
    PROBABILITY_NAME,
    chunk_shape,
    create_ome_array,
    describe_ome_image,
    flush,
    flush_folder,
)

__all__ = [
    "LABELS",
    "MASK",
    "NO_NUMBER",
    "PROBABILITIES",
    "TABLE",
    "Level",
    "chunk_paths",
    "create_group",
    "flush_chunks",
    "levels_of",
    "open_level",
]

MASK, LABELS, PROBABILITIES, TABLE = "", "labels/mitochondria", "probabilities", "measurements.csv"
NO_NUMBER = 2**32 - 1  # what reads as "not computed" among numbers of objects
SMALLEST = 512  # voxels: the coarsest level is no longer than this on any side
NEARLY_EQUAL = 1.5  # edges of voxels up to this much longer than the shortest are halved with it

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Level:
    """One resolution of a volume.

    Attributes
    ----------
    shape
        (z, y, x).
    factors
        Voxels of the finest level that make one of this, along each axis.
    """

    shape: Shape
    factors: Shape

    def voxel_size(self, finest: VoxelSize) -> VoxelSize:
        """Return the edges of this level's voxels."""
        return tuple(edge * factor for edge, factor in zip(finest, self.factors, strict=True))


def levels_of(shape: Shape, voxel_size_nm: VoxelSize) -> tuple[Level, ...]:
    """Return the levels of a volume, from the finest on, each half as long along y and x.

    Along z, too, except where slices are thick: then the planes are coarsened until voxels are about as long as wide.
    """
    levels = [Level(shape, (1, 1, 1))]
    while max(levels[-1].shape) > SMALLEST:
        last = levels[-1]
        size = last.voxel_size(voxel_size_nm)
        steps = [
            2 if edge <= NEARLY_EQUAL * min(size) and n > 1 else 1 for edge, n in zip(size, last.shape, strict=True)
        ]
        if max(steps) == 1:
            break
        levels.append(
            Level(
                tuple(-(-n // step) for n, step in zip(last.shape, steps, strict=True)),
                tuple(f * step for f, step in zip(last.factors, steps, strict=True)),
            )
        )
    return tuple(levels)


def create_group(path: Path, levels: tuple[Level, ...], voxel_size_nm: VoxelSize, *, probabilities: bool) -> None:
    """Create the group with empty arrays at a path where nothing is."""
    import zarr

    def image(name: str) -> dict:
        return describe_ome_image(name, [level.voxel_size(voxel_size_nm) for level in levels])

    root = zarr.create_group(path, zarr_format=3, attributes={"ome": image("mask")})
    _create_levels(root, levels, np.uint8, NOT_COMPUTED)
    root.create_group("labels", attributes={"ome": {"version": NGFF_VERSION, "labels": [LABELS.split("/")[1]]}})
    numbered = image("mitochondria") | {"image-label": {"source": {"image": "../../"}}}
    _create_levels(root.create_group(LABELS, attributes={"ome": numbered}), levels, np.uint32, NO_NUMBER)
    if probabilities:
        group = root.create_group(PROBABILITIES, attributes={"ome": image(PROBABILITY_NAME)})
        _create_levels(group, levels, np.uint8, NOT_COMPUTED)


def open_level(path: Path, what: str, level: int = 0, *, mode: str = "r") -> Any:
    """Open an array of a group: of `MASK`, `LABELS` or `PROBABILITIES`."""
    import zarr

    return zarr.open_array(path / what / str(level), mode=mode)


def chunk_paths(folder: Path, shape: Shape, slices: range) -> Iterator[tuple[Path, tuple[slice, ...]]]:
    """Yield the file of each chunk that holds some of the slices of an array, and its place in the array."""
    chunks = chunk_shape(shape)
    ranges = [range(slices.start // chunks[0], -(-slices.stop // chunks[0]))]
    ranges += [range(-(-n // c)) for n, c in zip(shape[1:], chunks[1:], strict=True)]
    for index in product(*ranges):
        place = tuple(slice(i * c, min(n, (i + 1) * c)) for i, c, n in zip(index, chunks, shape, strict=True))
        yield folder.joinpath("c", *map(str, index)), place


def flush_chunks(folder: Path, shape: Shape, slices: range) -> None:
    """Wait until the chunks of some slices, and their names, are on the disk."""
    folders = set()
    for path, _ in chunk_paths(folder, shape, slices):
        flush(path)
        folders |= {path.parent, path.parent.parent, path.parent.parent.parent}
    for path in folders:
        flush_folder(path)


def _create_levels(group: Any, levels: tuple[Level, ...], dtype: type, fill_value: int) -> None:
    for number, level in enumerate(levels):
        create_ome_array(group, str(number), level.shape, dtype, fill_value)
