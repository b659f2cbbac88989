"""Checkers of chapter 1, explore the data."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from mitoseg_lib.exercises.feedback import NotYet, as_array, as_number, as_numbers, checker, hint, is_close
from mitoseg_lib.stacks import Stack

__all__ = ["check_dark_place", "check_smooth", "check_thickness"]

SLICE = 40
RIM = 5  # voxels beside a labelled one that may still be its rim
FOUND = (0.25, 0.5, 0.75, 0.9)
WIDTH = 4
STEPS = 16  # of a grey level


@checker
def check_dark_place(place: Any, stack: Stack) -> str:
    """Exercise 1: the place (z, y, x), in voxels, of something dark in slice 40 that is no mitochondrion."""
    given = as_numbers(place, "the place (z, y, x)", 3)
    hint(any(value != round(value) for value in given), "The numbers of a slice, a row and a column are whole.")
    z, y, x = (int(value) for value in given)
    words = f"The place is looked for in slice {SLICE}. The order of axes is (z, y, x): the slice's number first."
    hint(z != SLICE, words)
    inside = all(0 <= index < n for index, n in zip((z, y, x), stack.shape, strict=True))
    hint(not inside, "That lies outside the stack, whose rows and columns are counted from 0 at the upper left.")
    if _is_dark_background(stack, y, x):
        return "whatever it is, a network has to learn that darkness alone makes no mitochondrion."
    hint(stack.labels[z, y, x], "This voxel is labelled, so it belongs to a mitochondrion.")
    words = f"Within {RIM} voxels lies a labelled one, so this may be the rim of that mitochondrion. Go further away."
    hint(_around(stack.labels[z], y, x, RIM).any(), words)
    words = "This is the end of a mitochondrion: it is labelled a few slices further up or down."
    hint(_near_labels(stack, y, x), words)
    corners = [(y + i, x + j) for i in range(-RIM, RIM + 1) for j in range(-RIM, RIM + 1)]
    height, width = stack.shape[1:]
    darker = any(0 <= i < height and 0 <= j < width and _is_dark_background(stack, i, j) for i, j in corners)
    hint(darker, "Something dark lies beside it; move a few voxels towards its middle.")
    turned = y < width and x < height and _is_dark_background(stack, x, y)
    hint(turned, "Are row and column exchanged? The order is (z, y, x); in a picture y is the number at its side.")
    raise NotYet("It isn't labelled, but it isn't as dark as mitochondria are in this slice, either.")


@checker
def check_smooth(right: Any, blurred: Any, stack: Stack) -> str:
    """Exercise 2: the shares right, as fractions, of the blurred stack, where 25, 50, 75 and 90 % are found."""
    found = as_numbers(right, "the shares right for the four shares found", len(FOUND))
    grey = as_array(blurred, "the blurred stack", stack.shape)
    _require_blur(grey, stack.image)
    counts, own = _counts(grey, stack.labels), _counts(stack.image, stack.labels)
    levels, own_levels = _quantiles(counts[0]), _quantiles(own[0])
    expected = _shares_right(counts, levels)
    if _are_near(found, expected):
        return "a blur weighs its surroundings in one fixed way; a network learns how to."
    hint(all(value > 1 for value in found), "These are per cent; hand in fractions, between 0 and 1.")
    hint(is_close(found, FOUND, within=0.01), "These are the shares found. How many of the called voxels are right?")
    hint(_are_near(found[::-1], expected), "Hand them in in the order of the shares found, 25 % first.")
    words = "These belong to the stack as it is; hand in those of the blurred one."
    hint(_are_near(found, _shares_right(own, own_levels)), words)
    words = "The thresholds are those of the stack as it is. Take the quantile of the blurred stack, too."
    hint(_are_near(found, _shares_right(counts, own_levels)), words)
    words = "The thresholds are those of the blurred stack, but the stack as it is has been compared with them."
    hint(_are_near(found, _shares_right(own, levels)), words)
    (called_rightly, called), n = counts[:, levels], stack.image.size
    words = "These are shares of all voxels of the stack; divide by the number of called ones."
    hint(_are_near(found, called_rightly / n), words)
    words = "These are the shares of all voxels that are judged rightly; look at the called ones alone."
    hint(_are_near(found, (2 * called_rightly + n - called - counts[0, -1]) / n), words)
    words = "The quantile is taken over all voxels; take it over the labelled ones alone."
    hint(_are_near(found, _shares_right(counts, _quantiles(counts[1]))), words)
    raise NotYet("Call what is as dark as the threshold or darker, and see how many of the called voxels are labelled.")


@checker
def check_thickness(median_nm: Any, objects: NDArray[np.integer], z_nm: float) -> str:
    """Exercise 3: the median extent of the numbered objects along z, in nm."""
    found = as_number(median_nm, "the median in nm")
    boxes = [box for box in ndimage.find_objects(objects) if box is not None]
    extents = np.array([[side.stop - side.start for side in box] for box in boxes])
    median, *others = np.median(extents, axis=0)
    near = z_nm / 5
    if abs(found - median * z_nm) <= near:
        return "few objects show all of their depth in a stack as thin as this one."
    hint(abs(found - median) <= near / 5, "This is in slices; a slice has a thickness in nm.")
    hint(is_close(found, median * z_nm / 1000), "This is in µm; hand it in in nm.")
    hint(abs(found - extents[:, 0].mean() * z_nm) <= near, "This is the mean, which a few long objects pull up.")
    words = "One slice is missing. A range doesn't contain its `.stop`, so it is `.stop - .start` long."
    hint(abs(found - (median - 1) * z_nm) <= near, words)
    words = "One slice is too many. A range doesn't contain its `.stop`, so it is `.stop - .start` long."
    hint(abs(found - (median + 1) * z_nm) <= near, words)
    in_slice = any(abs(found - other * z_nm) <= near for other in others)
    hint(in_slice, "This is an extent within the slices. Of the three ranges in a box the first is that of z.")
    hint(abs(found - len(objects) * z_nm) <= near, "This is the depth of the whole stack.")
    raise NotYet("Take the range of z from each object's box, how many slices it holds, and the median of that.")


def _is_dark_background(stack: Stack, y: int, x: int) -> bool:
    """Tell whether the mean of 5 x 5 pixels is as dark as three quarters of the labelled ones, and none is near."""
    image, labels = stack.image[SLICE], stack.labels[SLICE]
    inside = image[labels] if labels.any() else image
    dark = _around(image, y, x, 2).mean() <= np.quantile(inside, 0.75)
    return bool(dark and not _near_labels(stack, y, x))


def _near_labels(stack: Stack, y: int, x: int) -> bool:
    slices = stack.labels[max(SLICE - RIM, 0) : SLICE + RIM + 1]
    return any(_around(labels, y, x, RIM).any() for labels in slices)


def _around(picture: NDArray, y: int, x: int, reach: int) -> NDArray:
    return picture[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]


def _require_blur(grey: NDArray, image: NDArray[np.uint8]) -> None:
    """Hint if a stack isn't the blurred one; only its middle is compared, since blurring a real stack takes seconds."""
    margin, core = 4 * WIDTH, 16  # from 4 widths away nothing is mixed in
    starts = [max((n - core) // 2 - margin, 0) for n in image.shape]
    cut = tuple(slice(start, start + core + 2 * margin) for start in starts)
    inner = tuple(
        slice(margin, -margin) if n >= core + 2 * margin else slice(None) for n in image.shape
    )  # an axis that is shorter is compared as a whole
    part, own = grey[cut][inner].astype(np.float32), image[cut]
    hint(np.array_equal(part, own[inner]), "The blurred stack is the stack as it is.")

    def is_blurred_by(*widths: float) -> bool:
        kinds = (own, own.astype(np.float32))  # whole grey levels, or fractions of them
        return any(np.abs(ndimage.gaussian_filter(kind, widths)[inner] - part).mean() < 0.1 for kind in kinds)

    right = is_blurred_by(WIDTH, WIDTH, WIDTH)
    words = "This stack is blurred within its slices only; blur it along z, too, all at once."
    hint(not right and is_blurred_by(0, WIDTH, WIDTH), words)
    words = f"This isn't the stack in grey levels, blurred with a width of {WIDTH}: `ndimage.gaussian_filter`."
    hint(not right, words)


def _counts(grey: NDArray, labels: NDArray[np.bool_]) -> NDArray[np.integer]:
    """Count the labelled voxels and all, up to each level: steps of a fraction of a grey level, quick to ask again."""
    counts = np.zeros((2, 256 * STEPS), np.int64)
    for picture, mask in zip(grey, labels, strict=True):
        levels = (np.clip(np.nan_to_num(picture), 0, 255) * np.float32(STEPS)).astype(np.intp)
        counts += [np.bincount(part.ravel(), minlength=256 * STEPS) for part in (levels[mask], levels)]
    return counts.cumsum(axis=1)


def _quantiles(counts: NDArray[np.integer]) -> NDArray[np.integer]:
    """Return the levels up to which the shares found lie."""
    return np.searchsorted(counts, np.multiply(FOUND, counts[-1]))


def _shares_right(counts: NDArray[np.integer], levels: NDArray[np.integer]) -> NDArray[np.floating]:
    """Return the share of labelled voxels among those up to each level."""
    right, called = counts[:, levels]
    return right / np.maximum(called, 1)


def _are_near(found: ArrayLike, expected: ArrayLike) -> bool:
    """Tell whether shares agree, also those that were rounded to whole per cent."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.0051)
