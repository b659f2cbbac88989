"""How a training is to be made."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mitoseg_lib.losses import DiceBCELoss

Loss = Callable[[Tensor, Tensor], Tensor]
SCHEDULES = ("one-cycle", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults suit a U-Net with BatchNorm.

    Attributes
    ----------
    epochs : int
        Passes over the patches of an epoch, each followed by a validation.
    batch_size : int
        Patches a step, over all processes together.
    learning_rate : float
        Of Adam: the peak of the one-cycle schedule, or the constant rate.
    schedule : {"one-cycle", "constant"}
        One-cycle rises from 1/25 of the rate to the rate in the first 30 % of the steps, and falls to nearly 0 in the
        rest (torch's ``OneCycleLR``; L. N. Smith, N. Topin: Super-Convergence, https://arxiv.org/abs/1708.07120).
    encoder_rate : float
        What the rate is multiplied with for the parameters of ``model.encoder``, between 0 and 1 (0 excluded): a
        pretrained encoder needs smaller steps than a decoder that starts at random.
    averaging : float
        0, or a share below 1: keep a moving average of the weights (and of BatchNorm's statistics), of which each
        step leaves this share as it was. The average is validated, and is what the training returns. 0.99 looks back
        on some 100 steps (B. Polyak, A. Juditsky 1992; torch's ``AveragedModel``).
    loss : callable
        Takes logits and masks, float32 (n, 1, y, x), and returns a scalar.
    seed : int
        Of every random number that is drawn while training (dropout, say). The patches have a seed of their own, and
        the model's first weights were drawn before.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``auto`` is mixed precision on a GPU (bf16 where the hardware has it, else fp16), and fp32 on a CPU.
    checkpoint_every : int
        Steps between checkpoints within an epoch; there is always one at its end.
    workers : int, optional
        Processes that prepare patches; by default none on a CPU, and up to 8 for a GPU. Results don't depend on it.
    device : {"auto", "cpu", "cuda"}
        "auto" takes a GPU if there is one, and "cpu" leaves it alone. All trainings of one process need the same.
    """

    epochs: int
    batch_size: int = 6
    learning_rate: float = 2e-3
    schedule: str = "one-cycle"
    encoder_rate: float = 1.0
    averaging: float = 0.0
    loss: Loss = field(default_factory=DiceBCELoss)
    seed: int = 0
    precision: str = "auto"
    checkpoint_every: int = 500
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be {lowest} or more; correct it.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}, but it must be 0 or more; correct it.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate is {self.learning_rate}, but it must be above 0; use for example 0.002.")
        if not 0 < self.encoder_rate <= 1:
            raise ValueError(f"encoder_rate is {self.encoder_rate}, but it must lie in (0, 1]; use for example 0.1.")
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging is {self.averaging}, but it must lie in [0, 1); use 0, or for example 0.99.")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it must be one of {', '.join(choices)}; choose one."
                )

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for a training to go on from a checkpoint as the same one."""
        names = ["batch_size", "learning_rate", "schedule", "encoder_rate", "averaging", "seed", "precision"]
        if self.schedule == "one-cycle":  # a constant rate can go on for longer, a cycle can't
            names.append("epochs")
        is_module = isinstance(self.loss, nn.Module)
        loss = repr(self.loss) if is_module else getattr(self.loss, "__qualname__", type(self.loss).__name__)
        return {name: getattr(self, name) for name in names} | {"loss": " ".join(loss.split())}
