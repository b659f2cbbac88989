"""What takes a step: Adam, the schedule of its rate, and the average of weights."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mitoseg_lib.training.settings import TrainingSettings


def adam(model: nn.Module, settings: TrainingSettings) -> torch.optim.Adam:
    """Return Adam over what can be trained, or raise a ValueError if that is nothing.

    The encoder's parameters are a group of their own where their rate differs.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad, but some must be trained; thaw a part of it."
        )
    rate, encoder = settings.learning_rate, getattr(model, "encoder", None)
    if encoder is None or settings.encoder_rate == 1:
        return torch.optim.Adam(trainable, lr=rate)
    of_encoder = {id(parameter) for parameter in encoder.parameters()}
    groups = [
        {"params": [p for p in trainable if id(p) in of_encoder], "lr": rate * settings.encoder_rate},
        {"params": [p for p in trainable if id(p) not in of_encoder], "lr": rate},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])


def averaged(model: nn.Module, share: float) -> AveragedModel | None:
    """Return what keeps the moving average of a model, or None for a share of 0."""
    if not share:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(share), use_buffers=True)


def like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay out what an optimizer remembers as its parameters are, since a file doesn't keep the order of memory.

    Adam takes twice as long a step with another order, and nothing promises that it rounds the same.
    """
    for parameter, memory in optimizer.state.items():
        for name, values in memory.items():
            if isinstance(values, Tensor) and values.shape == parameter.shape:
                memory[name] = torch.empty_like(parameter).copy_(values)


def learning_rate_schedule(optimizer: torch.optim.Optimizer, settings: TrainingSettings, n_steps: int) -> LRScheduler:
    """Return the schedule that the settings name, over so many steps."""
    if settings.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=n_steps)
