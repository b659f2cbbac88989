"""Training and validation parts of a stack, as z-indices.

Neighbouring slices of an electron-microscopy stack are near copies of each other. Slices drawn at random for
validation therefore have near copies in the training part, and the validation score is flattered. A
contiguous block with a gap lowers this leak; it does not end it, because a mitochondrion can be longer than
the gap.
"""

from dataclasses import dataclass
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
