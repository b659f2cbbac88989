"""Training and validation parts of a stack, as z-indices.

Neighbouring slices of an electron-microscopy stack are near copies of each other. Slices drawn at random for
validation therefore have near copies in the training part, and the validation score is flattered. A
contiguous block with a gap lowers this leak; it does not end it, because a mitochondrion can be longer than
the gap.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from random import Random


@dataclass(frozen=True)
class Split:
    """Which slices of a stack train a model and which validate it.

    Attributes
    ----------
    train : tuple of int
        z-indices of the training slices, ascending.
    validation : tuple of int
        z-indices of the validation slices, ascending; none of them is in `train`.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]


def block_split(n_slices: int, *, validation: float = 0.15, gap: int = 10) -> Split:
    """Put the last slices of a stack aside for validation, with a gap of unused slices before them.

    Parameters
    ----------
    n_slices : int
        Number of slices in the stack, at least 2.
    validation : float
        Share of the slices in the validation block, between 0 and 1 (both excluded); the number is rounded,
        and is at least 1.
    gap : int
        Number of slices between the two parts, which belong to neither.

    Returns
    -------
    Split
        `train` is 0 .. n - v - gap - 1 and `validation` is n - v .. n - 1, for v validation slices of n.

    Raises
    ------
    ValueError
        When the stack has fewer than 2 slices, a value is out of range, or nothing is left to train on.

    Examples
    --------
    >>> split = block_split(165)
    >>> split.train[-1], split.validation[0], split.validation[-1]
    (129, 140, 164)
    """
    n_validation = _validation_size(n_slices, validation)
    if gap < 0:
        raise ValueError(f"The gap is {gap} slices, but it can't be negative; use 0 for no gap.")
    n_train = n_slices - n_validation - gap
    if n_train < 1:
        raise ValueError(
            f"Of {n_slices} slices, {n_validation} for validation and a gap of {gap} leave none for "
            "training; use a smaller gap or a smaller validation share."
        )
    return Split(tuple(range(n_train)), tuple(range(n_slices - n_validation, n_slices)))


def random_split(n_slices: int, *, validation: float = 0.2, seed: int = 0) -> Split:
    """Draw the validation slices at random from the whole stack.

    This is the usual reading of "a split of 80:20". Nearly every validation slice has a direct neighbour in
    the training part, so use it to see the leak, and `block_split` to measure a model.

    Parameters
    ----------
    n_slices : int
        Number of slices in the stack, at least 2.
    validation : float
        Share of the slices for validation, between 0 and 1 (both excluded); the number is rounded, and is at
        least 1.
    seed : int
        The same seed gives the same split on every machine.

    Returns
    -------
    Split
        Two parts that together hold every slice once.

    Raises
    ------
    ValueError
        When the stack has fewer than 2 slices, a value is out of range, or nothing is left to train on.

    Examples
    --------
    >>> split = random_split(165)
    >>> len(split.train), len(split.validation)
    (132, 33)
    """
    n_validation = _validation_size(n_slices, validation)
    if n_validation >= n_slices:
        raise ValueError(
            f"Of {n_slices} slices, {n_validation} for validation leave none for training; "
            "use a smaller validation share."
        )
    chosen = set(Random(seed).sample(range(n_slices), n_validation))
    return Split(tuple(z for z in range(n_slices) if z not in chosen), tuple(sorted(chosen)))


def cross_validation_folds(
    n_slices: int, n_folds: int = 4, *, gap: int = 10, left_out: Collection[int] = ()
) -> tuple[Split, ...]:
    """Cut a stack into blocks of slices; each of them validates once, and the others train.

    One validation block of a small stack holds a dozen mitochondria, so a score on it can rise by luck. Over all folds
    every slice is predicted once, by a model that hasn't seen it or its neighbours within the gap.

    Parameters
    ----------
    n_slices : int
        Number of slices in the stack.
    n_folds : int
        Number of blocks, 2 or more; their sizes differ by one slice at most.
    gap : int
        Number of slices on each side of a validation block that don't train.
    left_out : collection of int
        Slices that neither train nor validate, in any fold: damaged ones.

    Returns
    -------
    tuple of Split
        One a fold, from the first slices to the last.

    Raises
    ------
    ValueError
        When a number is out of range, or a fold has nothing to train on or to validate.

    Examples
    --------
    >>> [(fold.validation[0], fold.validation[-1]) for fold in cross_validation_folds(165)]
    [(0, 40), (41, 81), (82, 122), (123, 164)]
    """
    if not 2 <= n_folds <= n_slices:
        raise ValueError(f"n_folds is {n_folds}, but from 2 to the {n_slices} slices were expected; use for example 4.")
    if gap < 0:
        raise ValueError(f"The gap is {gap} slices, but it can't be negative; use 0 for no gap.")
    ends = [n_slices * fold // n_folds for fold in range(n_folds + 1)]
    used = [z for z in range(n_slices) if z not in left_out]
    folds = tuple(
        Split(
            tuple(z for z in used if z < start - gap or z >= end + gap),
            tuple(z for z in used if start <= z < end),
        )
        for start, end in pairwise(ends)
    )
    if not all(fold.train and fold.validation for fold in folds):
        raise ValueError(
            f"{n_slices} slices in {n_folds} folds with a gap of {gap} leave a fold no slice to train on or none to "
            "validate; use a smaller gap or fewer folds."
        )
    return folds


def _validation_size(n_slices: int, validation: float) -> int:
    """Return the number of validation slices, at least 1."""
    if n_slices < 2:
        raise ValueError(f"The stack has {n_slices} slices, but a split needs 2 or more; use a taller stack.")
    if not 0 < validation < 1:
        raise ValueError(
            f"The validation share is {validation}, but it must lie between 0 and 1 (both excluded); "
            "use for example 0.2."
        )
    return max(1, round(n_slices * validation))
