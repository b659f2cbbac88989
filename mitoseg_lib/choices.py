"""How probabilities become a mask, and how that is chosen: on slices that validate, pooled over all folds.

A fold's run writes down what each choice would score on its validation slices, as counts of voxels. Counts can be
added, so the best choice over the whole stack is found from the folds' files, and no probability has to be kept.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.files import write_whole
from mitoseg_lib.inference import median_filter_z, threshold_scores
from mitoseg_lib.metrics import Scores
from mitoseg_lib.runs import RESULTS

__all__ = ["Choice", "best_choice", "pooled", "read_choices", "scores_of_choices", "write_choices"]

MEDIANS = (1, 3, 5, 7, 9)  # slices; at most 45 nm, and no mitochondrion is that thin
HEADER = "turned,median,threshold,true_positives,false_positives,false_negatives,true_negatives"


@dataclass(frozen=True)
class Choice:
    """How probabilities become a mask.

    Attributes
    ----------
    turned : bool
        They are the mean over the eight ways to lay down a slice (`predict_turned`).
    median : int
        Slices of a median along z (`median_filter_z`); 1 for none.
    threshold : float
        Voxels at or above it are foreground.
    """

    turned: bool = False
    median: int = 1
    threshold: float = 0.5


Choices = dict[Choice, Scores]


def scores_of_choices(probabilities: NDArray[np.float32], truth: NDArray[np.bool_], *, turned: bool) -> Choices:
    """Return the scores of each median and each threshold.

    Parameters
    ----------
    probabilities : ndarray
        float32 in [0, 1], (z, y, x).
    truth : ndarray
        bool, same shape.
    turned : bool
        What the choices say of themselves.
    """
    return {
        Choice(turned, median, threshold): found
        for median in MEDIANS
        for threshold, found in threshold_scores(median_filter_z(probabilities, median), truth).items()
    }


def pooled(parts: Iterable[Mapping[Choice, Scores]]) -> Choices:
    """Return the scores of each choice over all parts, counts added up; choices that a part lacks are left out."""
    parts = list(parts)
    times = Counter(choice for part in parts for choice in part)
    return {
        choice: sum((part[choice] for part in parts), Scores(0, 0, 0, 0))
        for choice, n in times.items()
        if n == len(parts)
    }


def best_choice(found: Mapping[Choice, Scores]) -> Choice:
    """Return the choice with the best IoU; of equal ones the plainest, and the threshold nearest to 0.5."""
    if not found:
        raise ValueError("There is no choice to choose from, but one or more was expected; pass the folds' figures.")
    return max(found, key=lambda c: (found[c].iou, not c.turned, -c.median, -abs(c.threshold - 0.5), -c.threshold))


def write_choices(name: str, seed: int, found: Mapping[Choice, Scores], folder: Path = RESULTS) -> Path:
    """Write what each choice scores on a run's validation slices, a row each, beside its file; return the path."""
    rows = [HEADER]
    for choice, counts in found.items():
        values = (int(choice.turned), choice.median, choice.threshold, *dataclasses.astuple(counts))
        rows.append(",".join(map(str, values)))
    path = _path(name, seed, folder)
    write_whole(path, ("\n".join(rows) + "\n").encode())
    return path


def read_choices(name: str, seed: int, folder: Path = RESULTS) -> Choices:
    """Return what `write_choices` wrote.

    Raises
    ------
    ValueError
        If there is no such file, or it is another's.
    """
    path = _path(name, seed, folder)
    if not path.is_file():
        raise ValueError(
            f"{path.name} isn't there, but its figures are needed; make it with `mitoseg run {name} --seed {seed}`."
        )
    header, *rows = path.read_text().splitlines()
    if header != HEADER:
        raise ValueError(f"{path.name} begins with {header!r}, but {HEADER!r} was expected; make the run again.")
    return dict(map(_from_row, rows))


def _from_row(row: str) -> tuple[Choice, Scores]:
    turned, median, threshold, *counts = row.split(",")
    return Choice(turned == "1", int(median), float(threshold)), Scores(*map(int, counts))


def _path(name: str, seed: int, folder: Path) -> Path:
    return folder / f"{name}-seed{seed}-choices.csv"
