"""Changes of an image do what they say, and nothing where their strength says nothing."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage import exposure, transform
from small_models import grey_unet

from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import scores
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.robustness import CHANGES, Change, blur, brightness, contrast, curve, drift, noise, voxel_size
from mitoseg_lib.stacks import Stack, StackError

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 18, 25), dtype=np.uint8)

every_change = pytest.mark.parametrize("name", CHANGES)


def bright(image):
    """The simplest model."""
    return image >= 128


def blobs(shape=(6, 64, 80), seed=0):
    """Smooth objects, bright on dark, and their mask."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), (2, 6, 6))
    grey = (field - field.mean()) / field.std() * 40 + 128
    image = grey.clip(0, 255).astype(np.uint8)
    return Stack(image, image >= 128)


# --- one change at a time


@every_change
@pytest.mark.parametrize("shape", [(5, 18, 25), (1, 1, 1), (2, 31, 7)])
def test_the_strength_that_changes_nothing_changes_nothing(name, shape):
    change, image = CHANGES[name], np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    changed = change.function(image, change.unchanged)
    assert changed.dtype == np.uint8 and np.array_equal(changed, image)
    changed[:] = 7
    assert np.array_equal(image, before)  # it was no view
    assert np.array_equal(change.mask(bright, image, change.unchanged), bright(image))


@every_change
def test_every_other_strength_changes_something_and_not_the_given_image(name):
    change, before = CHANGES[name], IMAGE.copy()
    assert change.unchanged in change.strengths and list(change.strengths) == sorted(set(change.strengths))
    for strength in change.strengths:
        changed = change.function(IMAGE, strength)
        assert changed.dtype == np.uint8 and np.array_equal(IMAGE, before)
        assert np.array_equal(changed, IMAGE) == (strength == change.unchanged)


@given(st.floats(-300, 300))
def test_brightness_is_an_offset_that_ends_at_0_and_255(offset):
    expected = [min(255, max(0, round(int(grey) + offset))) for grey in range(256)]
    found = brightness(np.arange(256, dtype=np.uint8)[None, None], offset)
    assert found.ravel().tolist() == expected


@pytest.mark.parametrize("offset", [-255, 255, 1e9, -1e9])
def test_brightness_of_all_or_nothing_is_one_grey_level(offset):
    assert np.unique(brightness(IMAGE, offset)).tolist() == [255 if offset > 0 else 0]


def test_brightness_is_that_of_scikit_image_adding():
    for offset in (-40, 25):
        expected = exposure.rescale_intensity(IMAGE, (-offset, 255 - offset), (0, 255))
        assert np.abs(brightness(IMAGE, offset).astype(int) - expected.astype(int)).max() <= 1  # it doesn't round


@given(st.floats(0, 5))
def test_contrast_scales_about_the_mean_of_the_stack(factor):
    mean = sum(map(int, IMAGE.ravel())) / IMAGE.size
    expected = np.clip(np.rint(np.array([(int(grey) - mean) * factor + mean for grey in IMAGE.ravel()])), 0, 255)
    assert np.abs(contrast(IMAGE, factor).ravel() - expected).max() <= 1  # half a grey level may fall to either side


def test_contrast_keeps_the_mean_and_scales_the_spread_where_nothing_is_cut_off():
    image = np.random.default_rng(0).integers(100, 151, (3, 40, 40), dtype=np.uint8)
    for factor in (0.5, 1.5):
        found = contrast(image, factor)
        assert found.mean() == pytest.approx(image.mean(), abs=0.5)
        assert found.std() == pytest.approx(factor * image.std(), rel=0.02)
    assert np.unique(contrast(image, 0)).tolist() == [round(image.mean())]
    assert set(np.unique(contrast(IMAGE, 1e4))) == {0, 255}


