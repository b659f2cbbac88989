import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage import measure
from skimage.metrics import contingency_table

from mitoseg_lib.instances import label_instances, match_objects, overlaps


def mask_of(*places, shape=(4, 6, 7)):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


def row(*numbers, dtype=np.int64):
    """Labels along one row."""
    return np.array(numbers, dtype).reshape(1, 1, -1)


def same_objects(first, second):
    """Whether two label arrays differ in their numbers only."""
    pairs = set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    return (
        len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) and ((first == 0) == (second == 0)).all()
    )


# --- label_instances


@pytest.mark.parametrize("step", [s for s in itertools.product((-1, 0, 1), repeat=3) if any(s)])
def test_faces_edges_and_corners_connect(step):
    first = np.array([1, 2, 3])
    assert label_instances(mask_of(tuple(first), tuple(first + step))).max() == 1
    if abs(np.array(step)).max() == 1 and (first + 2 * np.array(step) >= 0).all():
        assert label_instances(mask_of(tuple(first), tuple(first + 2 * np.array(step)))).max() == 2


def test_two_touching_balls_are_one_object_and_apart_they_are_two():
    z, y, x = np.ogrid[:13, :13, :30]

    def balls(distance):
        return ((z - 6) ** 2 + (y - 6) ** 2 + (x - 6) ** 2 <= 25) | (
            (z - 6) ** 2 + (y - 6) ** 2 + (x - 6 - distance) ** 2 <= 25
        )

    assert label_instances(balls(11)).max() == 1
    assert label_instances(balls(12)).max() == 2


def test_empty_full_and_one_voxel():
    for mask, n in ((mask_of(), 0), (~mask_of(), 1), (mask_of((0, 0, 0)), 1)):
        labels = label_instances(mask)
        assert labels.dtype == np.int32 and labels.max() == n and ((labels > 0) == mask).all()


def test_numbers_have_no_gap():
    labels = label_instances(mask_of((0, 0, 0), (0, 3, 3), (3, 0, 6)))
    assert sorted(set(labels.ravel().tolist())) == [0, 1, 2, 3]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)))
@settings(deadline=None)
def test_objects_are_those_of_scikit_image(mask):
    assert same_objects(label_instances(mask), measure.label(mask, connectivity=3))


@pytest.mark.parametrize("mask", [np.zeros((2, 3, 4), np.uint8), np.zeros((3, 4), bool)])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"but bool \(z, y, x\) was expected"):
        label_instances(mask)


# --- match_objects


def test_matches_by_hand():
    #                  all right     2 of 3       half        alone    two for one
    truth = row(*[1, 1, 1, 0], *[2, 2, 2, 0], *[3, 3, 0], *[0, 0], *[5, 5, 5, 5, 0])
    prediction = row(*[9, 9, 9, 0], *[8, 8, 0, 0], *[7, 0, 0], *[6, 0], *[5, 5, 5, 4, 0])
    found = match_objects(prediction, truth)
    assert sorted(map(tuple, found.pairs.tolist())) == [(5, 5), (8, 2), (9, 1)]
    assert dict(zip(found.pairs[:, 1].tolist(), found.ious.tolist(), strict=True)) == {1: 1, 2: 2 / 3, 5: 3 / 4}
    assert (found.n_predicted, found.n_true) == (6, 4)
    assert (found.precision, found.recall) == (3 / 6, 3 / 4)


def test_an_iou_of_exactly_half_is_no_match():
    assert len(match_objects(row(1, 1), row(1, 2)).pairs) == 0  # each true object would match the predicted one
    assert len(match_objects(row(1, 1, 0), row(0, 2, 2)).pairs) == 0
    assert len(match_objects(row(1, 1, 1), row(2, 2, 0)).pairs) == 1


@pytest.mark.parametrize(
    ("prediction", "truth", "precision", "recall"),
    [
        (row(0, 0), row(0, 0), 1, 1),
        (row(0, 0), row(1, 0), 1, 0),
        (row(1, 0), row(0, 0), 0, 1),
        (row(3, 3), row(9, 9), 1, 1),
        (row(1, 0), row(0, 1), 0, 0),
        (row(), row(), 1, 1),
        (np.zeros((0, 4, 4), int), np.zeros((0, 4, 4), int), 1, 1),
    ],
)
def test_the_convention_for_nothing(prediction, truth, precision, recall):
    found = match_objects(prediction, truth)
    assert (found.precision, found.recall) == (precision, recall)


