"""Checkers of chapter 2, patches, augmentation and an honest split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_array,
    as_numbers,
    call,
    checker,
    hint,
    is_close,
    require_function,
)  # fmt: skip
from mitoseg_lib.metrics import scores
from mitoseg_lib.splits import Split, block_split
from mitoseg_lib.stacks import Stack

__all__ = ["check_distances", "check_gaps", "check_turned_patch"]

GAPS = (0, 5, 10, 20)
STRIPE = 16  # grey levels, and as many pixels


@checker
def check_distances(far: Any, split: Split) -> str:
    """Exercise 1: how far each validation slice is from its nearest training slice, in slices, in any order."""
    found = np.sort(as_numbers(far, "the distance of each validation slice"))
    nearest = np.array([_nearest(z, split.train) for z in split.validation])
    expected = np.sort(np.abs(nearest - split.validation))
    if _are_equal(found, expected):
        return "a score on such slices is a score on near-copies of what a network was trained on."
    hint(_are_equal(np.sort(np.abs(found)), expected), "Some are negative; on which side a slice lies doesn't matter.")
    hint(_are_equal(found, np.sort(nearest)), "These are the numbers of the nearest slices, not how far they are away.")
    hint(_are_equal(found, expected - 1), "These are the slices in between; a direct neighbour is 1 slice away.")
    hint(_are_equal(found, np.unique(expected)), "Each distance is there once; hand in one for each validation slice.")
    words = "It is the other way round: look at each validation slice, and at the training slice nearest to it."
    hint(_are_equal(found, _distances(split.train, split.validation)), words)
    block = block_split(len(split.train) + len(split.validation))
    words = "These belong to the block with a gap; look at the random split."
    hint(_are_equal(found, _distances(block.validation, block.train)), words)
    n = len(expected)
    hint(len(found) != n, f"The numbers handed in are {len(found)}, but there are {n} validation slices.")
    hint(found.min() == 0, "No validation slice is a training slice, so none is 0 slices away.")
    raise NotYet("Take the number of each validation slice and that of the nearest training slice, and subtract.")


@checker
def check_gaps(dices: Any, labels: NDArray[np.bool_]) -> str:
    """Exercise 2: the Dice of copying the nearest training slice, (z, y, x), for gaps of 0, 5, 10 and 20 slices."""
    found = as_numbers(dices, "the Dice for each of the four gaps", len(GAPS))
    splits = [block_split(len(labels), gap=gap) for gap in GAPS]
    pairs = [_copied_and_true(split, labels) for split in splits]
    judged = [scores(*pair) for pair in pairs]
    expected = [one.dice for one in judged]
    if _are_near(found, expected):
        return "what is left to copy are the mitochondria that reach across the gap."
    hint(_are_near(found, [one.iou for one in judged]), "These are IoUs; the question is about the Dice.")
    hint(_are_near(np.divide(found, 100), expected), "These are per cent; a Dice lies between 0 and 1.")
    words = "These are the numbers of training slices that are left. Hand in the Dice of copying."
    hint(is_close(found, [len(split.train) for split in splits]), words)
    hint(any(not 0 <= value <= 1 for value in found), "A Dice lies between 0 and 1.")
    words = "The slices are compared with themselves here; the truth is the labels of the validation slices."
    hint(_are_near(found, np.ones(len(GAPS))), words)
    words = "All four are the same. Does the gap reach `block_split`, and is the new split the one that is scored?"
    hint(_are_near(found, found[:1] * len(GAPS)), words)
    hint(_are_near(found[::-1], expected), f"Hand them in in the order of the gaps: {', '.join(map(str, GAPS))}.")
    by_slice = [np.mean([scores(c, t).dice for c, t in zip(*pair, strict=True)]) for pair in pairs]
    hint(_are_near(found, by_slice), "These are means over slices; give `dice` all validation slices at once.")
    first = [scores(copied[0], truth[0]).dice for copied, truth in pairs]
    hint(_are_near(found, first), "This is the first validation slice alone; copy for all of them.")
    wrong = [gap for gap, *pair in zip(GAPS, found, expected, strict=True) if not _are_near(*pair)]
    words = f"Look at the gap of {wrong[0]}. Copied are the labels of the nearest training slices, for each validation"
    raise NotYet(f"{words} slice, and the truth is the validation slices' own.")


@checker
def check_turned_patch(turned_patch: Any) -> str:
    """Exercise 3: a function (stack, size, degrees, rng) -> image and mask, (size, size), with no corner filled."""
    require_function(turned_patch, "turned_patch")
    for size, degrees in ((64, 17), (33, 45), (64, 45), (300, 45)):
        _require_no_filling(turned_patch, size, degrees)
        for axis in (1, 0):
            _require_turned(turned_patch, size, degrees, axis)
    _require_random(turned_patch)
    return "each pixel comes from tissue, at the price of a larger cut and a little smoothing."


def _require_no_filling(function: Callable[..., Any], size: int, degrees: float) -> None:
    """Hint unless a stack that is white and labelled all over stays so."""
    white = np.full((4, _side(size), _side(size)), 255, np.uint8)
    image, mask = _patch(function, Stack(white, white > 0), size, degrees)
    words = "From a stack that is white (255) all over, the middle of the patch isn't white. Is it cut from `stack`?"
    hint(image[size // 2, size // 2] < 250, words)
    words = (
        f"From a stack that is white all over, a patch turned by {degrees} degrees has dark corners: they are filled."
    )
    hint(image.min() < 250, words)
    words = f"From a stack that is labelled all over, a mask turned by {degrees} degrees isn't: its corners are filled."
    hint(not mask.all(), words)


def _require_turned(function: Callable[..., Any], size: int, degrees: float, axis: int) -> None:
    """Hint unless image and mask are turned alike, by these degrees, with tissue of the stack in the corners.

    The stack becomes brighter with the number of its row (axis 0) or column (1): turned, that is an even slope, and
    where it is mirrored it isn't.
    """
    side = _side(size)
    step = 200 / side  # grey levels a pixel
    grey = np.tile(np.rint(np.indices((side, side))[axis] * step + 28).astype(np.uint8), (4, 1, 1))
    image, mask = _patch(function, Stack(grey, _is_striped(grey)), size, degrees)
    rows_out, columns_out = np.indices(image.shape) - (size - 1) / 2
    disc = np.hypot(rows_out, columns_out) < size / 2 - 2  # holds tissue whatever has been done to the corners
    design = np.stack([rows_out, columns_out, np.ones_like(image)], axis=-1)
    slope = np.linalg.lstsq(design[disc], image[disc], rcond=None)[0]
    off = np.abs(design @ slope - image)
    hint(off[disc].max() > 3, "The middle of the patch isn't as it is in the stack; only turn it and cut it.")
    turned = np.degrees(np.arctan2(abs(slope[1 - axis]), slope[axis]))
    hint(turned < 1, f"With {degrees} degrees the patch isn't turned, or hardly. `rotate` takes degrees, not radians.")
    words = f"With {degrees} degrees the patch is turned by another angle. Is it turned once, and by `degrees`?"
    hint(abs(turned - degrees) > 2, words)
    stretched = abs(np.hypot(*slope[:2]) / step - 1) > 0.05
    hint(stretched, "The tissue is smaller or larger than in the stack. Cut the inner part out, don't resize.")
    words = (
        f"Turned by {degrees} degrees, a patch of {size} holds mirrored tissue in its corners. Is the side of the cut"
        " as long as the patch's diagonal, and is the inner part its middle?"
    )
    hint(off.max() > 3, words)
    level = np.rint(image)
    sure = (level % STRIPE >= 2) & (level % STRIPE <= STRIPE - 3)  # not where a stripe ends
    words = "Image and mask don't belong together. Take both from one place, and turn and cut both in the same way."
    hint(not np.array_equal(mask[sure], _is_striped(level[sure])), words)


def _side(size: int) -> int:
    """Side of a stack that holds patches of a size with enough around them."""
    return max(200, 2 * size)


def _require_random(function: Callable[..., Any]) -> None:
    """Hint unless the place depends on the generator, in each direction, and on nothing else."""
    for axis, name in enumerate(("slice", "row", "column")):
        image = np.indices((20, 200, 200), np.uint8)[axis] * np.uint8(10 if axis == 0 else 1)  # grey tells the place
        places = [_patch(function, Stack(image, image > 0), 32, 30, seed)[0].mean() for seed in (0, *range(8))]
        words = "Called twice with generators of the same seed, the function gives two patches. Draw from `rng` alone."
        hint(places[0] != places[1], words)
        words = f"The {name} is the same with each seed. Draw the place with `rng`, as `random_patch` does."
        hint(np.ptp(places) < 1, words)


def _patch(
    function: Callable[..., Any], stack: Stack, size: int, degrees: float, seed: int = 0
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Call a learner's function, and return image and mask, or hint at what is returned instead."""
    words = f"a stack of the shape {stack.shape}, the size {size} and {degrees} degrees"
    pair = call(function, stack, size, degrees, np.random.default_rng(seed), words=words)
    hint(pair is None, "The function returns nothing; end it with `return`, image and mask.")
    words = "The function should return two things, image and mask."
    hint(not isinstance(pair, tuple | list) or len(pair) != 2, words)
    image, mask = (as_array(part, f"the {name}") for part, name in zip(pair, ("image", "mask"), strict=True))
    words = f"Asked for a size of {size}, the function returns {image.shape}. Return the inner part of what is turned."
    hint(image.ndim == 2 and min(image.shape) > size, words)
    for part, name in ((image, "image"), (mask, "mask")):
        as_array(part, f"the {name}, for a size of {size}", (size, size))
    hint(not np.isfinite(image).all(), "The image holds values that aren't numbers.")
    return image.astype(float), mask > 0


def _is_striped(levels: NDArray) -> NDArray[np.bool_]:
    return levels // STRIPE % 2 == 1


def _nearest(z: int, slices: Iterable[int]) -> int:
    return min(slices, key=lambda other: abs(other - z))


def _distances(those: Iterable[int], others: Iterable[int]) -> NDArray[np.integer]:
    return np.sort([abs(z - _nearest(z, others)) for z in those])


def _copied_and_true(split: Split, labels: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return labels[[_nearest(z, split.train) for z in split.validation]], labels[list(split.validation)]


def _are_equal(found: ArrayLike, expected: ArrayLike) -> bool:
    return np.shape(found) == np.shape(expected) and bool(np.array_equal(found, expected))


def _are_near(found: ArrayLike, expected: ArrayLike) -> bool:
    """Tell whether Dice coefficients agree, also those that were rounded to two digits."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.0051)
