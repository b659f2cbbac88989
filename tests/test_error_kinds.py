"""Each kind by hand, all of them against a loop over voxels, and what must hold for any two masks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import measure

from mitoseg_lib.error_kinds import KINDS, errors_by_kind
from mitoseg_lib.metrics import iou


def boxes(*places, shape=(3, 30, 60)):
    """Mask of boxes, each given as (rows, columns) in all slices."""
    mask = np.zeros(shape, bool)
    for rows, columns in places:
        mask[:, slice(*rows), slice(*columns)] = True
    return mask


def only(kind, voxels):
    return {name: voxels if name == kind else 0 for name in KINDS}


A, B = ((5, 15), (5, 15)), ((5, 15), (30, 40))  # 10 x 10 in each of 3 slices


# --- each kind by hand


def test_what_is_right_has_no_errors():
    found = errors_by_kind(boxes(A, B), boxes(A, B))
    assert not found.kind.any() and found.kind.dtype == np.uint8 and found.kind.shape == (3, 30, 60)
    assert set(found.voxels.values()) == {0} and found.iou == 1
    assert found.objects == {"missed": 0, "invented": 0, "merged": 0, "split": 0, "boundary": None, "region": None}


def test_a_missed_object():
    found = errors_by_kind(boxes(A), boxes(A, B))
    assert found.voxels == found.lacking == only("missed", 300) and found.objects["missed"] == 1
    assert ((found.kind == 1) == boxes(B)).all()
    assert found.iou == 0.5 and found.iou_without("missed") == 1


@pytest.mark.parametrize(("columns", "kind"), [(0, "missed"), (1, "region")])
def test_an_object_is_missed_below_a_share_and_not_at_it(columns, kind):
    prediction = boxes(((5, 15), (9, 9 + columns)))  # 0 or 1 of 10 columns, in the middle of A
    found = errors_by_kind(prediction, boxes(A), width=0)
    assert found.voxels == only(kind, 300 - 30 * columns)


def test_a_share_of_seven_in_seventy_is_a_tenth():
    truth = np.ones((1, 1, 70), bool)  # in floats, 0.1 x 70 is more than 7
    found = errors_by_kind(np.arange(70).reshape(1, 1, 70) < 7, truth, width=0)
    assert found.objects["missed"] == 0


def test_an_invented_object():
    found = errors_by_kind(boxes(A, B), boxes(A))
    assert found.voxels == found.added == only("invented", 300) and found.objects["invented"] == 1
    assert ((found.kind == 2) == boxes(B)).all()
    assert found.iou == 0.5 and found.iou_without("invented") == 1


def test_merged_objects():
    bridge = ((9, 11), (15, 30))
    found = errors_by_kind(boxes(A, B, bridge), boxes(A, B))
    assert found.voxels == found.added == only("merged", 90) and found.objects["merged"] == 1
    assert ((found.kind == 3) == boxes(bridge)).all()


def test_the_rim_of_a_merged_object_counts_as_merged():
    wide, bridge = ((4, 16), (5, 15)), ((9, 11), (15, 30))
    found = errors_by_kind(boxes(wide, B, bridge), boxes(A, B))
    assert found.voxels == only("merged", 90 + 3 * 20)


def test_what_touches_a_small_part_of_another_object_is_not_merged():
    truth = boxes(A, ((5, 15), (17, 37)))
    prediction = boxes(((5, 15), (5, 18)))  # A, and 1 of the 20 columns of its neighbour
    found = errors_by_kind(prediction, truth, width=0)
    assert found.objects == {"missed": 1, "invented": 0, "merged": 0, "split": 0, "boundary": None, "region": None}
    assert found.added["region"] == 60 and found.lacking["missed"] == 570


def test_a_split_object():
    pieces = ((5, 15), (5, 9)), ((5, 15), (11, 15))
    found = errors_by_kind(boxes(*pieces), boxes(A))
    assert found.voxels == found.lacking == only("split", 60) and found.objects["split"] == 1
    assert ((found.kind == 4) == boxes(((5, 15), (9, 11)))).all()


def test_a_crumb_does_not_split_an_object():
    prediction = boxes(((5, 15), (5, 12)))
    prediction[1, 10, 14] = True
    found = errors_by_kind(prediction, boxes(A))
    assert found.objects["split"] == 0 and found.voxels["split"] == 0


def test_a_rim_is_a_boundary_error_and_what_is_deeper_a_region():
    prediction = boxes(((4, 16), (5, 12)))  # a row too many on either side, 3 columns too few
    found = errors_by_kind(prediction, boxes(A), width=1)
    assert found.added == only("boundary", 3 * 2 * 7)
    assert found.lacking == {**only("boundary", 3 * (10 + 2 * 2)), "region": 3 * 2 * 8}
    assert errors_by_kind(prediction, boxes(A), width=0).voxels == only("region", 3 * (14 + 30))
    assert errors_by_kind(prediction, boxes(A), width=3).voxels == only("boundary", 3 * (14 + 30))


def test_all_kinds_at_once():
    truth = boxes(((1, 5), (1, 11)), ((8, 12), (1, 6)), ((8, 12), (9, 14)), ((15, 19), (1, 21)), ((22, 29), (1, 21)))
    prediction = boxes(((8, 12), (1, 14)), ((15, 19), (1, 9)), ((15, 19), (12, 21)), ((22, 29), (1, 16)), (
        (1, 5), (40, 50)))  # fmt: skip
    found = errors_by_kind(prediction, truth, width=1)
    assert found.voxels == {
        "missed": 3 * 40,
        "invented": 3 * 40,
        "merged": 3 * 12,
        "split": 3 * 12,
        "boundary": 3 * (7 + 2 * 4),
        "region": 3 * 5 * 4,
    }
    assert list(found.objects.values()) == [1, 1, 1, 1, None, None]
    assert found.iou_without("missed", "boundary") == pytest.approx(
        (found.scores.true_positives + 165) / (found.scores.true_positives + 3 * (40 + 40 + 12 + 12 + 15 + 20))
    )


def test_what_is_invented_is_not_merged_even_if_it_holds_two_objects():
    truth = boxes(((5, 7), (5, 7)), ((5, 7), (20, 22)))
    found = errors_by_kind(np.ones_like(truth), truth)
    assert found.objects["invented"] == 1 and found.objects["merged"] == 0
    assert found.voxels == only("invented", truth.size - truth.sum())


# --- any masks


def by_loop(prediction, truth, share, width):
    """Kind of each wrong voxel, from the definitions, one voxel after the other."""
    predicted, true = (measure.label(mask, connectivity=3) for mask in (prediction, truth))

    def found_of(t, p):
        return ((true == t) & (predicted == p)).sum() / (true == t).sum()

    numbers = [range(1, labels.max() + 1) for labels in (predicted, true)]
    kinds = np.full(truth.shape, "", dtype="<U8")
    for place in zip(*np.nonzero(prediction != truth), strict=True):
        _, y, x = place
        square = truth[place[0], max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        rest = "boundary" if (square != truth[place]).any() else "region"
        if truth[place]:
            t = true[place]
            pieces = sum(found_of(t, p) >= share for p in numbers[0])
            found = prediction[true == t].sum() / (true == t).sum()
            kinds[place] = "missed" if found < share else "split" if pieces >= 2 else rest
        else:
            p = predicted[place]
            joined = sum(found_of(t, p) >= share for t in numbers[1])
            right = truth[predicted == p].sum() / (predicted == p).sum()
            kinds[place] = "invented" if right < share else "merged" if joined >= 2 else rest
    return kinds


def masks_of(seed):
    """Two masks: rows of objects, which the prediction misses, cuts and joins, and some voxels of noise.

    Noise alone would nearly always be one object, or none that matches. Shapes are drawn from the seed, too, since
    hypothesis prefers small ones, in which little fits.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, (4, 7, 25)))
    truth, prediction = np.zeros((2, *shape), bool)
    for y in range(0, shape[1], 2):
        row = np.repeat(rng.random(shape[2]) < 0.5, rng.integers(1, 8, shape[2]))[: shape[2]]
        truth[:, y] = row
        prediction[:, y] = row & (rng.random(shape[2]) < rng.choice([0, 0.8, 1]))
        for start in rng.integers(0, shape[2], rng.integers(0, 4)):
            prediction[:, y, start : start + rng.integers(1, 5)] ^= True
    flips = rng.random(shape) < rng.choice([0, 0.02, 0.2])
    return prediction ^ flips, truth