def test_noise_has_the_stated_sd_in_every_slice_and_is_independent():
    grey = np.full((4, 100, 100), 128, np.uint8)
    found = noise(grey, 10).astype(float) - 128
    assert found.std(axis=(1, 2)) == pytest.approx([10] * 4, rel=0.05)
    assert np.abs(found.mean(axis=(1, 2))).max() < 0.5
    assert np.abs(np.corrcoef(found.reshape(4, -1)) - np.eye(4)).max() < 0.05
    neighbours = np.corrcoef(found[:, :, 1:].ravel(), found[:, :, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.05


@pytest.mark.parametrize("change", [noise, drift])
def test_what_is_drawn_is_the_seeds(change):
    assert np.array_equal(change(IMAGE, 8), change(IMAGE, 8, seed=0))
    assert not np.array_equal(change(IMAGE, 8), change(IMAGE, 8, seed=1))


def test_blur_is_a_gaussian_in_the_plane_of_unit_sum():
    point = np.zeros((3, 41, 41), np.uint8)
    point[1, 20, 20] = 255
    found = blur(point, 1.0)
    assert not found[0].any() and not found[2].any()
    y, x = np.mgrid[-20:21, -20:21]
    weights = np.exp(-(y**2 + x**2) / 2)
    assert np.abs(found[1] - 255 * weights / weights.sum()).max() <= 0.51
    flat = np.full((2, 9, 9), 200, np.uint8)
    assert np.array_equal(blur(flat, 3), flat)  # edges are no darkness


@pytest.mark.parametrize("sd", [2, 4, 8])
def test_drift_is_one_offset_a_slice_with_the_stated_sd(sd):
    grey = np.full((2000, 2, 3), 128, np.uint8)
    found = drift(grey, sd).astype(float) - 128
    assert not np.ptp(found, axis=(1, 2)).any()
    offsets = found[:, 0, 0]
    assert offsets.std() == pytest.approx(sd, rel=0.05) and abs(offsets.mean()) < 0.1 * sd
    assert abs(np.corrcoef(offsets[1:], offsets[:-1])[0, 1]) < 0.08  # independent of the slice before
    assert np.abs(drift(grey, 2 * sd).astype(float) - 128 - 2 * found).max() <= 1.5  # the same offsets, scaled


# --- voxel size


@pytest.mark.parametrize(
    ("factor", "plane"), [(2, (9, 12)), (0.5, (36, 50)), (1.4, (13, 18)), (1000, (1, 1)), (1.0001, (18, 25))]
)
def test_larger_voxels_are_fewer(factor, plane):
    assert voxel_size(IMAGE, factor).shape == (5, *plane)


def test_smaller_voxels_are_those_of_scikit_images_cubic_interpolation_far_from_edges():
    image = blobs().image
    expected = np.stack([transform.resize(grey, (128, 160), order=3, preserve_range=True) for grey in image])
    found = voxel_size(image, 0.5).astype(float)
    assert np.abs(found - expected)[:, 8:-8, 8:-8].max() < 2  # its kernel is a spline


def test_there_and_back_is_nearly_the_same_image_where_it_is_smooth():
    image = blobs().image
    for factor in (0.5, 0.7, 1.4, 2):
        back = voxel_size(voxel_size(image, factor), 1 / factor)[:, :64, :80].astype(float)
        same = tuple(slice(side) for side in back.shape)
        assert np.abs(back - image[same]).mean() < 1.5


@pytest.mark.parametrize("name", ["voxel_size", "stated_voxel_size"])
@pytest.mark.parametrize("factor", [0.5, 0.7, 1.4, 2, 3])
def test_the_mask_comes_back_to_the_grid_of_the_truth(name, factor):
    stack, seen = blobs((3, 61, 83)), []

    def predict(image):
        seen.append(image.shape)
        return bright(image)

    mask = CHANGES[name].mask(predict, stack.image, factor)
    assert mask.dtype == np.bool_ and mask.shape == stack.shape
    stated = name.startswith("stated")
    assert seen == [stack.shape if stated else (3, round(61 / factor), round(83 / factor))]
    assert scores(mask, stack.labels).iou > 0.8  # a model of single voxels doesn't mind their size


def test_a_stated_size_is_predicted_as_the_command_predicts_it():
    stack, factor, nm = blobs((3, 64, 80)), 2, 5.0
    model = grey_unet()
    recorded = voxel_size(stack.image, factor)
    command = Segmenter(model).probabilities(recorded, (nm, nm * factor, nm * factor)) >= 0.5
    expected = np.kron(command, np.ones((1, 2, 2), bool)).astype(bool)
    found = CHANGES["stated_voxel_size"].mask(lambda image: predict_stack(model, image) >= 0.5, stack.image, factor)
    assert scores(found, expected).iou > 0.93  # kron's steps, and masks instead of probabilities brought back


# --- curves


@every_change
def test_a_curve_has_the_scores_of_each_strength(name):
    change, stack = CHANGES[name], blobs()
    found = curve(bright, stack, change)
    assert [strength for strength, _ in found] == list(change.strengths)
    by_strength = dict(found)
    assert by_strength[change.unchanged].iou == 1
    for strength in (change.strengths[0], change.strengths[-1]):
        assert by_strength[strength] == scores(change.mask(bright, stack.image, strength), stack.labels)


def test_a_curve_falls_with_the_strength():
    for name in ("noise", "blur", "drift"):
        ious = [found.iou for _, found in curve(bright, blobs(), CHANGES[name])]
        assert ious == sorted(ious, reverse=True) and ious[-1] < ious[0]


def test_a_change_of_ones_own_makes_a_curve():
    inverted = Change("inverted", "", (0, 1), 0, lambda image, strength: 255 - image if strength else image)
    stack = blobs()
    (_, same), (_, other) = curve(bright, stack, inverted)
    assert same.iou == 1 and other.iou == scores(~stack.labels | (stack.image == 127), stack.labels).iou


def test_a_curve_needs_a_truth():
    with pytest.raises(StackError, match="labels"):
        curve(bright, Stack(IMAGE), CHANGES["noise"])


# --- what can't be meant


@every_change
@pytest.mark.parametrize(
    ("image", "words"),
    [
        (IMAGE.astype(np.float32), "float32"),
        (IMAGE[0], r"uint8 \(18, 25\)"),
        (IMAGE[:0], r"\(0, 18, 25\)"),
        ([1, 2], "list"),
    ],
)
def test_what_is_no_image_is_refused(name, image, words):
    with pytest.raises(ValueError, match=rf"{words}.*uint8 \(z, y, x\) was expected"):
        CHANGES[name].function(image, CHANGES[name].unchanged)


@every_change
@pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_strengths_that_cannot_be_meant_are_refused(name, strength):
    if name == "brightness" and strength == -1:
        return
    with pytest.raises(ValueError, match=f"is {strength}, but a finite number"):
        CHANGES[name].function(IMAGE, strength)


def test_voxels_without_a_size_are_refused():
    with pytest.raises(ValueError, match="The factor is 0"):
        voxel_size(IMAGE, 0)


def test_the_module_loads_no_torch():
    code = "import sys, mitoseg_lib.robustness; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
