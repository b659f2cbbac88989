"""What every checker is made of: feedback, and the questions that are asked of an answer.

A checker is a function of its answer with the decorator `checker`. It returns what is said of a right answer, or goes
through what could be wrong, the commonest first, and leaves by the first `hint` that applies. Whether an answer is
right is asked before it is compared with common mistakes, since on some data both may agree.
"""

from __future__ import annotations

import functools
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Feedback",
    "NotYet",
    "as_array",
    "as_mapping",
    "as_number",
    "as_numbers",
    "call",
    "checker",
    "hint",
    "is_close",
    "require_function",
]

WIDTH = 88  # characters of a line, as in the chapters' code


@dataclass(frozen=True)
class Feedback:
    """What a checker says.

    Attributes
    ----------
    right
        Whether the answer is.
    words
        What to look at again, or what the right answer shows.
    """

    right: bool
    words: str

    def __repr__(self) -> str:
        """In words, as a notebook shows it: in lines, since a page doesn't break them."""
        return textwrap.fill(f"{'Right' if self.right else 'Not yet'}: {self.words}", WIDTH, break_long_words=False)


class NotYet(Exception):  # noqa: N818, it is no error
    """A wrong answer; its text is the hint."""


def checker(check: Callable[..., str]) -> Callable[..., Feedback]:
    """Make a checker of a function that returns what is said of a right answer, or raises `NotYet`."""

    @functools.wraps(check)
    def feedback(*answer: Any) -> Feedback:
        try:
            return Feedback(True, check(*answer))
        except NotYet as found:
            return Feedback(False, str(found))

    return feedback


def hint(applies: object, words: str) -> None:
    """Leave the checker with a hint if it applies."""
    if applies:
        raise NotYet(words)


def is_close(found: Any, expected: Any, *, within: float = 5e-3) -> bool:
    """Tell whether numbers agree, within a share of the expected ones (by default, as numbers copied from a print)."""
    try:
        return bool(np.allclose(found, expected, rtol=within, atol=1e-9))
    except (TypeError, ValueError):  # of another shape
        return False


def as_number(answer: Any, what: str) -> float:
    """Return an answer as a number, or hint at what was handed in instead; an array or tensor of one value is one."""
    if hasattr(answer, "item") and getattr(answer, "size", None) in (1, ()) or getattr(answer, "shape", None) == ():
        answer = answer.item()
    hint(answer is None or answer is ..., f"Hand in {what}.")
    is_number = isinstance(answer, numbers.Real) and not isinstance(answer, bool)
    hint(not is_number, f"A number was expected ({what}), but this is {_kind(answer)}.")
    try:
        number = float(answer)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    hint(not math.isfinite(number), f"{what[:1].upper()}{what[1:]} is {number}; was something divided by zero?")
    return number


def as_numbers(answer: Any, what: str, length: int | None = None) -> list[float]:
    """Return an answer as a list of numbers, as many as are expected, or hint."""
    hint(answer is None or answer is ..., f"Hand in {what}.")
    has_length = isinstance(answer, Iterable) and getattr(answer, "shape", None) != ()
    is_list = has_length and not isinstance(answer, str | bytes | Mapping)
    hint(not is_list, f"A list of numbers was expected ({what}), but this is {_kind(answer)}.")
    values = [as_number(value, f"a number among {what}") for value in answer]
    n = len(values)
    hint(length is not None and n != length, f"{length} numbers were expected ({what}), but these are {n}.")
    return values


def as_mapping(answer: Any, what: str, keys: Iterable[Any]) -> dict[Any, Any]:
    """Return an answer as a dictionary with these keys, or hint."""
    hint(answer is None or answer is ..., f"Hand in {what}.")
    hint(not isinstance(answer, Mapping), f"A dictionary was expected ({what}), but this is {_kind(answer)}.")
    missing = [key for key in keys if key not in answer]
    hint(missing, f"In the dictionary ({what}) {', '.join(map(repr, missing))} is missing.")
    return dict(answer)


def as_array(answer: Any, what: str, shape: tuple[int, ...] | None = None) -> NDArray:
    """Return an answer as an array of numbers or truth values, of this shape if one is given, or hint."""
    hint(answer is None or answer is ..., f"Hand in {what}.")
    answer = answer.detach().cpu() if hasattr(answer, "detach") else answer
    try:
        array = np.asarray(answer)
    except (TypeError, ValueError):
        array = np.empty(0, object)
    hint(array.dtype.kind not in "biuf", f"An array was expected ({what}), but this is {_kind(answer)}.")
    words = f"The shape {shape} was expected ({what}), but this has {array.shape}."
    hint(shape is not None and array.shape != shape, words)
    return array


def require_function(answer: Any, name: str) -> None:
    """Hint if an answer isn't a function."""
    kind = _kind(answer)
    hint(not callable(answer), f"Hand in the function itself, `{name}`, without brackets after it; this is {kind}.")


def call(function: Callable[..., Any], *arguments: Any, words: str) -> Any:
    """Call a learner's function, and turn whatever error it raises into a hint; `words` say what it was called with."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever a learner's code may raise
        text = " ".join(str(error).split())[:200]
        raise NotYet(f"Called with {words}, the function raised {type(error).__name__}: {text}") from None


def _kind(answer: Any) -> str:
    """Say in words what an answer is."""
    names = {bool: "True or False", str: "text", list: "a list", tuple: "a tuple", dict: "a dictionary"}
    if callable(answer) and not isinstance(answer, type):
        return "a function; call it first"
    return names.get(type(answer), f"of the type {type(answer).__name__}")