volumes = st.integers(0, 2**32 - 1).map(masks_of)


@given(volumes, st.sampled_from([0.05, 0.1, 0.3, 0.5, 1.0]), st.integers(0, 2))
@settings(deadline=None, max_examples=150)
def test_every_wrong_voxel_has_the_kind_that_a_loop_finds(masks, share, width):
    prediction, truth = masks
    found = errors_by_kind(prediction, truth, share=share, width=width)
    names = np.array(["", *KINDS])[found.kind]
    assert np.array_equal(names, by_loop(prediction, truth, share, width))


@given(volumes, st.sampled_from([0.05, 0.1, 0.3, 0.5, 1.0]), st.integers(0, 2))
@settings(deadline=None)
def test_kinds_part_the_wrong_voxels_and_mending_them_mends_the_iou(masks, share, width):
    prediction, truth = masks
    found = errors_by_kind(prediction, truth, share=share, width=width)
    wrong = prediction != truth
    assert np.array_equal(found.kind > 0, wrong) and sum(found.voxels.values()) == wrong.sum()
    for code, kind in enumerate(KINDS, start=1):
        of_kind = found.kind == code
        assert found.added[kind] == (of_kind & ~truth).sum() and found.lacking[kind] == (of_kind & truth).sum()
        assert found.iou_without(kind) == iou(np.where(of_kind, truth, prediction), truth) >= found.iou
    assert found.iou == iou(prediction, truth) and found.iou_without(*KINDS) == 1
    for some in itertools.combinations(KINDS, 2):
        mended = np.isin(found.kind, [KINDS.index(kind) + 1 for kind in some])
        assert found.iou_without(*some, some[0]) == iou(np.where(mended, truth, prediction), truth)


