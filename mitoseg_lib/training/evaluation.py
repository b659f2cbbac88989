"""Loss and scores of a model on whole slices."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.stacks import Stack
from mitoseg_lib.training.settings import Loss

THRESHOLD = 0.5
SMALLEST_PROBABILITY = 2.0**-23  # the spacing of float32 below 1


def evaluate(model: nn.Module, stack: Stack, *, loss: Loss, precision: str = "fp32") -> tuple[float, Scores]:
    """Measure a model on the whole slices of a labelled stack, as `fit` does after each epoch.

    Parameters
    ----------
    model : nn.Module
        As for `fit`; left as it was found.
    stack : Stack
        With labels.
    loss : callable
        Takes logits and masks, as in `TrainingSettings`.
    precision : {"auto", "fp32", "bf16"}
        As in `predict_stack`.

    Returns
    -------
    loss : float
        As `mean_slice_loss` gives it.
    scores : Scores
        Of the mask at threshold 0.5, counts pooled over all slices.

    Raises
    ------
    StackError
        If the stack has no labels, or labels of one class only.
    """
    labels = stack.require_labels()
    probabilities = predict_stack(model, stack.image, precision=precision)
    return mean_slice_loss(probabilities, labels, loss=loss), scores(probabilities >= THRESHOLD, labels)


def mean_slice_loss(probabilities: NDArray[np.float32], labels: NDArray[np.bool_], *, loss: Loss) -> float:
    """Return the mean over the slices of the loss of each slice.

    The loss is that of logits found from the probabilities. These are rounded near 1, so logits count as at most 15.9
    either way: a voxel that is utterly wrong costs a cross-entropy of 15.9 and not more.

    Parameters
    ----------
    probabilities : ndarray
        float32 in [0, 1], (z, y, x).
    labels : ndarray
        bool, same shape.
    loss : callable
        Takes logits and masks, as in `TrainingSettings`.
    """
    losses = []
    for slice_probabilities, mask in zip(probabilities, labels, strict=True):
        logits = torch.logit(torch.from_numpy(slice_probabilities)[None, None], eps=SMALLEST_PROBABILITY)
        losses.append(float(loss(logits, torch.from_numpy(mask)[None, None].float())))
    return float(np.mean(losses))