def test_an_object_may_lie_in_many_slices_and_parts():
    truth = np.zeros((5, 4, 4), np.uint16)
    truth[::2, :2] = 7
    prediction = truth.astype(np.uint32)
    prediction[4] = 0
    found = match_objects(prediction, truth)
    assert found.pairs.tolist() == [[7, 7]] and found.ious.tolist() == [2 / 3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_any_whole_numbers(dtype):
    largest = min(np.iinfo(dtype).max, 2**32 - 1)
    found = match_objects(row(0, largest, 1, dtype=dtype), row(0, 1, largest, dtype=dtype))
    assert found.pairs.tolist() == [[1, largest], [largest, 1]] and (found.precision, found.recall) == (1, 1)


def by_loop(prediction, truth):
    pairs = []
    for p, t in itertools.product(set(prediction.ravel().tolist()) - {0}, set(truth.ravel().tolist()) - {0}):
        both, union = ((prediction == p) & (truth == t)).sum(), ((prediction == p) | (truth == t)).sum()
        if both / union > 0.5:
            pairs.append((p, t))
    return sorted(pairs)


labels = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.int32, shape, elements=st.integers(0, 3))] * 2)
)


@given(labels)
@settings(deadline=None)
def test_matches_of_any_labels_are_those_of_a_loop_and_unique(volumes):
    prediction, truth = volumes
    found, swapped = match_objects(prediction, truth), match_objects(truth, prediction)
    pairs = [tuple(pair) for pair in found.pairs.tolist()]
    assert sorted(pairs) == by_loop(prediction, truth)
    assert len({p for p, _ in pairs}) == len({t for _, t in pairs}) == len(pairs)
    assert (found.precision, found.recall) == (swapped.recall, swapped.precision)
    assert ((found.ious > 0.5) & (found.ious <= 1)).all()
    itself = match_objects(truth, truth)
    assert (itself.precision, itself.recall) == (1, 1) and (itself.ious == 1).all()


def test_what_numbers_no_objects_is_refused():
    with pytest.raises(ValueError, match=r"The truth is bool.*label_instances"):
        match_objects(row(1), row(1).astype(bool))
    with pytest.raises(ValueError, match="The prediction is float64"):
        match_objects(row(1.0, dtype=float), row(1))
    with pytest.raises(ValueError, match="from -1 to 0"):
        match_objects(row(-1, 0), row(0, 0))
    with pytest.raises(ValueError, match="4294967296"):
        match_objects(row(0), row(2**32))
    with pytest.raises(ValueError, match="must be equal"):
        match_objects(row(1, 2), row(1))


# --- overlaps


def test_overlaps_by_hand():
    found = overlaps(row(0, 7, 7, 7, 0, 2), row(0, 3, 3, 0, 3, 5))
    listed = list(zip(found.predicted.tolist(), found.true.tolist(), found.voxels.tolist(), strict=True))
    assert listed == [(0, 3, 1), (2, 5, 1), (7, 0, 1), (7, 3, 2)]
    assert {array.dtype for array in (found.predicted, found.true, found.voxels)} == {np.dtype(np.int64)}


def test_empty_volumes_overlap_nowhere():
    assert len(overlaps(row(0, 0), row(0, 0)).voxels) == 0
    assert len(overlaps(np.zeros((0, 4, 5), int), np.zeros((0, 4, 5), int)).voxels) == 0


@given(labels)
@settings(deadline=None)
def test_overlaps_are_the_table_of_scikit_image(volumes):
    prediction, truth = volumes
    found = overlaps(prediction, truth)
    table = contingency_table(prediction, truth).toarray()
    table[0, 0] = 0
    ours = np.zeros_like(table)
    ours[found.predicted, found.true] = found.voxels
    assert np.array_equal(ours, table) and (found.voxels > 0).all()


def test_what_cannot_overlap_is_refused():
    with pytest.raises(ValueError, match=r"The prediction is bool.*label_instances"):
        overlaps(row(1).astype(bool), row(1))
    with pytest.raises(ValueError, match="must be equal"):
        overlaps(row(1, 2), row(1))