@given(volumes)
@settings(deadline=None)
def test_objects_of_a_kind_have_wrong_voxels_of_it(masks):
    found = errors_by_kind(*masks)
    for kind in KINDS[:4]:  # also merged and split: what joins, or lies between pieces, is wrong somewhere
        assert (found.objects[kind] > 0) == (found.voxels[kind] > 0), kind


@given(volumes)
@settings(deadline=None)
def test_objects_are_counted_as_a_loop_counts_them(masks):
    prediction, truth = masks
    predicted, true = (measure.label(mask, connectivity=3) for mask in masks)
    found = errors_by_kind(prediction, truth, share=0.3)
    assert found.objects["missed"] == sum(prediction[true == t].mean() < 0.3 for t in range(1, true.max() + 1))
    assert found.objects["invented"] == sum(truth[predicted == p].mean() < 0.3 for p in range(1, predicted.max() + 1))


def test_the_volumes_above_have_all_kinds():
    seen = dict.fromkeys(KINDS, 0)

    @given(volumes)
    @settings(deadline=None, derandomize=True, max_examples=150, database=None)
    def count(masks):
        for kind, number in errors_by_kind(*masks, width=1).voxels.items():
            seen[kind] += number > 0

    count()
    assert min(seen.values()) >= 20, seen


# --- edges


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 6), (0, 4, 4)])
def test_empty_and_full_masks(shape):
    nothing, everything = np.zeros(shape, bool), np.ones(shape, bool)
    assert errors_by_kind(nothing, nothing).iou == 1
    size = nothing.size
    assert errors_by_kind(nothing, everything).voxels == only("missed", size)
    assert errors_by_kind(everything, nothing).voxels == only("invented", size)
    assert errors_by_kind(everything, everything).iou_without(*KINDS) == 1


def test_the_table_holds_the_numbers():
    found = errors_by_kind(boxes(A, ((9, 11), (50, 52))), boxes(A, B))
    lines = found.as_table().splitlines()
    assert len({len(line) for line in lines}) == 1 and max(map(len, lines)) <= 88
    assert [line.split(":")[0] for line in lines[1:-1]] == list(KINDS)
    assert lines[1].split()[-4:] == ["1", "300", "96.2%", f"{300 * 2 / 612:.4f}"]
    assert lines[2].split()[-4:] == ["1", "12", "3.8%", "0.5000"]
    assert lines[5].split()[-4:] == ["-", "0", "0.0%", f"{300 / 612:.4f}"]
    assert lines[-1].split() == ["all", "312", "now", f"{300 / 612:.4f}"]
    assert "nan" not in errors_by_kind(boxes(A), boxes(A)).as_table()


def test_what_cannot_be_sorted_is_refused():
    mask = boxes(A)
    with pytest.raises(ValueError, match="The share is 0,"):
        errors_by_kind(mask, mask, share=0)
    with pytest.raises(ValueError, match=r"The share is 1.5,"):
        errors_by_kind(mask, mask, share=1.5)
    with pytest.raises(ValueError, match="The share is nan"):
        errors_by_kind(mask, mask, share=float("nan"))
    with pytest.raises(ValueError, match="width of the band is -1"):
        errors_by_kind(mask, mask, width=-1)
    with pytest.raises(ValueError, match="is uint8 with 3 axes, but bool"):
        errors_by_kind(mask.astype(np.uint8), mask)
    with pytest.raises(ValueError, match="2 axes"):
        errors_by_kind(mask[0], mask[0])
    with pytest.raises(ValueError, match="must be equal"):
        errors_by_kind(mask[1:], mask)
    with pytest.raises(ValueError, match="'edges' was asked for"):
        errors_by_kind(mask, mask).iou_without("edges")
