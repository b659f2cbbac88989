"""Chapter 10, the capstone: a stack without labels, and what is said of a mask of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mitoseg_lib.datasets import load_example
from mitoseg_lib.error_kinds import WORDS, ErrorsByKind, errors_by_kind
from mitoseg_lib.exercises.feedback import NotYet, as_array, as_number, as_numbers, checker, hint, is_close
from mitoseg_lib.instances import label_instances
from mitoseg_lib.metrics import iou
from mitoseg_lib.phantom import Imaging, make_phantom
from mitoseg_lib.stacks import Stack

__all__ = ["Capstone", "check_interval", "check_levels"]

SHAPE, SEED, FOREGROUND = (32, 320, 352), 52, 0.08
IMAGING = Imaging(contrast=0.7, brightness=35.0, shot_noise=6.0, readout_noise=3.0, damaged_slice=False)
ENOUGH = 0.6  # IoU: what a network reaches here that has learned for a minute, if the grey levels are right
NEAR = 0.15  # how far from the IoU an expectation may lie: a stack this small is worth no more
SMALLEST = 4000  # voxels, 0.0005 µm³: what is smaller is taken for a speck
QUARTILES = (25, 50, 75)
LEVELS = 10  # grey levels that the median may be off
TILES, TIMES, LIMITS = 3, 4000, (2.5, 97.5)  # tiles along y and x, samples, and percentiles of these
FIT = 0.015  # how far a limit may lie from ours: two samplings never agree exactly
STEP = 25  # grey levels: a fall between neighbouring levels that no smooth transform makes


@checker
def check_levels(adapted: Any, stack: Stack) -> str:
    """Exercise 1: the stack's image, uint8 (z, y, x), with the grey levels of the course's labelled training stack."""
    words = "the image with other grey levels"
    values = as_array(adapted, words, stack.image.shape)
    hint(values.max() <= 1, "These values end at 1. Grey levels go from 0 to 255 here, as in the training stack.")
    hint(np.array_equal(values, stack.image), "This is the image as it came.")
    by_level = ndimage.mean(values, stack.image, _common_levels(stack.image))
    words = (
        "Voxels that were brighter are darker now. 8-bit numbers start at 0 again after 255: compute with floats, and"
    )
    hint(np.diff(by_level).min() < -STEP, f"{words} cut off (`clip`) at 0 and 255 before you convert them.")
    words = "That is an array of floats. Round it and convert it to uint8, which the library's images are."
    hint(values.dtype != np.uint8, words)
    lost = np.mean((values == 0) | (values == 255))
    hint(lost > 0.02, f"{lost:.0%} of the voxels are quite black or white, and their differences are lost.")
    line = np.polynomial.Polynomial.fit(*(image[(values > 0) & (values < 255)] for image in (stack.image, values)), 1)
    inside = np.clip(line(stack.image), 0, 255)
    hint(
        np.abs(inside - values).max() > 2,
        "No single straight line makes this of the whole stack. Was it done by slices?",
    )
    found, wanted = (np.percentile(image, QUARTILES) for image in (values, load_example("train").image))
    spread = (found[2] - found[0]) / (wanted[2] - wanted[0])
    hint(spread < 0.75, "The levels lie closer together than the training stack's: is the contrast the same?")
    hint(spread > 1.33, "The levels lie further apart than the training stack's; was the contrast raised too far?")
    side = "higher" if found[1] > wanted[1] else "lower"
    words = f"The contrast is right, but the median is {side} than the training stack's."
    hint(abs(found[1] - wanted[1]) > LEVELS, words)
    return "the network meets grey levels that it knows. Noise has been raised with the contrast."


@checker
def check_interval(interval: Any, mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> str:
    """Exercise 2: the limits of the IoU's 95 % interval, by drawing nine tiles of the plane with replacement."""
    found = as_numbers(interval, "the lower and the upper limit of the IoU", 2)
    score, counts = iou(mask, truth), _counts(mask, truth, _tiles(truth.shape))
    expected = _interval(counts)
    if _fits(found, expected):
        return "and this is only the chance of which tissue was imaged. Another microscope isn't in it."
    hint(found[0] > found[1], "The first number is the lower limit.")
    hint(max(found) > 1, "An IoU lies between 0 and 1: write 0.8 for 80 %.")
    hint(
        not found[0] <= score <= found[1], "The IoU of the whole mask doesn't lie between the two. Is it the same mask?"
    )
    by_slice = _interval(_counts(mask, truth, [(np.s_[z],) for z in range(len(truth))]))
    words = (
        "That is narrow. Were slices drawn? Neighbours show nearly the same, so that they are no independent samples."
    )
    hint(_fits(found, by_slice), words)
    each = counts[:, 0] / np.maximum(counts.sum(1), 1)
    words = "These are the limits of nine IoUs. How far does the IoU of nine tiles together vary, if others are drawn?"
    hint(_fits(found, np.percentile(each, LIMITS)), words)
    others = [_interval(counts, limits) for limits in ((5, 95), (0, 100), (25, 75))]
    hint(any(_fits(found, other) for other in others), "Which percentiles are these? 95 % lie between 2.5 and 97.5.")
    words = "Was the mean of the tiles' IoUs taken? Add up the counts of the nine tiles that are drawn, then divide."
    drawn = each[np.random.default_rng(0).integers(len(each), size=(TIMES, len(each)))].mean(1)
    hint(_fits(found, np.percentile(drawn, LIMITS)), words)
    raise NotYet("Draw nine of the nine tiles, some of them twice, add up their counts, and do so some thousand times.")


