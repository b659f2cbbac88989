"""Checkers of chapter 3, metrics and losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import nn

from mitoseg_lib.exercises.feedback import NotYet, as_mapping, as_number, as_numbers, checker, hint, is_close
from mitoseg_lib.losses import DiceBCELoss, DiceLoss
from mitoseg_lib.metrics import Scores, scores

__all__ = ["check_border", "check_pooling", "check_ten_numbers"]

LOSSES = (nn.BCEWithLogitsLoss, DiceLoss, DiceBCELoss)
STEPS = (200, 1000)


@checker
def check_border(ious: Any, truth: NDArray[np.bool_]) -> str:
    """Exercise 1: the IoU of the true masks, (z, y, x), widened by 1, 2 and 3 pixels in each slice."""
    found = as_numbers(ious, "the IoU for 1, 2 and 3 pixels", 3)
    in_slice = ndimage.generate_binary_structure(2, 1)[np.newaxis]
    judged = [_scores_of_wider(truth, in_slice, pixels) for pixels in (1, 2, 3)]
    if is_close(found, [one.iou for one in judged]):
        return "the border of the very truth, moved by one pixel, costs more than most improvements of a network gain."
    hint(is_close(found, [one.dice for one in judged]), "These are Dice coefficients; the question is about the IoU.")
    hint(
        is_close(found, [_mean_over_slices(truth, in_slice, n) for n in (1, 2, 3)]),
        "These look like means over slices. Score all at once.",
    )
    hint(is_close([1 - one for one in found], [one.iou for one in judged]), "These are costs; hand in the IoUs.")
    in_volume = ndimage.generate_binary_structure(3, 1)
    hint(
        is_close(found, [_scores_of_wider(truth, in_volume, pixels).iou for pixels in (1, 2, 3)]),
        "These masks have grown along z, too: given a stack, `binary_dilation` widens it in all three directions. Give"
        " it one slice at a time.",
    )
    hint(found != sorted(found, reverse=True), "A wider border can only cost more; are they in the order 1, 2, 3?")
    hint(is_close(found[0], judged[0].iou), "The first one is right. Does `iterations` change from one to the next?")
    raise NotYet("Score the widened masks of all slices at once against the true ones.")


@checker
def check_pooling(total: Any, prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> str:
    """Exercise 2: the scores of all slices, added up."""
    expected = scores(prediction, truth)
    if total == expected:
        return "counts of voxels can be added, ratios can't."
    is_number = isinstance(total, float | np.floating)
    mean = np.mean([scores(p, t).iou for p, t in zip(prediction, truth, strict=True)])
    hint(
        is_number and abs(total - expected.iou) < 5e-5, "That is the sum's IoU. Hand in the sum itself, not one number."
    )
    hint(is_number and is_close(total, mean), "That is the mean over slices: each slice weighs the same in it.")
    hint(not isinstance(total, Scores), "Hand in the sum itself, which is what `scores` returns, not one number of it.")
    voxels = [sum(vars(one).values()) for one in (total, expected)]
    hint(voxels[0] > voxels[1], "Some voxels are counted twice. Is a slice in the sum already when the loop begins?")
    hint(voxels[0] < voxels[1], "Some voxels are missing. Does the loop go over all slices, and add to the sum?")
    raise NotYet("The number of voxels is right, but not what they are. Is the prediction the first argument?")


@checker
def check_ten_numbers(found: Any) -> str:
    """Exercise 3: the probability of the first foreground voxel, for each pair of the name of a loss and the steps."""
    keys = [(loss.__name__, steps) for loss in LOSSES for steps in STEPS]
    given = as_mapping(found, "a probability for each pair (name of the loss, steps)", keys)
    values = [as_number(given[key], f"the probability for {key}") for key in keys]
    expected = [_train(loss(), steps) for loss in LOSSES for steps in STEPS]
    if _are_near(values, expected):
        return "a pull that has faded away isn't gone, but it takes five times as many steps."
    hint(any(not 0 <= value <= 1 for value in values), "These aren't probabilities; take the sigmoid of the logits.")
    start = 1 / (1 + np.exp(6))
    words = "Some logits haven't moved at all. Is the loss computed, and `backward()` called, in each step?"
    hint(any(is_close(value, start) for value in values), words)
    piled = [_train(loss(), steps, forget=False) for loss in LOSSES for steps in STEPS]
    words = "The slopes of all steps add up here; `zero_grad()` belongs into each step."
    hint(_are_near(values, piled), words)
    wrong = [key for key, *pair in zip(keys, values, expected, strict=True) if not _are_near(*pair)]
    raise NotYet(f"Look at {wrong[0]}. Does each start at logits of -6, with a new optimizer and no sigmoid?")


def _wider(truth: NDArray[np.bool_], structure: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    return ndimage.binary_dilation(truth, structure, iterations=pixels)


def _scores_of_wider(truth: NDArray[np.bool_], structure: NDArray[np.bool_], pixels: int) -> Scores:
    return scores(_wider(truth, structure, pixels), truth)


def _mean_over_slices(truth: NDArray[np.bool_], structure: NDArray[np.bool_], pixels: int) -> float:
    wider = _wider(truth, structure, pixels)
    return float(np.mean([scores(w, t).iou for w, t in zip(wider, truth, strict=True)]))


def _train(loss: nn.Module, steps: int, *, forget: bool = True) -> float:
    """Train ten logits, and return the probability of the first."""
    target = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    logits = torch.full((10,), -6.0, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(steps):
        if forget:
            optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    return float(torch.sigmoid(logits.detach())[0])


def _are_near(found: ArrayLike, expected: ArrayLike) -> bool:
    """Tell whether probabilities agree, also those that were rounded to two digits."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.01)
