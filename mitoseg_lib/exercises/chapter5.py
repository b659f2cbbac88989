"""Checkers of chapter 5, in 3D."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from mitoseg_lib.exercises.feedback import NotYet, as_mapping, as_number, as_numbers, checker, hint, is_close
from mitoseg_lib.inference import median_filter_z
from mitoseg_lib.metrics import scores
from mitoseg_lib.stacks import Stack

__all__ = ["check_cheaper_cube", "check_formula", "check_largest_cube", "check_medians", "check_normalisations"]

CHANNELS = 16
IMAGE = (8, 32, 32)  # the one that the chapter tries a convolution on
MEMORY = 14e9  # bytes of the graphics card
SIZES = (1, 3, 5, 7, 9, 15)  # slices of a median
BLOCK = (8, 16, 16)  # of random numbers
NORMALISATIONS = ("batch", "group")


@checker
def check_cheaper_cube(number: Any) -> str:
    """Exercise 1: multiply-adds a voxel of a convolution of 1 x 3 x 3 and one of 3 x 1 x 1, 16 channels to 16."""
    found = as_number(number, "the number of multiply-adds a voxel")
    in_slice, along_z, pairs = 3 * 3, 3, CHANNELS * CHANNELS
    expected = (in_slice + along_z) * pairs
    if found == expected:
        return "a window that is a product of two smaller ones needs the sum of their weights."
    words = "That is the full cube's number. Two convolutions one after the other each take their own multiply-adds."
    hint(found == in_slice * along_z * pairs, words)
    hint(found == in_slice * pairs, "That is the convolution within the slice alone.")
    hint(found == along_z * pairs, "That is the convolution along z alone.")
    words = "Those are the weights of the two windows. How often is each used, with 16 channels given and 16 made?"
    hint(found in (in_slice + along_z, in_slice * along_z), words)
    words = "Each of the 16 channels that are made looks at each of the 16 that are given."
    hint(found == (in_slice + along_z) * CHANNELS, words)
    words = "The first convolution makes 16 channels of 16, and the second does so again."
    hint(found in ((in_slice + along_z * CHANNELS) * CHANNELS, (in_slice * CHANNELS + along_z) * CHANNELS), words)
    hint(found == 2 * expected, "A multiplication and the addition after it count as one multiply-add.")
    hint(found == expected + 2 * CHANNELS, "Biases are added, not multiplied; leave them out.")
    hint(found == expected * np.prod(IMAGE), "That is for all voxels of an image; it is asked for one of them.")
    raise NotYet("For each of the two convolutions: the weights of its window, times channels given, times those made.")


@checker
def check_largest_cube(sides: Any, cost: Mapping[str, tuple[float, float]], nets: Mapping[str, nn.Module]) -> str:
    """Exercise 2: voxels a side of the largest cube, by the name of each 3D network in `nets`."""
    names = [name for name, net in nets.items() if net.ndim == 3]
    given = as_mapping(sides, "voxels a side for the name of each 3D network", names)
    found = [as_number(given[name], f"the side for {name!r}") for name in names]
    steps = [nets[name].size_multiple for name in names]
    kept = [cost[name][1] for name in names]

    def largest(bytes_of_a_cube: float, per_voxel: list[float] = kept, root: float = 3) -> list[float]:
        exact = [(bytes_of_a_cube / one) ** (1 / root) for one in per_voxel]
        return [side // step * step for side, step in zip(exact, steps, strict=True)]

    expected = largest(MEMORY / 4)
    if found == expected:
        return "a network that keeps half as much a voxel sees only a little further, and one block more costs as much."
    hint(found == expected[::-1], "Each network has got the side of the other.")
    hint(found == largest(MEMORY / 2), "Half of the memory is to be filled, by two cubes together.")
    hint(found == largest(MEMORY), "That is one cube that fills all of the memory; two are to fill half of it.")
    hint(found == largest(MEMORY / 8), "A half is taken once too often: two cubes share half of the memory.")
    hint(found == largest(MEMORY / 4, root=2), "That is the side of a square; a cube has three.")
    voxels = [MEMORY / share / one for share in (1, 2, 4) for one in kept]
    hint(any(is_close(one, number) for one in found for number in voxels), "Those are voxels of the cube, not a side.")
    operations = [cost[name][0] for name in names]
    hint(found == largest(MEMORY / 4, operations), "Those are the multiply-adds; memory is what is kept.")
    hint(found == largest(MEMORY / 4, [4.0] * len(names)), "A voxel keeps more than its own number: all activations.")
    hint(is_close(found, np.multiply(expected, 5e-3)), "Those are lengths in µm; hand in voxels a side.")
    odd = [name for name, side, step in zip(names, found, steps, strict=True) if side % step or side <= 0]
    hint(odd, f"The side for {', '.join(map(repr, odd))} isn't a multiple of the network's `size_multiple`.")
    for name, side, right in zip(names, found, expected, strict=True):
        words = f"For {name!r} two such cubes keep more than half of the memory. Round down; a GB has 10^9 bytes here."
        hint(side > right, words)
        hint(side < right, f"For {name!r} a larger multiple of `size_multiple` still fits.")
    raise NotYet("Divide the bytes that one cube may keep by those of a voxel, and take the side of such a cube.")


@checker
def check_medians(found: Any, probability: Mapping[str, NDArray[np.float32]], held_out: Stack) -> str:
    """Exercise 3: (teeth in 1000, IoU) of the 2D network's answer for each size of a median over slices."""
    hint(not isinstance(probability, Mapping), "The second argument is the dictionary `probability`, of both networks.")
    given = as_mapping(found, "a pair (teeth, IoU) for each size of the median", SIZES)
    pairs = [as_numbers(given[size], f"teeth and IoU for {size} slices", 2) for size in SIZES]
    truth, p = held_out.labels, probability["2D"]
    expected = [_judge(median_filter_z(p >= 0.5, size), truth) for size in SIZES]
    if _are_near(pairs, expected):
        return "teeth can only tell how smooth an answer is; an empty mask has none, either."
    words = "In each pair the teeth come first, and the IoU second."
    hint(_are_near(np.flip(pairs, 1), expected), words)
    words = "The teeth are those in 1000 voxels; `teeth` says so already."
    hint(_are_near(np.multiply(pairs, (1000, 1)), expected), words)
    hint(all(pair == pairs[0] for pair in pairs), "All sizes gave the same. Is `size` what the median is given?")
    hint(not all(0 <= score <= 1 for _, score in pairs), "An IoU lies between 0 and 1.")
    dice = [(teeth, 2 * score / (1 + score)) for teeth, score in expected]
    hint(_are_near(pairs, dice), "The second numbers are Dice coefficients; the question is about the IoU.")
    some = [1, 3]  # sizes 3 and 7 are enough to recognise a mistake
    chosen = [pairs[i] for i in some]
    for mistake, words in _MEDIANS.items():
        hint(_are_near(chosen, [_judge(mistake(p, SIZES[i]) >= 0.5, truth) for i in some]), words)
    piled, filtered = [], p
    for size in SIZES:
        filtered = median_filter_z(filtered, size)
        piled.append(_judge(filtered >= 0.5, truth))
    hint(_are_near(pairs, piled), "Each median here was taken of the one before; start anew from the probabilities.")
    other = [_judge(median_filter_z(probability["3D"] >= 0.5, SIZES[i]), truth) for i in some]
    hint(_are_near(chosen, other), "That is the 3D network; the question is about the 2D one.")
    wrong = [size for size, *both in zip(SIZES, pairs, expected, strict=True) if not _are_near(*both)]
    raise NotYet(f"Look at {wrong[0]} slices. `median_filter_z` of the probabilities comes first, the threshold after.")