class Capstone:
    """A synthetic stack without labels, and a place where a mask of it is handed in and scored.

    It is tissue of another seed than the course's two stacks, seen by another microscope setting.

    Attributes
    ----------
    stack
        32 x 320 x 352 voxels (z, y, x) of 5 nm, without labels.
    """

    def __init__(self) -> None:
        phantom = make_phantom(SHAPE, SEED, foreground=FOREGROUND, imaging=IMAGING)
        self.stack = Stack(phantom.image, None, phantom.voxel_size_nm, "capstone")
        self._truth = phantom.labels
        self._handed_in: dict[str, tuple[float, float]] = {}  # IoU and first expectation of each mask, by its sha256
        self._last: NDArray[np.bool_] | None = None

    @checker
    def hand_in(self, mask: Any, expected_iou: Any) -> str:
        """Exercise 3: a mask, bool (z, y, x), and the IoU that is expected of it.

        A mask that is turned, shifted or inverted gets a hint and isn't scored. The first one that is scored is the one
        to quote: all later ones may have been chosen by what was said of it.
        """
        mask = _as_mask(mask)
        expected = as_number(expected_iou, "the IoU that you expect")
        hint(not 0 <= expected <= 1, "The IoU that you expect must lie between 0 and 1: write 0.8 for 80 %.")
        _look_for_slips(mask, self._truth)
        found, self._last = errors_by_kind(mask, self._truth), mask
        given, expected = expected, self._first_expectation(mask, found.iou, expected)
        first = "" if given == expected else ", and the expectation that you had first counts"
        words = f"{_report(found)} You expected {expected:.2f}{first}. {self._which()}"
        hint(found.iou < ENOUGH, f"{words} {ENOUGH:g} can be reached without labels of this stack. {_advice(found)}")
        way = "more" if expected > found.iou else "less"
        off = f"Your expectation was {way} than that by over {NEAR:g}. On which labelled stack did you measure it, and"
        hint(abs(expected - found.iou) > NEAR, f"{words} {off} how does that one differ from this?")
        return words

    @checker
    def check_count(self, count: Any, volume_um3: Any) -> str:
        """Exercise 4: how many mitochondria of at least 0.0005 µm³ the mask handed in last has, and their volume."""
        hint(self._last is None, "Hand in a mask first: `hand_in(mask, expected_iou)`.")
        number = as_number(count, "the number of mitochondria of at least 0.0005 µm³")
        volume = as_number(volume_um3, "their volume together, in µm³")
        voxel_um3 = math.prod(self.stack.voxel_size_nm) / 1e9
        _judge_count(number, self._last)
        _judge_volume(volume, _sizes(self._last), voxel_um3)
        true = _sizes(self._truth)
        true = true[true >= SMALLEST]
        off = volume / (true.sum() * voxel_um3) - 1
        return (
            f"your mask has {int(number)}, and in truth there are {len(true)}. Your volume is off by {off:+.0%}. Which"
            " of the two would you publish, and with which limits of error?"
        )

    def _first_expectation(self, mask: NDArray[np.bool_], found: float, expected: float) -> float:
        """Remember a mask, and return what was expected of it before its score was known."""
        digest = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
        return self._handed_in.setdefault(digest, (found, expected))[1]

    def _which(self) -> str:
        """Say which mask in turn this is."""
        if len(self._handed_in) == 1:
            return "It is your first mask, so this is the score to quote."
        first = next(iter(self._handed_in.values()))[0]
        return f"You have handed in {len(self._handed_in)} masks; the score to quote is the first one's, {first:.2f}."


