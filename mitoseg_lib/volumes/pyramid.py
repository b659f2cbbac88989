"""A coarser version of a volume: blocks of voxels become one."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

__all__ = ["coarsen_labels", "coarsen_mask", "coarsen_probabilities"]


def coarsen_mask(mask: NDArray[np.uint8], steps: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return 1 where at least half of a block of 0 and 1 is 1.

    Parameters
    ----------
    mask
        uint8 (z, y, x). Blocks that its end cuts off are counted with what is there of them.
    steps
        Voxels of a block along each axis, 1 or 2.
    """
    parts = _parts(mask, steps)
    return (2 * reduce(np.add, parts) >= len(parts)).astype(np.uint8)


def coarsen_labels(labels: NDArray[np.uint32], mask: NDArray[np.uint8], steps: tuple[int, ...]) -> NDArray[np.uint32]:
    """Return the number that a block of numbers becomes: the largest in it, or 0 where the coarse mask is 0.

    Only where two objects nearly touch has a block more than one number.
    """
    return reduce(np.maximum, _parts(labels, steps)) * mask


def coarsen_probabilities(values: NDArray[np.uint8], steps: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the mean of each block, rounded half to even."""
    parts = _parts(values, steps)
    total = reduce(lambda so_far, part: so_far + part, parts, np.uint16(0))
    return np.rint(total / np.float32(len(parts))).astype(np.uint8)


def _parts(values: NDArray, steps: tuple[int, ...]) -> list[NDArray]:
    """First voxels of all blocks, second ones, and so on; what is missing at the end repeats what is there."""
    missing = [(0, -n % step) for n, step in zip(values.shape, steps, strict=True)]
    padded = np.pad(values, missing, mode="edge") if np.any(missing) else values
    z, y, x = steps
    return [padded[i::z, j::y, k::x] for i in range(z) for j in range(y) for k in range(x)]
