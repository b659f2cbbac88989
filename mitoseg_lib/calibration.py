"""Whether probabilities mean what they say: of the voxels given 0.8, are 80 % mitochondrion?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.inference import check_probabilities

__all__ = ["Reliability", "reliability"]


@dataclass(frozen=True)
class Reliability:
    """Voxels sorted into bins by their probability; parts can be added.

    Attributes
    ----------
    edges : ndarray
        float64, (bins + 1,): the bins' limits, from 0 to 1. A voxel on a limit belongs to the bin above it; 1 belongs
        to the last.
    voxels, foreground : ndarray
        int64, (bins,): how many voxels a bin holds, and how many of them are foreground.
    probability_sum : ndarray
        float64, (bins,): of all probabilities in a bin.
    """

    edges: NDArray[np.float64]
    voxels: NDArray[np.int64]
    foreground: NDArray[np.int64]
    probability_sum: NDArray[np.float64]

    def __add__(self, other: "Reliability") -> "Reliability":
        """Return both parts pooled; ValueError where their bins differ."""
        if not np.array_equal(self.edges, other.edges):
            raise ValueError(
                f"One part has {len(self.voxels)} bins and the other {len(other.voxels)}, or they have other limits, "
                "but the same bins were expected; use the same `bins` for both."
            )
        return Reliability(
            self.edges,
            self.voxels + other.voxels,
            self.foreground + other.foreground,
            self.probability_sum + other.probability_sum,
        )

    @property
    def predicted(self) -> NDArray[np.float64]:
        """Mean probability of each bin, (bins,); NaN where it is empty."""
        return _divided(self.probability_sum, self.voxels)

    @property
    def observed(self) -> NDArray[np.float64]:
        """Share of foreground in each bin, (bins,); NaN where it is empty."""
        return _divided(self.foreground, self.voxels)

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between what was predicted and what was observed, over all voxels.

        The sum over bins of (voxels in it / all voxels) x abs(predicted - observed): M. P. Naeini et al. 2015, in the
        form for one class against the rest; see also C. Guo et al. 2017, https://arxiv.org/abs/1706.04599. 0 where
        there is no voxel. Since nearly all voxels are surely background, it is small for any network; the bins
        in the middle say more.
        """
        distance = np.abs(self.probability_sum - self.foreground).sum()
        return float(distance / max(1, self.voxels.sum()))


def reliability(probabilities: NDArray[np.floating], truth: NDArray[np.bool_], *, bins: int = 10) -> Reliability:
    """Sort voxels into bins of equal width by their probability.

    Parameters
    ----------
    probabilities : ndarray
        Floats in [0, 1], any number of axes.
    truth : ndarray
        bool, same shape.
    bins : int
        1 or more.

    Raises
    ------
    ValueError
        When shapes or dtypes are others, a number lies outside [0, 1] (or is NaN), or there is no bin.
    """
    check_probabilities(probabilities, truth)
    if bins < 1:
        raise ValueError(f"bins is {bins}, but 1 or more were expected; use for example 10.")
    edges = np.linspace(0, 1, bins + 1)
    counts, foreground, total = np.zeros((3, bins))
    # Slice by slice: the numbers of the bins take twice the memory of the probabilities.
    for part, is_foreground in zip(np.atleast_2d(probabilities), np.atleast_2d(truth), strict=True):
        number = np.searchsorted(edges[1:-1], part.ravel(), side="right")
        counts += np.bincount(number, minlength=bins)
        foreground += np.bincount(number, weights=is_foreground.ravel(), minlength=bins)
        total += np.bincount(number, weights=part.ravel(), minlength=bins)
    return Reliability(edges, counts.astype(np.int64), foreground.astype(np.int64), total)


def _divided(numbers: NDArray, by: NDArray) -> NDArray[np.float64]:
    return np.divide(numbers, by, out=np.full(len(by), np.nan), where=by > 0)
