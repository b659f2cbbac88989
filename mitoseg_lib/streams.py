"""Stacks that pass through slab by slab, where what becomes of a slice depends on the slices around it.

Nothing here holds more slices than one step needs, however many the stack has.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["median_of_blocks", "median_slices", "overlapping_blocks", "surroundings"]


def overlapping_blocks(
    slabs: Iterable[NDArray],
    depth: int,
    *,
    size: int,
    reach: int,
    mode: Literal["reflect", "symmetric"],
    part: range | None = None,
) -> Iterator[NDArray]:
    """Yield a stack in blocks of slices, each with some slices more of what is before and after it.

    Parameters
    ----------
    slabs : iterable of ndarray
        (n, y, x), of any depths, one after the other from the first slice of `surroundings`.
    depth : int
        Slices of the whole stack, 1 or more.
    size : int
        Slices of a block, 1 or more; the last one may have fewer.
    reach : int
        Slices more, on either side.
    mode : {"reflect", "symmetric"}
        How the stack goes on beyond its ends, as in `numpy.pad`: without repeating its last slice, or with.
    part : range, optional
        Slices that blocks are wanted of; all by default.

    Yields
    ------
    ndarray
        (size + 2 reach, y, x); new arrays.
    """
    sources = np.pad(np.arange(depth), reach, mode=mode)  # the slices of the stack, as it goes on beyond its ends
    part = range(depth) if part is None else part
    slices = (grey for slab in slabs for grey in slab)
    kept: list[NDArray] = []
    first = surroundings(part, reach, depth).start  # number of the first slice that is kept
    for start in range(part.start, part.stop, size):
        wanted = sources[start : min(start + size, part.stop) + 2 * reach]
        del kept[: wanted.min() - first]
        first = int(wanted.min())
        while first + len(kept) <= wanted.max():
            kept.append(next(slices))
        yield np.stack([kept[z - first] for z in wanted])


def surroundings(part: range, reach: int, depth: int) -> range:
    """Return the slices of a stack, `depth` slices deep, that a part and what reaches into it need."""
    return range(max(0, part.start - reach), min(depth, part.stop + reach))


def median_of_blocks(blocks: Iterable[NDArray], n_slices: int) -> Iterator[NDArray]:
    """Yield `mitoseg_lib.inference.median_filter_z` of a stack, block by block.

    Parameters
    ----------
    blocks : iterable of ndarray
        Floats, by `overlapping_blocks`, with a reach of half the slices and "symmetric".
    n_slices : int
        Of the median, odd.
    """
    for block in blocks:
        yield np.stack([_median(list(block[z : z + n_slices])) for z in range(len(block) - n_slices + 1)])


def median_slices(n_slices: int, made_for_nm: float, own_nm: float) -> int:
    """Return over how many slices of another thickness a median reaches about as far.

    The nearest odd number; of two as near the lower, and never more than it was chosen for: from slices as thick as
    the whole median on, and a little before, it is 1, which leaves the slices alone.

    Parameters
    ----------
    n_slices : int
        Odd, chosen for slices that are `made_for_nm` thick.
    made_for_nm, own_nm : float
        Edges of voxels along z, in nm.
    """
    wanted = n_slices * made_for_nm / own_nm
    return min(n_slices, 2 * max(0, math.ceil(wanted / 2 - 1)) + 1)


def _median(slices: list[NDArray]) -> NDArray:
    """Median of an odd number of arrays, element by element; the list is used up.

    The passes of a bubble sort until the middle is in its place: several times as fast as a sort of each voxel's few
    values, since each step compares two whole slices.
    """
    middle = len(slices) // 2
    for last in range(len(slices) - 1, middle - 1, -1):
        for i in range(last):
            lower, upper = slices[i], slices[i + 1]
            slices[i], slices[i + 1] = np.minimum(lower, upper), np.maximum(lower, upper)
    return slices[middle]
