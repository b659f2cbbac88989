"""What every checker is made of; each chapter's own checkers have a file of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mitoseg_lib.exercises import Feedback
from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_array,
    as_mapping,
    as_number,
    as_numbers,
    call,
    checker,
    hint,
    is_close,
    require_function,
)  # fmt: skip


@checker
def check_seven(answer):
    number = as_number(answer, "the number of slices")
    if is_close(number, 7):
        return "seven it is."
    hint(number == 700, "That is in nm.")
    raise NotYet("Count again.")


def test_a_right_answer_is_said_to_be_right():
    assert repr(check_seven(7)) == "Right: seven it is." and check_seven(7) == Feedback(True, "seven it is.")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (700, "That is in nm."),
        (8, "Count again."),
        (..., "Hand in the number of slices."),
        (None, "Hand in the number of slices."),
        ("7", "A number was expected (the number of slices), but this is text."),
        (True, "but this is True or False."),
        ([7], "but this is a list."),
        (len, "a function; call it first"),
        (10**400, "The number of slices is inf"),
        (float("nan"), "The number of slices is nan; was something divided by zero?"),
    ],
)
def test_a_wrong_answer_gets_a_hint(answer, words):
    found = check_seven(answer)
    assert not found.right and repr(found).startswith("Not yet: ") and words in found.words


@pytest.mark.parametrize("seven", [7.0, np.int64(7), np.float32(7), np.array(7), np.array([7]), torch.tensor(7.0)])
def test_numbers_of_all_kinds_are_numbers(seven):
    assert check_seven(seven).right


@given(st.one_of(st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.dictionaries(st.text(), st.none())))
def test_no_answer_raises_an_error(answer):
    assert check_seven(answer).right == (isinstance(answer, int | float) and is_close(answer, 7))


def said(check, *arguments):
    return checker(lambda: check(*arguments) and "right")().words


def test_lists_say_what_is_wrong_with_them():
    assert as_numbers((1, np.float64(2)), "scores", 2) == [1.0, 2.0] == as_numbers(np.array([1, 2]), "scores")
    assert "2 numbers were expected (scores), but these are 3." in said(as_numbers, [1, 2, 3], "scores", 2)
    assert "a list of numbers was expected" in said(as_numbers, 3, "scores", 2).lower()
    assert "a list of numbers was expected" in said(as_numbers, np.array(5), "scores").lower()
    assert "a number among scores), but this is text" in said(as_numbers, ["a", 1], "scores", 2)
    assert "this is a dictionary" in said(as_numbers, {1: 2}, "scores", 1)


def test_dictionaries_say_what_is_missing():
    assert as_mapping({1: 2, 3: 4}, "IoU by size", [1]) == {1: 2, 3: 4}
    assert "1, 'b' is missing" in said(as_mapping, {"a": 2}, "IoU by size", [1, "b"])
    assert "a dictionary was expected" in said(as_mapping, [1], "IoU by size", [1]).lower()


def test_arrays_say_their_shape():
    assert as_array(torch.zeros(2, 3, requires_grad=True), "a patch", (2, 3)).shape == (2, 3)
    assert "The shape (2, 3) was expected (a patch), but this has (3, 2)." in said(
        as_array, np.zeros((3, 2)), "a patch", (2, 3)
    )
    for wrong in ("text", [[1], [1, 2]], {}, len, [None]):
        assert "An array was expected (a patch)" in said(as_array, wrong, "a patch")


def test_an_error_in_a_learners_function_is_told():
    def broken(a):
        return a / 0

    found = checker(lambda: call(broken, 1, words="the number 1"))()
    assert found == Feedback(False, "Called with the number 1, the function raised ZeroDivisionError: division by zero")
    assert "without brackets after it; this is a list" in said(require_function, [1], "join")
