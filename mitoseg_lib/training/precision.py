"""Which numbers a step is computed with."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mitoseg_lib.inference import is_bf16_native


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions; float32 means no mixed precision."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if is_bf16_native(device) else "fp16"  # a T4 has fp16 only
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def mixed_precision(device: torch.device) -> str:
    """Return the setting with which a device trains fastest: bf16 where a CPU computes with it itself, else auto."""
    return "bf16" if device.type == "cpu" and is_bf16_native(device) else "auto"


def depthwise_convolutions(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for the forward pass, in which depthwise convolutions take the numbers that are fastest.

    On a CPU that is float32: their gradients take up to ten times as long in bfloat16 (torch 2.15, oneDNN), which made
    a step of EfficientNet-Lite0 half as long again. They are a small part of a network's arithmetic.
    """
    return DepthwiseInFloat32() if device.type == "cpu" and dtype == torch.bfloat16 else nullcontext()


class DepthwiseInFloat32(TorchFunctionMode):
    """Within it, 2D convolutions with a group for each channel are computed in float32, whatever autocast says."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute `func`, or its float32 form; the result has the dtype of its input."""
        kwargs = kwargs or {}
        if func is not functional.conv2d or not _is_depthwise(*args, **kwargs):
            return func(*args, **kwargs)
        image, *others = args
        with torch.autocast(image.device.type, enabled=False):
            return func(image.float(), *others, **kwargs).to(image.dtype)


def _is_depthwise(
    image: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Take the arguments of ``conv2d`` and say whether each channel is a group of its own."""
    return groups > 1 and groups == image.shape[1] == len(weight)
