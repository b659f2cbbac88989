"""Objects that are numbered slab by slab: equal to those of the whole volume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import regionprops

from mitoseg_lib.instances import label_instances
from mitoseg_lib.shapes import CROFTON_DIRECTIONS, crofton_weights, surface_area
from mitoseg_lib.volumes.job import slabs_of
from mitoseg_lib.volumes.joining import join_slabs, label_slab, number_objects
from mitoseg_lib.volumes.pyramid import coarsen_labels, coarsen_mask, coarsen_probabilities
from mitoseg_lib.volumes.sums import ObjectSums, sum_objects, with_margin

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.booleans())


def numbered(mask, grey, depth):
    """Labels and sums of a volume that is seen in slabs of so many slices only."""
    slabs = []
    for s in slabs_of(len(mask), depth):
        before = mask[s.start - 1] if s.start else None
        after = mask[s.stop] if s.stop < len(mask) else None
        slabs.append(
            label_slab(mask[s.start : s.stop], grey[s.start : s.stop], s.start, mask.shape, before=before, after=after)
        )
    owner, sums = join_slabs(slabs, mask.shape[1:])
    numbers, ordered = number_objects(sums)
    parts = np.split(numbers[owner], np.cumsum([len(slab.sums) for slab in slabs])[:-1])
    labels = [
        np.concatenate([[0], own])[label_instances(mask[s.start : s.stop])]
        for s, own in zip(slabs_of(len(mask), depth), parts, strict=True)
    ]
    return np.concatenate(labels), ordered


def in_voxel_order(labels):
    """The same objects, numbered by their first voxels."""
    found, first = np.unique(labels[labels > 0], return_index=True)
    numbers = np.zeros(labels.max() + 1, int)
    numbers[found[np.argsort(first)]] = np.arange(1, len(found) + 1)
    return numbers[labels]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.as_arrays().values(), b.as_arrays().values(), strict=True))


@given(masks, st.integers(1, 7), st.integers(0, 99))
@settings(deadline=None, max_examples=300)
def test_slabs_of_any_depth_give_what_the_whole_volume_gives(mask, depth, seed):
    grey = np.random.default_rng(seed).integers(0, 256, mask.shape, dtype=np.uint8)
    labels, sums = numbered(mask, grey, depth)
    whole = in_voxel_order(label_instances(mask))
    assert np.array_equal(labels, whole)
    assert equal(sums, sum_objects(whole, with_margin(mask), grey, (0, 0, 0), mask.shape))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3])
def test_larger_volumes_near_the_density_where_everything_connects(share):
    mask = np.random.default_rng(0).random((40, 50, 60)) < share
    grey = np.zeros(mask.shape, np.uint8)
    whole, n = ndimage.label(mask, np.ones((3, 3, 3)))
    for depth in (1, 7, 40):
        labels, sums = numbered(mask, grey, depth)
        assert len(sums) == n and np.array_equal(labels, in_voxel_order(whole))


def test_objects_that_meet_only_at_a_corner_across_slabs_are_one():
    mask = np.zeros((4, 3, 3), bool)
    mask[1, 0, 0] = mask[2, 1, 1] = mask[3, 2, 2] = True
    labels, sums = numbered(mask, np.zeros(mask.shape, np.uint8), 2)
    assert labels.max() == 1 and sums.voxels.tolist() == [3]


def test_a_u_that_joins_in_the_last_slab_is_one():
    mask = np.zeros((9, 3, 7), bool)
    mask[:, 1, 1] = mask[:, 1, 5] = mask[8, 1, 1:6] = True
    labels, sums = numbered(mask, np.zeros(mask.shape, np.uint8), 3)
    assert labels.max() == 1 and sums.voxels.tolist() == [mask.sum()]


@pytest.mark.parametrize("mask", [np.zeros((5, 4, 3), bool), np.ones((5, 4, 3), bool)])
def test_nothing_and_everything(mask):
    labels, sums = numbered(mask, np.full(mask.shape, 7, np.uint8), 2)
    assert labels.max() == len(sums) == int(mask.any())
    if mask.any():
        assert sums.grey.tolist() == [7 * 60] and sums.upper.tolist() == [[5, 4, 3]]
        faces = sums.crossings[0][(np.abs(CROFTON_DIRECTIONS).sum(axis=1) == 1)]
        assert sorted(faces) == sorted([2 * 4 * 3, 2 * 5 * 3, 2 * 5 * 4])


def test_sums_are_those_of_skimage_and_of_the_surface():
    rng = np.random.default_rng(1)
    mask = ndimage.gaussian_filter(rng.random((30, 40, 50)), 3) > 0.51
    grey = rng.integers(0, 60000, mask.shape, dtype=np.uint16)
    labels, sums = numbered(mask, grey, 8)
    assert len(sums) >= 10
    for i, found in enumerate(regionprops(labels, grey)):
        assert sums.voxels[i] == found.area and sums.grey[i] == pytest.approx(found.intensity_mean * found.area)
        assert (*sums.lower[i], *sums.upper[i]) == found.bbox
        assert sums.position[i] / sums.voxels[i] == pytest.approx(found.centroid)
        area = sums.crossings[i] @ crofton_weights((8, 4, 4))
        assert area == pytest.approx(surface_area(labels == i + 1, (8, 4, 4)))


def test_small_objects_are_left_out_and_numbers_have_no_gaps():
    mask = np.zeros((3, 3, 9), bool)
    mask[0, 0, 0] = mask[0, 0, 2:5] = mask[2, 2, 6:8] = True
    labels = label_instances(mask)
    sums = sum_objects(labels, with_margin(mask), labels, (0, 0, 0), mask.shape)
    numbers, kept = number_objects(sums, 2)
    assert numbers.tolist() == [0, 1, 2] and kept.voxels.tolist() == [3, 2]
    assert number_objects(sums, 99)[1].voxels.size == 0


def test_parts_of_one_object_are_bounded_by_one_another():
    labels = np.ones((2, 2, 2), np.int32)
    labels[1] = 2
    sums = sum_objects(labels, with_margin(labels), labels, (0, 0, 0), (2, 2, 2))
    along_z = np.flatnonzero((CROFTON_DIRECTIONS == (1, 0, 0)).all(axis=1))[0]
    assert sums.crossings[:, along_z].tolist() == [8, 8]


@given(masks, st.tuples(*[st.integers(1, 2)] * 3))
@settings(deadline=None)
def test_a_coarse_mask_is_set_where_half_of_the_block_is(mask, steps):
    found = coarsen_mask(mask.astype(np.uint8), steps)
    assert found.shape == tuple(-(-n // s) for n, s in zip(mask.shape, steps, strict=True))
    for z, y, x in np.ndindex(found.shape):
        block = mask[
            z * steps[0] : (z + 1) * steps[0], y * steps[1] : (y + 1) * steps[1], x * steps[2] : (x + 1) * steps[2]
        ]
        assert found[z, y, x] == (block.mean() >= 0.5)


def test_coarse_numbers_are_those_of_the_block_and_0_where_the_mask_is():
    labels = np.zeros((2, 4, 4), np.uint32)
    labels[:, :2, :2], labels[0, 2, 2] = 2**32 - 3, 5
    mask = coarsen_mask((labels > 0).astype(np.uint8), (2, 2, 2))
    assert coarsen_labels(labels, mask, (2, 2, 2)).tolist() == [[[2**32 - 3, 0], [0, 0]]]


def test_coarse_probabilities_are_means():
    values = np.array([[[0, 254, 100], [254, 254, 100]]], np.uint8)
    assert coarsen_probabilities(values, (1, 2, 2)).tolist() == [[[190, 100]]]


def test_sums_of_no_object():
    nothing = np.zeros((2, 2, 2), np.int32)
    sums = sum_objects(nothing, with_margin(nothing), nothing, (0, 0, 0), (2, 2, 2))
    assert len(sums) == 0 and len(sums.join(np.empty(0, int), 0)) == 0
    assert len(ObjectSums.concatenate([sums, sums])) == 0
