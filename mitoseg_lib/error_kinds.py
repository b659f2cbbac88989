"""Which mistakes the wrong voxels belong to: whole objects missed, invented, merged or split, rims, or regions.

An IoU says how many voxels are wrong, and not why. Objects are what `mitoseg_lib.instances.label_instances` numbers:
what is connected by faces, edges or corners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.instances import Overlaps, label_instances, overlaps
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.surfaces import boundary_band

__all__ = ["KINDS", "ErrorsByKind", "errors_by_kind"]

KINDS = ("missed", "invented", "merged", "split", "boundary", "region")
CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}
WORDS = {
    "missed": "true objects hardly found",
    "invented": "predicted objects hardly true",
    "merged": "predicted objects that join true ones",
    "split": "true objects found in pieces",
    "boundary": "rims of the other objects",
    "region": "the rest: parts of the other objects",
}


@dataclass(frozen=True, eq=False)
class ErrorsByKind:
    """Every wrong voxel of a prediction, and the kind of mistake that it belongs to.

    Attributes
    ----------
    kind
        uint8 (z, y, x): 0 where prediction and truth agree, and 1 to 6 for ``KINDS`` in their order: "missed",
        "invented", "merged", "split", "boundary", "region".
    objects
        How many objects each of the first four kinds has, by name: true ones that are missed or split, predicted ones
        that are invented or merged. None for "boundary" and "region", which nearly every object has.
    added, lacking
        Voxels of each kind that were predicted and aren't true, and that are true and weren't predicted.
    scores
        Of the whole prediction.
    """

    kind: NDArray[np.uint8]
    objects: dict[str, int | None]
    added: dict[str, int]
    lacking: dict[str, int]
    scores: Scores

    @property
    def voxels(self) -> dict[str, int]:
        """How many wrong voxels each kind has."""
        return {kind: self.added[kind] + self.lacking[kind] for kind in KINDS}

    @property
    def iou(self) -> float:
        """IoU of the prediction as it is."""
        return self.iou_without()

    def iou_without(self, *kinds: str) -> float:
        """Return the IoU that the prediction would have if all mistakes of some kinds were mended.

        Parameters
        ----------
        *kinds
            Names out of ``KINDS``; with all of them it is 1.

        Raises
        ------
        ValueError
            If there is no such kind.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} was asked for, but the kinds are {', '.join(KINDS)}; name some of them.")
        found = self.scores.true_positives + sum(self.lacking[kind] for kind in set(kinds))
        removed = sum(self.added[kind] for kind in set(kinds))
        union = self.scores.true_positives + self.scores.false_positives + self.scores.false_negatives - removed
        return found / union if union else 1.0

    def as_table(self) -> str:
        """Return a line for each kind: objects, voxels, their share of all wrong ones, and the IoU without them."""
        total = sum(self.voxels.values())
        width = max(len(f"{kind}: {words}") for kind, words in WORDS.items()) + 1
        lines = [f"{'':{width}s}{'objects':>8s}{'voxels':>12s}{'of all':>8s}{'IoU without':>13s}"]
        for kind, number in self.voxels.items():
            objects = "-" if self.objects[kind] is None else str(self.objects[kind])
            share = f"{number / total:.1%}" if total else "-"
            lines.append(
                f"{f'{kind}: {WORDS[kind]}':{width}s}{objects:>8s}{number:>12,d}{share:>8s}"
                f"{self.iou_without(kind):>13.4f}"
            )
        return "\n".join([*lines, f"{'all':{width}s}{'':8s}{total:>12,d}{'':8s}{f'now {self.iou:.4f}':>13s}"])


def errors_by_kind(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], *, share: float = 0.1, width: int = 2
) -> ErrorsByKind:
    """Sort the wrong voxels of a prediction by the kind of mistake that they belong to.

    A voxel that is true and wasn't predicted is judged by the true object that it lies in, one that was predicted and
    isn't true by the predicted object. The first of these that holds is its kind:

    1. missed: less than `share` of the true object was found.
    2. invented: less than `share` of the predicted object is true.
    3. merged: the predicted object holds `share` or more of each of two or more true objects.
    4. split: each of two or more predicted objects holds `share` or more of the true object.
    5. boundary: the voxel is in `mitoseg_lib.surfaces.boundary_band` of the truth with this `width`.
    6. region: all else, such as a part of an object that was missed.

    So the rim of a merged or split object counts as merged or split, and not as boundary: where the gap between two
    objects is narrow, the voxels that join them lie on their rims, and nothing else would be left of the mistake. The
    kinds are this course's own: other authors draw the lines elsewhere.

    Parameters
    ----------
    prediction, truth
        Masks, bool (z, y, x), of the same shape.
    share
        Above 0 and at most 1.
    width
        Of the band, in voxels to each side of the truth's boundaries; 0 or more.

    Raises
    ------
    ValueError
        If these aren't masks of the same shape, or share or width is another number.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share is {share}, but a number above 0 and at most 1 was expected; try 0.1.")
    boundary_band(truth[:0], width)  # refuses a wrong width at once
    whole = scores(prediction, truth)
    predicted, true = label_instances(prediction), label_instances(truth)
    of_predicted, of_true = _codes_of_objects(overlaps(predicted, true), share)
    kind = np.zeros(truth.shape, np.uint8)
    counts = np.zeros((2, len(KINDS) + 1), np.int64)
    for z, target in enumerate(kind):  # slice by slice, so that the two label volumes are the largest arrays
        wrong = prediction[z] != truth[z]
        is_true, band = truth[z][wrong], boundary_band(truth[z : z + 1], width)[0][wrong]
        # A wrong voxel lies in one object: in the other volume it is background, whose number and code are 0.
        codes = of_predicted[predicted[z][wrong]] + of_true[true[z][wrong]]
        target[wrong] = codes = np.where(codes, codes, np.where(band, CODES["boundary"], CODES["region"]))
        for row, chosen in zip(counts, (~is_true, is_true), strict=True):
            row += np.bincount(codes[chosen], minlength=len(row))
    added, lacking = (dict(zip(KINDS, row[1:].tolist(), strict=True)) for row in counts)
    return ErrorsByKind(kind, _numbers_of_objects(of_predicted, of_true), added, lacking, whole)


def _codes_of_objects(found: Overlaps, share: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Code of the kind of each predicted and each true object, at the place of its number; 0 for those that match."""
    sides = found.predicted, found.true
    both = (found.predicted > 0) & (found.true > 0)
    sizes = [np.bincount(numbers, found.voxels, minlength=1) for numbers in sides]
    held = both.copy()  # pairs in which enough of the true object lies in the predicted one
    held[both] = found.voxels[both] / sizes[1][found.true[both]] >= share
    codes = []
    for numbers, size, (hardly, several) in zip(
        sides, sizes, (("invented", "merged"), ("missed", "split")), strict=True
    ):
        shared = np.bincount(numbers[both], found.voxels[both], minlength=len(size))
        partners = np.bincount(numbers[held], minlength=len(size))
        code = np.where(partners > 1, CODES[several], 0)
        code[shared / np.maximum(size, 1) < share] = CODES[hardly]
        code[0] = 0
        codes.append(code.astype(np.uint8))
    return codes[0], codes[1]


def _numbers_of_objects(of_predicted: NDArray[np.uint8], of_true: NDArray[np.uint8]) -> dict[str, int | None]:
    """How many objects have each code; None for the kinds that aren't of objects."""
    numbers = np.bincount(np.concatenate([of_predicted, of_true]), minlength=len(KINDS) + 1)
    return {kind: int(numbers[code]) if code < CODES["boundary"] else None for kind, code in CODES.items()}
