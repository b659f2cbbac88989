"""Losses for the segmentation of rare foreground, from logits.

A model's last layer gives logits: any real number, of which the sigmoid is the foreground probability. Both
losses here take logits, because the cross-entropy of a probability that was rounded to 0 or 1 is infinite.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DiceLoss(nn.Module):
    """One minus the Dice coefficient of probabilities p and truth t.

    The plain form is ``1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)``. The squared form, of V-Net (see
    References), has ``sum(p^2) + sum(t^2)`` in the denominator. For binary p and t both are equal, since 0 and 1 are
    their own squares; for probabilities in between they differ, in value and in gradient.

    `smooth` stands in the numerator **and** in the denominator, so that an empty prediction of an empty truth
    has loss 0. (In the denominator alone it would make that perfect answer score as badly as can be.)

    The sums run over the whole batch unless `per_sample` is set. A sample without foreground has a Dice of
    nearly 0 for any prediction that isn't quite empty, so its mean over samples is noisy where some patches
    are empty.

    Parameters
    ----------
    squared : bool
        Use V-Net's form.
    smooth : float
        Added to numerator and denominator, in voxels; 0 or more. With 0, empty against empty is undefined
        (NaN).
    per_sample : bool
        Compute one loss for each sample (first axis) and return their mean, instead of one for the batch.

    Raises
    ------
    ValueError
        When `smooth` is negative.

    References
    ----------
    F. Milletari, N. Navab, S.-A. Ahmadi: V-Net: Fully Convolutional Neural Networks for Volumetric
       Medical Image Segmentation, 3DV 2016 (section "Dice loss layer"). https://arxiv.org/abs/1606.04797
    """

    def __init__(self, *, squared: bool = False, smooth: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        if not smooth >= 0:
            raise ValueError(f"smooth is {smooth}, but it must be 0 or more; use for example 1.0.")
        self.squared = squared
        self.smooth = smooth
        self.per_sample = per_sample

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss.

        Parameters
        ----------
        logits : Tensor
            Any floating dtype, any shape, for example (n, 1, y, x) or (n, 1, z, y, x). Half precision is
            computed in float32, also under autocast.
        targets : Tensor
            Same shape; bool, or numbers in [0, 1].

        Returns
        -------
        Tensor
            A scalar in [0, 1], float32 (float64 for float64 logits).

        Raises
        ------
        ValueError
            When the shapes differ, there is nothing in them, or a target is outside [0, 1].
        """
        logits, targets = _checked(logits, targets)
        return self._loss(logits, targets)

    def extra_repr(self) -> str:
        """Return the settings that ``print(loss)`` shows."""
        return f"squared={self.squared}, smooth={self.smooth}, per_sample={self.per_sample}"

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of arguments that `_checked` has seen."""
        n_groups = len(logits) if self.per_sample and logits.ndim > 0 else 1
        probabilities = torch.sigmoid(logits).reshape(n_groups, -1)
        targets = targets.reshape(n_groups, -1)
        overlap = (probabilities * targets).sum(dim=1)
        if self.squared:
            total = (probabilities**2 + targets**2).sum(dim=1)
        else:
            total = (probabilities + targets).sum(dim=1)
        dice = (2 * overlap + self.smooth) / (total + self.smooth)
        return (1 - dice).mean()


class DiceBCELoss(nn.Module):
    """The sum of `DiceLoss` and the binary cross-entropy with logits, each with weight 1.

    Cross-entropy (the mean over all voxels) gives every voxel a gradient, however wrong; Dice keeps the rare
    foreground from drowning in the background.

    Parameters
    ----------
    squared, smooth, per_sample
        As in `DiceLoss`.

    Raises
    ------
    ValueError
        When `smooth` is negative.
    """

    def __init__(self, *, squared: bool = False, smooth: float = 1.0, per_sample: bool = False) -> None:
        super().__init__()
        self.dice = DiceLoss(squared=squared, smooth=smooth, per_sample=per_sample)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss: a scalar of 0 or more; arguments and errors as in `DiceLoss.forward`."""
        logits, targets = _checked(logits, targets)
        return self.dice._loss(logits, targets) + F.binary_cross_entropy_with_logits(logits, targets)


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one floating dtype of at least float32, or raise a ValueError."""
    if logits.shape != targets.shape:
        raise ValueError(
            f"The logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}, but they "
            "must be equal; add or remove the channel axis, for example with targets[:, None]."
        )
    if logits.numel() == 0:
        raise ValueError(f"The logits have shape {tuple(logits.shape)}, so there is no voxel; pass one sample or more.")
    if not logits.is_floating_point():
        raise ValueError(f"The logits are {logits.dtype}, but they must be floating; pass the model's raw output.")
    # Sums over a batch overflow float16 (65504) and lose digits in bfloat16, so never compute in those.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if targets.dtype != torch.bool:
        low, high = (value.item() for value in targets.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"The targets run from {low} to {high}, but they must lie in [0, 1]; a mask of 0 and 255 "
                "becomes one with targets > 0."
            )
    return logits.to(dtype), targets.to(dtype)
