"""Wrong answers to the exercises of chapter 7 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mitoseg_lib.calibration import disagreement, errors_among_most_uncertain
from mitoseg_lib.datasets import load_example
from mitoseg_lib.error_kinds import KINDS, errors_by_kind
from mitoseg_lib.exercises.chapter7 import check_best_of, check_doubts, check_median, check_rule
from mitoseg_lib.inference import median_filter_z
from mitoseg_lib.metrics import scores

JUNK = [None, ..., "text", 3, [], [1, 2], {"a": 1}, len, float("nan"), np.zeros(3), torch.zeros(2, 2), object(), int]
TRUTH = load_example("train").labels[20:29, :128, :128]
RNG = np.random.default_rng(0)


def noisy(blur):
    """Probabilities that are right on the whole."""
    noise = ndimage.gaussian_filter(RNG.normal(size=TRUTH.shape), (0, blur, blur))
    return np.clip(0.15 + 0.6 * TRUTH + 0.25 * noise / noise.std(), 0, 1).astype(np.float32)


PROBABILITIES = noisy(2)
THRESHOLD = 0.45
DOUBT = disagreement([noisy(blur) for blur in (1, 2, 3, 4)])


def played(n, *, gain=0.0, ddof=1, by=1.0):
    differences = np.random.default_rng(1).normal(gain, 1, (20_000, n))
    return differences.mean(axis=1), differences.std(axis=1, ddof=ddof) * by


def fooled(n, **how):
    mean, limit = played(n, **how)
    return np.mean(np.abs(mean) > limit)


def test_the_rule():
    for gain in (1.7, 1.75, np.float64(1.8), torch.tensor(1.74)):
        assert check_rule(fooled(8), gain).right
    assert check_rule(round(fooled(8), 3), 1.75).right
    for junk in JUNK:
        assert not check_rule(junk, 1.75).right and not check_rule(fooled(8), junk).right


@pytest.mark.parametrize(
    ("share", "gain", "words"),
    [
        (fooled(8) / 2, 1.75, "one side only"),
        (fooled(4), 1.75, "four folds"),
        (fooled(8, ddof=0), 1.75, "`std(ddof=1)`"),
        (fooled(8, by=8**-0.5), 1.75, "standard error"),
        (2.5, 1.75, "0.1 for 10 %"),
        (0.9, 1.75, "20,000"),
        (fooled(8), 0.9, "how often"),
        (fooled(8), 0.0175, "as large as their spread"),
        (fooled(8), 0.92, "every second time"),
        (fooled(8), 1.15, "standard error"),
        (fooled(8), 1.58, "`ddof=1`"),
        (fooled(8), 1.53, "what 8 folds find"),
        (fooled(8), 1.4, "fewer than nine"),
        (fooled(8), 2, "more than nine"),
        (fooled(8), 1e300, "more than nine"),
        (fooled(8), -1e300, "fewer than nine"),
    ],
)
def test_a_rule_that_is_wrong(share, gain, words):
    found = check_rule(share, gain)
    assert not found.right and words in found.words and "1.7" not in found.words and "0.02" not in found.words


def best_of(function=np.mean, *, best=np.max, sd=0.005, centre=0.87, axis=1):
    rng = np.random.default_rng(2)
    plays = {n: rng.normal(centre, sd, (10_000, n)) for n in (1, 3, 10, 100)}
    return {n: function(best(play, axis=axis)) for n, play in plays.items()}


def test_the_best_of_many():
    assert check_best_of(best_of()).right
    assert check_best_of({n: round(iou, 3) for n, iou in best_of().items()}).right
    assert check_best_of({n: torch.tensor(iou) for n, iou in best_of().items()}).right
    for junk in JUNK:
        assert not check_best_of(junk).right and not check_best_of(best_of() | {10: junk}).right
    wrong = {
        "the means of all": best_of(best=np.mean),
        "the worst of n": best_of(best=np.min),
        "over the n": best_of(function=np.max),
        "taken over the n": best_of(axis=0),
        "order of size": best_of(sd=0.05),
        "between 0 and 1": best_of(sd=0.5, centre=87),
        "Nearly": {n: iou + 0.001 for n, iou in best_of().items()},
        "under its own n": best_of() | {3: best_of()[100], 10: best_of()[3]},
        "the mean of the bests": best_of() | {100: 0.9},
        "100 is missing": {n: best_of()[n] for n in (1, 3, 10)},
    }
    for words, answer in wrong.items():
        found = check_best_of(answer)
        assert not found.right and words in found.words, words
        assert not any(f"{iou:.3f}" in found.words for iou in best_of().values())


def caught(share=0.05, threshold=THRESHOLD, mask=None):
    mask = DOUBT.mean >= threshold if mask is None else mask
    return {
        name: errors_among_most_uncertain(getattr(DOUBT, name), mask, TRUTH, shares=[share])[0]
        for name in ("entropy", "sd")
    }


def test_two_doubts():
    right = caught()
    assert check_doubts(right, DOUBT, THRESHOLD, TRUTH).right
    rounded = {name: [np.float32(round(share, 2))] for name, share in right.items()}
    assert check_doubts({name: share[0] for name, share in rounded.items()}, DOUBT, THRESHOLD, TRUTH).right
    assert check_doubts({name: np.array(share) for name, share in rounded.items()}, DOUBT, THRESHOLD, TRUTH).right
    for junk in JUNK:
        assert not check_doubts(junk, DOUBT, THRESHOLD, TRUTH).right
        assert not check_doubts(right | {"sd": junk}, DOUBT, THRESHOLD, TRUTH).right
    wrong = {
        "changed places": {"entropy": right["sd"], "sd": right["entropy"]},
        "0.1 for 10 %": {name: 100 * share for name, share in right.items()},
        "elsewhere": {name: 1 - share for name, share in right.items()},
        "Both shares are equal": {"entropy": right["entropy"], "sd": right["entropy"]},
        "another share": caught(share=0.1),
        "at 0.5": caught(threshold=0.5),
        "by sd isn't right": right | {"sd": 0.01},
        "the mean's mask": {"entropy": 0.011, "sd": 0.013},
        "'sd' is missing": {"entropy": right["entropy"]},
    }
    for words, answer in wrong.items():
        found = check_doubts(answer, DOUBT, THRESHOLD, TRUTH)
        assert not found.right and words in found.words, words


def ious_by(function, threshold=THRESHOLD, score="iou"):
    return {size: getattr(scores(function(size) >= threshold, TRUTH), score) for size in (1, 3, 7)}


IOUS = ious_by(lambda size: median_filter_z(PROBABILITIES, size))
VOXELS = {size: errors_by_kind(median_filter_z(PROBABILITIES, size) >= THRESHOLD, TRUTH).voxels for size in (1, 7)}
FEWER = [kind for kind in KINDS if VOXELS[7][kind] < VOXELS[1][kind]]


def test_the_median():
    assert "invented" in FEWER
    assert check_median(IOUS, FEWER, PROBABILITIES, THRESHOLD, TRUTH).right
    of_masks = ious_by(lambda size: median_filter_z(PROBABILITIES >= THRESHOLD, size), threshold=1)
    rounded = {size: round(iou, 3) for size, iou in of_masks.items()}
    assert check_median(rounded, set(FEWER), PROBABILITIES, THRESHOLD, TRUTH).right
    assert check_median(IOUS, np.array(FEWER), PROBABILITIES, THRESHOLD, TRUTH).right
    for junk in JUNK:
        assert not check_median(junk, FEWER, PROBABILITIES, THRESHOLD, TRUTH).right
        assert not check_median(IOUS, junk, PROBABILITIES, THRESHOLD, TRUTH).right
        assert not check_median(IOUS | {3: junk}, FEWER, PROBABILITIES, THRESHOLD, TRUTH).right
        assert not check_median(IOUS, [junk], PROBABILITIES, THRESHOLD, TRUTH).right


@pytest.mark.parametrize(
    ("ious", "words"),
    [
        (lambda: ious_by(lambda size: median_filter_z(PROBABILITIES, size), score="dice"), "Dice"),
        (lambda: dict.fromkeys((1, 3, 7), IOUS[1]), "All three are equal"),
        (lambda: ious_by(lambda size: median_filter_z(PROBABILITIES, size), threshold=0.5), "at 0.5"),
        (lambda: {1: IOUS[1], 3: IOUS[7], 7: IOUS[3]}, "in their places"),
        (lambda: ious_by(lambda size: ndimage.median_filter(PROBABILITIES, (1, size, 1))), "along z"),
        (lambda: ious_by(lambda size: ndimage.median_filter(PROBABILITIES, size)), "along z"),
        (lambda: IOUS | {1: 0.1}, "without a median (1 slice)"),
        (lambda: IOUS | {3: 0.1}, "then threshold"),
        (lambda: IOUS | {3: 77}, "between 0 and 1"),
        (lambda: {1: IOUS[1], 7: IOUS[7]}, "3 is missing"),
    ],
)
def test_a_median_that_is_wrong(ious, words):
    found = check_median(ious(), FEWER, PROBABILITIES, THRESHOLD, TRUTH)
    assert not found.right and words in found.words
    assert not any(f"{iou:.3f}" in found.words for iou in IOUS.values())


def test_kinds_that_are_wrong():
    more = [kind for kind in KINDS if VOXELS[7][kind] > VOXELS[1][kind]]
    same = [kind for kind in KINDS if VOXELS[7][kind] == VOXELS[1][kind]]
    wrong = {
        "become more.": more or None,
        "some stay as they are": FEWER + same if same else None,
        "not all that you named": FEWER + more[:1] if more else None,
        "more become fewer": FEWER[1:],
        "some are wrong and some": [*FEWER[1:], *more[:1]] if len(FEWER) > 1 and more else None,
        "is no kind of error": ["invented", "spurious"],
        "a list of the names": [1, 2],
    }
    for words, kinds in wrong.items():
        if kinds is not None:
            found = check_median(IOUS, kinds, PROBABILITIES, THRESHOLD, TRUTH)
            assert not found.right and words in found.words, words
