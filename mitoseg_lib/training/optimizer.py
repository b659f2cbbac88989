"""What takes a step: Adam, the schedule of its rate, and the precision of its gradients."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from mitoseg_lib.inference import is_bf16_native
from mitoseg_lib.training.settings import TrainingSettings


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Return Adam over what can be trained, or raise a ValueError if that is nothing."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad, but some must be trained; thaw a part of it."
        )
    return torch.optim.Adam(trainable, lr=learning_rate)


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
    return OneCycleLR(optimizer, settings.learning_rate, total_steps=n_steps)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions; float32 means no mixed precision."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if is_bf16_native(device) else "fp16"  # a T4 has fp16 only
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
