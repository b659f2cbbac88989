"""Masks to objects, and which objects of a prediction are those of the truth.

Objects are numbered as the field's label images are: an array of whole numbers (z, y, x), 0 for background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LARGEST_NUMBER = 2**32 - 1


@dataclass(frozen=True, eq=False)
class Matches:
    """Which predicted objects are true ones.

    Attributes
    ----------
    pairs
        Numbers of each predicted object and the true one that it matches, int64 (pair, 2).
    ious
        Intersection over union of each pair, float64, all above 0.5.
    n_predicted, n_true
        How many objects there are.
    """

    pairs: NDArray[np.int64]
    ious: NDArray[np.float64]
    n_predicted: int
    n_true: int

    @property
    def precision(self) -> float:
        """Share of the predicted objects that match a true one; 1 where none is predicted."""
        return len(self.pairs) / self.n_predicted if self.n_predicted else 1.0

    @property
    def recall(self) -> float:
        """Share of the true objects that are matched; 1 where there is none."""
        return len(self.pairs) / self.n_true if self.n_true else 1.0


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How many voxels each pair of a predicted and a true number shares; pairs that share none aren't listed.

    Attributes
    ----------
    predicted, true
        Numbers of the pair, int64 (pair,); 0 is background, and no pair is background twice.
    voxels
        How many voxels have both numbers, int64 (pair,), all above 0.
    """

    predicted: NDArray[np.int64]
    true: NDArray[np.int64]
    voxels: NDArray[np.int64]


def label_instances(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the objects of a mask: what is connected by faces, edges or corners is one.

    Parameters
    ----------
    mask
        bool (z, y, x).

    Returns
    -------
    numpy.ndarray
        int32 (z, y, x): 0 for background, and 1, 2, ... for the objects.

    Raises
    ------
    ValueError
        If it is no such mask.
    """
    if mask.dtype != np.bool_ or mask.ndim != 3:
        raise ValueError(
            f"The mask is {mask.dtype} with {mask.ndim} axes, but bool (z, y, x) was expected; threshold it first."
        )
    return ndimage.label(mask, np.ones((3, 3, 3)))[0]


def match_objects(prediction: NDArray[np.integer], truth: NDArray[np.integer]) -> Matches:
    """Match predicted objects with true ones: a pair matches if its IoU is above 0.5.

    Above, and not at, because then the match is unique without a choice: two objects can't both share more than
    half of their union with a third (Kirillov et al., Panoptic segmentation, CVPR 2019, section 4.1). At exactly
    0.5 two could, each being half of it.

    Parameters
    ----------
    prediction, truth
        Numbers of objects, whole numbers from 0 (background) to 2^32 - 1, of the same shape. What has one number
        is one object, connected or not; `label_instances` numbers the objects of a mask.

    Raises
    ------
    ValueError
        If the shapes differ or the numbers aren't of this kind.
    """
    found = overlaps(prediction, truth)
    predicted, true, overlap = found.predicted, found.true, found.voxels
    sizes = [_sums(numbers, overlap) for numbers in (predicted, true)]
    both = (predicted > 0) & (true > 0)
    predicted, true, overlap = predicted[both], true[both], overlap[both]
    union = sum(_look_up(*size, of) for size, of in zip(sizes, (predicted, true), strict=True)) - overlap
    matched = 2 * overlap > union
    pairs = np.stack([predicted, true], axis=1)[matched]
    n_predicted, n_true = (int(np.count_nonzero(numbers)) for numbers, _ in sizes)
    return Matches(pairs, overlap[matched] / union[matched], n_predicted, n_true)


def overlaps(prediction: NDArray[np.integer], truth: NDArray[np.integer]) -> Overlaps:
    """Count the voxels that each pair of numbers shares, where at least one of them isn't background.

    Slice by slice, so that no array is as large as the volumes.

    Parameters
    ----------
    prediction, truth
        Numbers of objects as for `match_objects`.

    Returns
    -------
    Overlaps
        Sorted by the predicted number, then by the true one. What an object shares with background is listed too,
        so that the size of an object is the sum over its pairs.

    Raises
    ------
    ValueError
        If the shapes differ or the numbers aren't of this kind.
    """
    for labels, name in ((prediction, "prediction"), (truth, "truth")):
        _require_numbers(labels, name)
    if prediction.shape != truth.shape:
        raise ValueError(
            f"The prediction has shape {prediction.shape} and the truth {truth.shape}, but they must be equal; compare"
            " the same slices."
        )
    keys, counts = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for predicted, true in zip(prediction, truth, strict=True):
        some = (predicted != 0) | (true != 0)
        key = (predicted[some].astype(np.uint64) << np.uint64(32)) | true[some].astype(np.uint64)
        starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]][: len(key)])  # runs: less to sort than voxels
        found, number = _sums(key[starts], np.diff(np.r_[starts, len(key)]))
        keys.append(found)
        counts.append(number)
    key, number = _sums(np.concatenate(keys), np.concatenate(counts))
    halves = key >> np.uint64(32), key & np.uint64(LARGEST_NUMBER)
    return Overlaps(*(half.astype(np.int64) for half in halves), number)


def _require_numbers(labels: NDArray, name: str) -> None:
    """Raise ValueError unless an array numbers objects."""
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"The {name} is {labels.dtype}, but whole numbers of objects were expected; number a mask's objects with"
            " label_instances."
        )
    if labels.size and (labels.min() < 0 or labels.max() > LARGEST_NUMBER):
        raise ValueError(
            f"The {name} has numbers from {labels.min()} to {labels.max()}, but numbers of objects are from 0 to"
            f" {LARGEST_NUMBER}; number them anew."
        )


def _sums(keys: NDArray[np.integer], counts: NDArray[np.int64]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Every key once, in order, with the sum of its counts."""
    found, where = np.unique(keys, return_inverse=True)
    total = np.zeros(len(found), np.int64)
    np.add.at(total, where, counts)
    return found, total


def _look_up(keys: NDArray[np.int64], totals: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Totals of some of the keys."""
    return totals[np.searchsorted(keys, wanted)]
