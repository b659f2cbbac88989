"""Trained models as files to hand on: 16-bit numbers, and all that is needed to use them.

One safetensors file holds the weights and, in its header, what network they belong to, the grey levels, the voxel size
and the threshold that it was made for, and the version of the library. safetensors opens a file with a flipped bit
without a word, so beside it lies ``NAME.sha256``, as ``sha256sum`` writes it, and nothing is read that doesn't match.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from mitoseg_lib import __version__
from mitoseg_lib.datasets import bundled_folder
from mitoseg_lib.errors import FilePath
from mitoseg_lib.files import hash_path, write_whole
from mitoseg_lib.models import EncoderUNet, UNet, encoder_unet

__all__ = [
    "MaskRule",
    "WeightsError",
    "WeightsMetadata",
    "load_weights",
    "read_metadata",
    "save_weights",
    "shipped_weights",
]

KEY, FORMAT = "mitoseg", 1  # of the header; one key, since safetensors writes several in any order
SHIPPED = "efficientnet_lite0.safetensors"
LARGEST_HALF = torch.finfo(torch.float16).max
# Estimates of variances that lie outside what 16 bits can hold would make a layer infinite; they are few.
KEPT_IN_FULL = ("running_mean", "running_var")


class WeightsError(ValueError):
    """Weights that can't be used: one sentence that says what was found, what was expected, and what to do."""


@dataclass(frozen=True)
class MaskRule:
    """How a model's probabilities become a mask, chosen on validation slices.

    Attributes
    ----------
    threshold
        Probability from which a voxel is foreground.
    median
        Slices of a median along z before that (`mitoseg_lib.inference.median_filter_z`), odd; 1 for none.
    """

    threshold: float = 0.5
    median: int = 1


@dataclass(frozen=True)
class WeightsMetadata:
    """What a file of weights says of itself.

    Attributes
    ----------
    encoder
        Its name for `mitoseg_lib.models.encoder_unet`, or "unet" for `mitoseg_lib.models.UNet`.
    options
        Keyword arguments of the `UNet`, or of `encoder_unet` (``neighbours``, if it is true).
    mean, sd
        By which the network itself normalises its input, grey levels in [0, 1]; 0 and 1 for a `UNet`.
    voxel_size_nm
        Edges of a voxel in training, (z, y, x).
    threshold, median
        See `MaskRule`.
    grey_range
        Grey levels (uint8) that 0.1 and 99.9 % of the voxels in training lay below, or None if that isn't known.
    library_version
        Of the library that wrote the file.
    """

    encoder: str
    options: dict[str, Any]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    voxel_size_nm: tuple[float, float, float]
    threshold: float
    grey_range: tuple[float, float] | None
    library_version: str
    median: int = 1  # which files don't mention, so those that were written before medians are like those without one


def save_weights(
    model: nn.Module,
    path: FilePath,
    *,
    rule: MaskRule,
    encoder: str | None = None,
    voxel_size_nm: tuple[float, float, float] = (5.0, 5.0, 5.0),
    grey_range: tuple[float, float] | None = None,
) -> WeightsMetadata:
    """Write a trained model as a file of 16-bit weights, and its sha256 beside it; each whole or not at all.

    BatchNorm's running statistics keep 32 bits: a variance may be too large or too small for 16.

    Parameters
    ----------
    model
        An `EncoderUNet`, or a `UNet`.
    path
        Of the file; an existing one is replaced.
    rule
        How its probabilities become a mask.
    voxel_size_nm, grey_range
        See `WeightsMetadata`.
    encoder
        Its name, as it was given to `encoder_unet`. Not for a `UNet`.

    Returns
    -------
    WeightsMetadata
        What was written into the file's header.

    Raises
    ------
    WeightsError
        If the model is of another kind or another encoder's, or a number is out of range.
    """
    metadata = _describe(model, rule, encoder, voxel_size_nm, grey_range)
    _checked_model(metadata, model.state_dict(), "the model")
    described = asdict(metadata)
    if metadata.median == 1:  # as in files from before, so that an older library reads this one, too
        del described["median"]
    header = {KEY: json.dumps({"format": FORMAT, **described})}
    tensors = {name: _narrowed(name, tensor) for name, tensor in model.state_dict().items()}
    content = tensors_to_bytes(tensors, metadata=header)
    path = Path(path)
    digest = hashlib.sha256(content).hexdigest()
    write_whole(hash_path(path), f"{digest}  {path.name}\n".encode())
    write_whole(path, content)
    return metadata


