"""Wrong answers to the exercises of chapter 5 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from small_answers import JUNK

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter5 import (
    check_cheaper_cube,
    check_formula,
    check_largest_cube,
    check_medians,
    check_normalisations,
)
from mitoseg_lib.inference import median_filter_z
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import UNet
from mitoseg_lib.stacks import Stack


@pytest.mark.parametrize("number", [3072, 3072.0, np.int64(3072), torch.tensor(3072)])
def test_a_cheaper_cube(number):
    assert check_cheaper_cube(number).right


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (27 * 256, "full cube"),
        (9 * 256, "within the slice alone"),
        (3 * 256, "along z alone"),
        (12, "How often is each used"),
        (27, "How often is each used"),
        (12 * 16, "each of the 16"),
        (9 * 16 + 3 * 256, "does so again"),
        (2 * 3072, "one multiply-add"),
        (3072 + 32, "Biases"),
        (3072 * 8 * 32 * 32, "one of them"),
        (1000, "For each of the two"),
    ],
)
def test_a_wrong_number_of_multiply_adds(number, words):
    found = check_cheaper_cube(number)
    assert not found.right and words in found.words and "3072" not in found.words and "3,072" not in found.words


NETS = {"flat": UNet(width=8, depth=1), "wide": UNet(3, width=8, depth=4), "narrow": UNet(3, width=8, depth=3)}
COST = {"flat": (45_984.0, 1311.0), "wide": (56_920.0, 888.0), "narrow": (13_516.0, 442.0)}


def sides(bytes_of_a_cube=3.5e9, *, root=3, steps=(16, 8), per_voxel=(888, 442), name=int):
    exact = [(bytes_of_a_cube / kept) ** (1 / root) for kept in per_voxel]
    return {n: name(x / step) * step for n, x, step in zip(("wide", "narrow"), exact, steps, strict=True)}


def test_the_largest_cube():
    right = sides()
    assert right == {"wide": 144, "narrow": 192}
    for kind in (int, float, np.int64, torch.tensor):
        assert check_largest_cube({name: kind(side) for name, side in right.items()}, COST, NETS).right


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (sides(7e9), "by two cubes together"),
        (sides(14e9), "fills all of the memory"),
        (sides(1.75e9), "once too often"),
        (sides(3.5 * 2**30), "10^9 bytes"),
        (sides(root=2), "side of a square"),
        (sides(root=1), "not a side"),
        (sides(per_voxel=(56_920, 13_516)), "multiply-adds"),
        (sides(per_voxel=(4, 4)), "all activations"),
        (sides(steps=(1, 1)), "isn't a multiple"),
        (sides(name=lambda x: int(x) + 1), "two such cubes keep more"),
        (sides(name=lambda x: int(x) - 1), "still fits"),
        ({"wide": 144, "narrow": 200}, "'narrow'"),
        ({"wide": 192, "narrow": 144}, "of the other"),
        ({"wide": 0.72, "narrow": 0.96}, "in µm"),
        ({"wide": 144}, "'narrow' is missing"),
        (144, "A dictionary was expected"),
    ],
)
def test_a_wrong_cube(answer, words):
    found = check_largest_cube(answer, COST, NETS)
    assert not found.right and words in found.words and not {"144", "192"} & set(found.words.split()), found


SIZES = (1, 3, 5, 7, 9, 15)


def ragged(labels, seed):
    """Probabilities that follow labels, but are unsure from slice to slice."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(labels.astype(np.float32), (1, 2, 2))
    noise = ndimage.gaussian_filter(rng.normal(size=labels.shape), (0, 2, 2)) * 1.5
    return np.clip(smooth + noise, 0, 1).astype(np.float32)


EXAMPLE = load_example("train")
HELD_OUT = Stack(EXAMPLE.image[:30, :48, :48], EXAMPLE.labels[:30, :48, :48])
PROBABILITY = {name: ragged(HELD_OUT.labels, seed) for seed, name in enumerate(("2D", "3D"))}


def teeth(mask):
    return 1000 * ((mask[1:-1] != mask[:-2]) & (mask[1:-1] != mask[2:])).mean()


def medians(name="2D", median=median_filter_z, score="iou"):
    found = {}
    for size in SIZES:
        mask = median(PROBABILITY[name], size) >= 0.5
        found[size] = teeth(mask), getattr(scores(mask, HELD_OUT.labels), score)
    return found


def check(found):
    return check_medians(found, PROBABILITY, HELD_OUT)


def test_medians():
    right = medians()
    assert check(right).right and check(medians(median=lambda p, n: median_filter_z(p >= 0.5, n))).right
    assert check({size: np.round(pair, 2) for size, pair in right.items()}).right
    assert check({size: torch.tensor(pair) for size, pair in right.items()}).right


def along(axis):
    return lambda p, n: np.moveaxis(median_filter_z(np.moveaxis(p, axis, 0), n), 0, axis)


