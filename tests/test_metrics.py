import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_confusion_matrix_metric, compute_dice, compute_iou, get_confusion_matrix
from torchmetrics.functional import classification as tm

from mitoseg_lib.metrics import Scores, iou, scores
from mitoseg_lib.pooled import PooledScores

RATIOS = ("iou", "dice", "precision", "recall", "accuracy")


@pytest.fixture
def pair():
    """Two balls of radius 6 whose centres lie 4 voxels apart, and the counts found voxel by voxel."""
    z, y, x = np.ogrid[:17, :20, :24]
    prediction = (z - 8) ** 2 + (y - 10) ** 2 + (x - 9) ** 2 <= 36
    truth = (z - 8) ** 2 + (y - 10) ** 2 + (x - 13) ** 2 <= 36
    return prediction, truth


def brute_force(prediction, truth):
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        counts[p, t] += 1
    return Scores(*counts.values())


# --- known answers


def test_scores_by_hand():
    result = scores(np.array([[1, 1, 1, 0, 0]], bool), np.array([[1, 0, 0, 1, 0]], bool))
    assert result == Scores(1, 2, 1, 1)
    assert (result.iou, result.dice) == (1 / 4, 2 / 5)
    assert (result.precision, result.recall, result.accuracy) == (1 / 3, 1 / 2, 2 / 5)


def test_counts_are_those_of_a_loop(pair):
    assert scores(*pair) == brute_force(*pair)
    assert 0.2 < iou(*pair) < 0.6


def test_iou_is_the_iou_of_the_scores(pair):
    assert iou(*pair) == scores(*pair).iou


def test_counts_and_ratios_are_plain_numbers(pair):
    result = scores(*pair)
    assert all(type(count) is int for count in dataclasses.astuple(result))
    assert list(result.as_dict()) == list(RATIOS)
    assert all(type(value) is float for value in result.as_dict().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.true_positives = 0


def test_the_accuracy_of_an_all_black_mask_is_the_share_of_background():
    truth = np.zeros((10, 10, 10), bool)
    truth[:, :5, :1] = True
    black = scores(np.zeros_like(truth), truth)
    assert (black.accuracy, black.iou, black.recall) == (0.95, 0, 0)


# --- the convention: nothing divided by nothing is 1

EMPTY, FULL = np.zeros((2, 3, 3), bool), np.ones((2, 3, 3), bool)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        (EMPTY, EMPTY, {"iou": 1, "dice": 1, "precision": 1, "recall": 1, "accuracy": 1}),
        (FULL, FULL, {"iou": 1, "dice": 1, "precision": 1, "recall": 1, "accuracy": 1}),
        (EMPTY, FULL, {"iou": 0, "dice": 0, "precision": 1, "recall": 0, "accuracy": 0}),
        (FULL, EMPTY, {"iou": 0, "dice": 0, "precision": 0, "recall": 1, "accuracy": 0}),
        (EMPTY[:0], EMPTY[:0], {"iou": 1, "dice": 1, "precision": 1, "recall": 1, "accuracy": 1}),
    ],
    ids=["empty-empty", "full-full", "empty-full", "full-empty", "no voxels"],
)
def test_the_convention_for_empty_masks(prediction, truth, expected):
    assert scores(prediction, truth).as_dict() == expected
    pooled = PooledScores()
    pooled.update(prediction, truth)
    assert {name: pooled.compute()[name] for name in RATIOS} == expected


def test_one_wrong_voxel_in_an_empty_slice_costs_everything_there_and_little_when_pooled():
    truth = np.zeros((2, 10, 10), bool)
    truth[0, :5] = True
    prediction = truth.copy()
    prediction[1, 0, 0] = True
    averaged = np.mean([iou(p, t) for p, t in zip(prediction, truth, strict=True)])
    assert (averaged, iou(prediction, truth)) == (0.5, 50 / 51)


# --- other implementations


def test_ratios_agree_with_torchmetrics(pair):
    prediction, truth = (torch.from_numpy(mask).int() for mask in pair)
    result = scores(*pair)
    assert result.iou == pytest.approx(tm.binary_jaccard_index(prediction, truth).item())
    assert result.dice == pytest.approx(tm.binary_f1_score(prediction, truth).item())
    assert result.precision == pytest.approx(tm.binary_precision(prediction, truth).item())
    assert result.recall == pytest.approx(tm.binary_recall(prediction, truth).item())
    assert result.accuracy == pytest.approx(tm.binary_accuracy(prediction, truth).item())