def _tiles(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Parts of the plane, as deep as the stack."""
    rows, columns = (np.linspace(0, n, TILES + 1).round().astype(int) for n in shape[1:])
    return [np.s_[:, y:v, x:u] for y, v in pairwise(rows) for x, u in pairwise(columns)]


def _counts(mask: NDArray[np.bool_], truth: NDArray[np.bool_], parts: Sequence[tuple[Any, ...]]) -> NDArray[np.int64]:
    """Voxels found and voxels wrong in each part, (part, 2)."""
    return np.array([(np.sum(mask[part] & truth[part]), np.sum(mask[part] != truth[part])) for part in parts])


def _interval(counts: NDArray[np.int64], limits: tuple[float, float] = LIMITS) -> NDArray[np.float64]:
    drawn = np.random.default_rng(0).integers(len(counts), size=(TIMES, len(counts)))
    found, wrong = np.moveaxis(counts[drawn].sum(1), -1, 0)
    return np.percentile(found / np.maximum(found + wrong, 1), limits)


def _fits(found: Sequence[float], expected: NDArray[np.float64]) -> bool:
    return bool(np.all(np.abs(np.subtract(found, expected)) < FIT))


def _common_levels(image: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Grey levels that enough voxels have for a mean over them."""
    return np.flatnonzero(np.bincount(image.ravel(), minlength=256) >= 50)


def _as_mask(answer: Any) -> NDArray[np.bool_]:
    values = as_array(answer, "a mask of the stack", SHAPE)
    words = "There are more than two values in it. Are these probabilities? A threshold makes a mask of them."
    hint(len(np.unique(values)) > 2, words)
    mask = values > 0
    hint(not mask.any(), "The mask is empty. Which grey levels does the network expect, and which does it get?")
    hint(mask.all(), "The mask covers the whole stack.")
    return mask


def _look_for_slips(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> None:
    """Hint if the mask fits much better inverted, turned or shifted; what is said gives the score away to nobody."""
    score = iou(mask, truth)
    words = "It isn't scored:"
    hint(iou(~mask, truth) > score + 0.2, f"{words} the mask has the background where the mitochondria should be.")
    for axis, name in enumerate("zyx"):
        better = iou(np.flip(mask, axis), truth) > score + 0.2
        hint(
            better,
            f"{words} the mask fits better when it is flipped along {name}. Was an image turned and not turned back?",
        )
        for step in (-1, 1):
            better = iou(np.roll(mask, step, axis), truth) > score + 0.02
            hint(better, f"{words} the mask fits better when it is moved by a voxel along {name}.")


def _report(found: ErrorsByKind) -> str:
    """What is to be said of a mask."""
    numbers = ", ".join(f"{n} {kind}" for kind, n in found.objects.items() if n is not None)
    words = (
        f"IoU {found.iou:.2f}, precision {found.scores.precision:.2f}, recall {found.scores.recall:.2f}. Objects:"
        f" {numbers}."
    )
    worst = max(found.voxels, key=found.iou_without)
    if found.iou == 1:
        return words
    return f"{words} Most is lost by {WORDS[worst]} (IoU {found.iou_without(worst):.2f} without these mistakes)."


def _advice(found: ErrorsByKind) -> str:
    """What to look at first."""
    precision, recall = found.scores.precision, found.scores.recall
    if recall < precision - 0.2:
        return "Most of what you marked is right, and much is missing: are the grey levels those of the training?"
    if precision < recall - 0.2:
        return "Too much is marked. Look at what was marked wrongly: what does it look like?"
    return "Train longer, or with more variety (chapters 2 and 7), and choose the threshold on validation slices."


def _sizes(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Voxels of each object."""
    return np.bincount(label_instances(mask).ravel())[1:]


def _judge_count(number: float, mask: NDArray[np.bool_]) -> None:
    voxels = _sizes(mask)
    right = int((voxels >= SMALLEST).sum())
    if number == right:
        return
    hint(number == len(voxels), "That is the number of all objects. Leave out those below 0.0005 µm³.")
    words = "That is one too many: was the background, number 0, counted as an object?"
    hint(number in (right + 1, len(voxels) + 1), words)
    by_faces = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    words = "That is the number where only faces connect. Number them with `label_instances`."
    hint(number in (len(by_faces), (by_faces >= SMALLEST).sum()), words)
    raise NotYet("That isn't the number of large objects in the mask that you handed in last.")


def _judge_volume(volume: float, voxels: NDArray[np.intp], voxel_um3: float) -> None:
    large = voxels[voxels >= SMALLEST].sum()
    right = large * voxel_um3
    if is_close(volume, right, within=0.01):
        return
    hint(is_close(volume, large), "The number is right. The volume is a number of voxels; how large is one?")
    hint(is_close(volume, right * 1e9), "The number is right. The volume is in nm³; how many of them has a µm³?")
    mean = right / (voxels >= SMALLEST).sum()
    hint(is_close(volume, mean), "The number is right. The volume is the mean of one; what have they together?")
    words = "The number is right. The volume is wrong by a power of ten: a µm³ is a cube of 1000 nm to each side."
    hint(any(is_close(volume, right * 10.0**power) for power in range(-12, 12)), words)
    hint(is_close(volume, voxels.sum() * voxel_um3), "The number is right. The volume is that of all objects.")
    raise NotYet("The number is right, the volume isn't: the voxels of these objects, times the volume of one.")
