"""Wrong answers to the exercises of chapter 1 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter1 import check_dark_place, check_smooth, check_thickness
from mitoseg_lib.stacks import Stack

ANYTHING = (None, ..., "text", 7, [], [None], [float("nan")] * 4, {}, {1: 2}, len, object(), np.zeros((2, 2)), [1j] * 3)


def tissue():
    """Bright, with a labelled body, a dark one that isn't, and the end of a mitochondrion."""
    image, labels = np.full((60, 120, 100), 150, np.uint8), np.zeros((60, 120, 100), bool)
    image[:, 10:40, 10:40] = image[:, 60:80, 10:30] = image[30:41, 90:110, 70:90] = 90
    labels[:, 10:40, 10:40] = labels[30:40, 90:110, 70:90] = True
    return Stack(image, labels, (5, 5, 5))


def test_something_dark_and_unlabelled_is_right():
    for place in ((40, 70, 20), [40.0, 70.0, 20.0], np.array([40, 70, 20]), torch.tensor([40, 70, 20])):
        assert check_dark_place(place, tissue()).right


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((20, 70, 40), "(z, y, x): the slice"),
        ((39, 70, 20), "slice 40"),
        ((40, 20, 70), "exchanged"),
        ((40, 25, 25), "is labelled"),
        ((40, 43, 25), "rim"),
        ((40, 100, 80), "end of a mitochondrion"),
        ((40, 58, 20), "towards its middle"),
        ((40, 50, 60), "isn't as dark"),
        ((40, 20, 119), "outside"),
        ((40, -50, 20), "outside"),
        ((40, 70.5, 20), "whole"),
        ((70, 20), "3 numbers were expected"),
        (70, "list of numbers"),
    ],
)
def test_a_wrong_place_gets_its_hint(place, words):
    found = check_dark_place(place, tissue())
    assert not found.right and words in found.words and "70" not in found.words


def test_a_place_in_the_phantom():
    test = load_example("test")
    near = ndimage.binary_dilation(test.labels[35:46].any(axis=0), iterations=10)
    smooth = ndimage.uniform_filter(test.image[40], 5)
    smooth[near] = 255
    assert check_dark_place((40, *np.unravel_index(smooth.argmin(), smooth.shape)), test).right
    smooth[near] = 0
    assert not check_dark_place((40, *np.unravel_index(smooth.argmax(), smooth.shape)), test).right


WHOLE = load_example("train")
TRAIN = Stack(WHOLE.image[:50, :200, :200], WHOLE.labels[:50, :200, :200])
BLURRED = ndimage.gaussian_filter(TRAIN.image, 4)
FOUND = (0.25, 0.5, 0.75, 0.9)


def shares(image=BLURRED, of=None, by=lambda called: called.sum()):
    """Shares right of an image, with the thresholds of another."""
    of = image if of is None else of
    levels = np.quantile(of[TRAIN.labels], FOUND)
    return [(TRAIN.labels & (image <= level)).sum() / by(image <= level) for level in levels]


def test_shares_of_the_blurred_stack_are_right():
    assert check_smooth(shares(), BLURRED, TRAIN).right
    assert check_smooth(np.round(shares(), 2), BLURRED, TRAIN).right
    assert check_smooth(torch.tensor(shares()), torch.from_numpy(BLURRED), TRAIN).right
    precise = ndimage.gaussian_filter(TRAIN.image.astype(np.float32), 4)
    assert check_smooth(shares(precise), precise, TRAIN).right


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (lambda: shares(TRAIN.image), "the stack as it is; hand in"),
        (lambda: shares(BLURRED, TRAIN.image), "The thresholds are those of the stack as it is"),
        (lambda: shares(TRAIN.image, BLURRED), "has been compared with them"),
        (lambda: [100 * share for share in shares()], "per cent"),
        (lambda: FOUND, "shares found"),
        (lambda: shares()[::-1], "25 % first"),
        (lambda: shares(by=lambda called: called.size), "divide by the number of called"),
        (lambda: [(TRAIN.labels == (t >= BLURRED)).mean() for t in np.quantile(BLURRED[TRAIN.labels], FOUND)], "alone"),
        (
            lambda: [TRAIN.labels[level >= BLURRED].mean() for level in np.quantile(BLURRED, FOUND)],
            "over all voxels; take it over the labelled",
        ),
        (lambda: [0.9, 0.8, 0.7, 0.6], "Call what is as dark"),
        (lambda: shares()[0], "list of numbers"),
        (lambda: shares()[:3], "4 numbers were expected"),
    ],
)
def test_wrong_shares_get_their_hint(right, words):
    found = check_smooth(right(), BLURRED, TRAIN)
    assert not found.right and words in found.words
    assert not any(f"{share:.2f}" in found.words or f"{share:.0%}" in found.words for share in shares())


@pytest.mark.parametrize(
    ("blurred", "words"),
    [
        (lambda: TRAIN.image, "is the stack as it is"),
        (lambda: ndimage.gaussian_filter(TRAIN.image, (0, 4, 4)), "within its slices"),
        (lambda: ndimage.gaussian_filter(TRAIN.image, 3), "width of 4"),
        (lambda: ndimage.gaussian_filter(TRAIN.image / 255, 4), "in grey levels"),
        (lambda: np.full(TRAIN.shape, np.nan), "in grey levels"),
        (lambda: BLURRED[:40], "shape"),
        (lambda: BLURRED <= 100, "in grey levels"),
    ],
)
def test_another_blur_gets_its_hint(blurred, words):
    found = check_smooth(shares(), blurred(), TRAIN)
    assert not found.right and words in found.words


OBJECTS = np.zeros((40, 60, 60), int)
for number, (depth, height) in enumerate([(6, 31), (10, 33), (21, 39)], start=1):
    OBJECTS[:depth, :height, 10 * number] = number


def test_a_median_thickness():
    for right in (50, 50.0, np.float64(50), torch.tensor(50.0), np.array([50])):
        assert check_thickness(right, OBJECTS, 5.0).right
    wrong = {
        "in slices": 10,
        "in µm": 0.05,
        "the mean": np.mean([6, 10, 21]) * 5,
        "One slice is missing": 45,
        "One slice is too many": 55,
        "within the slices": 33 * 5,
        "whole stack": 200,
        "Take the range": 83,
        "A number was expected": [50],
    }
    for words, answer in wrong.items():
        found = check_thickness(answer, OBJECTS, 5.0)
        assert not found.right and words in found.words and "50" not in found.words, words


@pytest.mark.parametrize("answer", ANYTHING)
def test_no_answer_raises_an_error(answer):
    assert not check_dark_place(answer, tissue()).right
    assert not check_smooth(answer, BLURRED, TRAIN).right
    assert not check_smooth(shares(), answer, TRAIN).right
    assert not check_thickness(answer, OBJECTS, 5.0).right
