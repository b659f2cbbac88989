"""Rungs of a ladder: what a change gained on the blocks of a cross-validation, and whether that is more than chance.

A rung is a recipe that was run on each of the folds. It is compared with another fold by fold, since blocks of tissue
differ more in difficulty than settings do, and a difference on the same block leaves that out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mitoseg_lib.choices import Choice, Choices, best_choice, pooled, read_choices
from mitoseg_lib.recipes import N_FOLDS
from mitoseg_lib.runs import RESULTS, origin, read_runs

__all__ = ["Gain", "Rung", "gain", "ladder_table", "read_rung"]


@dataclass(frozen=True)
class Rung:
    """What a recipe reached on the folds.

    Attributes
    ----------
    name : str
        Its recipe's name, without ``-fold-K``.
    choice : Choice
        How probabilities become a mask: the threshold that is best on all folds together.
    ious : tuple of float
        IoU on each fold's validation slices, with that choice.
    seconds : float
        Mean time of a fold's run.
    """

    name: str
    choice: Choice
    ious: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Gain:
    """What one rung has over another, fold by fold.

    Attributes
    ----------
    mean, sd : float
        Of the differences in IoU; the sample standard deviation.
    """

    mean: float
    sd: float

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the mean is larger than the spread, else ``no difference``.

        With four folds a mean of one standard deviation is two standard errors.
        """
        if abs(self.mean) <= self.sd:
            return "no difference"
        return "better" if self.mean > 0 else "worse"


def read_rung(name: str, folder: Path = RESULTS) -> Rung | None:
    """Return what a rung's folds reached with seed 0 and plain probabilities; None where one of them wasn't run.

    Plain: without test-time augmentation and median, which are rungs of their own.
    """
    names = [f"{name}-fold-{k}" for k in range(1, N_FOLDS + 1)]
    runs = [next((run for run in read_runs(fold, folder) if run.seed == 0), None) for fold in names]
    if None in runs:
        return None
    folds = [_plain(read_choices(fold, 0, folder)) for fold in names]
    choice = best_choice(pooled(folds))
    return Rung(
        name, choice, tuple(fold[choice].iou for fold in folds), float(np.mean([run.wall_seconds for run in runs]))
    )


def gain(rung: Rung, start: Rung) -> Gain:
    """Return what a rung gained over another, from the differences on each fold."""
    differences = np.subtract(rung.ious, start.ious)
    return Gain(float(differences.mean()), float(differences.std(ddof=1)))


def ladder_table(rungs: Mapping[str, str], start: str, folder: Path = RESULTS) -> str:
    """Return a table as text: each rung's IoU on the folds, its gain over another, and the minutes that a fold took.

    Parameters
    ----------
    rungs : dict
        What the table calls a rung, and its name.
    start : str
        Name of the rung that the others are compared with.
    folder : Path
        Of the recorded runs.
    """
    width = max(map(len, rungs)) + 2
    heads = "".join(f"{f'#{k}':>6s}" for k in range(1, N_FOLDS + 1))
    lines = [f"{'':{width}s}{heads}{'mean':>7s}{'gain':>16s}{'min':>5s}"]
    first, shown = read_rung(start, folder), []
    for label, name in rungs.items():
        rung = read_rung(name, folder)
        if rung is None:
            lines.append(f"{label:{width}s}not run yet: mitoseg run {name}-fold-1 to {name}-fold-{N_FOLDS}")
            continue
        shown += [run for k in range(1, N_FOLDS + 1) for run in read_runs(f"{name}-fold-{k}", folder)]
        lines.append(f"{label:{width}s}{_row(rung, first)}")
    return "\n".join([*lines, origin(shown)] if shown else lines)


def _row(rung: Rung, start: Rung | None) -> str:
    """Return a rung's figures, and its gain where there is something to compare it with."""
    cells = "".join(f"{iou:6.3f}" for iou in rung.ious) + f"{np.mean(rung.ious):7.3f}"
    if start is None or rung.name == start.name:
        return f"{cells}{'':16s}{rung.seconds / 60:5.0f}"
    found = gain(rung, start)
    return f"{cells}{f'{found.mean:+.3f} ± {found.sd:.3f}':>16s}{rung.seconds / 60:5.0f}  {found.verdict}"


def _plain(found: Choices) -> Choices:
    """Return the choices without test-time augmentation and without a median."""
    return {choice: counts for choice, counts in found.items() if not choice.turned and choice.median == 1}
