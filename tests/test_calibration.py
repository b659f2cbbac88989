"""Bins, means and shares hold what they say, and agree with torchmetrics, SciPy and NumPy."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torchmetrics.classification import BinaryCalibrationError

from mitoseg_lib.calibration import SHARES, disagreement, errors_among_most_uncertain, reliability


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


# --- disagreement

probability = st.floats(0, 1, width=32)
several = st.integers(2, 6).flatmap(
    lambda number: hnp.arrays(np.float32, st.just((number, 2, 3, 4)), elements=probability)
)


@given(several)
@settings(deadline=None)
def test_mean_and_spread_are_those_of_numpy(predictions):
    found = disagreement(iter(predictions))
    assert {array.dtype for array in (found.mean, found.sd, found.entropy)} == {np.dtype(np.float32)}
    assert found.number == len(predictions)
    assert np.allclose(found.mean, predictions.mean(axis=0, dtype=np.float64), atol=1e-6, rtol=0)
    assert np.allclose(found.sd, predictions.std(axis=0, dtype=np.float64), atol=1e-4, rtol=0)  # root of 1e-8
    mean = found.mean.astype(np.float64)
    assert np.allclose(found.entropy, stats.entropy([mean, 1 - mean], base=2), atol=1e-6, rtol=0)
    assert (found.mean <= 1).all() and (found.sd <= 0.5 + 1e-6).all() and (found.entropy <= 1).all()


def test_the_spread_of_close_predictions_is_not_lost_to_rounding():
    rng = np.random.default_rng(0)
    predictions = (0.9 + 1e-3 * rng.standard_normal((5, 4, 20, 20))).astype(np.float32)
    assert np.allclose(disagreement(predictions).sd, predictions.std(axis=0, dtype=np.float64), rtol=1e-3)


def test_disagreement_by_hand():
    sure, unsure = np.array([[[0, 1, 0.5, 0.25]]], np.float32), np.array([[[0, 0, 0.5, 0.25]]], np.float32)
    found = disagreement([sure, unsure])
    assert found.mean.ravel().tolist() == [0, 0.5, 0.5, 0.25]
    assert found.sd.ravel().tolist() == [0, 0.5, 0, 0]
    assert found.entropy.ravel() == pytest.approx([0, 1, 1, 0.8112781])


def test_predictions_are_not_changed_and_may_come_in_one_array_that_is_used_again():
    buffer, expected = np.zeros((2, 3, 4), np.float32), []

    def predict():
        for seed in range(4):
            buffer[...] = np.random.default_rng(seed).random(buffer.shape)
            expected.append(buffer.copy())
            yield buffer
            assert np.array_equal(buffer, expected[-1])

    found = disagreement(predict())
    assert np.allclose(found.mean, np.mean(expected, axis=0)) and np.allclose(found.sd, np.std(expected, axis=0))


def test_memory_is_that_of_about_three_volumes():
    def predict():
        for seed in range(5):
            yield np.random.default_rng(seed).random((64, 128, 128), np.float32)

    tracemalloc.start()
    try:
        disagreement(predict())
        volumes = tracemalloc.get_traced_memory()[1] / (64 * 128 * 128 * 4)
    finally:
        tracemalloc.stop()
    assert volumes < 4.2  # three, and the next prediction while the last one is still there


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ([], "There are 0 predictions, but two or more"),
        ([np.zeros((1, 2, 3), np.float32)], "There are 1 predictions"),
        ([np.zeros((1, 2, 3)), np.zeros((1, 2, 4))], r"Prediction 2 has shape \(1, 2, 4\)"),
        ([np.zeros((2, 3))], r"Prediction 1 is float64 \(2, 3\), but floats \(z, y, x\)"),
        ([np.zeros((1, 2, 3), np.uint8)], "Prediction 1 is uint8"),
        ([0.5, 0.5], "Prediction 1 is float, but"),
        ([np.zeros((1, 2, 3)), np.full((1, 2, 3), 1.5)], r"Prediction 2 lies between 1.5 and 1.5, but \[0, 1\]"),
        ([np.full((1, 2, 3), np.nan)], "Prediction 1 lies between nan"),
    ],
)
def test_what_cannot_disagree_is_refused(predictions, said):
    with pytest.raises(ValueError, match=said):
        disagreement(predictions)


# --- where doubt and errors meet


def by_sorting(uncertainty, wrong, share):
    """Sort all voxels; those of equal uncertainty share their errors evenly."""
    _, where = np.unique(-uncertainty.ravel(), return_inverse=True)
    even = (np.bincount(where, wrong.ravel()) / np.bincount(where))[where]
    errors = np.concatenate([[0], np.cumsum(even[np.argsort(-uncertainty, axis=None)])])
    return np.interp(share * uncertainty.size, np.arange(len(errors)), errors) / wrong.sum()


def test_doubt_and_errors_by_hand():
    uncertainty = np.array([[[0.9, 0.1, 0.8, 0.2, 0.3, 0.0, 0.5, 0.4, 0.6, 0.7]]])
    prediction, truth = np.zeros((2, 1, 1, 10), bool)
    truth[0, 0, [0, 2, 5]] = True  # wrong at 0.9, 0.8 and 0.0
    found = errors_among_most_uncertain(uncertainty, prediction, truth, shares=(0.1, 0.2, 0.25, 0.9, 1, 0))
    assert found == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 1, 0])


def test_ties_share_their_errors():
    uncertainty = np.array([1.0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0])
    truth = np.array([False, True, True, False, False, True, True, False, False, False])
    found = errors_among_most_uncertain(uncertainty, np.zeros(10, bool), truth, shares=(0.1, 0.3, 0.5, 0.75))
    assert found == pytest.approx([0, 0.25, 0.5, 0.75])


@given(
    hnp.arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.sampled_from([0, 0.1, 0.25, 0.5, 0.9, 1])),
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(0, 1), max_size=5),
)
@settings(deadline=None)
def test_shares_are_those_of_a_full_sort(uncertainty, seed, shares):
    wrong = np.random.default_rng(seed).random(uncertainty.shape) < 0.3
    prediction = np.random.default_rng(seed + 1).random(uncertainty.shape) < 0.5
    found = errors_among_most_uncertain(uncertainty, prediction, prediction ^ wrong, shares=shares)
    assert found.dtype == np.float64 and found.shape == (len(shares),)
    expected = [by_sorting(uncertainty, wrong, share) for share in shares] if wrong.any() else np.ones(len(shares))
    assert np.allclose(found, expected, atol=1e-9)
    assert (np.diff(found[np.argsort(shares)]) >= -1e-12).all()


def test_doubt_that_knows_nothing_holds_as_many_errors_as_voxels_and_doubt_that_knows_all_holds_them_all():
    rng = np.random.default_rng(0)
    truth = rng.random((20, 100, 100)) < 0.02
    prediction = np.zeros_like(truth)
    blind = errors_among_most_uncertain(rng.random(truth.shape, np.float32), prediction, truth)
    assert blind == pytest.approx(SHARES, abs=0.02)
    same = errors_among_most_uncertain(np.zeros(truth.shape, np.float32), prediction, truth)
    assert same == pytest.approx(SHARES)
    knowing = errors_among_most_uncertain(truth.astype(np.float32), prediction, truth, shares=(truth.mean(), 0.5))
    assert knowing.tolist() == [1, 1]


def test_no_errors_are_all_found():
    assert errors_among_most_uncertain(np.zeros(4), np.ones(4, bool), np.ones(4, bool), shares=(0, 0.5)).tolist() == [
        1,
        1,
    ]
    assert errors_among_most_uncertain(np.zeros(0), np.ones(0, bool), np.ones(0, bool), shares=(0.5,)).tolist() == [1]


def test_the_volume_is_not_changed():
    uncertainty = np.random.default_rng(0).random((3, 4, 5))
    before = uncertainty.copy()
    errors_among_most_uncertain(uncertainty, np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool))
    assert np.array_equal(uncertainty, before)


def test_what_cannot_be_compared_with_errors_is_refused():
    doubt, mask = np.zeros((2, 3, 4)), np.zeros((2, 3, 4), bool)
    with pytest.raises(ValueError, match="prediction float64"):
        errors_among_most_uncertain(doubt, doubt, mask)
    with pytest.raises(ValueError, match="uncertainty is bool"):
        errors_among_most_uncertain(mask, mask, mask)
    with pytest.raises(ValueError, match="must be equal"):
        errors_among_most_uncertain(doubt, mask, mask[:1])
    with pytest.raises(ValueError, match="holds NaN"):
        errors_among_most_uncertain(np.full((2, 3, 4), np.nan), mask, mask)
    for share in (-0.1, 5, float("nan")):
        with pytest.raises(ValueError, match=f"A share is {share}, but numbers from 0 to 1"):
            errors_among_most_uncertain(doubt, mask, mask, shares=(0.5, share))
