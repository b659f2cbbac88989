"""Masks and instance labels from files: one rule for which voxels are foreground.

`mitoseg_lib.stacks` is the door to these names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import numpy as np

from mitoseg_lib.errors import FilePath, StackError, StackWarning, named_errors
from mitoseg_lib.readers import open_reader
from mitoseg_lib.tiff import VoxelSize, read_volume

# The largest value of a smooth mask. It is one only if it holds 0, this and at least three values between:
# two values are a mask as they are, and three or four are rather classes.
FULL_SCALES = (1, 255, 65535)
FEWEST_SMOOTH = 5
ALL_FOREGROUND = (1, 255)  # a file of one of these values only is all foreground
LARGEST_INSTANCE = 2**32 - 1
LISTED = 6


def read_mask(path: FilePath) -> np.ndarray:
    """Read a mask of mitochondria from a TIFF, a folder of slices or a Zarr.

    Parameters
    ----------
    path
        One volume with two values, of which the larger is the foreground; usual are 0 and 1, or 0 and 255.
        `read_labels` says what else is accepted.

    Returns
    -------
    numpy.ndarray
        bool (z, y, x), True in mitochondria.

    Raises
    ------
    StackError
        If the file is damaged or holds other values; see `read_labels`.
    """
    return read_labels(path)[0]


def read_labels(path: FilePath, *, instances: bool = False) -> tuple[np.ndarray, VoxelSize | None]:
    """Read a mask, or the numbers of instances, with the voxel size that the file states.

    Parameters
    ----------
    path
        A TIFF (a single 2D image is a volume of one slice), or what else `mitoseg_lib.readers.open_reader` reads: a
        folder of grey TIFF or PNG slices, or a Zarr. A mask has two values, of which the larger is the foreground,
        or one: 0 is all background, 1 or 255 all foreground. Of RGB and RGBA pixels the largest colour counts, and
        a constant alpha is ignored. A smooth (anti-aliased) mask, which holds 0, the full scale (255, 65535 or, in
        floats, 1) and at least three values between, is cut at half of the full scale, with a `StackWarning`.
    instances
        Whether the values are numbers of objects instead: 0 is background, and each other whole number one
        object, whether it is connected or not.

    Returns
    -------
    labels : numpy.ndarray
        bool (z, y, x), True in mitochondria; with `instances` whole numbers, unsigned.
    voxel_size_nm : tuple of float or None
        Edges of a voxel, (z, y, x), if the file states them; see `mitoseg_lib.tiff.read_volume`.

    Raises
    ------
    StackError
        If the file is missing or damaged, or holds other values: the message lists them.
    """
    values, voxel_size_nm = _read_values(path)
    with named_errors(path):
        labels, notice = _to_instances(values) if instances else _to_mask(values)
    if notice:
        name = os.path.basename(os.path.normpath(os.fsdecode(path)))
        warnings.warn(f"{name} {notice}.", StackWarning, stacklevel=2)
    return labels, voxel_size_nm


def _read_values(path: FilePath) -> tuple[np.ndarray, VoxelSize | None]:
    """Volume, (z, y, x) or a TIFF's (z, y, x, colour), in memory that is the caller's own, and its voxel size."""
    if not os.path.isdir(path):
        return read_volume(path, colour=True, one_slice=True)
    reader = open_reader(path)
    with named_errors(path):
        if reader.dtype.kind not in "biuf":
            raise StackError(f"holds {reader.dtype}, but numbers were expected in a mask; save it as uint8")
    return reader.read(0, reader.shape[0]), reader.voxel_size_nm


# --- masks --------------------------------------------------------------------------------------------------


def _to_mask(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Mask of the values of a file, and what a person should know of it. A uint8 array's memory becomes its own."""
    if values.dtype == np.bool_:
        return values, None
    grey = values if values.ndim == 3 else _largest_colour(values)
    lowest, highest = grey.min(), grey.max()
    if not np.isfinite([lowest, highest]).all():  # NaN if any is
        raise StackError("holds NaN or infinite values, but a mask of two values was expected; replace them")
    if grey.dtype.kind == "i" and lowest < 0:
        raise StackError(
            f"holds whole numbers below 0 (the smallest is {lowest}), but a mask of two values from 0 was expected;"
            " save it as uint8"  # 255 that is read with a sign is -1, and the larger value would be the background
        )
    number, some = _between(grey, lowest, highest)
    if number == 0:
        return _two_values_to_bool(grey, lowest, highest), None
    may_be_smooth = grey.dtype.kind == "f" or grey.dtype in (np.uint8, np.uint16)  # wider ones number instances
    if not may_be_smooth or lowest != 0 or highest not in FULL_SCALES or len(some) + 2 < FEWEST_SMOOTH:
        raise StackError(_wrong_values(grey.dtype, [lowest, *sorted(some), highest]))
    half = highest.item() / 2
    is_rim = 2 * number < grey.size  # smoothing leaves most voxels as they were
    doubt = "if they number instances, use --instances" if is_rim else "it looks like an image, so check the file"
    notice = (
        f"isn't a mask of two values: {number:,} of its {grey.size:,} voxels lie between 0 and {highest:g}, as after"
        f" smoothing, so everything from {half:g} up counts as foreground; {doubt}"
    )
    return _by_slices(grey, lambda part: part >= half), notice


