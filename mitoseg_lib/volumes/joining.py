"""Objects that are numbered slab by slab, and then joined to what they are in the whole volume.

The result is that of `mitoseg_lib.instances.label_instances` for the whole volume at once, up to the order of numbers,
whatever the depth of the slabs. Memory is needed for one slab, and for some numbers of each object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mitoseg_lib.instances import label_instances
from mitoseg_lib.volumes.sums import ObjectSums, sum_objects, with_margin

__all__ = ["Face", "SlabObjects", "join_slabs", "label_slab", "number_objects"]


@dataclass(frozen=True, eq=False)
class Face:
    """Which voxels of a slice belong to objects.

    Attributes
    ----------
    places
        Their indices in the slice, row by row, int64 (k,), ascending.
    numbers
        Of the objects in their slab, from 0, int64 (k,).
    """

    places: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @classmethod
    def of(cls, labels: NDArray[np.int32]) -> Face:
        """Return the face that a slice of labels, (y, x), is."""
        places = np.flatnonzero(labels)
        return cls(places, labels.ravel()[places].astype(np.int64) - 1)


@dataclass(frozen=True, eq=False)
class SlabObjects:
    """The objects of one slab of a volume: sums over their voxels, and its first and last slice."""

    sums: ObjectSums
    top: Face
    bottom: Face


def label_slab(
    mask: NDArray[np.bool_],
    grey: NDArray,
    first: int,
    shape: tuple[int, int, int],
    *,
    before: NDArray[np.bool_] | None = None,
    after: NDArray[np.bool_] | None = None,
) -> SlabObjects:
    """Number the objects in one slab of whole slices, and sum over their voxels.

    Parameters
    ----------
    mask, grey
        The slab, bool and any grey levels, (z, y, x).
    first
        Number of its first slice in the volume.
    shape
        Of the volume.
    before, after
        Mask of the slices next to the slab, (y, x), bool; None at the ends of the volume.
    """
    labels = label_instances(mask)
    sums = sum_objects(labels, with_margin(mask, before, after), grey, (first, 0, 0), shape)
    return SlabObjects(sums, Face.of(labels[0]), Face.of(labels[-1]))


def join_slabs(slabs: Sequence[SlabObjects], plane: tuple[int, int]) -> tuple[NDArray[np.int64], ObjectSums]:
    """Find which objects of neighbouring slabs are one: what touches by faces, edges or corners.

    Parameters
    ----------
    slabs
        All slabs of the volume in their order, at least one.
    plane
        (y, x) of its slices.

    Returns
    -------
    owner
        Number from 0 of the whole object that each object of each slab, one after the other, belongs to, int64.
    sums
        Of the whole objects.
    """
    offsets = np.cumsum([0, *(len(slab.sums) for slab in slabs)])
    pairs = [
        _touching(above.bottom, below.top, plane) + offsets[[number, number + 1]]
        for number, (above, below) in enumerate(pairwise(slabs))
    ]
    a, b = np.concatenate([np.empty((0, 2), np.int64), *pairs]).T
    n = int(offsets[-1])
    graph = sparse.coo_array((np.ones(len(a), bool), (a, b)), (n, n))
    n_objects, owner = sparse.csgraph.connected_components(graph, directed=False)
    sums = ObjectSums.concatenate([slab.sums for slab in slabs])
    return owner.astype(np.int64), sums.join(owner, int(n_objects))


def number_objects(sums: ObjectSums, smallest: float = 0) -> tuple[NDArray[np.uint32], ObjectSums]:
    """Number objects from 1 in the order of their first voxels, and leave out those with too few voxels.

    Parameters
    ----------
    sums
        Of all objects.
    smallest
        Voxels that an object must have.

    Returns
    -------
    numbers
        Of each object, uint32 (n,), 0 for those that are left out.
    sums
        Of those that are kept, in the order of their numbers.
    """
    order = np.argsort(sums.first, kind="stable")
    kept = order[sums.voxels[order] >= smallest]
    numbers = np.zeros(len(sums), np.uint32)
    numbers[kept] = np.arange(1, len(kept) + 1)
    return numbers, sums.take(kept)


def _touching(upper: Face, lower: Face, plane: tuple[int, int]) -> NDArray[np.int64]:
    """Pairs of numbers, each once, whose voxels in two neighbouring slices touch, (m, 2)."""
    height, width = plane
    other = np.full((height + 2, width + 2), -1, np.int64)
    other[1:-1, 1:-1].flat[lower.places] = lower.numbers
    y, x = np.divmod(upper.places, width)
    n_lower = int(other.max()) + 1
    keys = [np.empty(0, np.int64)]
    for dy, dx in product(range(3), repeat=2):
        found = other[y + dy, x + dx]
        keys.append(np.unique((upper.numbers * n_lower + found)[found >= 0]))
    return np.stack(np.divmod(np.unique(np.concatenate(keys)), max(1, n_lower)), axis=1)
