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

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.writers import NGFF_VERSION, NOT_COMPUTED, PROBABILITY_ONE, ZARR_CHUNK

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

    root = zarr.create_group(path, zarr_format=3, attributes={"ome": _image("mask", levels, voxel_size_nm)})
    _create_levels(root, levels, np.uint8, NOT_COMPUTED)
    root.create_group("labels", attributes={"ome": {"version": NGFF_VERSION, "labels": [LABELS.split("/")[1]]}})
    numbered = _image("mitochondria", levels, voxel_size_nm) | {"image-label": {"source": {"image": "../../"}}}
    group = root.create_group(LABELS, attributes={"ome": numbered})
    _create_levels(group, levels, np.uint32, NO_NUMBER)
    if probabilities:
        about = _image(f"probability, {PROBABILITY_ONE} is 1", levels, voxel_size_nm)
        group = root.create_group(PROBABILITIES, attributes={"ome": about})
        _create_levels(group, levels, np.uint8, NOT_COMPUTED)


def open_level(path: Path, what: str, level: int = 0, *, mode: str = "r") -> Any:
    """Open an array of a group: of `MASK`, `LABELS` or `PROBABILITIES`."""
    import zarr

    return zarr.open_array(path / what / str(level), mode=mode)


def chunk_paths(folder: Path, shape: Shape, slices: range) -> Iterator[tuple[Path, tuple[slice, ...]]]:
    """Yield the file of each chunk that holds some of the slices of an array, and its place in the array."""
    chunks = _chunks(shape)
    ranges = [range(slices.start // chunks[0], -(-slices.stop // chunks[0]))]
    ranges += [range(-(-n // c)) for n, c in zip(shape[1:], chunks[1:], strict=True)]
    for index in product(*ranges):
        place = tuple(slice(i * c, min(n, (i + 1) * c)) for i, c, n in zip(index, chunks, shape, strict=True))
        yield folder.joinpath("c", *map(str, index)), place


def flush_chunks(folder: Path, shape: Shape, slices: range) -> None:
    """Wait until the chunks of some slices, and their names, are on the disk."""
    folders = set()
    for path, _ in chunk_paths(folder, shape, slices):
        _flush(path)
        folders |= {path.parent, path.parent.parent, path.parent.parent.parent}
    if os.name == "posix":
        for path in folders:
            _flush(path)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _chunks(shape: Shape) -> Shape:
    return tuple(min(side, n) for side, n in zip(ZARR_CHUNK, shape, strict=True))


def _create_levels(group: Any, levels: tuple[Level, ...], dtype: type, fill_value: int) -> None:
    from zarr.codecs import Crc32cCodec, ZstdCodec

    for number, level in enumerate(levels):
        group.create_array(
            str(number),
            shape=level.shape,
            chunks=_chunks(level.shape),
            dtype=dtype,
            fill_value=fill_value,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=("z", "y", "x"),
            config={"write_empty_chunks": True},
        )


def _image(name: str, levels: tuple[Level, ...], voxel_size_nm: VoxelSize) -> dict:
    """OME-NGFF 0.5 metadata of an image with several levels.

    A coarse voxel covers a block of fine ones, so its centre lies half a block less half a voxel farther.
    """
    datasets = []
    for number, level in enumerate(levels):
        scale = [float(edge) for edge in level.voxel_size(voxel_size_nm)]
        shift = [(coarse - fine) / 2 for coarse, fine in zip(scale, voxel_size_nm, strict=True)]
        steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    return {"version": NGFF_VERSION, "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}
