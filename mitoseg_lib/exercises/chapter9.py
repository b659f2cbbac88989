"""Checkers of chapter 9, the model in a browser."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_array,
    as_mapping,
    as_number,
    call,
    checker,
    hint,
    is_close,
    require_function,
)  # fmt: skip
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import iou
from mitoseg_lib.onnx_export import OnnxNetwork

__all__ = ["check_calibration", "check_per_channel", "check_quantise", "check_sizes"]

BITS = (32, 16, 8)


@checker
def check_sizes(sizes: Any, n_parameters: int) -> str:
    """Exercise 1: megabytes (10^6 bytes) of so many numbers, for 32, 16 and 8 bits each."""
    given = as_mapping(sizes, "megabytes for each number of bits", BITS)
    found = [as_number(given[bits], f"the size with {bits} bits") for bits in BITS]
    expected = np.array([n_parameters * bits / 8 / 1e6 for bits in BITS])
    if is_close(found, expected, within=0.01):
        return "a file has little beside its numbers, so its size can be told beforehand."
    hint(is_close(found, expected * 8, within=0.01), "These are millions of bits; a byte has eight.")
    hint(is_close(found, expected * 1e6, within=0.01), "These are bytes; a megabyte has a million.")
    hint(is_close(found, expected / 1.048576, within=0.01), "These are MiB, of 2^20 bytes; a megabyte has 10^6.")
    hint(is_close(found[::-1], expected, within=0.01), "The order is turned round: fewer bits make a smaller file.")
    raise NotYet("Each number takes so many bits, and eight bits are a byte. How many numbers are there?")


@checker
def check_quantise(quantise: Any) -> str:
    """Exercise 2: a function (values, bits) -> values rounded to whole steps, with 0 and the largest one kept."""
    require_function(quantise, "quantise")
    rng = np.random.default_rng(0)
    values = rng.normal(0, 3, 500).astype(np.float32)
    values[:2] = 0, 20  # and nothing as far on the other side
    found = as_array(call(quantise, values.copy(), 8, words="500 numbers and 8 bits"), "the rounded values", (500,))
    step = 20 / 127
    hint(
        np.array_equal(found, np.rint(found)), "These are the whole steps themselves; multiply them by the step again."
    )
    hint(found[0] != 0, "Zero isn't zero any more. Steps are counted from zero, in both directions.")
    words = "The largest value has changed. A step is the largest absolute value over 127, for 8 bits."
    hint(abs(found[1] - 20) > 1e-3, words)
    hint(len(np.unique(found)) > 255, "These are more than 255 values: is the number of steps rounded?")
    error = np.abs(found - values).max()
    hint(error > 0.6 * step, "Some values are off by more than half a step. Are they rounded, or cut off?")
    turned = as_array(call(quantise, -values, 8, words="the negatives of these"), "the rounded values", (500,))
    words = "Of numbers whose largest by size is negative, that one changes. Is the absolute value taken?"
    hint(abs(turned[1] + 20) > 1e-3, words)
    fewer = as_array(call(quantise, values.copy(), 4, words="500 numbers and 4 bits"), "the rounded values", (500,))
    hint(
        len(np.unique(fewer)) > 15,
        "With 4 bits there are more than 15 values. Is 127 written where it depends on bits?",
    )
    hint(np.abs(fewer - values).max() > 0.6 * 20 / 7, "With 4 bits some values are off by more than half a step.")
    return "each value is off by half a step at most, and the largest one sets the step."


@checker
def check_per_channel(errors: Any, weights: Any) -> str:
    """Exercise 3: mean squared errors of 8-bit weights (out, in, y, x), with a step for all and one for each output."""
    given = as_mapping(errors, "a mean squared error for each way", ("one step", "a step each"))
    found = [as_number(given[key], f"the error with {key}") for key in ("one step", "a step each")]
    values = as_array(weights, "the weights").astype(np.float64)
    largest = np.abs(values).max(axis=(1, 2, 3), keepdims=True)
    expected = [_squared_error(values, np.abs(values).max()), _squared_error(values, largest)]
    if is_close(found, expected, within=0.02):
        return "filters of one layer differ in size, and a step for all of them is set by the largest."
    hint(is_close(found[::-1], expected, within=0.02), "The two are exchanged.")
    by_input = _squared_error(values, np.abs(values).max(axis=(0, 2, 3), keepdims=True))
    words = "There is a step for each input here; a filter is one output, the first axis."
    hint(is_close(found[1], by_input, within=0.02), words)
    hint(is_close(found, np.sqrt(expected), within=0.02), "These are the roots of the mean squares.")
    hint(is_close(found[0], found[1]), "Both are equal. Is the second one quantised filter by filter?")
    right = [is_close(*pair, within=0.02) for pair in zip(found, expected, strict=True)]
    hint(
        right[0], "The first one is right. For the second one, quantise `weights[n]` for each n, and compare all of it."
    )
    raise NotYet("Compare the quantised weights with the weights: the mean of the squares of all differences.")


@checker
def check_calibration(
    ious: Any, paths: Any, image: NDArray[np.uint8], truth: NDArray[np.bool_], threshold: float
) -> str:
    """Exercise 4: IoU of files that were calibrated with slices as they are, and with dark ones.

    Parameters
    ----------
    ious, paths
        Dictionaries with the keys "as they are" and "dark".
    image, truth, threshold
        uint8 (z, y, x), bool, and a probability.
    """
    keys = ("as they are", "dark")
    given, files = as_mapping(ious, "the IoU of each file", keys), as_mapping(paths, "the path of each file", keys)
    found = [as_number(given[key], f"the IoU of {key!r}") for key in keys]
    hint(len({str(files[key]) for key in keys}) < 2, "Both paths are the same file; give the second one another name.")
    contents = [call(_content, files[key], words=f"the path of {key!r}") for key in keys]
    hint(contents[0] == contents[1], "Both files hold the same model. Were the slices of the second one made dark?")
    masks = [predict_stack(OnnxNetwork(files[key]), image, precision="fp32") >= threshold for key in keys]
    expected = [iou(mask, truth) for mask in masks]
    if is_close(found, expected, within=0.01):
        return "what is calibrated on one kind of image is cut off on another."
    hint(is_close(found[::-1], expected, within=0.01), "The two are exchanged.")
    raise NotYet("Score the masks of both files at the model's threshold, on the same slices as before.")


def _squared_error(values: NDArray, largest: Any) -> float:
    step = np.maximum(largest, 1e-30) / 127
    return float(np.mean((np.rint(values / step) * step - values) ** 2))


def _content(path: Any) -> bytes:
    with open(path, "rb") as file:
        return file.read()
