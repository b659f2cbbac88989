"""Scores of a binary segmentation, from counts pooled over a whole volume.

Every score here is a ratio of counts of voxels. The counts are summed over the whole volume first and divided
once: the mean of the scores of slices or patches is another number, and the two must never be compared.

**Nothing divided by nothing is 1.** A ratio whose denominator is 0 asks for a share of nothing, and no
mistake was made in it. So an empty prediction of an empty truth has IoU, Dice, precision and recall of 1;
precision is 1 where nothing was predicted, and recall is 1 where there was nothing to find. Other libraries
return 0 or NaN here.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Counts of voxels, and the ratios that follow from them.

    Scores of parts can be added: ``scores(a, b) + scores(c, d)`` are the scores of both parts pooled.

    Attributes
    ----------
    true_positives, false_positives, false_negatives, true_negatives : int
        Numbers of voxels: foreground found, background called foreground, foreground missed, background left
        alone.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def iou(self) -> float:
        """Intersection over union of the foreground (Jaccard index): TP / (TP + FP + FN)."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def dice(self) -> float:
        """Dice coefficient (F1 score): 2 TP / (2 TP + FP + FN), which is 2 IoU / (1 + IoU)."""
        doubled = 2 * self.true_positives
        return _ratio(doubled, doubled + self.false_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        """Share of the predicted foreground that is right: TP / (TP + FP)."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of the true foreground that was found: TP / (TP + FN)."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def accuracy(self) -> float:
        """Share of all voxels that are right: (TP + TN) / all. Of little use where foreground is rare."""
        right = self.true_positives + self.true_negatives
        return _ratio(right, right + self.false_positives + self.false_negatives)

    def as_dict(self) -> dict[str, float]:
        """Return the five ratios by name, in the order iou, dice, precision, recall, accuracy."""
        names = ("iou", "dice", "precision", "recall", "accuracy")
        return {name: getattr(self, name) for name in names}

    def __add__(self, other: "Scores") -> "Scores":
        """Pool the counts of two parts."""
        if not isinstance(other, Scores):
            return NotImplemented
        return Scores(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def scores(prediction: NDArray | Tensor, truth: NDArray | Tensor) -> Scores:
    """Compare a predicted mask with the true one, voxel by voxel.

    Parameters
    ----------
    prediction, truth : array or Tensor
        Masks of the same shape, any number of axes: bool, or integers that are all 0 or 1.

    Returns
    -------
    Scores
        Counts pooled over all voxels.

    Raises
    ------
    ValueError
        When the shapes differ, or one of them isn't a mask (probabilities, or grey levels such as 255).

    Examples
    --------
    >>> result = scores(np.array([True, True, False]), np.array([True, False, False]))
    >>> result.iou, result.precision, result.recall
    (0.5, 0.5, 1.0)
    """
    return Scores(*(int(count) for count in count_voxels(prediction, truth)))


def iou(prediction: NDArray | Tensor, truth: NDArray | Tensor) -> float:
    """Return the intersection over union of the foreground, pooled over all voxels; see `scores`."""
    return scores(prediction, truth).iou


def _ratio(part: int, whole: int) -> float:
    """Return part / whole, and 1 where the whole is 0 (see the head of this module)."""
    return part / whole if whole else 1.0


def count_voxels(prediction: NDArray | Tensor, truth: NDArray | Tensor) -> tuple[int | Tensor, ...]:
    """Return the numbers of true positives, false positives, false negatives and true negatives; see `scores`."""
    if tuple(prediction.shape) != tuple(truth.shape):
        raise ValueError(
            f"The prediction has shape {tuple(prediction.shape)} and the truth {tuple(truth.shape)}, but "
            "they must be equal; compare the same slices."
        )
    masks = _as_mask(prediction, "prediction"), _as_mask(truth, "truth")
    # Two tensors on an accelerator are counted there, so that it needn't wait; NumPy is fastest on the CPU.
    count = torch.count_nonzero
    if not all(isinstance(mask, Tensor) for mask in masks):
        count, masks = np.count_nonzero, [_to_numpy(mask) for mask in masks]
    predicted, positive, both = count(masks[0]), count(masks[1]), count(masks[0] & masks[1])
    n_voxels = math.prod(prediction.shape)
    return both, predicted - both, positive - both, n_voxels - predicted - positive + both


def _as_mask(values: NDArray | Tensor, name: str) -> NDArray[np.bool_] | Tensor:
    """Return a bool array (a bool tensor if on an accelerator), or raise a ValueError."""
    if isinstance(values, Tensor) and values.device.type == "cpu":
        values = _to_numpy(values)
    dtype = str(values.dtype).removeprefix("torch.")
    if dtype == "bool":
        return values
    if not dtype.startswith(("int", "uint")):
        raise ValueError(
            f"The {name} is {dtype}, but a mask of bool was expected; threshold it first, for example with "
            f"{name} >= 0.5."
        )
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(
            f"The {name} has integers from {values.min()} to {values.max()}, but a mask of 0 and 1 was "
            f"expected; make it one first, for example with {name} > 0."
        )
    return values == 1


def _to_numpy(values: NDArray | Tensor) -> NDArray:
    """Return an array in the CPU's memory; no copy where it is there already."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values
