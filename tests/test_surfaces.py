import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_average_surface_distance
from scipy import ndimage
from skimage import morphology

from mitoseg_lib import metrics
from mitoseg_lib.surfaces import boundary_band, boundary_iou, surface_distance


@pytest.fixture
def pair():
    """Two balls of radius 6 whose centres lie 4 voxels apart in y and 3 in z."""
    z, y, x = np.ogrid[:19, :22, :24]
    prediction = (z - 8) ** 2 + (y - 9) ** 2 + (x - 11) ** 2 <= 36
    truth = (z - 11) ** 2 + (y - 13) ** 2 + (x - 11) ** 2 <= 36
    return prediction, truth


def empty(shape=(3, 5, 6)):
    return np.zeros(shape, bool)


def with_voxels(*places, shape=(3, 5, 6)):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


shapes = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)
pairs = shapes.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))
edges = st.tuples(*[st.sampled_from([0.5, 1.0, 5.0, 8.0, 30.0])] * 3)


# --- IoU without a band


def iou_by_loop(prediction, truth, width):
    """Every voxel looks at the square around it in its slice."""
    union = both = 0
    for z, y, x in np.ndindex(truth.shape):
        square = truth[z, max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
        if (square == truth[z, y, x]).all():
            both += prediction[z, y, x] and truth[z, y, x]
            union += prediction[z, y, x] or truth[z, y, x]
    return both / union if union else 1


def test_a_band_by_hand():
    truth = np.zeros((1, 7, 9), bool)
    truth[0, 1:6, 1:6] = True  # 5 x 5, of which 3 x 3 are more than 1 voxel inside
    prediction = truth.copy()
    prediction[0, 1, 1] = prediction[0, 3, 3] = False  # in the band, and in the middle
    prediction[0, 3, 6] = prediction[0, 3, 8] = True  # in the band, and far outside
    assert boundary_iou(prediction, truth, 0) == metrics.iou(prediction, truth) == 23 / 27
    assert boundary_iou(prediction, truth, 1) == 8 / 10
    assert boundary_iou(prediction, truth, 2) == 0  # the middle alone is left of the truth, and is missed
    assert boundary_iou(prediction, truth, 3) == 1


def test_the_band_goes_around_corners_as_along_edges():
    truth = np.zeros((1, 9, 9), bool)
    truth[0, :4, :4] = True
    prediction = truth.copy()
    prediction[0, 4, 4] = True  # touches the corner only
    assert boundary_iou(prediction, truth, 1) == 1
    prediction[0, 5, 5] = True
    assert boundary_iou(prediction, truth, 1) == 9 / 10 and boundary_iou(prediction, truth, 2) == 1


def test_neighbouring_slices_make_no_band():
    truth = np.zeros((3, 8, 8), bool)
    truth[1] = True
    prediction = np.zeros_like(truth)
    assert boundary_iou(truth, truth, 2) == 1 and boundary_iou(prediction, truth, 2) == 0
    prediction[0] = prediction[1] = True
    assert boundary_iou(prediction, truth, 2) == 0.5


def test_the_edge_of_the_image_is_no_boundary():
    truth = np.ones((2, 4, 4), bool)
    prediction = truth.copy()
    prediction[0, 0, 0] = False
    assert boundary_iou(prediction, truth, 2) == 31 / 32


def test_it_is_not_the_boundary_iou_of_cheng():
    """Theirs is 0 for a mask that misses the whole rim; this one leaves the rim out."""
    truth = np.zeros((1, 11, 11), bool)
    truth[0, 2:9, 2:9] = True
    prediction = np.zeros_like(truth)
    prediction[0, 3:8, 3:8] = True
    assert boundary_iou(prediction, truth, 1) == 1 and metrics.iou(prediction, truth) == 25 / 49


@pytest.mark.parametrize("width", [0, 1, 2, 50])
def test_the_convention_for_nothing_holds(width):
    full = ~empty()
    assert boundary_iou(empty(), empty(), width) == boundary_iou(full, full, width) == 1
    assert boundary_iou(full, empty(), width) == boundary_iou(empty(), full, width) == 0


@pytest.mark.parametrize("width", [0, 1, 2, 3])
def test_the_band_is_that_of_scikit_image(pair, width):
    prediction, truth = pair
    square = np.ones((1, 2 * width + 1, 2 * width + 1), bool)
    kept = morphology.erosion(truth, square) | ~morphology.dilation(truth, square)
    expected = metrics.iou(prediction & kept, truth & kept)
    assert boundary_iou(prediction, truth, width) == expected and expected < 1


@given(pairs, st.integers(0, 7))
@settings(deadline=None)
def test_the_band_of_any_masks_is_that_of_a_loop(masks, width):
    found = boundary_iou(*masks, width)
    assert found == pytest.approx(iou_by_loop(*masks, width)) and 0 <= found <= 1
    assert boundary_iou(masks[1], masks[1], width) == 1
    assert width or found == metrics.iou(*masks)


@given(pairs, st.integers(0, 3))
@settings(deadline=None)
def test_what_a_prediction_does_inside_the_band_changes_nothing(masks, width):
    prediction, truth = masks
    square = np.ones((1, 2 * width + 1, 2 * width + 1), bool)
    band = ndimage.binary_dilation(truth, square) & ndimage.binary_dilation(~truth, square)
    assert boundary_iou(prediction ^ band, truth, width) == boundary_iou(prediction, truth, width)


def test_a_width_below_0_is_refused(pair):
    with pytest.raises(ValueError, match="width of the band is -1"):
        boundary_iou(*pair, -1)


# --- distance of surfaces


def distance_by_loop(prediction, truth, scale):
    """Every voxel with a face on the background, against all of the other mask."""
    surfaces = []
    for mask in (prediction, truth):
        padded = np.pad(mask, 1)
        inside = [np.roll(padded, shift, axis) for axis in range(3) for shift in (-1, 1)]
        surfaces.append(np.argwhere(padded & ~np.all(inside, axis=0)) * scale)
    apart = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=2)
    return np.concatenate([apart.min(axis=1), apart.min(axis=0)]).mean()


