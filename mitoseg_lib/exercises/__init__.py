"""Checkers of the book's exercises: they say what is wrong with an answer and where to look, never what is right.

One module a chapter. A checker is called with the answer and with the data it was found from, and returns a `Feedback`,
which a notebook shows. None of them raises an error for a wrong answer, whatever it is.
"""

from mitoseg_lib.exercises.feedback import Feedback

__all__ = ["Feedback"]
