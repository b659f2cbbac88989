"""Measures of objects that can be added up: what the parts of a volume say of an object gives what the whole says.

So a mitochondrion that goes through a hundred slabs is measured exactly, although no slab has seen more than a part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mitoseg_lib.shapes import CROFTON_DIRECTIONS

__all__ = ["ObjectSums", "sum_objects", "with_margin"]


@dataclass(frozen=True, eq=False)
class ObjectSums:
    """Sums over the voxels of n objects, or of the parts of them that lie in one slab.

    Attributes
    ----------
    voxels
        How many, int64 (n,).
    position
        Sum of their indices in the volume, int64 (n, 3), (z, y, x).
    lower, upper
        Box that holds them, int64 (n, 3); `upper` is one beyond the last.
    first
        Index of the first one in the raster order of the volume, int64 (n,).
    grey
        Sum of their grey levels, float64 (n,).
    crossings
        How often lines in each of `mitoseg_lib.shapes.CROFTON_DIRECTIONS` cross the object's boundary, int64 (n, 13).
    """

    voxels: NDArray[np.int64]
    position: NDArray[np.int64]
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    first: NDArray[np.int64]
    grey: NDArray[np.float64]
    crossings: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.voxels)

    def take(self, which: NDArray) -> Self:
        """Return some of the objects, by number from 0 or by a mask, in that order."""
        return type(self)(**{name: values[which] for name, values in self.as_arrays().items()})

    def join(self, owner: NDArray[np.integer], n_owners: int) -> Self:
        """Return the sums of n_owners objects, of which these are parts.

        Parameters
        ----------
        owner
            Number from 0 of the object that each part belongs to, (n,); each object has a part.
        n_owners
            How many there are.
        """
        order = np.argsort(owner, kind="stable")
        starts = np.searchsorted(owner[order], np.arange(n_owners))
        how = {"lower": np.minimum, "first": np.minimum, "upper": np.maximum}
        return type(self)(
            **{
                name: how.get(name, np.add).reduceat(values[order], starts, axis=0) if n_owners else values[:0]
                for name, values in self.as_arrays().items()
            }
        )

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Return the objects of several sums, one after the other; at least one of them."""
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def as_arrays(self) -> dict[str, NDArray]:
        """Return all arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def sum_objects(
    labels: NDArray[np.integer],
    around: NDArray,
    grey: NDArray,
    start: tuple[int, int, int],
    shape: tuple[int, int, int],
) -> ObjectSums:
    """Sum over the voxels of each object in a box of a volume.

    Parameters
    ----------
    labels
        Numbers of the objects in the box, 1 to n without gaps, 0 for background, (z, y, x).
    around
        The box with one voxel more on each side (`with_margin`), in which two neighbours belong to one object if they
        have equal values: the labels, or just the mask where all that touches is one object.
    grey
        Grey levels in the box.
    start
        Where the box begins in the volume.
    shape
        Of the volume, (z, y, x).
    """
    where = np.flatnonzero(labels)
    number = labels.ravel()[where].astype(np.int64) - 1
    boxes = ndimage.find_objects(labels)
    n = len(boxes)
    index = np.unravel_index(where, labels.shape)
    place = np.ravel_multi_index([i + s for i, s in zip(index, start, strict=True)], shape)
    first = np.zeros(n, np.int64)
    first[number[::-1]] = place[::-1]
    voxels = np.bincount(number, minlength=n)
    inside = np.stack([_sums(number, i, n) for i in index], axis=1).astype(np.int64)
    corners = np.array([[[side.start for side in box], [side.stop for side in box]] for box in boxes], np.int64)
    corners = corners.reshape(-1, 2, 3) + np.array(start)
    return ObjectSums(
        voxels,
        inside + voxels[:, None] * np.array(start),
        corners[:, 0],
        corners[:, 1],
        first,
        _sums(number, grey.ravel()[where], n),
        _crossings(number, np.ravel_multi_index([i + 1 for i in index], around.shape), around, n),
    )


def with_margin(box: NDArray, before: NDArray | None = None, after: NDArray | None = None) -> NDArray:
    """Return a box with one voxel more on each side: 0, or along z the slice that is there, (y, x)."""
    grown = np.pad(box, 1)
    for z, found in ((0, before), (-1, after)):
        if found is not None:
            grown[z, 1:-1, 1:-1] = found
    return grown


def _sums(number: NDArray[np.int64], values: NDArray, n: int) -> NDArray[np.float64]:
    """Sum of values for each object; exact for whole numbers below 2^53."""
    return np.bincount(number, values, minlength=n)


def _crossings(number: NDArray[np.int64], place: NDArray[np.int64], around: NDArray, n: int) -> NDArray[np.int64]:
    """Boundaries crossed in each direction: neighbours, to and fro, that aren't of the same object."""
    values = around.ravel()
    own = values[place]
    found = np.zeros((n, len(CROFTON_DIRECTIONS)), np.int64)
    _, height, width = around.shape
    for d, (z, y, x) in enumerate(CROFTON_DIRECTIONS.tolist()):
        step = (z * height + y) * width + x
        for neighbour in (step, -step):
            found[:, d] += np.bincount(number[values[place + neighbour] != own], minlength=n)
    return found