def load_weights(path: FilePath | None = None) -> tuple[EncoderUNet | UNet, WeightsMetadata]:
    """Read a trained model that `save_weights` wrote.

    Parameters
    ----------
    path
        Of the file. None: the model that comes with the library.

    Returns
    -------
    model
        With 32-bit weights, on the CPU and in ``eval()``.
    metadata
        What it was made for.

    Raises
    ------
    WeightsError
        If there is no such file, it isn't what was written (by its sha256), or another program wrote it.
    """
    path = shipped_weights() if path is None else Path(path)
    content = _verified(path)
    metadata = _read_metadata(content, path.name)
    try:
        tensors = tensors_from_bytes(content)
    except SafetensorError as error:
        raise WeightsError(f"{path.name} can't be read ({error}); get it again.") from None
    return _checked_model(metadata, tensors, path.name).eval(), metadata


def read_metadata(path: FilePath | None = None) -> WeightsMetadata:
    """Return what a file of weights (None: the shipped one) says of itself, without the model, which takes longer.

    Raises
    ------
    WeightsError
        See `load_weights`.
    """
    path = shipped_weights() if path is None else Path(path)
    return _read_metadata(_verified(path), path.name)


def shipped_weights() -> Path:
    """Return the path of the model that comes with the library; WeightsError if it isn't there."""
    path = bundled_folder() / "weights" / SHIPPED
    if not path.is_file():
        raise WeightsError(
            f"{SHIPPED} isn't there, but the model comes with the library in data/weights; install mitoseg-lib again,"
            " or name another file with --weights."
        )
    return path


# --- to a file ----------------------------------------------------------------------------------------------


def _describe(
    model: nn.Module,
    rule: MaskRule,
    encoder: str | None,
    voxel_size_nm: tuple[float, float, float],
    grey_range: tuple[float, float] | None,
) -> WeightsMetadata:
    """Metadata of a model; WeightsError for one that couldn't be made again from them."""
    if isinstance(model, EncoderUNet) and encoder is not None:
        mean, sd = (tuple(values.flatten().tolist()) for values in (model.mean, model.sd))
        options = {"neighbours": True} if model.n_slices > 1 else {}
    elif isinstance(model, UNet) and encoder is None:
        encoder, options, mean, sd = "unet", _unet_options(model), (0.0,), (1.0,)
    else:
        raise WeightsError(
            f"{type(model).__name__} with encoder {encoder!r} was given, but an EncoderUNet with its encoder's name, or"
            " a UNet without one, was expected; correct it."
        )
    numbers = WeightsMetadata(
        encoder, options, mean, sd, voxel_size_nm, rule.threshold, grey_range, __version__, rule.median
    )
    return _with_numbers_checked(asdict(numbers), "the model")


def _unet_options(model: UNet) -> dict[str, Any]:
    """Keyword arguments that make a U-Net of this shape."""
    layer = model.first.layers[1]
    kinds = {nn.BatchNorm2d: "batch", nn.BatchNorm3d: "batch", nn.GroupNorm: "group", nn.Identity: "none"}
    return ({"ndim": 3} if model.ndim == 3 else {}) | {
        "width": model.head.in_channels,
        "depth": len(model.down),
        "normalisation": kinds[type(layer)],
        "residual": model.first.skip is not None,
    }