@checker
def check_formula(numbers: Any) -> str:
    """Exercise 4: worth of a block of 8 x 16 x 16 random numbers, of a blurred one, and the formula's count of it."""
    hint(_holds_nan(numbers), "There is a nan among them. `worth` takes (blocks, channels, z, y, x), here one channel.")
    sharp, blurred, formula = as_numbers(numbers, "the count of sharp blocks, of blurred ones, and the formula's", 3)
    n = float(np.prod(BLOCK))
    single = np.zeros(BLOCK)
    single[tuple(side // 2 for side in BLOCK)] = 1
    # A blurred value is a weighted sum, so its variance is the sum of the squared weights; the mean stays what it was.
    less = float((ndimage.gaussian_filter(single, 1, mode="wrap") ** 2).sum())
    hint(_is_about(sharp, 200 * n), "That counts all blocks together; what is one block worth?")
    hint(_is_about(blurred, n) and _is_about(sharp, n * less), "The sharp blocks come first, then the blurred ones.")
    roots = _is_about(sharp, np.sqrt(n)) and _is_about(blurred, np.sqrt(n * less))
    hint(roots, "The count is (sd / wobble) squared, as `worth` has it.")
    hint(sharp <= 1.5, "That is a share. Hand in the count, as `worth` gives it.")
    words = "The first count is of independent numbers, so nearly all of a block should count. Was nothing blurred?"
    hint(not _is_about(sharp, n), words)
    hint(_is_about(blurred, n), "The second count is that of numbers which were never blurred.")
    words = "The second count isn't one of blocks that were each blurred by 1 with `wrap`. Blur one block at a time."
    hint(not _is_about(blurred, n * less), words)
    each = [_independent(side, 0.25) for side in BLOCK]
    if is_close(formula, np.prod(each), within=0.02):
        return "two counts made in different ways come out alike but not equal; such a count tells the size of a thing."
    hint(
        any(is_close(formula, one) for one in each), "The formula's count is of one axis; multiply those of all three."
    )
    hint(is_close(formula, np.sum(each)), "The counts of the three axes are multiplied, not added.")
    words = "The formula is asked axis by axis, with 8, 16 and 16, not for all values in one row."
    hint(is_close(formula, _independent(int(n), 0.25), within=0.02), words)
    hint(is_close(formula, n), "The formula says that of values without any correlation. What is r?")
    words = "That is the formula for the blur itself, exp(-k²/2); blurred noise is correlated over a longer way."
    hint(is_close(formula, np.prod([_independent(side, 0.5) for side in BLOCK]), within=0.02), words)
    hint(is_close(formula, np.prod([_independent(side, 1) for side in BLOCK]), within=0.02), "r is exp(-k²/4), not /1.")
    raise NotYet("The counts are right. For the formula, r starts at k = 0 with 1, and each axis has its own n.")


@checker
def check_normalisations(ious: Any, conclusion: Any, labels: NDArray[np.bool_]) -> str:
    """Exercise 5: IoU on the piece held out for three seeds, with "batch" and with "group", and which is better."""
    given = as_mapping(ious, "three IoUs for 'batch' and three for 'group'", NORMALISATIONS)
    found = {name: as_numbers(given[name], f"one IoU a seed, for {name!r}", 3) for name in NORMALISATIONS}
    words = "An IoU lies between 0 and 1."
    hint(not all(0 <= one <= 1 for values in found.values() for one in values), words)
    constant = {name: all(_is_constant(one, labels) for one in values) for name, values in found.items()}
    words = "All six answers are black or white, which compares nothing. Train for longer."
    hint(all(constant.values()), words)
    for name, values in found.items():
        words = f"Three seeds gave one and the same number with {name!r}. Is the seed used, for the weights and blocks?"
        hint(len(set(values)) == 1 and not constant[name], words)
    words = "Both normalisations gave the same numbers. Is it handed on to the network?"
    hint(found["batch"] == found["group"], words)
    words = 'As the second argument hand in "batch", "group" or "no difference".'
    hint(not isinstance(conclusion, str) or conclusion not in (*NORMALISATIONS, "no difference"), words)
    lower, higher = sorted(NORMALISATIONS, key=lambda name: min(found[name]))
    overlap = min(found[higher]) <= max(found[lower])
    if not overlap:
        words = "No number of one is within the range of the other. By the rule of the exercise that is a difference."
        hint(conclusion == "no difference", words)
        hint(conclusion == lower, "The IoUs that you handed in say the opposite.")
        return "three seeds that don't overlap are a sign. Another recipe or stack can still turn it round."
    words = "The two ranges overlap, whatever the means say; another three seeds could turn the order round."
    hint(conclusion != "no difference", words)
    return "to see no difference in six runs is a result, and a more honest one than the better of two."


def _teeth(mask: NDArray[np.bool_]) -> float:
    above, here, below = mask[:-2], mask[1:-1], mask[2:]
    return 1000 * float(((here != above) & (here != below)).mean())


def _judge(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float]:
    return _teeth(mask), scores(mask, truth).iou


def _are_near(found: Any, expected: Any) -> bool:
    """Tell whether numbers agree, also those that were rounded to two digits."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.0051)


def _mean(p: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return ndimage.uniform_filter1d(p, size, axis=0)


def _median_along(axis: int) -> Callable[[NDArray[np.float32], int], NDArray[np.float32]]:
    def median(p: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        return np.moveaxis(median_filter_z(np.moveaxis(p, axis, 0), size), 0, axis)

    return median


def _median_in_plane(p: NDArray[np.float32], size: int) -> NDArray[np.uint8]:
    return ndimage.median_filter((p >= 0.5).astype(np.uint8), size=(1, size, size), mode="reflect")


def _median_of_two_too_many(p: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return median_filter_z(p, 2 * size + 1)  # as if the size were counted in each direction


_MEDIANS = {
    _mean: "Those are means over slices, which a single sure voxel can pull; a median was asked for.",
    _median_along(1): "Those are medians along y. The teeth stand along z, the first axis.",
    _median_along(2): "Those are medians along x. The teeth stand along z, the first axis.",
    _median_in_plane: "Those are medians within each slice. The slices above and below are the ones to ask.",
    _median_of_two_too_many: "The size is the number of all slices of the median, not of those on each side.",
}


def _holds_nan(numbers: Any) -> bool:
    """Tell whether an answer is a list of numbers with a nan in it."""
    try:
        return bool(np.isnan(np.asarray(numbers, float)).any()) and np.ndim(numbers) > 0
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return False


def _is_about(found: float, expected: float) -> bool:
    """Tell whether a count from 200 random blocks agrees with what it is on the average (its sd is a tenth)."""
    return 0.6 * expected < found < 1.5 * expected


def _independent(n: int, fall: float) -> float:
    """Count the independent ones of n values in a row whose correlation after k steps is exp(-fall k²)."""
    k = np.arange(1, n)
    return float(n / (1 + 2 * ((1 - k / n) * np.exp(-fall * k**2)).sum()))


def _is_constant(score: float, labels: NDArray[np.bool_]) -> bool:
    """Tell whether an IoU is that of an answer that is all black or all white."""
    return min(score, abs(score - float(labels.mean()))) < 5e-3
