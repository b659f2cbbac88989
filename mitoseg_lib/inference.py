"""From a trained model and a stack to probabilities, and from probabilities to a mask.

A slice that a model takes whole needs no tiles: no seams, no overlap computed twice, and no voxel that sees less of
its surroundings than another. Only volumes for a 3D model, and slices too large for memory, are cut into windows.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from tqdm.auto import tqdm

from mitoseg_lib.metrics import Scores

__all__ = [
    "batch_size_on",
    "choose_threshold",
    "is_bf16_native",
    "median_filter_z",
    "predict_stack",
    "predict_turned",
    "predict_views",
]

WINDOW_3D = (32, 128, 128)  # voxels at a time for a 3D model: under 2 GB with the default U-Net
OVERLAP = 0.25  # of neighbouring windows, of a side
# The order of memory in which convolutions are fastest, by the number of axes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Axes of a volume whose slices lie in the planes xy, xz and yz of a stack (z, y, x).
VIEWS = ((0, 1, 2), (1, 0, 2), (2, 0, 1))
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # 0.05 to 0.95

Predictor = Callable[[Tensor], Tensor]


def predict_stack(
    model: nn.Module,
    image: NDArray[np.uint8],
    *,
    batch_size: int | None = None,
    precision: str = "auto",
    window: int | Sequence[int] | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Return the probability of being foreground for each voxel of a stack.

    The model runs in ``eval()`` on the device where it is, without gradients, and is left as it was found. Sides that
    the model can't take are continued by reflection at their ends, and cut off again.

    Parameters
    ----------
    model : Module
        From grey levels in [0, 1], (n, 1, y, x) or, with ``model.ndim == 3``, (n, 1, z, y, x), to logits of the same
        shape. Its `size_multiple` says what its sides must be multiples of; 32 is assumed if it has none. One whose
        `n_slices` is 3 is given each slice with its neighbours, (n, 3, y, x); at both ends of the stack the slice
        next to the end stands in for the one that is missing.
    image : ndarray
        uint8, (z, y, x), of any size. Or slices that have their neighbours with them, as channels in the order of z:
        (z, 3, y, x) for a model whose `n_slices` is 3, so that a part of a stack needn't end like a whole one.
    batch_size : int, optional
        Slices (or windows) at a time: 1 on the CPU and 4 on a GPU by default. It is halved, again and again if need
        be, when a GPU's memory doesn't suffice.
    precision : {"auto", "fp32", "bf16"}
        "bf16" lets convolutions run on 16-bit numbers: probabilities change in the third digit, in exchange for two
        to three times the speed where the processor has instructions for it. "auto" takes it there and "fp32"
        elsewhere. With "fp32" probabilities are the same for any batch size within 1e-4, on every machine.
    window : int or sequence of int, optional
        Side or sides of the windows, (y, x) or (z, y, x); rounded up to what the model needs, and no larger than the
        stack. They overlap by a quarter and are blended with Gaussian weights by MONAI. By default a 2D model is
        given whole slices, and a 3D one windows of (32, 128, 128).
    progress : bool
        Show a progress bar.

    Returns
    -------
    ndarray
        float32 in [0, 1], (z, y, x).

    Raises
    ------
    ValueError
        When the image isn't uint8 of such a shape, or an argument is out of range.
    RuntimeError
        When not even one slice (or window) fits into a GPU's memory.
    """
    _check_image(image, getattr(model, "n_slices", 1))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be 1 or more; correct it.")
    ndim, multiple = getattr(model, "ndim", 2), _size_multiple(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch_size = batch_size or batch_size_on(device)
    mixed = _mixed_precision(precision, device)

    def predict(grey: Tensor) -> Tensor:
        # Each layer hands the order of memory on to the next, so the model itself needn't be rearranged.
        grey = torch.empty_like(grey, memory_format=CHANNELS_LAST[grey.ndim]).copy_(grey)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            logits = model(grey)
        return logits.float().sigmoid()

    with evaluating(model), torch.no_grad(), nullcontext() if mixed else _exact_convolutions(device):
        n_neighbours = getattr(model, "n_slices", 1) // 2
        if ndim == 2 and window is None:
            slices = _Slices(image, n_neighbours, multiple)
            return _predict_slices(predict, slices, batch_size, device=device, progress=progress)
        sides = _window_sides(window, ndim, multiple, image.shape)
        # Padded here, since MONAI can't reflect by more than a side of the volume.
        padded = _Slices(_pad_to(image, (1,) * (image.ndim - ndim) + sides), n_neighbours)
        found = _predict_windows(predict, padded, sides, batch_size, device=device, progress=progress)
        return found[tuple(slice(side) for side in _volume_shape(image))]


def batch_size_on(device: torch.device) -> int:
    """Return how many slices `predict_stack` predicts at a time unless it is told: 4 on a GPU, and 1 elsewhere."""
    return 4 if device.type == "cuda" else 1


def predict_turned(
    model: nn.Module,
    image: NDArray[np.uint8],
    *,
    precision: str = "auto",
    window: int | Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Return the mean of a model's answers to the eight ways to lay down a slice ("test-time augmentation").

    The slices are flipped and turned by quarter turns, predicted, and the answers are turned back. Eight times the
    time of `predict_stack`, whose parameters and errors hold here, too.
    """
    _check_image(image, getattr(model, "n_slices", 1))
    total = np.zeros(_volume_shape(image), np.float32)
    _add_turned(total, image, partial(predict_stack, model, precision=precision, window=window))
    total /= 8
    return total


def predict_views(
    model: nn.Module,
    image: NDArray[np.uint8],
    *,
    precision: str = "auto",
    window: int | Sequence[int] | None = None,
    turned: bool = False,
) -> NDArray[np.float32]:
    """Return the mean of a 2D model's answers to a stack cut into slices along z, along y and along x.

    Where voxels are as long as they are wide, a mitochondrion looks alike in all three planes, so a model that was
    trained on xy slices can be given the xz and yz slices, too, and these show what lies above and below an xy slice.
    Takes about three times the time of `predict_stack`, whose errors hold here, too, and memory for two arrays like
    the one that is returned.

    Parameters
    ----------
    model, image, precision, window
        As in `predict_stack`. A network that is given neighbouring slices gets the neighbours along each axis.
    turned : bool
        Average over the eight ways to lay down each slice (`predict_turned`), too: 24 answers for a voxel.

    Returns
    -------
    ndarray
        float32 in [0, 1], (z, y, x).
    """
    _check_image(image, 1)
    total = np.zeros(image.shape, np.float32)
    predict = partial(predict_stack, model, precision=precision, window=window)
    for axes in VIEWS:
        seen, sums = image.transpose(axes), total.transpose(axes)  # the same memory, no copies
        if turned:
            _add_turned(sums, seen, predict)
        else:
            sums += predict(seen)
    total /= len(VIEWS) * (8 if turned else 1)
    return total


def choose_threshold(
    probabilities: NDArray[np.float32],
    truth: NDArray[np.bool_],
    *,
    candidates: Sequence[float] = THRESHOLDS,
) -> float:
    """Return the threshold whose mask, ``probabilities >= threshold``, has the best pooled IoU.

    A choice like any other in training: make it on validation slices, never on those that the result is reported on.
    All candidates are counted in one pass over the voxels.

    Parameters
    ----------
    probabilities : ndarray
        Floats in [0, 1], any number of axes.
    truth : ndarray
        bool, same shape.
    candidates : sequence of float
        In [0, 1]. 0.05, 0.10, ... 0.95 by default.

    Returns
    -------
    float
        One of the candidates. Of equally good ones the nearest to 0.5, and of two as near the lower.

    Raises
    ------
    ValueError
        When shapes or dtypes differ from these, a number lies outside [0, 1] (or is NaN), or there is no candidate.
    """
    found = threshold_scores(probabilities, truth, candidates=candidates)
    return -max((pooled.iou, -round(abs(t - 0.5), 6), -t) for t, pooled in found.items())[2]


def threshold_scores(
    probabilities: NDArray[np.float32],
    truth: NDArray[np.bool_],
    *,
    candidates: Sequence[float] = THRESHOLDS,
) -> dict[float, Scores]:
    """Return the scores of the mask at each threshold, ascending; parameters and errors as in `choose_threshold`.

    Those of several parts can be added up, and the best threshold of all of them be chosen then.
    """
    check_probabilities(probabilities, truth)
    thresholds = sorted({float(candidate) for candidate in candidates})
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(f"The candidates are {thresholds}, but numbers in [0, 1] were expected; give one or more.")
    counts = _counts_between(thresholds, probabilities, truth)
    # The voxels at or above a threshold are those of all intervals above it.
    background, foreground = np.cumsum(counts[::-1], axis=0)[::-1].T.tolist()
    return {
        t: Scores(tp, fp, foreground[0] - tp, background[0] - fp)
        for t, tp, fp in zip(thresholds, foreground[1:], background[1:], strict=True)
    }


def median_filter_z(values: NDArray, size: int) -> NDArray:
    """Replace each voxel by the median of itself and its neighbours in the slices above and below.

    What a 2D model sees in one slice only, but not in those around it, is rarely a mitochondrion. At both ends the
    stack is continued by reflection, its last slice being repeated once, so that the last slices count most there.

    Parameters
    ----------
    values : ndarray
        Probabilities (float) or a mask (bool), (z, y, x).
    size : int
        Number of slices, odd; 1 changes nothing.

    Returns
    -------
    ndarray
        Same shape and dtype; a new array.

    Raises
    ------
    ValueError
        When there aren't three axes, or the size isn't odd.
    """
    if values.ndim != 3:
        raise ValueError(f"The values have shape {values.shape}, but (z, y, x) was expected; pass the whole stack.")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size is {size}, but a median needs an odd number of slices; use for example 3.")
    if size == 1:
        return values.copy()
    numbers = values.astype(np.uint8) if values.dtype == np.bool_ else values
    return ndimage.median_filter(numbers, size=(size, 1, 1), mode="reflect").astype(values.dtype, copy=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in ``eval()``, and each of its modules back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_bf16_native(device: torch.device | str = "cpu") -> bool:
    """Tell whether a device computes with bfloat16 itself; where it must be emulated, it is slower than float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    # oneDNN, which computes torch's convolutions, can be told to use older instructions.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    allowed = limit in ("DEFAULT", "ALL") or "BF16" in limit or "FP16" in limit or "AMX" in limit
    found = torch.cpu.get_capabilities()
    return allowed and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@dataclass(frozen=True)
class _Slices:
    """A stack as a 2D model takes it: each slice padded, with so many neighbours on either side as channels."""

    image: NDArray[np.uint8]  # (z, y, x), or with the neighbours in it already, (z, channels, y, x)
    n_neighbours: int
    multiple: int = 1

    def batch(self, start: int, size: int) -> NDArray[np.uint8]:
        """Return (n, channels, y, x)."""
        if self.image.ndim == 4:
            return _pad_ends(self.image[start : start + size], (1, 1, self.multiple, self.multiple))
        n, depth = self.n_neighbours, len(self.image)
        around = np.arange(start, min(start + size, depth))[:, None] + np.arange(-n, n + 1)
        reflected = (depth - 1) - np.abs((depth - 1) - np.abs(around))  # 1, 0, 1, ... n - 2, n - 1, n - 2
        chosen = self.image[reflected.clip(0).ravel()]
        padded = _pad_ends(chosen, (1, self.multiple, self.multiple))
        return padded.reshape(*around.shape, *padded.shape[1:])


def _predict_slices(
    predict: Predictor, slices: _Slices, batch_size: int, *, device: torch.device, progress: bool
) -> NDArray[np.float32]:
    """Return the probabilities of a stack whose slices are predicted whole, some at a time."""
    depth, height, width = shape = _volume_shape(slices.image)
    out = np.empty(shape, np.float32)
    start = 0
    with tqdm(total=depth, unit="slice", disable=not progress) as bar:
        while start < depth:
            batch = slices.batch(start, batch_size)
            found = _unless_out_of_memory(predict, _to_grey(batch, device))
            if found is None:
                batch_size = _halved(min(batch_size, len(batch)), "slice")
                continue
            out[start : start + len(batch)] = found[:, 0, :height, :width].cpu().numpy()
            start += len(batch)
            bar.update(len(batch))
    return out


def _predict_windows(
    predict: Predictor,
    slices: _Slices,
    sides: tuple[int, ...],
    batch_size: int,
    *,
    device: torch.device,
    progress: bool,
) -> NDArray[np.float32]:
    """Return the probabilities of a stack that is predicted in overlapping windows."""
    from monai.inferers import sliding_window_inference

    def blend(volume: Tensor, size: int) -> Tensor:
        return sliding_window_inference(
            volume, sides, size, predict, overlap=OVERLAP, mode="gaussian", sw_device=device, device="cpu"
        )

    out = np.empty(_volume_shape(slices.image), np.float32)
    for part in tqdm(range(len(out)) if len(sides) == 2 else [slice(None)], disable=not progress):
        batch = slices.batch(part, 1) if len(sides) == 2 else slices.image[None, None]
        grey = _to_grey(batch, torch.device("cpu"))
        while (found := _unless_out_of_memory(partial(blend, size=batch_size), grey)) is None:
            batch_size = _halved(batch_size, "window")
        # Blending with weights whose sum is rounded can leave [0, 1] in the last digit.
        out[part] = found[0, 0].clamp_(0, 1).numpy()
    return out


def _unless_out_of_memory(function: Predictor, grey: Tensor) -> Tensor | None:
    """Return the function's result, or None when a GPU's memory didn't suffice."""
    try:
        return function(grey)
    except torch.OutOfMemoryError:
        return None


def _add_turned(total: NDArray[np.float32], image: NDArray[np.uint8], predict: Callable[[NDArray], NDArray]) -> None:
    """Add the answers to the eight ways to lay down a slice, each turned back."""
    for quarters in range(4):
        for flip in (slice(None), slice(None, None, -1)):
            turned = np.ascontiguousarray(np.rot90(image, quarters, axes=(-2, -1))[..., flip, :])
            total += np.rot90(predict(turned)[:, flip], -quarters, axes=(1, 2))


def _halved(batch_size: int, what: str) -> int:
    """Return half a batch, or raise a RuntimeError where there is nothing to halve."""
    if batch_size == 1:
        raise RuntimeError(
            f"Not even one {what} fits into the GPU's memory, but one must; use predict_stack(..., window=256), a GPU "
            "with more memory, or the CPU."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2


def _to_grey(image: NDArray, device: torch.device) -> Tensor:
    """Return grey levels in [0, 1]; bytes travel to the device, not floats."""
    return torch.from_numpy(np.ascontiguousarray(image)).to(device).float().div_(255)


def _pad_ends(image: NDArray, multiples: tuple[int, ...]) -> NDArray:
    """Continue each axis at its end to the next multiple, by reflection (no edge twice)."""
    return _pad_to(image, tuple(-(-n // m) * m for n, m in zip(image.shape, multiples, strict=True)))


def _pad_to(image: NDArray, sides: tuple[int, ...]) -> NDArray:
    """Continue each axis at its end to these sides where it is shorter, by reflection (no edge twice)."""
    return np.pad(image, [(0, max(0, side - n)) for n, side in zip(image.shape, sides, strict=True)], mode="reflect")


def _window_sides(
    window: int | Sequence[int] | None, ndim: int, multiple: int, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the sides of windows that the model can take, or raise a ValueError."""
    if window is None:
        window = WINDOW_3D
    sides = (window,) * ndim if isinstance(window, int | np.integer) else tuple(window)
    if len(sides) != ndim or any(side < 1 for side in sides):
        raise ValueError(f"window is {window}, but {ndim} sides of 1 or more were expected; use for example 128.")
    fitting = (min(side, n) for side, n in zip(sides, shape[-ndim:], strict=True))
    return tuple(-(-side // multiple) * multiple for side in fitting)


def _size_multiple(model: nn.Module) -> int:
    """Return what the sides of a model's input must be multiples of."""
    if hasattr(model, "size_multiple"):
        return int(model.size_multiple)
    return int(getattr(getattr(model, "encoder", None), "output_stride", 32))


def _mixed_precision(precision: str, device: torch.device) -> bool:
    """Tell whether bf16 was asked for, or is faster, or raise a ValueError."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}, but it must be 'auto', 'fp32' or 'bf16'; choose one of them.")
    return precision == "bf16" or (precision == "auto" and is_bf16_native(device))


def _exact_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """Keep a GPU from rounding float32 to 19 bits (TF32) in convolutions, as it does by default."""
    if device.type != "cuda":
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


def _counts_between(thresholds: list[float], probabilities: NDArray, truth: NDArray) -> NDArray[np.int64]:
    """Return the numbers of background and foreground voxels in each interval between thresholds.

    Row 0 counts those below the lowest threshold, row i those that reach i thresholds.
    """
    # In the dtype of the probabilities, as NumPy compares an array with a number.
    edges = np.array(thresholds, dtype=probabilities.dtype)
    counts = np.zeros(2 * (len(edges) + 1), np.int64)
    # Slice by slice, since the intervals' numbers take twice the memory of the probabilities.
    for part, is_foreground in zip(np.atleast_2d(probabilities), np.atleast_2d(truth), strict=True):
        reached = np.searchsorted(edges, part.ravel(), side="right")
        counts += np.bincount(2 * reached + is_foreground.ravel(), minlength=len(counts))
    return counts.reshape(-1, 2)


def _volume_shape(image: NDArray) -> tuple[int, ...]:
    """Return (z, y, x) of slices, with or without their neighbours as channels."""
    return (len(image), *image.shape[-2:])


def _check_image(image: NDArray, n_slices: int) -> None:
    """Raise a ValueError for what isn't a stack's image."""
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
    if not is_image or not (image.ndim == 3 or (image.ndim == 4 and image.shape[1] == n_slices > 1)):
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"The image is {what}, but uint8 (z, y, x) was expected; pass stack.image, or image[None] for one slice."
        )


def check_probabilities(probabilities: NDArray, truth: NDArray) -> None:
    """Raise a ValueError unless these are probabilities and a mask of one shape."""
    if probabilities.shape != truth.shape or truth.dtype != np.bool_ or probabilities.dtype.kind != "f":
        raise ValueError(
            f"The probabilities are {probabilities.dtype} {probabilities.shape} and the truth {truth.dtype} "
            f"{truth.shape}, but floats and bool of one shape were expected; pass the same slices of both."
        )
    if probabilities.size and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError(
            f"The probabilities lie between {probabilities.min()} and {probabilities.max()}, but [0, 1] was expected; "
            "pass logits through a sigmoid first."
        )