def _narrowed(name: str, tensor: Tensor) -> Tensor:
    """Return 16-bit numbers for 32-bit ones, except for running statistics; WeightsError where they don't fit."""
    tensor = tensor.detach().cpu().contiguous().clone()
    if not tensor.is_floating_point():
        return tensor
    limit = math.inf if name.endswith(KEPT_IN_FULL) else LARGEST_HALF
    if not bool((tensor.abs() <= limit).all()) or not bool(tensor.isfinite().all()):
        raise WeightsError(
            f"{name} holds NaN, infinite or huge numbers, but weights up to {LARGEST_HALF:g} were expected; train"
            " the model again with a lower learning rate."
        )
    return tensor if name.endswith(KEPT_IN_FULL) else tensor.half()


# --- from a file --------------------------------------------------------------------------------------------


def _verified(path: Path) -> bytes:
    """Content of a file whose sha256 is the one beside it; WeightsError otherwise."""
    recorded = hash_path(path)
    try:
        content = path.read_bytes()
        expected = recorded.read_text(encoding="ascii", errors="replace").split()[:1]
    except OSError as error:
        missing = os.fspath(path) if not path.is_file() else recorded.name
        reason = "isn't a file" if not Path(error.filename or path).is_file() else f"can't be read ({error.strerror})"
        raise WeightsError(
            f"{missing} {reason}, but weights and their sha256 beside them ({recorded.name}) were expected; check the"
            " path, or get both again."
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if expected != [found]:
        raise WeightsError(
            f"{path.name} has changed: its sha256 is {found[:12]}..., but {''.join(expected)[:12]}... was recorded;"
            " get the file again."
        )
    return content


def _read_metadata(content: bytes, name: str) -> WeightsMetadata:
    """Metadata from a safetensors file's header; WeightsError if another program wrote it."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        values = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
        if values.pop("format") != FORMAT:
            raise KeyError("format")
        return _with_numbers_checked(values, name)
    except (struct.error, KeyError, TypeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{name} holds no description of its model, but weights that mitoseg_lib.weights.save_weights wrote were"
            " expected; give another file."
        ) from None


def _with_numbers_checked(values: dict[str, Any], name: str) -> WeightsMetadata:
    """Metadata with tuples of floats; WeightsError for numbers that can't be meant."""
    size = tuple(float(edge) for edge in values["voxel_size_nm"])
    threshold, levels = float(values["threshold"]), values["grey_range"]
    levels = None if levels is None else tuple(float(level) for level in levels)
    median = values.get("median", 1)
    is_wrong = {
        f"the voxel size {size}": len(size) != 3 or not all(math.isfinite(edge) and edge > 0 for edge in size),
        f"the threshold {threshold:g}": not 0 <= threshold <= 1,
        f"the median of {median!r} slices": not isinstance(median, int) or median < 1 or median % 2 == 0,
        f"the grey range {levels}": levels is not None and not (len(levels) == 2 and 0 <= levels[0] < levels[1] <= 255),
    }
    for what, wrong in is_wrong.items():
        if wrong:
            raise WeightsError(
                f"{name} has {what}, but (z, y, x) in nm, a probability, an odd number and two rising grey levels"
                " up to 255 were expected; correct it."
            )
    mean, sd = (tuple(float(number) for number in values[key]) for key in ("mean", "sd"))
    changed = {"voxel_size_nm": size, "threshold": threshold, "grey_range": levels, "mean": mean, "sd": sd}
    return WeightsMetadata(**(values | changed))


def _checked_model(metadata: WeightsMetadata, tensors: dict[str, Tensor], name: str) -> EncoderUNet | UNet:
    """Make the network that the metadata describe, and fill it; WeightsError if the tensors are another's."""
    try:
        if metadata.encoder == "unet":
            model = UNet(**metadata.options)
        else:
            model = encoder_unet(metadata.encoder, weights=None, frozen=False, **metadata.options)
            shape = model.mean.shape
            model.mean.copy_(torch.tensor(metadata.mean).reshape(shape))
            model.sd.copy_(torch.tensor(metadata.sd).reshape(shape))
        model.load_state_dict({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{name} isn't a network on {metadata.encoder!r} ({reason}), but one was expected; name the encoder that it"
            " was made with."
        ) from None
    return model
