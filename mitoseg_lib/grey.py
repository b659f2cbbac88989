"""Grey levels of any stack to those that a model has seen, by one rule for the whole stack.

The rule is `mitoseg_lib.stacks.to_uint8`'s, decided from some slices, so that a volume larger than memory needn't be
read twice. One rule for all slices: a slice that is scaled by its own levels shows nothing as brightly as something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mitoseg_lib.errors import StackError
from mitoseg_lib.readers import SliceReader
from mitoseg_lib.stacks import BRIGHTEST, DARKEST, SMALLEST_RANGE

__all__ = ["GreyTransform", "choose_grey_transform", "grey_range", "to_grey_range"]

SAMPLED_SLICES = 64
LARGEST_SAMPLE = 2**28  # bytes; of larger slices only every nth row and column counts
# Of the model's range, by which the ends of a uint8 stack's may differ from it. EPFL's test stack differs by 0.02; 0.14
# cost a sixth of the IoU, and 0.28 nearly all of it (results/robustness.json: 20 and 40 grey levels).
NEAR = 0.05

NOT_FINITE = "holds NaN or infinite values, but finite grey values were expected; replace them"

GreyRange = tuple[float, float]


@dataclass(frozen=True)
class GreyTransform:
    """A linear map of grey levels to uint8: `source` becomes `target`, and what lies beyond 0 or 255 is cut off.

    Attributes
    ----------
    source
        Two grey levels of the input, or None: the values stay as they are.
    target
        What they become, in [0, 255].
    """

    source: GreyRange | None
    target: GreyRange = (0.0, 255.0)

    def __str__(self) -> str:
        """In words, for the user."""
        if self.source is None:
            return "grey levels stay as they are"
        (dark, bright), (low, high) = self.source, self.target
        return f"grey levels {dark:.6g} to {bright:.6g} become {low:.4g} to {high:.4g}"

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return uint8 of the same shape.

        Raises
        ------
        StackError
            If there are NaN or infinite values; without the name of a file, which `named_errors` adds.
        """
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise StackError(NOT_FINITE)
        if self.source is None:
            return values if values.dtype == np.uint8 else np.minimum(values, 255).astype(np.uint8)
        (dark, bright), (low, high) = self.source, self.target
        scale = (high - low) / (bright - dark) if bright - dark > SMALLEST_RANGE else 0.0
        result = np.empty(values.shape, np.uint8)
        for target, grey in zip(result, values, strict=True):  # by slices: no float64 copy of the volume
            target[...] = np.clip(np.rint((grey.astype(np.float64) - dark) * scale + low), 0, 255)
        return result


def grey_range(image: np.ndarray) -> GreyRange:
    """Return the grey levels (uint8, any shape) that 0.1 and 99.9 % of the voxels lie at or below."""
    shares = np.cumsum(np.bincount(image.ravel(), minlength=256)) / image.size
    low, high = (int(np.searchsorted(shares, percent / 100)) for percent in (DARKEST, BRIGHTEST))
    return float(low), float(high)


def choose_grey_transform(reader: SliceReader, grey_range: GreyRange | None = None) -> GreyTransform:
    """Choose the transform of a stack from 64 slices, evenly spread from the first to the last.

    uint16 and floats: the 0.1 and 99.9 percentiles become the model's (or the minimum and maximum, where those are
    equal). uint16 without a value above 255 is an 8-bit image in a wider file and is taken as uint8. uint8 stays as it
    is, as in training, where its percentiles are the model's within a twentieth of their distance, and is stretched or
    shifted like the others where they aren't: a network that was trained on one microscope's grey levels sees nothing
    in a stack that is a little brighter (`mitoseg run grey-levels` measures it).

    Parameters
    ----------
    reader
        The stack.
    grey_range
        The 0.1 and 99.9 percentiles of what the model was trained on. None: not known; then 0 and 255 are aimed at,
        exactly as by `mitoseg_lib.stacks.to_uint8`, and uint8 always stays as it is.

    Raises
    ------
    StackError
        If the values are of another type, or not finite.
    """
    if reader.dtype not in (np.uint8, np.uint16) and reader.dtype.kind != "f":
        raise StackError(
            f"{reader.name} holds {reader.dtype}, but grey values of uint8, uint16 or float were expected;"
            " convert them."
        )
    if reader.dtype == np.uint8 and grey_range is None:
        return GreyTransform(None)
    sample, lowest, highest = _sample(reader)
    dark, bright = np.percentile(sample, [DARKEST, BRIGHTEST]).astype(np.float64).tolist()
    is_8_bit = reader.dtype == np.uint8 or (reader.dtype == np.uint16 and highest <= 255)
    if is_8_bit:
        return to_grey_range((dark, bright), grey_range)
    if dark == bright:
        dark, bright = lowest, highest
    return GreyTransform((dark, bright), grey_range or (0.0, 255.0))


def to_grey_range(levels: GreyRange, grey_range: GreyRange | None) -> GreyTransform:
    """Return the transform of an 8-bit stack with such percentiles to those that a model saw.

    Nothing changes where they are near, the stack has one grey level only, or the model's aren't known.
    """
    dark, bright = levels
    if grey_range is None or dark == bright:
        return GreyTransform(None)
    farthest = max(abs(own - seen) for own, seen in zip(levels, grey_range, strict=True))
    is_near = farthest <= NEAR * (grey_range[1] - grey_range[0])
    return GreyTransform(None) if is_near else GreyTransform(levels, grey_range)


def _sample(reader: SliceReader) -> tuple[np.ndarray, float, float]:
    """Some of the values, and the least and the largest of all in their slices; StackError for NaN and infinity."""
    numbers = np.unique(np.linspace(0, reader.shape[0] - 1, SAMPLED_SLICES).round().astype(int)).tolist()
    size = len(numbers) * math.prod(reader.shape[1:]) * max(reader.dtype.itemsize, 4)
    step = math.ceil(math.sqrt(size / LARGEST_SAMPLE))
    parts, limits = [], []
    for number in numbers:
        grey = reader.read(number, number + 1)
        limits += [float(grey.min()), float(grey.max())]  # NaN if any is
        parts.append(grey[:, ::step, ::step].copy())
    if not math.isfinite(max(limits) - min(limits)) or math.isnan(sum(limits)):
        raise StackError(f"{reader.name} {NOT_FINITE}.")
    sample = np.concatenate(parts)
    # NumPy would count the voxels for its percentiles in float16 too.
    return sample.astype(np.float32) if sample.dtype == np.float16 else sample, min(limits), max(limits)
