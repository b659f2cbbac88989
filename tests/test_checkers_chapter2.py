"""Wrong answers to the exercises of chapter 2 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter2 import check_distances, check_gaps, check_turned_patch
from mitoseg_lib.metrics import scores
from mitoseg_lib.patches import rotate
from mitoseg_lib.splits import block_split, random_split

SPLIT = random_split(60)
LABELS = load_example("train").labels[:, 200:400, 200:400]  # where slices differ much in how full they are
ANYTHING = (None, ..., "text", 7, [], [None], [float("nan")] * 4, {}, {1: 2}, len, object(), np.zeros((2, 2)), [1j] * 4)


def nearest(those, others):
    others = np.array(others)
    return np.array([others[np.abs(others - z).argmin()] for z in those])


def away(those, others):
    return np.array(those) - nearest(those, others)


def test_distances():
    far = np.abs(away(SPLIT.validation, SPLIT.train))
    assert set(far) > {1}, "the test needs a slice that has no direct neighbour"
    for right in (far, sorted(far.tolist()), torch.from_numpy(far), tuple(far.astype(float))):
        assert check_distances(right, SPLIT).right
    block = block_split(60)
    wrong = {
        "Some are negative": away(SPLIT.validation, SPLIT.train),
        "numbers of the nearest slices": nearest(SPLIT.validation, SPLIT.train),
        "slices in between": far - 1,
        "there once": sorted(set(far)),
        "the other way round": np.abs(away(SPLIT.train, SPLIT.validation)),
        "with a gap": away(block.validation, block.train),
        "are 3, but there are 12": [1, 1, 1],
        "none is 0": np.zeros(12),
        "and subtract": np.full(12, 5),
        "a list of numbers was expected": (far == 1).sum(),
    }
    for words, answer in wrong.items():
        found = check_distances(answer, SPLIT)
        assert not found.right and words in found.words.replace("A list", "a list"), words


def copied(gap, score="dice", part=slice(None)):
    split = block_split(len(LABELS), gap=gap)
    copies, truth = LABELS[nearest(split.validation, split.train)], LABELS[list(split.validation)]
    return getattr(scores(copies[part], truth[part]), score)


GAPS = (0, 5, 10, 20)
DICES = [copied(gap) for gap in GAPS]


def test_the_dice_of_copying_is_right():
    for right in (DICES, np.round(DICES, 2), torch.tensor(DICES), np.float32(DICES)):
        assert check_gaps(right, LABELS).right


@pytest.mark.parametrize(
    ("dices", "words"),
    [
        ([copied(gap, "iou") for gap in GAPS], "These are IoUs"),
        ([100 * dice for dice in DICES], "per cent"),
        ([len(block_split(60, gap=gap).train) for gap in GAPS], "training slices that are left"),
        ([-1, 0, 0, 0], "between 0 and 1"),
        ([1.0] * 4, "compared with themselves"),
        ([copied(10)] * 4, "All four are the same"),
        ([0.97] * 4, "All four are the same"),
        (DICES[::-1], "0, 5, 10, 20"),
        ([np.mean([copied(gap, part=slice(i, i + 1)) for i in range(9)]) for gap in GAPS], "means over slices"),
        ([copied(gap, part=slice(1)) for gap in GAPS], "first validation slice"),
        ([*DICES[:2], 0.1, 0.05], "Look at the gap of 10"),
        (DICES[:3], "4 numbers were expected"),
        (DICES[0], "list of numbers"),
    ],
)
def test_a_wrong_dice_gets_its_hint(dices, words):
    found = check_gaps(dices, LABELS)
    assert not found.right and words in found.words
    assert not any(f"{dice:.2f}" in found.words for dice in DICES)


def cut(stack, size, rng):
    z, y, x = rng.integers((stack.shape[0], stack.shape[1] - size + 1, stack.shape[2] - size + 1))
    window = np.s_[z, y : y + size, x : x + size]
    return stack.image[window], stack.labels[window]


def turned_patch(stack, size, degrees, rng, factor=2**0.5, extra=2, border="reflect", shift=0):
    side = int(np.ceil(size * factor)) + extra
    image, mask = rotate(*cut(stack, side, rng), degrees, border=border)
    start = (side - size) // 2 + shift
    inner = np.s_[start : start + size, start : start + size]
    return image[inner], mask[inner]


def test_a_patch_cut_larger_is_right():
    assert check_turned_patch(turned_patch).right
    assert check_turned_patch(lambda *given: turned_patch(*given, extra=20, border="constant")).right
    assert check_turned_patch(lambda *given: [torch.from_numpy(part) for part in turned_patch(*given)]).right
    assert check_turned_patch(lambda stack, size, degrees, rng: turned_patch(stack, size, -degrees, rng)).right


def other_mask(stack, size, degrees, rng):
    return turned_patch(stack, size, degrees, rng)[0], turned_patch(stack, size, degrees, rng)[1]


def mask_left_alone(stack, size, degrees, rng):
    state = rng.bit_generator.state
    image, _ = turned_patch(stack, size, degrees, rng)
    rng.bit_generator.state = state
    return image, turned_patch(stack, size, 0, rng)[1]


def mask_filled(stack, size, degrees, rng):
    state = rng.bit_generator.state
    image, _ = turned_patch(stack, size, degrees, rng)
    rng.bit_generator.state = state
    return image, turned_patch(stack, size, degrees, rng, 1, 0, "constant")[1]


def resized(stack, size, degrees, rng):
    image, mask = turned_patch(stack, 2 * size, degrees, rng)
    return image[::2, ::2], mask[::2, ::2]


def scaled(stack, size, degrees, rng):
    image, mask = turned_patch(stack, size, degrees, rng)
    return image / 255, mask


def of_another_stack(stack, size, degrees, rng):
    return turned_patch(load_example("train"), size, degrees, rng)


def in_the_first_slice(stack, size, degrees, rng):
    return turned_patch(stack.slices([0]), size, degrees, rng)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda *given: turned_patch(*given, factor=1, extra=0, border="constant"), "has dark corners"),
        (mask_filled, "labelled all over"),
        (lambda *given: turned_patch(*given, factor=1, extra=0), "mirrored tissue"),
        (lambda *given: turned_patch(*given, factor=1.2), "mirrored tissue"),
        (lambda *given: turned_patch(*given, factor=1, extra=68), "a patch of 300 holds mirrored tissue"),
        (lambda *given: turned_patch(*given, extra=0, shift=-5), "mirrored tissue"),
        (lambda stack, size, degrees, rng: turned_patch(stack, size, 0, rng), "isn't turned"),
        (lambda stack, size, degrees, rng: turned_patch(stack, size, np.radians(degrees), rng), "radians"),
        (lambda stack, size, degrees, rng: turned_patch(stack, size, 2 * degrees, rng), "another angle"),
        (lambda stack, size, degrees, rng: turned_patch(stack, size, 17, rng), "another angle"),
        (lambda stack, size, degrees, rng: rotate(*cut(stack, 93, rng), degrees), "inner part"),
        (lambda stack, size, degrees, rng: turned_patch(stack, 30, degrees, rng), "(64, 64) was expected"),
        (other_mask, "don't belong together"),
        (mask_left_alone, "don't belong together"),
        (resized, "don't resize"),
        (scaled, "isn't white"),
        (of_another_stack, "isn't white"),
        (in_the_first_slice, "The slice is the same"),
        (lambda s, size, degrees, rng: turned_patch(s, size, degrees, np.random.default_rng(0)), "the same with each"),
        (lambda s, size, degrees, rng: turned_patch(s, size, degrees, np.random.default_rng()), "gives two patches"),
        (lambda stack, size, degrees, rng: None, "returns nothing"),
        (lambda *given: turned_patch(*given)[0], "two things"),
        (lambda stack, size: None, "raised TypeError"),
        (lambda *given: 1 / 0, "raised ZeroDivisionError"),
        (lambda *given: ("image", "mask"), "An array was expected"),
        (lambda stack, size, *given: (np.full((size, size), np.nan),) * 2, "aren't numbers"),
        (turned_patch(load_example("train"), 32, 30, np.random.default_rng(0)), "without brackets"),
    ],
)
def test_a_wrong_function_gets_its_hint(function, words):
    found = check_turned_patch(function)
    assert not found.right and words in found.words


@pytest.mark.parametrize("answer", ANYTHING)
def test_no_answer_raises_an_error(answer):
    assert not check_distances(answer, SPLIT).right
    assert not check_gaps(answer, LABELS).right
    assert not check_turned_patch(answer).right
