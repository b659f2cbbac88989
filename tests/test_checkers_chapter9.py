"""Wrong answers to the exercises of chapter 9 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest

from mitoseg_lib.exercises.chapter9 import check_calibration, check_per_channel, check_quantise, check_sizes

SIZES = {bits: 1_000_000 * bits / 8 / 1e6 for bits in (32, 16, 8)}
WEIGHTS = np.random.default_rng(0).normal(size=(6, 3, 3, 3)) * np.array([0, 1, 2, 4, 8, 16])[:, None, None, None]


def test_sizes():
    assert check_sizes(SIZES, 1_000_000).right
    for factor, words in ((8, "bits; a byte"), (1e6, "bytes; a megabyte"), (1 / 1.048576, "MiB"), (3, "How many")):
        found = check_sizes({bits: size * factor for bits, size in SIZES.items()}, 1_000_000)
        assert not found.right and words in found.words
    assert "turned round" in check_sizes({32: 1.0, 16: 2.0, 8: 4.0}, 1_000_000).words
    assert "dictionary" in check_sizes([4, 2, 1], 1_000_000).words


def quantise(values, bits, largest=None, rounding=np.round):
    step = (np.abs(values).max() if largest is None else largest) / (2 ** (bits - 1) - 1)
    return rounding(values / step) * step


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda v, b: np.round(v / (np.abs(v).max() / 127)), "multiply them by the step"),
        (lambda v, b: quantise(v, b, rounding=np.trunc), "rounded, or cut off"),
        (lambda v, b: quantise(v, 8), "127 written"),
        (lambda v, b: np.round((v - v.min()) / np.ptp(v) * 255) / 255 * np.ptp(v) + v.min(), "Zero isn't zero"),
        (lambda v, b: quantise(v, b, 15).clip(-15, 15), "largest value has changed"),
        (lambda v, b: v, "more than 255 values"),
        (lambda v, b: 1 / 0, "ZeroDivisionError"),
        (lambda v, b: None, "Hand in"),
    ],
)
def test_a_wrong_rounding_gets_its_hint(function, words):
    found = check_quantise(function)
    assert not found.right and words in found.words


def test_a_right_rounding_and_what_is_no_function():
    assert check_quantise(quantise).right
    assert "without brackets" in check_quantise(3).words


def errors(axes):
    largest = np.maximum(np.abs(WEIGHTS).max(axis=axes, keepdims=True), 1e-30)
    return float(np.mean((np.round(WEIGHTS / largest * 127) * largest / 127 - WEIGHTS) ** 2))


def test_per_channel():
    right = {"one step": errors((0, 1, 2, 3)), "a step each": errors((1, 2, 3))}
    assert check_per_channel(right, WEIGHTS).right
    wrong = {
        "exchanged": dict(zip(right, reversed(right.values()), strict=True)),
        "each input": right | {"a step each": errors((0, 2, 3))},
        "roots": {name: value**0.5 for name, value in right.items()},
        "Both are equal": {name: 0.5 for name in right},
        "divided by zero": right | {"a step each": float("nan")},
        "The first one is right": right | {"a step each": right["a step each"] * 1.5},
        "mean of the squares": {"one step": 0.9, "a step each": 0.1},
    }
    for words, answer in wrong.items():
        found = check_per_channel(answer, WEIGHTS)
        assert not found.right and words in found.words, words


def test_calibration_needs_two_files_that_differ(tmp_path):
    image, truth = np.zeros((1, 32, 32), np.uint8), np.zeros((1, 32, 32), bool)
    ious = {"as they are": 0.5, "dark": 0.4}
    for name in "abc":
        (tmp_path / name).write_bytes(b"the same")
    same = {"as they are": tmp_path / "a", "dark": tmp_path / "a"}
    assert "the same file" in check_calibration(ious, same, image, truth, 0.5).words
    equal = {"as they are": tmp_path / "a", "dark": tmp_path / "b"}
    assert "the same model" in check_calibration(ious, equal, image, truth, 0.5).words
    gone = {"as they are": tmp_path / "a", "dark": tmp_path / "nowhere"}
    assert "FileNotFoundError" in check_calibration(ious, gone, image, truth, 0.5).words
    assert "'dark' is missing" in check_calibration({"as they are": 0.5}, gone, image, truth, 0.5).words
