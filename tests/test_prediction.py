import dataclasses
import itertools
import os

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from small_models import SLOPE, grey_unet, random_unet
from test_readers import save_ome, save_slices, save_zarr

from mitoseg_lib.inference import median_filter_z, predict_stack, predict_turned
from mitoseg_lib.models import UNet, calibrate_encoder, encoder_unet
from mitoseg_lib.prediction import Segmenter, plan_prediction, resample
from mitoseg_lib.readers import open_reader
from mitoseg_lib.stacks import StackError, load_stack, read_mask
from mitoseg_lib.weights import MaskRule, save_weights
from mitoseg_lib.writers import encode_probabilities

GREY = Segmenter(grey_unet())

pytestmark = pytest.mark.usefixtures("one_thread")


def stack_image(shape=(5, 19, 27), dtype=np.uint8, seed=0):
    """Blobs: neighbouring voxels are alike, so that resampling them makes sense."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (0, 2, 2))
    scaled = (noise - noise.min()) / max(np.ptp(noise), 1e-9)
    return (scaled * (255 if dtype == np.uint8 else 40_000)).astype(dtype)


def save_tiff(path, values, size=None):
    """A TIFF, with a voxel size in its metadata where one is given."""
    options = {"photometric": "minisblack"}
    if size:
        options |= {"resolution": (1e3 / size[2], 1e3 / size[1]), "imagej": values.dtype.itemsize < 8}
        options["metadata"] = {"axes": "ZYX", "spacing": size[0] / 1e3, "unit": "um"}
    tifffile.imwrite(path, values, **options)
    return path


def predict(source, target, segmenter=GREY, *, probabilities=False, **options):
    plan = plan_prediction(source, target, segmenter, **options)
    plan.run(probabilities=probabilities)
    return plan


def written(path):
    reader = open_reader(path)
    return reader.read(0, reader.shape[0])


# --- against what is there already


@pytest.mark.parametrize("shape", [(5, 19, 27), (1, 16, 16), (1, 1, 1), (2, 1, 40), (17, 33, 4), (9, 64, 32)])
def test_a_tiff_of_5_nm_is_predicted_as_a_stack_in_memory(tmp_path, shape):
    model = random_unet()
    image = stack_image(shape)
    path = save_tiff(tmp_path / "a.tif", image)
    expected = predict_stack(model, image)
    predict(path, tmp_path / "mask.tif", Segmenter(model, threshold=0.4), voxel_size_nm=(5, 5, 5))
    assert np.array_equal(written(tmp_path / "mask.tif"), (expected >= 0.4) * np.uint8(255))
    predict(path, tmp_path / "p.zarr", Segmenter(model), probabilities=True, voxel_size_nm=(5, 5, 5))
    assert np.abs(written(tmp_path / "p.zarr") / 254 - expected).max() <= 1 / 508 + 1e-6


@pytest.mark.parametrize("name", ["m.tif", "m.zarr"])
def test_every_input_with_the_same_slices_gives_the_same_mask(tmp_path, name):
    values = stack_image((11, 19, 27), np.uint16)
    names = [f"slice{number}" for number in range(2, 13)]  # slice2 to slice12
    save_tiff(tmp_path / "a.tif", values)
    save_slices(tmp_path / "png", values, names, ".png")
    save_slices(tmp_path / "tif", values, names, ".tif")
    save_zarr(tmp_path / "v2.zarr", values, 2)
    save_zarr(tmp_path / "v3.zarr", values, 3)
    save_ome(tmp_path / "ome.zarr", values, scale=(5, 5, 5))
    model = random_unet()
    expected = predict_stack(model, load_stack(tmp_path / "a.tif").image) >= 0.5
    assert 0.05 < expected.mean() < 0.95
    for source in ("a.tif", "png", "tif", "v2.zarr", "v3.zarr", "ome.zarr"):
        predict(tmp_path / source, tmp_path / name, Segmenter(model), overwrite=True)
        assert np.array_equal(written(tmp_path / name) > 0, expected), source


@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32, np.float64])
def test_other_types_are_brought_to_what_a_stack_in_memory_is(tmp_path, dtype):
    values = stack_image(dtype=np.uint16).astype(dtype)
    path = save_tiff(tmp_path / "a.tif", values)
    plan = predict(path, tmp_path / "m.tif")
    assert np.array_equal(read_mask(tmp_path / "m.tif"), load_stack(path).image >= 128)
    assert any("become 0 to 255" in note for note in plan.notes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_constant_stack_is_no_error(tmp_path, dtype):
    path = save_tiff(tmp_path / "a.tif", np.full((3, 9, 9), 200, dtype))
    predict(path, tmp_path / "m.zarr")
    assert written(tmp_path / "m.zarr").shape == (3, 9, 9)


@pytest.mark.parametrize("chunk_depth", [1, 3, 8, 40])
def test_slabs_are_put_together_in_order(tmp_path, chunk_depth):
    image = stack_image((37, 9, 11))
    save_zarr(tmp_path / "a.zarr", image, chunks=(chunk_depth, 9, 11))
    predict(tmp_path / "a.zarr", tmp_path / "m.zarr")
    assert np.array_equal(written(tmp_path / "m.zarr"), image >= 128)


def test_slices_that_fill_the_memory_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.prediction.LARGEST_SLAB", 1000)
    image = stack_image((10, 19, 27))
    predict(save_tiff(tmp_path / "a.tif", image), tmp_path / "m.zarr")
    assert np.array_equal(written(tmp_path / "m.zarr"), image >= 128)


def test_very_large_slices_are_cut_into_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.prediction.LARGEST_WHOLE", 1000)
    monkeypatch.setattr("mitoseg_lib.prediction.WINDOW", 32)
    model, image = random_unet(), stack_image((2, 70, 90))
    path = save_tiff(tmp_path / "a.tif", image)
    predict(path, tmp_path / "m.tif", Segmenter(model))
    expected = predict_stack(model, image, window=32) >= 0.5
    assert np.array_equal(read_mask(tmp_path / "m.tif"), expected)
    assert not np.array_equal(expected, predict_stack(model, image) >= 0.5)


# --- neighbours and medians: a stack in slabs is the same as the whole stack


@pytest.fixture(scope="module")
def lite0_neighbours():
    """At random, but with probabilities that differ from slice to slice."""
    torch.manual_seed(0)
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False, neighbours=True)
    calibrate_encoder(model, [torch.rand(2, 3, 64, 64)])
    torch.nn.init.normal_(model.segmentation_head[0].weight, std=0.5)
    return model.eval()


class CountingModel(torch.nn.Module):
    """Single slices or three, in fp32; says which slices it was asked about, by a number in their corner."""

    ndim, size_multiple = 2, 1

    def __init__(self, n_slices):
        super().__init__()
        self.n_slices, self.asked = n_slices, []

    def forward(self, image):
        self.asked += (image[:, self.n_slices // 2, 0, 0] * 255).round().int().tolist()
        weights = torch.tensor([3.0, 1.0, -7.0])[: self.n_slices].reshape(1, -1, 1, 1)
        return (image * weights).sum(1, keepdim=True) * 3 + 1


def numbered(depth, plane=(6, 10)):
    image = np.random.default_rng(depth).integers(0, 256, (depth, *plane), dtype=np.uint8)
    image[:, 0, 0] = np.arange(depth)
    return image


def whole(model, image, median, size=(5, 5, 5)):
    """The long way round: all slices in memory, one step after the other."""
    plane = image.shape[1:]
    inner = tuple(round(side * edge / 5) for side, edge in zip(plane, size[1:], strict=True))
    if inner != plane:
        image = np.clip(np.rint(resample(image, inner, cubic=True)), 0, 255).astype(np.uint8)
    found = median_filter_z(predict_stack(model, image), median)
    return found if inner == plane else np.clip(resample(found, plane), 0, 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 8, 9, 17])
@pytest.mark.parametrize("n_slices", [1, 3])
@pytest.mark.parametrize("median", [1, 3, 7])
@pytest.mark.parametrize("size", [(5, 5, 5), (5, 10, 2.5)])
@pytest.mark.parametrize("chunk_depth", [1, 3, 20])
def test_in_slabs_a_stack_is_predicted_as_the_whole_is(tmp_path, depth, n_slices, median, size, chunk_depth):
    model, image = CountingModel(n_slices), numbered(depth)
    segmenter = Segmenter(model, median=median)
    slabs = (image[z : z + chunk_depth] for z in range(0, depth, chunk_depth))
    parts = list(segmenter.stream(slabs, image.shape, size))
    if size == (5, 5, 5):
        assert model.asked == list(range(depth))  # each slice once
    assert [len(part) for part in parts[:-1]] == [8] * (len(parts) - 1)  # whole chunks of a Zarr
    expected = whole(model, image, median, size)
    assert np.array_equal(np.concatenate(parts), expected)
    assert np.array_equal(segmenter.probabilities(image, size), expected)


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("tta", [False, True])
def test_a_real_network_with_neighbours_is_the_same_in_slabs(lite0_neighbours, monkeypatch, depth, tta):
    image = stack_image((depth, 33, 50))
    predict_whole = predict_turned if tta else predict_stack
    monkeypatch.setattr("mitoseg_lib.inference.is_bf16_native", lambda device: False)
    expected = median_filter_z(predict_whole(lite0_neighbours, image), 3)
    found = Segmenter(lite0_neighbours, median=3, tta=tta).probabilities(image, (5, 5, 5))
    assert np.array_equal(found, expected)
    alone = [predict_whole(lite0_neighbours, image[z : z + 1])[0] for z in range(depth)]
    assert depth == 1 or np.abs(expected - alone).max() > 0.01  # neighbours matter


def test_very_large_slices_with_neighbours_are_cut_into_windows(lite0_neighbours, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.prediction.LARGEST_WHOLE", 1000)
    monkeypatch.setattr("mitoseg_lib.prediction.WINDOW", 32)
    image = stack_image((3, 40, 50))
    expected = predict_stack(lite0_neighbours, image, window=32)
    assert np.array_equal(Segmenter(lite0_neighbours).probabilities(image, (5, 5, 5)), expected)


def test_a_file_is_predicted_with_neighbours_and_median(tmp_path, lite0_neighbours):
    image = stack_image((19, 32, 40))
    path = save_tiff(tmp_path / "a.tif", image)
    segmenter = Segmenter(lite0_neighbours, median=5)
    expected = median_filter_z(predict_stack(lite0_neighbours, image), 5)
    threshold = float(np.median(expected))
    predict(path, tmp_path / "m.zarr", dataclasses.replace(segmenter, threshold=threshold))
    assert np.array_equal(written(tmp_path / "m.zarr") > 0, expected >= np.float32(threshold))
    predict(path, tmp_path / "p.tif", segmenter, probabilities=True)
    assert np.array_equal(written(tmp_path / "p.tif"), encode_probabilities(expected))


@pytest.mark.parametrize(("z", "median"), [(5, 7), (5.04, 7), (10, 3), (50, 1), (2, 7)])
def test_in_thicker_slices_the_median_takes_fewer_and_says_so(tmp_path, z, median):
    image = numbered(12)
    path = save_tiff(tmp_path / "a.tif", image)
    segmenter = Segmenter(CountingModel(1), median=7, threshold=0.995)
    plan = predict(path, tmp_path / "m.tif", segmenter, voxel_size_nm=(z, 5, 5))
    expected = whole(CountingModel(1), image, median) >= np.float32(0.995)
    assert 0.1 < expected.mean() < 0.9 and np.array_equal(read_mask(tmp_path / "m.tif"), expected)
    notes = [note for note in plan.notes if "median" in note]
    words = f"takes {median} slice{'s' if median > 1 else ''} of {z:g} nm instead of 7 slices of 5 nm"
    assert notes == ([] if median == 7 else [f"the median along z {words}"])


# --- test-time augmentation


def orientations(grey):
    """The 8 by hand: transposed or not, upside down or not, left to right or not."""
    for is_transposed, *steps in itertools.product((False, True), (1, -1), (1, -1)):
        turned = grey[:: steps[0], :: steps[1]]
        yield turned.T if is_transposed else turned, is_transposed, steps


def test_tta_is_the_mean_over_8_orientations():
    model, image = random_unet(), stack_image((3, 21, 34))
    expected = np.zeros(image.shape, np.float64)
    for z, grey in enumerate(image):
        seen = set()
        for turned, is_transposed, steps in orientations(grey):
            seen.add(turned.tobytes())
            found = predict_stack(model, turned[None].copy(), precision="fp32")[0]
            expected[z] += (found.T if is_transposed else found)[:: steps[0], :: steps[1]] / 8
        assert len(seen) == 8
    found = predict_turned(model, image)
    assert (found.dtype, found.shape) == (np.float32, image.shape)
    limit = 0.05 if torch.backends.mkldnn.is_available() else 1e-5  # bf16 where the processor has it
    assert np.abs(found - expected).max() < limit
    assert np.abs(found - expected).mean() < 0.005
    assert np.abs(predict_stack(model, image) - expected).mean() > 0.02


def test_tta_changes_nothing_for_a_model_that_sees_single_voxels(tmp_path):
    image = stack_image()
    tta = Segmenter(GREY.model, tta=True)
    predict(save_tiff(tmp_path / "a.tif", image), tmp_path / "m.tif", tta)
    assert np.array_equal(read_mask(tmp_path / "m.tif"), image >= 128)


# --- voxel sizes


def disc(shape=(3, 80, 120), centre=(37.0, 62.0), radius=(16.0, 24.0)):
    y, x = np.ogrid[: shape[1], : shape[2]]
    inside = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 <= 1
    return np.repeat((inside * np.uint8(200) + np.uint8(20))[None], shape[0], axis=0)


@pytest.mark.parametrize(
    "size", [(5, 2.5, 2.5), (5, 10, 10), (20, 2.5, 10), (5, 3.3, 7.1), (50, 5, 5), (5, 1, 1), (5, 40, 40), (5, 5, 9)]
)
@pytest.mark.parametrize("name", ["m.tif", "m.zarr"])
def test_other_voxel_sizes_come_back_to_the_input_grid_and_in_place(tmp_path, size, name):
    image = disc()
    plan = predict(save_tiff(tmp_path / "a.tif", image, size), tmp_path / name)
    mask = written(tmp_path / name) > 0
    assert mask.shape == image.shape and plan.voxel_size_nm == pytest.approx(size)
    assert open_reader(tmp_path / name).voxel_size_nm == pytest.approx(size)
    centre = ndimage.center_of_mass(mask[1])
    assert centre == pytest.approx((37, 62), abs=0.15)
    assert mask.sum() == pytest.approx((image > 128).sum(), rel=0.05)
    is_resampled = any("resampled" in note for note in plan.notes)
    assert is_resampled == (size[1:] != (5, 5))


def test_what_the_model_sees_has_its_own_voxel_size(tmp_path):
    seen = []
    model = grey_unet()
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[2:]))
    segmenter = Segmenter(model, voxel_size_nm=(8.0, 4.0, 8.0))
    predict(save_tiff(tmp_path / "a.tif", disc()), tmp_path / "m.tif", segmenter, voxel_size_nm=(3.0, 8.0, 4.0))
    assert {tuple(shape) for shape in seen} == {(160, 60)}


def test_sizes_that_differ_by_less_than_a_hundredth_are_equal(tmp_path):
    image = stack_image()
    predict(save_tiff(tmp_path / "a.tif", image), tmp_path / "m.tif", voxel_size_nm=(5, 5.04, 4.96))
    assert np.array_equal(read_mask(tmp_path / "m.tif"), image >= 128)


@given(
    plane=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    other=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    cubic=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_resampling_keeps_a_constant_and_the_symmetry(plane, other, cubic):
    constant = np.full((2, *plane), 77, np.uint8)
    found = resample(constant, other, cubic=cubic)
    assert (found.dtype, found.shape) == (np.float32, (2, *other)) and np.abs(found - 77).max() < 1e-3
    values = np.random.default_rng(0).random((1, *plane), np.float32)
    there, mirrored = (resample(part, other, cubic=cubic) for part in (values, values[:, ::-1, ::-1]))
    assert np.abs(there[:, ::-1, ::-1] - mirrored).max() < 1e-4


@pytest.mark.parametrize("other", [(20, 30), (40, 60), (7, 13), (61, 9), (20, 45), (2, 300)])
@pytest.mark.parametrize("cubic", [False, True])
def test_resampling_agrees_with_torch(other, cubic):
    values = np.random.default_rng(0).random((2, 20, 30), np.float32)
    mode = "bicubic" if cubic else "bilinear"
    expected = F.interpolate(torch.from_numpy(values)[None], other, mode=mode, antialias=True)[0].numpy()
    assert np.abs(resample(values, other, cubic=cubic) - expected).max() < 1e-4


def test_a_voxel_size_that_nobody_stated_is_assumed_and_said(tmp_path):
    plan = predict(save_tiff(tmp_path / "a.tif", stack_image()), tmp_path / "m.tif")
    assert plan.voxel_size_nm == (5, 5, 5)
    assert any("5 x 5 x 5 nm is assumed" in note for note in plan.notes)
    assert open_reader(tmp_path / "m.tif").voxel_size_nm == pytest.approx((5, 5, 5))


def test_a_voxel_size_that_is_given_counts_more_than_the_file_s(tmp_path):
    path = save_tiff(tmp_path / "a.tif", stack_image(), (5, 5, 5))
    plan = plan_prediction(path, tmp_path / "m.tif", GREY, voxel_size_nm=(8, 4, 4))
    assert plan.voxel_size_nm == (8, 4, 4)
    assert any("8 x 4 x 4 nm (z, y, x), as given, although its metadata say 5 x 5 x 5 nm" in n for n in plan.notes)


@pytest.mark.parametrize("size", [(5, 500, 500), (5, 5, 0.1), (5, 5), (5, float("nan"), 5), (0, 5, 5)])
def test_impossible_voxel_sizes_are_refused(tmp_path, size):
    path = save_tiff(tmp_path / "a.tif", stack_image())
    with pytest.raises(StackError, match="voxel size is"):
        plan_prediction(path, tmp_path / "m.tif", GREY, voxel_size_nm=size)


# --- what the model saw


def test_grey_levels_are_brought_to_what_the_model_saw(tmp_path):
    dark = (stack_image() // 8).astype(np.uint8)  # 0 to 31
    path = save_tiff(tmp_path / "a.tif", dark)
    plan = predict(path, tmp_path / "m.tif", Segmenter(GREY.model, grey_range=(28.0, 228.0)))
    low, high = np.percentile(dark, [0.1, 99.9])
    assert f"grey levels {low:.6g} to {high:.6g} become 28 to 228" in plan.notes
    assert np.array_equal(read_mask(tmp_path / "m.tif"), dark >= (low + high) / 2)


# --- errors


def test_nothing_is_written_when_the_input_turns_out_to_be_damaged(tmp_path):
    values = np.random.default_rng(0).random((200, 5, 5)).astype(np.float32)
    values[199 - 4, 2, 2] = np.nan
    path = save_tiff(tmp_path / "a.tif", values)
    with pytest.raises(StackError, match=r"^a\.tif holds NaN"):
        predict(path, tmp_path / "m.zarr")
    assert os.listdir(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("name", ["m.tif", "m.zarr"])
def test_what_is_there_stays_unless_overwrite(tmp_path, name):
    path = save_tiff(tmp_path / "a.tif", stack_image())
    predict(path, tmp_path / name)
    other = save_tiff(tmp_path / "b.tif", stack_image((2, 5, 5)))
    with pytest.raises(StackError, match="exists already"):
        plan_prediction(other, tmp_path / name, GREY)
    assert len(written(tmp_path / name)) == 5
    predict(other, tmp_path / name, overwrite=True)
    assert len(written(tmp_path / name)) == 2


def test_a_group_of_arrays_and_a_folder_of_colours_are_refused(tmp_path):
    zarr.create_group(tmp_path / "a.zarr").create_array("raw", shape=(2, 2, 2), dtype="u1")
    save_slices(tmp_path / "colour", np.zeros((2, 5, 5, 3), np.uint8), ["1", "2"], ".png")
    for source, words in (("a.zarr", "raw"), ("colour", "colour")):
        with pytest.raises(StackError, match=words):
            plan_prediction(tmp_path / source, tmp_path / "m.tif", GREY)


# --- loading


def test_a_segmenter_is_what_its_file_says(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(grey_unet(100), path, rule=MaskRule(0.35, 3), voxel_size_nm=(8, 4, 4), grey_range=(20, 200))
    found = Segmenter.load(path, device="cpu")
    assert (found.threshold, found.voxel_size_nm, found.grey_range, found.tta) == (0.35, (8, 4, 4), (20, 200), False)
    image = stack_image()
    expected = median_filter_z(1 / (1 + np.exp(-SLOPE * (image / 255 - 100 / 255))), 3)
    assert found.median == 3
    assert np.abs(found.probabilities(image, (8, 4, 4)) - expected).max() < 0.05
    assert Segmenter.load(path, threshold=0.8, tta=True).threshold == 0.8


def test_a_3d_network_is_refused(tmp_path):
    path = tmp_path / "volume.safetensors"
    save_weights(UNet(3, width=2, depth=1), path, rule=MaskRule())
    with pytest.raises(ValueError, match=r"volume\.safetensors holds a 3D network, but one for slices was expected"):
        Segmenter.load(path)


@pytest.mark.parametrize(
    ("options", "words"), [({"device": "tpu"}, "'tpu'"), ({"threshold": 2}, "2"), ({"threshold": float("nan")}, "nan")]
)
def test_impossible_options_are_refused(tmp_path, options, words):
    path = tmp_path / "a.safetensors"
    save_weights(grey_unet(), path, rule=MaskRule(0.5))
    with pytest.raises(ValueError, match=words):
        Segmenter.load(path, **options)


def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(grey_unet(), path, rule=MaskRule(0.5))
    if torch.cuda.is_available():
        assert next(Segmenter.load(path, device="cuda").model.parameters()).device.type == "cuda"
        return
    with pytest.raises(ValueError, match="no GPU"):
        Segmenter.load(path, device="cuda")
    assert next(Segmenter.load(path).model.parameters()).device.type == "cpu"


@pytest.mark.parametrize(("depth", "neighbours", "is_said"), [(1, True, True), (1, False, False), (2, True, False)])
def test_a_single_image_is_told_from_a_stack(depth, neighbours, is_said, tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", np.full((depth, 40, 40), 128, np.uint8), photometric="minisblack")
    torch.manual_seed(0)
    segmenter = Segmenter(encoder_unet("efficientnet_lite0", weights=None, neighbours=neighbours).eval())
    plan = plan_prediction(tmp_path / "image.tif", tmp_path / "mask.tif", segmenter)
    assert any("here is one only" in note and "a stack gives a better mask" in note for note in plan.notes) == is_said
    plan.run()
    assert tifffile.imread(tmp_path / "mask.tif").shape[-2:] == (40, 40)