def test_ratios_agree_with_monai(pair):
    prediction, truth = (torch.from_numpy(mask)[None, None].float() for mask in pair)
    result = scores(*pair)
    assert result.iou == pytest.approx(compute_iou(prediction, truth).item())
    assert result.dice == pytest.approx(compute_dice(prediction, truth).item())
    confusion = get_confusion_matrix(prediction, truth)
    for name in ("precision", "recall", "accuracy"):
        theirs = compute_confusion_matrix_metric(name, confusion)
        assert getattr(result, name) == pytest.approx(theirs.item())


# --- what holds for any input

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6)
pairs = shapes.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))


@given(pairs)
@settings(deadline=None)
def test_identities(masks):
    prediction, truth = masks
    result, swapped = scores(prediction, truth), scores(truth, prediction)
    assert result == brute_force(prediction, truth)
    assert result.iou == pytest.approx(result.dice / (2 - result.dice))
    assert (result.iou, result.dice) == (swapped.iou, swapped.dice)
    assert (result.precision, result.recall) == (swapped.recall, swapped.precision)
    assert all(0 <= value <= 1 for value in result.as_dict().values())
    assert sum(dataclasses.astuple(result)) == prediction.size
    assert iou(truth, truth) == 1


@given(pairs, st.integers(1, 4))
@settings(deadline=None)
def test_parts_pooled_are_the_whole(masks, n_parts):
    parts = list(zip(*(np.array_split(mask, n_parts) for mask in masks), strict=True))
    whole = scores(*masks)
    pooled = PooledScores()
    for prediction, truth in parts:
        pooled.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert pooled.scores() == whole
    assert sum((scores(*part) for part in parts), Scores(0, 0, 0, 0)) == whole


# --- the streaming counter


def test_streaming_gives_counts_and_ratios_by_name(pair):
    pooled = PooledScores()
    for prediction, truth in zip(*pair, strict=True):
        pooled.update(prediction, truth)
    values = pooled.compute()
    assert values == dataclasses.asdict(scores(*pair)) | scores(*pair).as_dict()


def test_counts_do_not_saturate_as_float32_would():
    # 2^24 + 1 is the first whole number that float32 can't hold, so a float32 count would stop here.
    pooled = PooledScores()
    pooled.update(np.array([True]), np.array([True]))
    pooled.counts += 2**24
    pooled.update(np.array([True]), np.array([True]))
    assert pooled.scores().true_positives == 2**24 + 2


def test_a_counter_can_be_reset_and_gives_the_scores_of_a_batch(pair):
    pooled = PooledScores()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pooled.update(~pair[0], pair[1])
        assert pooled(*pair) == PooledScores()(*pair)  # called: the batch alone, and added
        assert pooled.scores() == scores(~pair[0], pair[1]) + scores(*pair)
        pooled.reset()
        pooled.update(*pair)
    assert pooled.scores() == scores(*pair)


def test_a_counter_can_be_saved_and_resumed(pair):
    first, second = PooledScores(), PooledScores()
    first.persistent(True)
    second.persistent(True)
    first.update(*pair)
    second.load_state_dict(first.state_dict())
    second.update(*pair)
    assert second.scores() == scores(*pair) + scores(*pair)


# --- what is a mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_integers_of_0_and_1_are_masks(pair, dtype):
    assert scores(pair[0].astype(dtype), pair[1]) == scores(*pair)
    assert scores(pair[0], torch.from_numpy(pair[1].astype(dtype))) == scores(*pair)


def test_arrays_and_tensors_may_be_mixed_reversed_and_read_only(pair):
    prediction, truth = pair
    truth.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores(torch.from_numpy(prediction), truth) == scores(prediction, truth)
        assert scores(prediction[::-1], truth[::-1]) == scores(prediction, truth)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_probabilities_must_be_thresholded_first(pair, dtype):
    for convert in (np.asarray, torch.from_numpy):
        with pytest.raises(ValueError, match=r"The prediction is float.*threshold it first.*prediction >= 0\.5"):
            scores(convert(pair[0].astype(dtype)), pair[1])
        with pytest.raises(ValueError, match="The truth is float"):
            scores(pair[0], convert(pair[1].astype(dtype)))


def test_a_mask_of_255_is_an_error(pair):
    with pytest.raises(ValueError, match=r"The truth has integers from 0 to 255.*truth > 0"):
        scores(pair[0], pair[1].astype(np.uint8) * 255)
    with pytest.raises(ValueError, match="from -1 to 0"):
        scores(-pair[0].astype(np.int8), pair[1])


def test_shapes_that_differ(pair):
    with pytest.raises(ValueError, match=r"shape \(17, 20, 24\) and the truth \(16, 20, 24\)"):
        scores(pair[0], pair[1][:16])
    with pytest.raises(ValueError, match="must be equal"):  # no silent broadcasting
        PooledScores().update(pair[0], pair[1][:1])
