"""A reader's own labels: an image and its mask from files, as a model takes them, and the part that is held out."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.errors import FilePath, StackError, named_errors
from mitoseg_lib.grey import GreyRange, grey_range
from mitoseg_lib.masks import read_labels
from mitoseg_lib.prediction import ASSUMED_NM, choose_conversion, resample
from mitoseg_lib.readers import SliceReader, open_reader
from mitoseg_lib.splits import Split, block_split
from mitoseg_lib.stacks import Stack
from mitoseg_lib.tiff import VoxelSize

__all__ = ["LabelledStack", "Parts", "hold_out", "read_labelled"]

ENOUGH_SLICES = 20  # with fewer, a block of slices would be a poor sample, and each slice is wanted for training
VALIDATION_SLICES = 0.15
VALIDATION_PLANE = {"quarter": 0.25, "half": 0.5}  # of the columns or rows; halves for a single mitochondrion
PLANE_AXES = ((2, "columns", ("right", "left")), (1, "rows", ("lower", "upper")))
GAP_NM = 50  # as `block_split` has on EPFL's stacks: 10 slices of 5 nm
GAP_PIXELS = 32  # between the parts of a plane
ENOUGH_FOREGROUND = 0.5  # of the whole stack's share, that each part should have


@dataclass(frozen=True)
class LabelledStack:
    """A labelled stack as a model takes it.

    Attributes
    ----------
    stack : Stack
        With labels; its voxel size is the model's in the plane, and the file's own along z.
    grey_range : tuple of float or None
        For the metadata of a model that is trained on it: the same file then goes through the same transform of its
        grey levels when it is predicted. See `mitoseg_lib.weights.WeightsMetadata`.
    notes : tuple of str
        What the user should know of it, one sentence each.
    """

    stack: Stack
    grey_range: GreyRange | None
    notes: tuple[str, ...]


def read_labelled(
    image: FilePath,
    labels: FilePath,
    *,
    voxel_size_nm: VoxelSize | None = None,
    model_size_nm: VoxelSize = ASSUMED_NM,
    model_grey_range: GreyRange | None = None,
    instances: bool = False,
) -> LabelledStack:
    """Read an image and its labels, all slices of which must be labelled.

    Grey levels and voxel size are changed as `mitoseg predict` changes them for the same model. Labels are resampled
    with the image and cut at half.

    Parameters
    ----------
    image
        What `mitoseg_lib.readers.open_reader` reads: a TIFF, a folder of slices, or a Zarr.
    labels
        Of the same shape, by the rules of `mitoseg_lib.masks.read_labels`.
    voxel_size_nm
        Of both, (z, y, x); by default what the image states, else 5 nm.
    model_size_nm, model_grey_range
        What the model knows; see `mitoseg_lib.prediction.choose_conversion`.
    instances
        Whether the labels number objects, each of which is foreground.

    Raises
    ------
    StackError
        If a file can't be read, the shapes differ, image and labels seem to be swapped, or there is only one class.
    """
    reader = open_reader(image)
    if os.path.realpath(image) == os.path.realpath(labels):
        raise StackError(
            f"{reader.name} was given as the image and as its labels, but two files were expected; name the image first"
            " and its labels second."
        )
    how = choose_conversion(reader, model_size_nm, model_grey_range, voxel_size_nm=voxel_size_nm)
    values = reader.read(0, reader.shape[0])
    _require_grey(values, reader)
    found, _ = read_labels(labels, instances=instances)
    mask = found > 0 if instances else found
    _require_same_shape(mask, labels, reader)
    with named_errors(reader.name):
        grey = how.apply(values)
    size = (how.voxel_size_nm[0], *model_size_nm[1:])
    stack = Stack(grey, _resample_mask(mask, how.plane), size, reader.name)
    stack.require_labels()
    levels = grey_range(grey) if how.grey.source is None else how.grey.target
    return LabelledStack(stack, levels if levels[0] < levels[1] else None, (*how.notes, *_on_empty_slices(stack)))


@dataclass(frozen=True)
class Parts:
    """What trains a model and what validates it.

    Attributes
    ----------
    train, validation : Stack
        With labels of both classes.
    note : str
        What was held out, for the user.
    """

    train: Stack
    validation: Stack
    note: str


def hold_out(stack: Stack) -> Parts:
    """Hold a part of a labelled stack out for validation, with a gap that belongs to neither part.

    Of 20 slices or more the last ones (15 %; `mitoseg_lib.splits.block_split`, with a gap of 50 nm, but of a fifth of
    the slices at most). Of fewer, the right quarter of each slice, with a gap of 32 pixels (or a 16th of the width). If
    either part would have less than half of the stack's share of foreground, the part at the other end of the axis is
    tried, then the lower and the upper quarter, then halves; if all have less, the least poor is taken.

    Parameters
    ----------
    stack : Stack
        With labels.

    Raises
    ------
    StackError
        If no such part leaves both classes in both parts.
    """
    share = stack.require_labels().mean()
    best, most = None, 0.0
    for words, train, validation in _ways(stack):
        shares = [stack.labels[where].mean() for where in (train, validation)]
        enough = min(ENOUGH_FOREGROUND, min(shares) / share)
        if max(shares) < 1 and enough > most:  # the first of equals
            best, most = (words, train, validation), enough
    if best is None:
        raise StackError(
            f"{stack.name}: wherever a part is held out for validation, it or the rest has labels of one class, but"
            " both classes were expected in both; label a larger area, or more slices."
        )
    words, train, validation = best
    return Parts(_part(stack, train), _part(stack, validation), f"held out for validation: {words}")


# --- reading ------------------------------------------------------------------------------------------------


def _require_grey(values: NDArray, reader: SliceReader) -> None:
    """Raise StackError for what can only be a mask."""
    lowest, highest = values.min(), values.max()
    if all(((part == lowest) | (part == highest)).all() for part in values):
        found = f"only the value {lowest:g}" if lowest == highest else f"only two values ({lowest:g} and {highest:g})"
        raise StackError(
            f"{reader.name} holds {found}, but grey levels were expected in an image; name the image first and its"
            " labels second."
        )


def _require_same_shape(mask: NDArray[np.bool_], labels: FilePath, reader: SliceReader) -> None:
    if mask.shape != reader.shape:
        name = os.path.basename(os.path.normpath(os.fsdecode(labels)))
        raise StackError(
            f"{name} has shape {mask.shape}, but {reader.name} has {reader.shape} and the same (z, y, x) was expected;"
            " give the labels of this image."
        )


def _resample_mask(mask: NDArray[np.bool_], plane: tuple[int, ...]) -> NDArray[np.bool_]:
    """Mask on another grid: foreground where half of a pixel is."""
    return mask if mask.shape[1:] == tuple(plane) else resample(mask.astype(np.uint8), plane) >= 0.5


def _on_empty_slices(stack: Stack) -> tuple[str, ...]:
    """Sentence on slices without foreground, which may be slices that nobody labelled."""
    empty = np.flatnonzero(~stack.labels.any(axis=(1, 2)))
    if not len(empty):
        return ()
    listed = ", ".join(map(str, empty[:6].tolist())) + (", ..." if len(empty) > 6 else "")
    return (
        f"{len(empty)} of {stack.shape[0]} slices have no foreground (from 0: {listed}) and count as tissue without"
        " mitochondria, so leave slices that nobody labelled out of both files",
    )


# --- holding out --------------------------------------------------------------------------------------------

Index = tuple[slice, slice, slice]


def _ways(stack: Stack) -> Iterator[tuple[str, Index, Index]]:
    """Ways to hold a part out, best first: in words, what trains, and what validates."""
    depth = stack.shape[0]
    if depth >= ENOUGH_SLICES:
        thickness = stack.voxel_size_nm[0] if stack.voxel_size_nm else ASSUMED_NM[0]
        gap = min(math.ceil(GAP_NM / thickness), depth // 5)
        split = block_split(depth, validation=VALIDATION_SLICES, gap=gap)
        for end, (train, validation) in zip(("last", "first"), _both_ends(split, depth), strict=True):
            found = f"{validation.start} to {validation.stop - 1}; {gap} beside them are left unused"
            yield f"the {end} slices ({found})", *_index(0, train, validation)
    for share, (axis, names, ends) in itertools.product(VALIDATION_PLANE, PLANE_AXES):
        length = stack.shape[axis]
        if length < 2:
            continue
        gap = min(GAP_PIXELS, length // 16)
        split = block_split(length, validation=VALIDATION_PLANE[share], gap=gap)
        for end, (train, validation) in zip(ends, _both_ends(split, length), strict=True):
            found = f"{validation.stop - validation.start} of {length} {names}; {gap} beside them are left unused"
            yield f"the {end} {share} of each slice ({found})", *_index(axis, train, validation)


def _both_ends(split: Split, length: int) -> Iterator[tuple[slice, slice]]:
    """Ranges that train and validate, with the validation at the end of an axis, and mirrored."""
    end, start = split.train[-1] + 1, split.validation[0]
    yield slice(0, end), slice(start, length)
    yield slice(length - end, length), slice(0, length - start)


def _index(axis: int, *ranges: slice) -> Iterator[Index]:
    """Return each range along one axis as an index of a volume."""
    whole = slice(None)
    return (tuple(part if axis == number else whole for number in range(3)) for part in ranges)


def _part(stack: Stack, where: Index) -> Stack:
    image, labels = (np.ascontiguousarray(volume[where]) for volume in (stack.image, stack.labels))
    return Stack(image, labels, stack.voxel_size_nm, stack.name)
