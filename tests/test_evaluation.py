import dataclasses
import warnings

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mitoseg_lib import metrics
from mitoseg_lib.evaluation import Evaluation, evaluate, evaluate_files
from mitoseg_lib.instances import label_instances, match_objects
from mitoseg_lib.stacks import StackError, StackWarning
from mitoseg_lib.surfaces import boundary_iou, surface_distance

SIZE = (30.0, 8.0, 5.0)


@pytest.fixture
def pair():
    """Two balls of radius 5 that touch nowhere; the prediction lies 2 voxels beside the first and lacks the second."""
    z, y, x = np.ogrid[:14, :20, :40]
    first = (z - 6) ** 2 + (y - 9) ** 2
    truth = (first + (x - 8) ** 2 <= 25) | (first + (x - 28) ** 2 <= 25)
    return first + (x - 9) ** 2 <= 25, truth


def test_every_score_is_that_of_its_function(pair):
    found = evaluate(*pair, voxel_size_nm=SIZE)
    matches = match_objects(*map(label_instances, pair))
    voxels = metrics.scores(*pair).as_dict()
    del voxels["accuracy"]
    assert found.as_dict() == voxels | {
        "boundary_iou_1": boundary_iou(*pair, 1),
        "boundary_iou_2": boundary_iou(*pair, 2),
        "object_precision": matches.precision,
        "object_recall": matches.recall,
        "surface_distance_nm": surface_distance(*pair, SIZE),
    }
    assert (found.object_precision, found.object_recall) == (1, 0.5)
    assert all(type(value) is float for value in found.as_dict().values())


def test_prediction_and_truth_are_not_the_same_role(pair):
    there, back = evaluate(*pair, voxel_size_nm=SIZE), evaluate(*pair[::-1], voxel_size_nm=SIZE)
    assert (there.precision, there.object_precision) == (back.recall, back.object_recall)
    assert there.precision != there.recall and there.boundary_iou_1 != back.boundary_iou_1


def test_given_objects_are_taken_as_they_are(pair):
    truth = label_instances(pair[1])
    assert evaluate(label_instances(pair[0]), truth, instances=True, voxel_size_nm=SIZE) == evaluate(
        *pair, voxel_size_nm=SIZE
    )
    split = truth.copy()
    split[:6][truth[:6] == 1] = 9  # one object in two parts, the larger of which matches
    found = evaluate(split, truth, instances=True, voxel_size_nm=SIZE)
    assert found.iou == 1 and (found.object_precision, found.object_recall) == (2 / 3, 1)


def test_a_distance_that_is_missing_is_explained(pair):
    with pytest.warns(StackWarning, match="voxel size isn't known"):
        assert evaluate(*pair).surface_distance_nm is None
    with pytest.warns(StackWarning, match="the prediction has no foreground"):
        assert evaluate(pair[0] & False, pair[1], voxel_size_nm=SIZE).surface_distance_nm is None


def test_nothing_against_nothing_is_1():
    empty = np.zeros((3, 4, 5), bool)
    with pytest.warns(StackWarning, match="the prediction and the truth have no foreground"):
        found = evaluate(empty, empty, voxel_size_nm=SIZE)
    assert set(dataclasses.astuple(found)) == {1.0, None}


def test_the_table_aligns_its_numbers():
    table = Evaluation(0.5, 1.0, 0.25, 0, 0.125, 0.2, 1, 0, 1234.56).as_table().splitlines()
    assert [line.split()[-1] for line in table[:4]] == ["0.5000", "1.0000", "0.2500", "0.0000"]
    assert table[-1].endswith(" 1234.6 nm") and len({len(line) for line in table[:-1]}) == 1
    assert Evaluation(*[1.0] * 8, None).as_table().endswith("unknown")


masks = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6).flatmap(
    lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
)


@given(masks)
@settings(deadline=None)
def test_ratios_are_from_0_to_1_and_a_mask_against_itself_is_perfect(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StackWarning)
        found, itself = evaluate(*pair, voxel_size_nm=SIZE), evaluate(pair[1], pair[1], voxel_size_nm=SIZE)
    *ratios, distance = dataclasses.astuple(found)
    assert all(0 <= ratio <= 1 for ratio in ratios)
    assert (distance is None) == (not all(mask.any() for mask in pair)) and (distance or 0) >= 0
    assert dataclasses.astuple(itself) == (*[1.0] * 8, 0.0 if pair[1].any() else None)


@pytest.mark.parametrize(
    ("prediction", "truth", "instances"),
    [
        (np.zeros((3, 4, 5), bool), np.zeros((2, 4, 5), bool), False),
        (np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), bool), False),
        (np.zeros((3, 4, 5), np.float32), np.zeros((3, 4, 5), bool), False),
        (np.zeros((3, 4, 5), bool), np.zeros((3, 4, 5), bool), True),
        (np.zeros((3, 4, 5), np.uint8), np.zeros((2, 4, 5), np.uint8), True),
    ],
)
def test_arrays_of_another_kind_are_refused(prediction, truth, instances):
    with pytest.raises(ValueError, match=r"expected|must be equal"):
        evaluate(prediction, truth, instances=instances, voxel_size_nm=SIZE)


def test_files_are_compared_as_their_arrays_are(pair, tmp_path):
    paths = [tmp_path / name for name in ("prediction.tif", "truth.tif")]
    for path, mask, foreground in zip(paths, pair, (1, 65535), strict=True):
        tifffile.imwrite(path, mask * np.uint16(foreground), photometric="minisblack", compression="zlib")
    assert evaluate_files(*paths, voxel_size_nm=SIZE) == evaluate(*pair, voxel_size_nm=SIZE)
    tifffile.imwrite(paths[0], pair[0][1:].astype(np.uint8), photometric="minisblack")
    with pytest.raises(
        StackError, match=r"prediction\.tif has shape \(13, 20, 40\), but truth\.tif has \(14, 20, 40\)"
    ):
        evaluate_files(*paths)


def test_the_bundled_labels():
    """The phantom's test labels, a voxel to the right: the rim is wrong, and without it nearly all is right."""
    from mitoseg_lib.datasets import load_example

    stack = load_example("test")
    moved = np.roll(stack.labels, 1, axis=2)
    found = evaluate(moved, stack.labels, voxel_size_nm=stack.voxel_size_nm)
    assert found.iou < found.boundary_iou_1 and found.boundary_iou_1 > 0.99
    assert 0 < found.surface_distance_nm < stack.voxel_size_nm[2]
    # what leaves the volume on the right comes in on the left, where it is no object of the truth
    assert found.object_recall == 1 and 0.8 < found.object_precision < 1
