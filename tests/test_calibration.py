"""Bins hold what they say, and agree with torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import BinaryCalibrationError

from mitoseg_lib.calibration import reliability


def volume(seed=0, shape=(3, 20, 30)):
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(0.4, 0.8, shape).astype(np.float32)
    return probabilities, rng.random(shape) < probabilities**2


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_the_error_is_torchmetrics(bins):
    probabilities, truth = volume()
    theirs = BinaryCalibrationError(n_bins=bins, norm="l1")(torch.from_numpy(probabilities), torch.from_numpy(truth))
    assert reliability(probabilities, truth, bins=bins).expected_calibration_error == pytest.approx(
        float(theirs), abs=1e-5
    )


def test_bins_by_hand():
    probabilities = np.array([[[0.0, 0.24, 0.25, 0.5, 0.99, 1.0]]])
    truth = np.array([[[False, True, False, True, True, False]]])
    found = reliability(probabilities, truth, bins=4)
    assert found.voxels.tolist() == [2, 1, 1, 2] and found.foreground.tolist() == [1, 0, 1, 1]
    assert found.predicted == pytest.approx([0.12, 0.25, 0.5, 0.995])
    assert found.observed.tolist() == [0.5, 0.0, 1.0, 0.5]
    assert found.expected_calibration_error == pytest.approx((0.76 + 0.25 + 0.5 + 0.99) / 6)


def test_probabilities_that_are_right_have_no_error():
    rng = np.random.default_rng(0)
    probabilities = rng.random((10, 300, 300))
    truth = rng.random(probabilities.shape) < probabilities
    found = reliability(probabilities, truth)
    assert found.expected_calibration_error < 0.005
    assert np.allclose(found.predicted, found.observed, atol=0.01)


def test_an_empty_bin_has_no_mean():
    found = reliability(np.array([0.1, 0.2]), np.array([False, True]), bins=2)
    assert np.isnan(found.predicted[1]) and np.isnan(found.observed[1])
    assert found.expected_calibration_error == pytest.approx(0.35)


@given(st.integers(0, 60), st.integers(1, 12))
def test_parts_add_up_to_the_whole(cut, bins):
    probabilities, truth = (array.reshape(60, 30) for array in volume())
    parts = [reliability(probabilities[part], truth[part], bins=bins) for part in (slice(cut), slice(cut, None))]
    whole = reliability(probabilities, truth, bins=bins)
    both = parts[0] + parts[1]
    assert np.array_equal(both.voxels, whole.voxels) and np.array_equal(both.foreground, whole.foreground)
    assert np.allclose(both.probability_sum, whole.probability_sum)


def test_parts_with_other_bins_are_refused():
    with pytest.raises(ValueError, match="same bins"):
        reliability(*volume(), bins=3) + reliability(*volume(), bins=4)


@pytest.mark.parametrize(
    ("probabilities", "truth", "bins"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2), bool), 10),
        (np.zeros(3), np.zeros(3, np.uint8), 10),
        (np.zeros(3, int), np.zeros(3, bool), 10),
        (np.full(3, 1.1), np.zeros(3, bool), 10),
        (np.full(3, np.nan), np.zeros(3, bool), 10),
        (np.zeros(3), np.zeros(3, bool), 0),
    ],
)
def test_what_cannot_be_sorted_is_refused(probabilities, truth, bins):
    with pytest.raises(ValueError, match="expected"):
        reliability(probabilities, truth, bins=bins)
