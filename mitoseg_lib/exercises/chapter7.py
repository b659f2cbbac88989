"""Checkers of chapter 7, the best honest result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, special, stats

from mitoseg_lib.calibration import Disagreement, errors_among_most_uncertain
from mitoseg_lib.error_kinds import KINDS, errors_by_kind
from mitoseg_lib.exercises.feedback import NotYet, as_mapping, as_number, checker, hint
from mitoseg_lib.inference import median_filter_z
from mitoseg_lib.metrics import Scores, scores

__all__ = ["check_best_of", "check_doubts", "check_median", "check_rule"]

CENTRE, SPREAD = 0.870, 0.005  # of the test IoUs of recipes that are equally good
RECIPES = (1, 3, 10, 100)
DOUBTS = ("entropy", "sd")
SHARE = 0.05
SIZES = (1, 3, 7)
NINE_IN_TEN = 0.9
SECOND = "The first number is right. "


@checker
def check_rule(fooled: Any, gain: Any) -> str:
    """Exercise 1: how often 8 folds fool the rule, and the gain, in standard deviations, that 4 find nine times in ten.

    The rule calls a difference where the mean of the folds is larger than their standard deviation.
    """
    share = as_number(fooled, "the share of plays that fool the rule with 8 folds")
    hint(share > 1, "A share lies between 0 and 1: write 0.1 for 10 %.")
    if not _is_near(share, _claims(8), 0.0038):
        hint(_is_near(share, _claims(8) / 2, 0.005), 'That is one side only. The rule also says "worse" of equals.')
        hint(_is_near(share, _claims(4), 0.01), "That is what four folds do. How many columns have the plays?")
        words = "The rule's deviation is that of a sample, `std(ddof=1)`; without it, it is too small."
        hint(_is_near(share, _claims(8, squared_limit=7), 0.005), words)
        words = "The mean was compared with its own standard error; the rule takes the standard deviation of the folds."
        hint(_is_near(share, _claims(8, squared_limit=1), 0.02), words)
        words = "Another share is fooled. Play at least 20,000 times, with 8 differences each and a true gain of 0."
        raise NotYet(words)
    found = as_number(gain, "the gain in standard deviations")
    often = _finds(found)
    if abs(often - NINE_IN_TEN) <= 0.03:
        return "no number of folds lets this rule find a gain below one standard deviation more often than not."
    hint(found == NINE_IN_TEN, SECOND + "The second is how often; how large must the gain be for that?")
    words = "Give the gain in standard deviations of the differences: 1 for a gain as large as their spread."
    hint(0 < found < 0.1, SECOND + words)
    words = "With this gain the rule finds it every second time; nine times in ten are asked for."
    hint(_is_near(found, _needed(share=0.5), 0.03), SECOND + words)
    hint(
        _is_near(found, _needed(squared_limit=1), 0.03), SECOND + "Compare with the deviation, not the standard error."
    )
    hint(_is_near(found, _needed(squared_limit=3), 0.02), SECOND + "Is the deviation that of a sample, `ddof=1`?")
    hint(_is_near(found, _needed(n=8, squared_limit=8), 0.02), SECOND + "This gain is what 8 folds find; take four.")
    words = "more" if often > NINE_IN_TEN else "fewer"
    raise NotYet(f"{SECOND}But four folds find this gain in {words} than nine of ten plays. Try finer steps.")


@checker
def check_best_of(expected: Any) -> str:
    """Exercise 2: for each number of equally good recipes, the IoU that the best one is expected to have."""
    given = as_mapping(expected, "an IoU for each of 1, 3, 10 and 100", RECIPES)
    found = np.array([as_number(given[n], f"the IoU of the best of {n}") for n in RECIPES])
    gains = np.array([_gain_of_best(n) for n in RECIPES]) * SPREAD
    if _are_near(found, CENTRE + gains, 7e-4):
        return "none of them is better than another, and yet the report gets better with each attempt."
    hint((found > 1).all(), "An IoU lies between 0 and 1.")
    hint(_are_near(found, CENTRE, 1e-3), "These are the means of all. Take the largest of n first, and then the mean.")
    hint(_are_near(found, CENTRE - gains, 1e-3), "These are the worst of n. Who reports those?")
    words = "A single recipe has no choice, so its mean can't be far from the centre. Is the maximum taken over the n?"
    hint(found[0] > CENTRE + SPREAD / 2, words)
    size = (found - CENTRE)[-1] / gains[-1]
    words = "The order of size isn't right. How much do the IoUs vary, in one standard deviation?"
    hint(size > 0 and _are_near(found, CENTRE + size * gains, 0.05 * size * SPREAD), words)
    hint(
        _are_near(found, CENTRE + gains, 2e-3), "Nearly. Repeat it more often, some thousand times, and keep 3 digits."
    )
    hint((np.diff(found) < 0).any(), "The best of more can only be better. Does each number stand under its own n?")
    raise NotYet("Draw n IoUs, keep the best, repeat that some thousand times, and take the mean of the bests.")


@checker
def check_doubts(caught: Any, doubt: Disagreement, threshold: float, truth: NDArray[np.bool_]) -> str:
    """Exercise 3: the share of the errors in the 5 % least sure voxels, by "entropy" and by "sd" of the answers."""
    given = as_mapping(caught, "a share for each of the two doubts", DOUBTS)
    found = [as_number(given[name], f"the share by {name}") for name in DOUBTS]
    hint(max(found) > 1, "A share lies between 0 and 1: write 0.1 for 10 %.")
    expected = _caught(doubt, threshold, truth)
    if _are_near(found, expected, 0.006):
        return (
            "both are made of the same four answers, and they doubt in different places. Ask which doubt a paper means."
        )
    hint(_are_near(found, expected[::-1], 0.006), "They have changed places.")
    hint(_are_near(found, [1 - one for one in expected], 0.006), "These are the errors that lie elsewhere.")
    words = "Both shares are equal. Does the uncertainty change from one to the other?"
    hint(found[0] == found[1] and expected[0] != expected[1], words)
    others = [_caught(doubt, threshold, truth, share=share) for share in (0.005, 0.01, 0.02, 0.1, 0.2, 0.5)]
    hint(any(_are_near(found, other, 0.006) for other in others), "That is another share of the voxels than 5 %.")
    hint(_are_near(found, _caught(doubt, 0.5, truth), 0.006), "That is at 0.5. Which threshold did the chapter choose?")
    right = [abs(pair[0] - pair[1]) <= 0.006 for pair in zip(found, expected, strict=True)]
    words = "The errors are those of the mean's mask, in both cases; only the doubt is another. And the share is 0.05."
    hint(any(right), f"The share by {DOUBTS[right.index(False)] if any(right) else ''} isn't right. {words}")
    raise NotYet(words)


@checker
def check_median(
    ious: Any, fewer: Any, probabilities: NDArray[np.floating], threshold: float, truth: NDArray[np.bool_]
) -> str:
    """Exercise 4: the IoU after a median over 1, 3 and 7 slices, and the kinds of errors with fewer voxels after 7.

    Arrays are (z, y, x).
    """
    given = as_mapping(ious, "an IoU for a median over 1, 3 and 7 slices", SIZES)
    found = [as_number(given[size], f"the IoU for a median over {size}") for size in SIZES]
    expected = [_filtered(probabilities, size, threshold, truth) for size in SIZES]
    if not _are_near(found, [one.iou for one in expected], 6e-4):
        _judge_ious(found, expected, probabilities, threshold, truth)
    kinds = _as_kinds(fewer)
    without, with_7 = (
        errors_by_kind(median_filter_z(probabilities, size) >= threshold, truth).voxels for size in (1, 7)
    )
    mended = {kind for kind in KINDS if with_7[kind] < without[kind]}
    if kinds == mended:
        words = {-1: "lowered", 0: "left", 1: "raised"}[int(np.sign(expected[-1].iou - expected[0].iou))]
        return f"the widest median has {words} the IoU here; it weighs what it mends against what it does to the rest."
    start = "The IoUs are right. But of the kinds "
    hint(kinds == {kind for kind in KINDS if with_7[kind] > without[kind]}, start + "you named those that become more.")
    same = {kind for kind in KINDS if with_7[kind] == without[kind]}
    hint(kinds == mended | same and same, start + "some stay as they are; only those that become fewer are asked for.")
    hint(kinds > mended, start + "not all that you named become fewer. Compare 7 slices with 1, by wrong voxels.")
    hint(kinds < mended, start + "more become fewer. Compare 7 slices with 1, by wrong voxels.")
    raise NotYet(start + "some are wrong and some are missing. Compare 7 slices with 1, by wrong voxels.")


def _claims(n: int, squared_limit: float | None = None) -> float:
    """How often n differences of chance are called better or worse, if a squared t above a limit is (the rule: n)."""
    limit = np.sqrt(n if squared_limit is None else squared_limit)
    return float(2 * stats.t.sf(limit, n - 1))


def _finds(gain: float, n: int = 4, squared_limit: float = 4) -> float:
    """How often the rule calls n differences better whose true mean is `gain` standard deviations."""
    gain = float(np.clip(gain, -20, 20))
    return float(stats.nct.sf(np.sqrt(squared_limit), n - 1, gain * np.sqrt(n)))


def _needed(n: int = 4, squared_limit: float = 4, share: float = NINE_IN_TEN) -> float:
    """The gain that is found that often."""
    return float(optimize.brentq(lambda gain: _finds(gain, n, squared_limit) - share, 0, 5))


def _gain_of_best(n: int) -> float:
    """The mean of the largest of n normal numbers, in standard deviations above their mean."""
    x = np.linspace(-8, 8, 4001)
    return float(np.sum((x[1:] + x[:-1]) / 2 * np.diff(special.ndtr(x) ** n)))


def _caught(doubt: Disagreement, threshold: float, truth: NDArray[np.bool_], share: float = SHARE) -> list[float]:
    mask = doubt.mean >= threshold
    doubts = (getattr(doubt, name) for name in DOUBTS)
    return [float(errors_among_most_uncertain(one, mask, truth, shares=[share])[0]) for one in doubts]


def _filtered(probabilities: NDArray, size: int, threshold: float, truth: NDArray[np.bool_]) -> Scores:
    return scores(median_filter_z(probabilities, size) >= threshold, truth)


def _judge_ious(
    found: list[float], expected: list[Scores], probabilities: NDArray, threshold: float, truth: NDArray[np.bool_]
) -> None:
    """Hint at what is wrong with the IoUs for medians over 1, 3 and 7 slices."""
    ious = [one.iou for one in expected]
    hint(max(found) > 1, "An IoU lies between 0 and 1.")
    hint(_are_near(found, [one.dice for one in expected], 6e-4), "These are Dice coefficients; IoUs are asked for.")
    words = "All three are equal. Does the median's size change, and is its result what you threshold?"
    hint(found[0] == found[1] == found[2] and len(set(ious)) > 1, words)
    at_half = [_filtered(probabilities, size, 0.5, truth).iou for size in SIZES]
    hint(_are_near(found, at_half, 6e-4), "These are at 0.5. Which threshold did the chapter choose?")
    hint(_are_near(sorted(found), sorted(ious), 6e-4), "These numbers are right, but not in their places.")
    hint(
        not _are_near(found[:1], ious[:1], 6e-4),
        'The IoU without a median (1 slice) isn\'t right. Is it that of "plain"?',
    )
    words = "The first is right, but this median doesn't go along z. `median_filter_z` does."
    for shape in ((1, 3, 1), (1, 1, 3), (1, 3, 3), (3, 3, 3)):
        other = scores(ndimage.median_filter(probabilities, shape) >= threshold, truth).iou
        hint(_are_near(found[1:2], [other], 6e-4), words)
    raise NotYet("Without a median it is right, with one it isn't. Filter the probabilities along z, then threshold.")


def _as_kinds(answer: Any) -> set[str]:
    """Return an answer as a set of kinds of errors, or hint."""
    what = 'Hand in a list of the names of kinds, such as ["missed"], as `errors_by_kind` calls them.'
    is_list = isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping)
    hint(not is_list, f"The IoUs are right. {what}")
    names = list(answer) if getattr(answer, "ndim", 1) == 1 else [None]
    hint(not all(isinstance(name, str) for name in names), f"The IoUs are right. {what}")
    unknown = [name for name in names if name not in KINDS]
    words = f"The IoUs are right. But {unknown[0]!r} is no kind of error." if unknown else ""
    hint(unknown, f"{words} {what}")
    return {str(name) for name in names}


def _is_near(found: float, expected: float, within: float) -> bool:
    return abs(found - expected) <= within


def _are_near(found: Any, expected: Any, within: float) -> bool:
    return bool(np.abs(np.subtract(found, expected)).max() <= within)