def monai_distance(prediction, truth, scale):
    masks = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
    spacing = [float(edge) for edge in scale]
    return compute_average_surface_distance(*masks, include_background=True, symmetric=True, spacing=spacing).item()


def test_two_voxels_are_as_far_apart_as_their_centres():
    prediction, truth = with_voxels((0, 1, 1)), with_voxels((2, 4, 5))
    assert surface_distance(prediction, truth, (30, 8, 5)) == pytest.approx((60**2 + 24**2 + 20**2) ** 0.5)
    assert surface_distance(prediction, truth, (1, 1, 1)) == pytest.approx((4 + 9 + 16) ** 0.5)


def test_the_mean_is_over_the_voxels_of_both_surfaces_together():
    prediction, truth = with_voxels((0, 0, 0)), with_voxels((0, 0, 0), (0, 0, 2))
    assert surface_distance(prediction, truth, (9, 9, 5)) == pytest.approx((0 + 0 + 10) / 3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_order_of_the_edges_is_z_y_x(axis):
    places = [(1, 2, 2), [1, 2, 2]]
    places[1][axis] += 1
    found = surface_distance(with_voxels(places[0]), with_voxels(tuple(places[1])), (30, 8, 5))
    assert found == (30, 8, 5)[axis]


def test_the_inside_of_a_mask_is_no_surface():
    truth = np.zeros((9, 9, 9), bool)
    truth[2:7, 2:7, 2:7] = True
    hollow = truth.copy()
    hollow[4, 4, 4] = False
    # the 6 voxels around the hole are a surface; the nearest of the truth's is 1 further out
    assert surface_distance(hollow, truth, (5, 5, 5)) == pytest.approx(6 * 5 / (98 + 98 + 6))


def test_outside_the_volume_is_background():
    full = np.ones((5, 5, 5), bool)
    middle = with_voxels((2, 2, 2), shape=full.shape)
    assert surface_distance(full, middle, (1, 1, 1)) == pytest.approx(distance_by_loop(full, middle, (1, 1, 1)))
    assert surface_distance(full, full, (1, 1, 1)) == 0


def test_to_nothing_there_is_no_distance():
    for masks in ((empty(), empty()), (empty(), ~empty()), (~empty(), empty())):
        assert surface_distance(*masks, (5, 5, 5)) is None


@pytest.mark.parametrize("scale", [(1, 1, 1), (5, 5, 5), (30, 8, 8), (50, 4.5, 7.25), (0.5, 9, 3)])
def test_the_distance_is_that_of_monai_scipy_and_a_loop(pair, scale):
    prediction, truth = pair
    found = surface_distance(prediction, truth, scale)
    surfaces = [mask ^ ndimage.binary_erosion(mask) for mask in pair]
    to = [ndimage.distance_transform_edt(~surface, sampling=scale) for surface in surfaces]
    assert found == pytest.approx(np.concatenate([to[1][surfaces[0]], to[0][surfaces[1]]]).mean(), rel=1e-12)
    assert found == pytest.approx(distance_by_loop(prediction, truth, scale), rel=1e-12)
    assert found == pytest.approx(monai_distance(prediction, truth, scale), rel=1e-5)  # theirs is float32


def test_far_objects_and_empty_slices():
    prediction = np.zeros((24, 30, 30), bool)
    truth = np.zeros_like(prediction)
    prediction[1:3, 2:5, 2:5] = prediction[20:23, 20:28, 3] = True
    truth[12:14, 25:29, 25:29] = truth[2, 3:6, 3:6] = True
    for scale in ((30, 8, 8), (1, 1, 1)):
        found = surface_distance(prediction, truth, scale)
        assert found == pytest.approx(distance_by_loop(prediction, truth, scale), rel=1e-12)
        assert found == pytest.approx(monai_distance(prediction, truth, scale), rel=1e-5)


@given(pairs, edges)
@settings(deadline=None)
def test_the_distance_of_any_masks(masks, scale):
    prediction, truth = masks
    found = surface_distance(prediction, truth, scale)
    if not (prediction.any() and truth.any()):
        assert found is None
        return
    assert found == pytest.approx(distance_by_loop(prediction, truth, scale), rel=1e-9)
    assert found == pytest.approx(surface_distance(truth, prediction, scale), rel=1e-12)
    assert surface_distance(prediction, truth, [2 * edge for edge in scale]) == pytest.approx(2 * found, rel=1e-9)
    assert found <= np.linalg.norm(np.array(truth.shape) * scale)
    assert surface_distance(truth, truth, scale) == 0


@pytest.mark.parametrize("size", [(5, 5), (5, 5, 0), (5, 5, -1), (5, 5, np.nan), (5, 5, np.inf), 5])
def test_a_voxel_size_of_something_else_is_refused(pair, size):
    with pytest.raises(ValueError, match="three lengths in nm"):
        surface_distance(*pair, size)


# --- both


@pytest.mark.parametrize("function", [lambda *m: boundary_iou(*m, 1), lambda *m: surface_distance(*m, (1, 1, 1))])
def test_what_is_no_pair_of_masks_is_refused_and_masks_are_left_alone(pair, function):
    prediction, truth = pair
    with pytest.raises(ValueError, match=r"prediction has shape \(18, 22, 24\) and the truth \(19, 22, 24\)"):
        function(prediction[:18], truth)
    with pytest.raises(ValueError, match=r"The truth is uint8.*truth > 0"):
        function(prediction, truth.astype(np.uint8))
    with pytest.raises(ValueError, match="The prediction is bool with 2 axes"):
        function(prediction[0], truth[0])
    before = [mask.copy() for mask in pair]
    for mask in pair:
        mask.setflags(write=False)
    function(prediction[::-1], truth[::-1])
    assert all((mask == old).all() for mask, old in zip(pair, before, strict=True))


# --- the band itself


def test_the_band_of_a_square_by_hand():
    truth = np.zeros((1, 7, 9), bool)
    truth[0, 2:5, 2:6] = True
    expected = np.zeros_like(truth)
    expected[0, 1:6, 1:7] = True
    expected[0, 3, 3:5] = False  # more than 1 voxel inside
    assert np.array_equal(boundary_band(truth, 1), expected)
    assert not boundary_band(truth, 0).any()


@given(pairs, st.integers(0, 3))
@settings(deadline=None)
def test_the_band_is_what_the_iou_leaves_out(masks, width):
    prediction, truth = masks
    kept = ~boundary_band(truth, width)
    assert kept.shape == truth.shape and kept.dtype == bool
    assert boundary_iou(prediction, truth, width) == metrics.iou(prediction[kept], truth[kept])
    assert np.array_equal(kept, ~boundary_band(~truth, width))


@given(hnp.arrays(bool, shapes), st.integers(0, 3))
@settings(deadline=None)
def test_the_band_is_that_of_scipy(truth, width):
    square = np.ones((1, 2 * width + 1, 2 * width + 1), bool)
    near = [ndimage.binary_dilation(mask, square) for mask in (truth, ~truth)]
    assert np.array_equal(boundary_band(truth, width), near[0] & near[1])


def test_what_has_no_band_is_refused():
    with pytest.raises(ValueError, match="The truth is uint8"):
        boundary_band(np.zeros((2, 3, 4), np.uint8), 1)
    with pytest.raises(ValueError, match="2 axes"):
        boundary_band(np.zeros((3, 4), bool), 1)
    with pytest.raises(ValueError, match="width of the band is -1"):
        boundary_band(empty(), -1)