def piled():
    found, p = {}, PROBABILITY["2D"]
    for size in SIZES:
        p = median_filter_z(p, size)
        found[size] = teeth(p >= 0.5), scores(p >= 0.5, HELD_OUT.labels).iou
    return found


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: medians(median=lambda p, n: ndimage.uniform_filter1d(p, n, axis=0)), "means over slices"),
        (lambda: medians(median=along(1)), "along y"),
        (lambda: medians(median=along(2)), "along x"),
        (lambda: medians(median=lambda p, n: ndimage.median_filter(p, (1, n, n))), "within each slice"),
        (lambda: medians(median=lambda p, n: median_filter_z(p, 2 * n + 1)), "not of those on each side"),
        (lambda: medians(median=lambda p, n: p), "All sizes gave the same"),
        (lambda: medians(score="dice"), "Dice"),
        (lambda: medians("3D"), "3D network"),
        (piled, "one before"),
        (lambda: {size: pair[::-1] for size, pair in medians().items()}, "the teeth come first"),
        (lambda: {size: (t / 1000, i) for size, (t, i) in medians().items()}, "in 1000 voxels"),
        (lambda: {size: (t, 100 * i) for size, (t, i) in medians().items()}, "between 0 and 1"),
        (lambda: medians() | {7: (9.0, 0.4)}, "Look at 7 slices"),
        (lambda: {size: pair[1] for size, pair in medians().items()}, "A list of numbers was expected"),
        (lambda: {size: medians()[size] for size in SIZES[:-1]}, "15 is missing"),
    ],
)
def test_wrong_medians_get_their_hint(found, words):
    said = check(found())
    assert not said.right and words in said.words, said


def independent(n, r):
    k = np.arange(1, min(n, len(r)))
    return n / (1 + 2 * ((1 - k / n) * r[k]).sum())


K = np.arange(4000.0)
R = np.exp(-(K**2) / 4)
AXES = [independent(n, R) for n in (8, 16, 16)]
FORMULA = np.prod(AXES)


@pytest.mark.parametrize("seed", range(3))
def test_the_formula(seed):
    rng, counts = np.random.default_rng(seed), []
    for width in (0, 1):
        blurred = [ndimage.gaussian_filter(rng.normal(size=(8, 16, 16)), width, mode="wrap") for _ in range(200)]
        x = torch.tensor(np.array(blurred))[:, None]
        counts.append((x.var((0, 2, 3, 4)) / x.mean((2, 3, 4)).var(0)).median())
    assert check_formula([*counts, FORMULA]).right
    assert check_formula(np.round([*map(float, counts), FORMULA])).right
    assert "first count" in check_formula([counts[1], counts[1], FORMULA]).words


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([2048, 2048, FORMULA], "never blurred"),
        ([2048 * 200, 46 * 200, FORMULA], "all blocks together"),
        ([45, 7, FORMULA], "squared"),
        ([46, 2000, FORMULA], "sharp blocks come first"),
        ([0.99, 0.02, FORMULA], "a share"),
        ([2048, 300, FORMULA], "one block at a time"),
        ([2000, 46, AXES[1]], "one axis"),
        ([2000, 46, sum(AXES)], "multiplied, not added"),
        ([2000, 46, independent(2048, R)], "axis by axis"),
        ([2000, 46, 2048], "What is r"),
        ([2000, 46, np.prod([independent(n, R**2) for n in (8, 16, 16)])], "longer way"),
        ([2000, 46, 5.0], "r starts at"),
        ([2000, float("nan"), FORMULA], "one channel"),
        ([2000, 46], "3 numbers were expected"),
    ],
)
def test_wrong_counts_get_their_hint(numbers, words):
    found = check_formula(numbers)
    assert not found.right and words in found.words and f"{FORMULA:.0f}" not in found.words, found


LABELS = HELD_OUT.labels
WHITE = float(LABELS.mean())
APART = {"batch": [0.6, 0.55, 0.58], "group": [0.3, 0.4, 0.5]}
OVERLAPPING = {"batch": [0.6, 0.55, 0.38], "group": [0.3, 0.4, 0.5]}


def test_conclusions_that_follow():
    assert check_normalisations(APART, "batch", LABELS).right
    assert check_normalisations({"batch": APART["group"], "group": np.array(APART["batch"])}, "group", LABELS).right
    assert check_normalisations(OVERLAPPING, "no difference", LABELS).right
    black = {"batch": [0.6, 0.55, 0.38], "group": [0.0, 0.0, 0.0]}  # which can happen
    assert check_normalisations(black, "batch", LABELS).right
    inside = {"batch": [0.1, 0.9, 0.5], "group": [0.4, 0.5, 0.6]}
    assert check_normalisations(inside, "no difference", LABELS).right


@pytest.mark.parametrize(
    ("ious", "conclusion", "words"),
    [
        (APART, "group", "the opposite"),
        (APART, "no difference", "By the rule"),
        (OVERLAPPING, "batch", "ranges overlap"),
        (OVERLAPPING, "group", "ranges overlap"),
        ({"batch": [0.6], "group": [0.4]}, "batch", "3 numbers were expected"),
        ({"batch": [0.6] * 3, "group": [0.4, 0.3, 0.5]}, "batch", "one and the same number with 'batch'"),
        ({"batch": [0, 0, WHITE], "group": [0.0] * 3}, "no difference", "black or white"),
        ({"batch": APART["batch"], "group": APART["batch"]}, "no difference", "handed on"),
        ({"batch": [60, 55, 58], "group": [30, 40, 50]}, "batch", "between 0 and 1"),
        ({"batch": [0.6, 0.5, 0.4]}, "batch", "'group' is missing"),
        (APART, "BatchNorm", "second argument"),
        (APART, None, "second argument"),
    ],
)
def test_wrong_conclusions_get_their_hint(ious, conclusion, words):
    found = check_normalisations(ious, conclusion, LABELS)
    assert not found.right and words in found.words, found


def test_no_answer_raises_an_error():
    for junk in JUNK:
        assert not check_cheaper_cube(junk).right
        assert not check_largest_cube(junk, COST, NETS).right
        assert not check_largest_cube({"wide": junk, "narrow": junk}, COST, NETS).right
        assert not check(junk).right and not check(dict.fromkeys(SIZES, junk)).right
        assert not check_formula(junk).right and not check_formula([junk] * 3).right
        assert not check_normalisations(junk, "batch", LABELS).right
        assert not check_normalisations(APART, junk, LABELS).right