def _two_values_to_bool(grey: np.ndarray, lowest: np.number, highest: np.number) -> np.ndarray:
    """Mask of the larger of two values, or of the only one."""
    if lowest == highest and highest not in (0, *ALL_FOREGROUND):
        raise StackError(
            f"holds only the value {highest:g}, but a mask of two values was expected; save it as 0 and 1, or 0 and 255"
        )
    background = 0 if lowest == highest else lowest
    return _by_slices(grey, lambda part: part > background)


def _by_slices(grey: np.ndarray, is_foreground: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Mask, made slice by slice: no second copy of a uint8 volume."""
    mask = grey.view(np.bool_) if grey.dtype == np.uint8 else np.empty(grey.shape, np.bool_)
    for target, part in zip(mask, grey, strict=True):
        target[...] = is_foreground(part)
    return mask


def _between(grey: np.ndarray, lowest: np.number, highest: np.number) -> tuple[int, set]:
    """How many voxels have neither of two values, and some of the values that they have."""
    number, some = 0, set()
    for part in grey:
        other = part[(part != lowest) & (part != highest)]
        number += other.size
        if other.size and len(some) < LISTED:
            some.update(np.unique(other)[:LISTED])
    return number, some


def _wrong_values(dtype: np.dtype, found: list[np.number]) -> str:
    """What is wrong with more than two values; `found` are some of them in order, with the smallest and largest."""
    names = [f"{value:.6g}" if dtype.kind == "f" else str(value) for value in found]
    if len(names) > LISTED:
        names = [*names[: LISTED - 1], "...", names[-1]]
    listed = ", ".join(names)
    if dtype.kind == "f" and found[0] >= 0 and found[-1] <= 1:
        return f"holds probabilities ({listed}), but a mask of two values was expected; compare them with a threshold"
    return (
        f"holds the values {listed}, but a mask of two values was expected; make the foreground one value, or, if they"
        " number instances, use --instances"
    )


def _largest_colour(values: np.ndarray) -> np.ndarray:
    """Grey volume (z, y, x) of the largest of a pixel's colours; its alpha must say nothing."""
    if values.shape[-1] == 4:
        alpha = values[..., 3]
        if any((part != alpha[0, 0, 0]).any() for part in alpha):
            raise StackError(
                f"has an alpha channel with values from {alpha.min():g} to {alpha.max():g}, but a constant one was"
                " expected; save the mask without transparency"
            )
    grey = np.empty(values.shape[:3], values.dtype)
    for target, part in zip(grey, values, strict=True):
        np.maximum(part[..., 0], part[..., 1], out=target)
        np.maximum(target, part[..., 2], out=target)
    return grey


# --- instances ----------------------------------------------------------------------------------------------


def _to_instances(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Instance numbers of a file, unsigned, and what a person should know of them."""
    if values.ndim == 4:
        raise StackError("is a colour image, but one number a voxel was expected; save the numbers of the instances")
    numbers = _to_unsigned(values)
    largest = numbers.max()
    if largest > 0 and all(((part == 0) | (part == largest)).all() for part in numbers):
        return numbers, (
            f"numbers one instance only ({largest}), so all its foreground counts as one object; if it is a mask of"
            " several, leave out --instances"
        )
    return numbers, None


def _to_unsigned(values: np.ndarray) -> np.ndarray:
    """Whole numbers of any type as unsigned ones; ImageJ keeps large labels as float32."""
    if values.dtype.kind == "u":
        return values
    if values.dtype == np.bool_:
        return values.view(np.uint8)
    numbers = np.empty(values.shape, np.uint32)
    for target, part in zip(numbers, values, strict=True):
        if not ((part >= 0) & (part <= LARGEST_INSTANCE) & (part == np.floor(part))).all():  # false for NaN
            raise StackError(
                "holds values that aren't whole numbers from 0, but numbers of instances were expected; convert them"
            )
        target[...] = part
    return numbers
