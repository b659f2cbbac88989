"""A coarser version of a volume: blocks of voxels become one."""

from __future__ import annotations

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
    blocks = _blocks(mask, steps)
    return (2 * blocks.sum(axis=0, dtype=np.uint8) >= len(blocks)).astype(np.uint8)


def coarsen_labels(labels: NDArray[np.uint32], mask: NDArray[np.uint8], steps: tuple[int, ...]) -> NDArray[np.uint32]:
    """Return the number that a block of numbers becomes: the largest in it, or 0 where the coarse mask is 0.

    Only where two objects nearly touch has a block more than one number.
    """
    return _blocks(labels, steps).max(axis=0) * mask


def coarsen_probabilities(values: NDArray[np.uint8], steps: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the mean of each block, rounded half to even."""
    return np.rint(_blocks(values, steps).mean(axis=0, dtype=np.float32)).astype(np.uint8)


def _blocks(values: NDArray, steps: tuple[int, ...]) -> NDArray:
    """Voxels of each block, (voxels of a block, z, y, x); what is missing at the end repeats what is there."""
    padded = np.pad(values, [(0, -n % step) for n, step in zip(values.shape, steps, strict=True)], mode="edge")
    z, y, x = steps
    return np.stack([padded[i::z, j::y, k::x] for i in range(z) for j in range(y) for k in range(x)])
