"""Wrong answers to the exercises of chapter 3 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter3 import check_border, check_pooling, check_ten_numbers
from mitoseg_lib.losses import DiceBCELoss, DiceLoss
from mitoseg_lib.metrics import scores

TRUTH = load_example("train").labels[::5, :160, :160]
PREDICTION = np.roll(TRUTH, 5, axis=2) | np.roll(TRUTH, 5, axis=1)
SWAPPED = [scores(t, p) for p, t in zip(PREDICTION, TRUTH, strict=True)]


def widened(n, structure=None, score="iou"):
    masks = np.array([ndimage.binary_dilation(mask, structure, iterations=n) for mask in TRUTH])
    return getattr(scores(masks, TRUTH), score)


def test_a_border_widened_in_each_slice_is_right():
    assert check_border([widened(n) for n in (1, 2, 3)], TRUTH).right
    assert check_border(np.array([widened(n) for n in (1, 2, 3)]).round(4), TRUTH).right


@pytest.mark.parametrize(
    ("ious", "words"),
    [
        (lambda: [widened(n, score="dice") for n in (1, 2, 3)], "These are Dice"),
        (lambda: [scores(ndimage.binary_dilation(TRUTH, iterations=n), TRUTH).iou for n in (1, 2, 3)], "along z"),
        (lambda: [widened(n) for n in (3, 2, 1)], "order"),
        (lambda: [widened(1)] * 3, "`iterations`"),
        (lambda: [0.3, 0.2, 0.1], "all slices at once"),
        (lambda: widened(1), "list of numbers"),
        (
            lambda: [
                np.mean([scores(ndimage.binary_dilation(t, iterations=n), t).iou for t in TRUTH]) for n in (1, 2, 3)
            ],
            "means over slices",
        ),
    ],
)
def test_a_wrong_border_gets_its_hint(ious, words):
    found = check_border(ious(), TRUTH)
    assert not found.right and words in found.words
    assert not any(f"{widened(n):.2f}" in found.words for n in (1, 2, 3))


def test_pooling():
    parts = [scores(p, t) for p, t in zip(PREDICTION, TRUTH, strict=True)]
    total = sum(parts[1:], parts[0])
    assert check_pooling(total, PREDICTION, TRUTH).right
    wrong = {
        "the mean over slices": np.mean([part.iou for part in parts]),
        "counted twice": total + parts[0],
        "are missing": parts[0],
        "the sum itself": total.iou,
        "the first argument": sum(SWAPPED[1:], SWAPPED[0]),
    }
    for words, answer in wrong.items():
        found = check_pooling(answer, PREDICTION, TRUTH)
        assert not found.right and words in found.words, words


def trained(forget=True, backward=True, steps_a_step=1):
    found = {}
    t = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    for loss in (torch.nn.BCEWithLogitsLoss(), DiceLoss(), DiceBCELoss()):
        for steps in (200, 1000):
            logits = torch.full((10,), -6.0, requires_grad=True)
            optimizer = torch.optim.SGD([logits], lr=1.0)
            for _ in range(steps * steps_a_step):
                if forget:
                    optimizer.zero_grad()
                if backward:
                    loss(logits, t).backward()
                optimizer.step()
            found[type(loss).__name__, steps] = torch.sigmoid(logits)[0]
    return found


def test_ten_numbers():
    right = trained()
    assert check_ten_numbers(right).right
    assert check_ten_numbers({key: round(float(value), 2) for key, value in right.items()}).right
    assert "`zero_grad()`" in check_ten_numbers(trained(forget=False)).words
    assert "haven't moved" in check_ten_numbers(trained(backward=False)).words
    assert "('BCEWithLogitsLoss', 200)" in check_ten_numbers(trained(steps_a_step=2)).words
    assert "sigmoid" in check_ten_numbers({key: -3 for key in right}).words
    del right["DiceLoss", 1000]
    assert "('DiceLoss', 1000) is missing" in check_ten_numbers(right).words
