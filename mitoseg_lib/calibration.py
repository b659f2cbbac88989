"""Whether probabilities mean what they say, where a model doubts, and whether its doubt is where its errors are."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr  # -p ln(p), and 0 for p = 0

from mitoseg_lib.inference import check_probabilities

__all__ = ["Disagreement", "Reliability", "disagreement", "errors_among_most_uncertain", "reliability"]

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


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


@dataclass(frozen=True, eq=False)
class Disagreement:
    """What several predictions of one stack say together, voxel by voxel.

    Attributes
    ----------
    mean, sd : ndarray
        float32, (z, y, x): mean probability, and the standard deviation of these predictions about it (divided by their
        number, and not by one less: it describes them, and estimates no others). sd is between 0 and 0.5.
    entropy : ndarray
        float32, (z, y, x): of the mean p, in bits: -p log2(p) - (1 - p) log2(1 - p). 1 where p is 0.5, and 0 where it
        is 0 or 1. It is large where each prediction doubts, and also where they contradict each other; sd is large in
        the second case only.
    number : int
        Of predictions.
    """

    mean: NDArray[np.float32]
    sd: NDArray[np.float32]
    entropy: NDArray[np.float32]
    number: int


def disagreement(predictions: Iterable[NDArray[np.floating]]) -> Disagreement:
    """Return mean, spread and entropy of several predictions, such as those of seeds, turns or folds.

    They are taken one after the other and needn't be in memory together: besides the one at hand there are two
    volumes, and three at the end (B. P. Welford 1962, Technometrics 4:419).

    Parameters
    ----------
    predictions : iterable of ndarray
        Two or more volumes of probabilities of one shape, float (z, y, x), in [0, 1]. A generator that predicts
        them is welcome. They aren't changed.

    Raises
    ------
    ValueError
        When there are fewer than two, shapes or dtypes are others, or a number lies outside [0, 1] (or is NaN).
    """
    number, mean, squares = 0, np.empty(0, np.float32), np.empty(0, np.float32)
    for prediction in predictions:
        number += 1
        _check_prediction(prediction, number, mean)
        if number == 1:
            mean, squares = prediction.astype(np.float32), np.zeros(prediction.shape, np.float32)
            continue
        for centre, total, part in zip(mean, squares, prediction, strict=True):
            before = part - centre
            centre += before / number
            total += before * (part - centre)
    if number < 2:
        raise ValueError(
            f"There are {number} predictions, but two or more were expected, which can disagree; add one of another "
            "seed or turn."
        )
    del prediction  # it may be the last name that holds its memory
    entropy = np.empty_like(mean)
    for total, target, centre in zip(squares, entropy, mean, strict=True):
        np.sqrt(total / number, out=total)
        target[...] = _entropy_bits(centre)
    return Disagreement(mean, squares, entropy, number)


def errors_among_most_uncertain(
    uncertainty: NDArray[np.floating],
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    *,
    shares: Sequence[float] = SHARES,
) -> NDArray[np.float64]:
    """Return which share of the wrong voxels lies among the voxels that the model is least sure of.

    If doubt had nothing to do with errors, the 5 % least sure voxels would hold 5 % of the errors. Where voxels of
    equal uncertainty lie on the border of a share, the part of them that it takes holds the same part of their errors,
    as it would on average if they were drawn by lot.

    Parameters
    ----------
    uncertainty : ndarray
        Floats, larger where the model is less sure, such as ``Disagreement.entropy``; any number of axes.
    prediction, truth : ndarray
        Masks, bool, of the same shape.
    shares : sequence of float
        Of all voxels, in [0, 1], in any order.

    Returns
    -------
    ndarray
        float64, one for each share, in [0, 1]; 1 where no voxel is wrong, as for all ratios of nothing to nothing.

    Raises
    ------
    ValueError
        When shapes or dtypes are others, an uncertainty is NaN, or a share lies outside [0, 1].
    """
    _check_uncertainty(uncertainty, prediction, truth, shares)
    wrong = np.sort(uncertainty[prediction != truth])
    if not len(wrong):
        return np.ones(len(shares))
    # One copy of the volume, put in order only at the places where a share ends.
    taken = [share * uncertainty.size for share in shares]
    ends = [max(0, uncertainty.size - max(1, math.ceil(number))) for number in taken]
    ordered = np.partition(uncertainty, sorted(set(ends)), axis=None) if ends else uncertainty
    return np.array([_errors_above(ordered, wrong, *pair) for pair in zip(ends, taken, strict=True)], np.float64)


def _errors_above(ordered: NDArray, wrong: NDArray, end: int, taken: float) -> float:
    """Share of the wrong voxels among the `taken` least sure, which end at a place of the partly ordered volume."""
    limit = ordered[end]
    above = np.count_nonzero(ordered[end:] > limit)
    equal = np.count_nonzero(ordered == limit)
    first, last = np.searchsorted(wrong, limit, "left"), np.searchsorted(wrong, limit, "right")
    return float((len(wrong) - last + (last - first) * (taken - above) / equal) / len(wrong))


def _check_prediction(prediction: NDArray, number: int, mean: NDArray) -> None:
    """Raise a ValueError unless this is a volume of probabilities, of the shape of those before it."""
    if not isinstance(prediction, np.ndarray) or prediction.dtype.kind != "f" or prediction.ndim != 3:
        what = (
            f"{prediction.dtype} {prediction.shape}"
            if isinstance(prediction, np.ndarray)
            else type(prediction).__name__
        )
        raise ValueError(
            f"Prediction {number} is {what}, but floats (z, y, x) were expected; pass what predict_stack returns, one "
            "volume after the other."
        )
    if number > 1 and prediction.shape != mean.shape:
        raise ValueError(
            f"Prediction {number} has shape {prediction.shape} and those before it {mean.shape}, but they must be "
            "equal; predict the same slices."
        )
    if prediction.size and not (prediction.min() >= 0 and prediction.max() <= 1):
        raise ValueError(
            f"Prediction {number} lies between {prediction.min()} and {prediction.max()}, but [0, 1] was expected; "
            "pass logits through a sigmoid first."
        )


def _check_uncertainty(uncertainty: NDArray, prediction: NDArray, truth: NDArray, shares: Sequence[float]) -> None:
    """Raise a ValueError unless these belong together."""
    if uncertainty.dtype.kind != "f" or {prediction.dtype, truth.dtype} != {np.dtype(np.bool_)}:
        raise ValueError(
            f"The uncertainty is {uncertainty.dtype}, the prediction {prediction.dtype} and the truth {truth.dtype}, "
            "but floats and two masks of bool were expected; compare probabilities with a threshold first."
        )
    if not uncertainty.shape == prediction.shape == truth.shape:
        raise ValueError(
            f"The uncertainty has shape {uncertainty.shape}, the prediction {prediction.shape} and the truth "
            f"{truth.shape}, but they must be equal; compare the same slices."
        )
    if uncertainty.size and np.isnan(uncertainty.min()):
        raise ValueError("The uncertainty holds NaN, but numbers were expected; replace them.")
    outside = [share for share in shares if not 0 <= share <= 1]
    if outside:
        raise ValueError(f"A share is {outside[0]}, but numbers from 0 to 1 were expected; 5 % are 0.05.")


def _entropy_bits(p: NDArray[np.float32]) -> NDArray[np.float64]:
    """Entropy of a yes or no that is yes with probability p."""
    return (entr(p.astype(np.float64)) + entr(1 - p.astype(np.float64))) / math.log(2)


def _divided(numbers: NDArray, by: NDArray) -> NDArray[np.float64]:
    return np.divide(numbers, by, out=np.full(len(by), np.nan), where=by > 0)
