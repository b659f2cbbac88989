"""Beginners' mistakes, made on purpose: chapter 4 trains with each of them and looks at what happens.

Each wraps a model or a loss that is right, so that a run with a mistake differs from one without it in nothing else.
"""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AlwaysTraining", "Masks255", "ScaledInput", "SigmoidTwice", "slow_statistics"]


class _Wrapped(nn.Module):
    """A model that passes for the one inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ndim, self.size_multiple = model.ndim, model.size_multiple

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of grey levels, as the model inside does."""
        return self.model(image)


class ScaledInput(_Wrapped):
    """Hand grey levels on in another scale than 0 to 1.

    Parameters
    ----------
    model : Module
        A network of `mitoseg_lib.models`.
    training, evaluation : float
        Factors while training and in ``eval()``: 255 for both is an image that nobody scaled, (1, 255) one that was
        scaled for the training only.
    """

    def __init__(self, model: nn.Module, *, training: float, evaluation: float) -> None:
        super().__init__(model)
        self.factors = {True: training, False: evaluation}

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of scaled grey levels."""
        return self.model(image * self.factors[self.training])


class SigmoidTwice(_Wrapped):
    """End a network with a sigmoid, although loss and prediction apply one themselves."""

    def forward(self, image: Tensor) -> Tensor:
        """Return probabilities, where logits are expected."""
        return self.model(image).sigmoid()


class AlwaysTraining(_Wrapped):
    """Forget ``model.eval()``: normalise by the statistics of the batch at hand, also while predicting."""

    def train(self, mode: bool = True) -> "AlwaysTraining":
        """Stay in training, whatever is asked for."""
        return super().train(True)


class Masks255(nn.Module):
    """Dice and cross-entropy of masks as they are in the file, 0 and 255.

    By formula, since the library's losses refuse such masks.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss against masks (0 or 1) times 255."""
        logits, targets = logits.float(), targets * 255
        overlap = (logits.sigmoid() * targets).sum()
        dice = (2 * overlap + 1) / (logits.sigmoid().sum() + targets.sum() + 1)
        return 1 - dice + F.binary_cross_entropy_with_logits(logits, targets)


def slow_statistics(model: nn.Module, momentum: float = 0.001) -> nn.Module:
    """Let the running statistics of BatchNorm follow the batches slowly (torch's momentum is 0.1); return the model."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            layer.momentum = momentum
    return model
