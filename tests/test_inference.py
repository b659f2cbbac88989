import copy
import functools
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import nn

from mitoseg_lib.inference import (
    choose_threshold,
    evaluating,
    is_bf16_native,
    median_filter_z,
    predict_stack,
    predict_turned,
    predict_views,
    threshold_scores,
)
from mitoseg_lib.metrics import iou, scores
from mitoseg_lib.models import UNet, calibrate_encoder, encoder_unet


def stack_image(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def small_unet(ndim=2, **options):
    """A U-Net whose outputs differ from place to place."""
    torch.manual_seed(0)
    model = UNet(ndim, width=8, depth=2, **options)
    nn.init.normal_(model.head.weight, std=3)
    for _ in range(30):  # so that BatchNorm's running statistics have become those of its layers
        model(torch.rand(2, 1, *(16,) * ndim))
    return model


def naive(model, image):
    """Probabilities slice by slice, padded by torch, which reflects by less than a side only."""
    model = copy.deepcopy(model).eval()
    multiple, (height, width) = model.size_multiple, image.shape[1:]
    out = []
    for slice_ in image:
        grey = torch.from_numpy(slice_ / np.float32(255))[None, None]
        grey = F.pad(grey, (0, -width % multiple, 0, -height % multiple), mode="reflect")
        with torch.no_grad():
            out.append(torch.sigmoid(model(grey))[0, 0, :height, :width].numpy())
    return np.stack(out)


class GreyModel(nn.Module):
    """Logits that depend on the grey level alone: where the result lies can be read from it."""

    size_multiple = 4

    def __init__(self, ndim=2):
        super().__init__()
        self.ndim = ndim
        self.shapes = []

    def forward(self, grey):
        assert all(side % self.size_multiple == 0 for side in grey.shape[2:])
        assert (grey.dtype, grey.shape[1]) == (torch.float32, 1)
        self.shapes.append(tuple(grey.shape))
        return 4 * grey - 2


def grey_answer(image):
    return 1 / (1 + np.exp(2 - 4 * (image / 255)))


# --- whole slices


@pytest.mark.parametrize("shape", [(3, 16, 24), (2, 17, 23), (1, 5, 9), (4, 31, 4)])
@pytest.mark.parametrize("normalisation", ["none", "batch", "group"])
def test_slices_are_predicted_as_by_the_obvious_code(shape, normalisation):
    model, image = small_unet(normalisation=normalisation), stack_image(shape)
    found = predict_stack(model, image, precision="fp32")
    assert (found.dtype, found.shape) == (np.float32, shape)
    assert 0 <= found.min() < found.max() <= 1
    assert np.abs(found - naive(model, image)).max() < 1e-5


def test_a_pretrained_encoder_is_predicted_as_by_the_obvious_code():
    torch.manual_seed(0)
    model = calibrate_encoder(encoder_unet("efficientnet_lite0", weights=None), [torch.rand(2, 1, 64, 64)])
    image = stack_image((2, 50, 70))
    found = predict_stack(model, image, precision="fp32")
    assert found.std() > 0.01
    assert np.abs(found - naive(model, image)).max() < 1e-4


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 11), st.integers(1, 11)),
    batch_size=st.integers(1, 6),
    ndim=st.sampled_from([2, 3]),
    window=st.sampled_from([None, 4, 7]),
)
@settings(deadline=None, max_examples=40)
def test_every_voxel_comes_back_in_its_place(shape, batch_size, ndim, window):
    image = stack_image(shape)
    model = GreyModel(ndim)
    found = predict_stack(model, image, batch_size=batch_size, window=window, precision="fp32")
    assert np.abs(found - grey_answer(image)).max() < 1e-5
    assert max(n for n, *_ in model.shapes) <= batch_size


class ThreeSlices(torch.nn.Module):
    """Its answer is the slice above less the one below."""

    ndim, n_slices, size_multiple = 2, 3, 4

    def forward(self, grey):
        assert grey.shape[1] == 3 and all(side % 4 == 0 for side in grey.shape[2:])
        return 4 * (grey[:, 2:] - grey[:, :1])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("predict", [predict_stack, predict_turned])
def test_slices_may_bring_their_neighbours(predict, window):
    image = stack_image((9, 11, 14))
    whole = predict(ThreeSlices(), image, precision="fp32", window=window)
    windows = np.lib.stride_tricks.sliding_window_view(image, 3, axis=0)  # of slices 1 to 7, (7, y, x, 3)
    found = predict(ThreeSlices(), np.moveaxis(windows, -1, 1), precision="fp32", window=window)
    assert (found.dtype, found.shape) == (np.float32, (7, 11, 14))
    assert np.array_equal(found, whole[1:-1])
    expected = 1 / (1 + np.exp(-4 / 255 * (image[2:].astype(float) - image[:-2])))
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(("model", "shape"), [(GreyModel(), (2, 1, 8, 8)), (ThreeSlices(), (2, 2, 8, 8))])
def test_other_numbers_of_channels_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"uint8 \(z, y, x\) was expected"):
        predict_stack(model, np.zeros(shape, np.uint8))


def test_the_padding_is_a_reflection_at_the_far_ends():
    seen = []

    class Spy(GreyModel):
        def forward(self, grey):
            seen.append((grey * 255).round().to(torch.uint8).numpy()[:, 0])
            return grey

    image = stack_image((1, 5, 3))
    predict_stack(Spy(), image)
    assert np.array_equal(seen[0], np.pad(image, ((0, 0), (0, 3), (0, 1)), mode="reflect"))


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_batch_size_changes_nothing(ndim):
    model, image = small_unet(ndim), stack_image((7, 22, 30))
    window = None if ndim == 2 else 8
    results = [predict_stack(model, image, batch_size=n, window=window, precision="fp32") for n in (1, 2, 3, 7, 20)]
    assert results[0].std() > 0.01
    for result in results[1:]:
        assert np.abs(result - results[0]).max() < 1e-4


def test_the_slices_arrive_as_channels_last():
    layouts = []
    model = UNet()
    model.first.register_forward_hook(
        lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    predict_stack(model, stack_image((2, 64, 96)), batch_size=2, precision="fp32")
    assert layouts == [True]
    assert all(p.is_contiguous() for p in model.parameters())  # the model itself isn't rearranged


# --- what it does to the model


def test_the_model_is_left_as_it_was():
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False).train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    during = []
    model.decoder.register_forward_hook(
        lambda *_: during.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))
    )
    predict_stack(model, stack_image((1, 32, 32)))
    assert during == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_the_mode_comes_back_after_an_error_too():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training and not model[0].training
        1 / 0  # noqa: B018
    assert [m.training for m in model.modules()] == [True, True, False]


def test_the_image_stays_as_it_is_and_may_be_read_only():
    image = stack_image((2, 9, 9))
    before = image.copy()
    image.flags.writeable = False
    predict_stack(GreyModel(), image)
    predict_stack(GreyModel(), image[:, ::-1, ::2])
    assert np.array_equal(image, before)


# --- windows


def monai_probabilities(model, image, roi):
    """MONAI on a volume that was padded by hand."""
    model = copy.deepcopy(model).eval()
    grey = torch.from_numpy(image / np.float32(255))
    with torch.no_grad():
        return sliding_window_inference(
            grey[None, None], roi, 1, lambda x: model(x).sigmoid(), overlap=0.25, mode="gaussian"
        )[0, 0].numpy()


def test_3d_windows_agree_with_monai():
    model, image = small_unet(3), stack_image((13, 21, 30))
    found = predict_stack(model, image, window=(8, 12, 16), batch_size=3, precision="fp32")
    assert (found.dtype, found.shape) == (np.float32, image.shape)
    assert np.abs(found - monai_probabilities(model, image, (8, 12, 16))).max() < 1e-5


def test_a_volume_smaller_than_the_window_is_predicted_whole():
    model, image = small_unet(3), stack_image((5, 7, 10))
    padded = np.pad(image, ((0, 3), (0, 1), (0, 2)), mode="reflect")
    with torch.no_grad():
        grey = torch.from_numpy(padded / np.float32(255))[None, None]
        expected = copy.deepcopy(model).eval()(grey).sigmoid()[0, 0, :5, :7, :10].numpy()
    assert np.abs(predict_stack(model, image, precision="fp32") - expected).max() < 1e-5


def test_a_2d_model_can_be_given_windows():
    model, image = small_unet(), stack_image((2, 40, 50))
    found = predict_stack(model, image, window=24, precision="fp32")
    expected = np.stack([monai_probabilities(model, slice_, (24, 24)) for slice_ in image])
    assert np.abs(found - expected).max() < 1e-5
    one_window, whole = (predict_stack(model, image, window=window, precision="fp32") for window in (64, None))
    assert np.abs(one_window - whole).max() < 1e-5


def test_windows_are_rounded_up_to_what_the_model_takes():
    model = GreyModel(3)
    predict_stack(model, stack_image((9, 9, 9)), window=(2, 5, 100))
    assert {shape[2:] for shape in model.shapes} == {(4, 8, 12)}


# --- precision


def test_bf16_changes_little():
    torch.manual_seed(0)
    model, image = small_unet(), stack_image((2, 32, 32))
    exact, rounded = (predict_stack(model, image, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05
    one_by_one = predict_stack(model, image, precision="bf16", batch_size=1)
    assert np.abs(rounded - one_by_one).max() < 0.02


def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch):
    seen = []
    model = small_unet()
    model.first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    predict_stack(model, stack_image((1, 16, 16)))
    assert seen == [torch.bfloat16 if is_bf16_native() else torch.float32]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not is_bf16_native()
    predict_stack(model, stack_image((1, 16, 16)))
    assert seen[1] == torch.float32


# --- memory


class SmallMemory(GreyModel):
    """Runs out of memory as a GPU does, for batches above a limit."""

    limit = 2

    def forward(self, grey):
        if len(grey) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(grey)


@pytest.mark.parametrize(("ndim", "window"), [(2, None), (2, 8), (3, 8)])
def test_out_of_memory_halves_the_batch(ndim, window):
    model, image = SmallMemory(ndim), stack_image((9, 20, 20))
    found = predict_stack(model, image, batch_size=9, window=window, precision="fp32")
    assert np.abs(found - grey_answer(image)).max() < 1e-5
    assert {shape[0] for shape in model.shapes} <= {1, 2}
    assert max(shape[0] for shape in model.shapes) == 2


@pytest.mark.parametrize(("ndim", "what"), [(2, "slice"), (3, "window")])
def test_a_slice_that_does_not_fit_at_all_is_an_error(ndim, what):
    model = SmallMemory(ndim)
    model.limit = 0
    with pytest.raises(RuntimeError, match=f"Not even one {what} fits"):
        predict_stack(model, stack_image((3, 8, 8)), batch_size=4)


# --- errors


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"image\[None\]"),
        (np.zeros((0, 8, 8), np.uint8), "uint8"),
        ([[[0]]], "list"),
    ],
)
def test_what_is_not_a_stack_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        predict_stack(GreyModel(), image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"precision": "fp16"}, "'fp16'"),
        ({"window": (4, 4, 4)}, "2 sides"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        predict_stack(GreyModel(), stack_image((1, 8, 8)), **options)


# --- the threshold


def best_by_trying(probabilities, truth, candidates):
    ranked = [(iou(probabilities >= c, truth), -round(abs(c - 0.5), 6), -c) for c in candidates]
    return -max(ranked)[2]


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    candidates=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0]), min_size=1),
    coarse=st.booleans(),
)
@settings(deadline=None)
def test_the_threshold_is_the_one_that_trying_all_finds(seed, shape, candidates, coarse):
    rng = np.random.default_rng(seed)
    probabilities = rng.random(shape, dtype=np.float32)
    if coarse:  # so that many lie exactly on a threshold
        probabilities = np.round(probabilities, 1).astype(np.float32)
    truth = rng.random(shape) < rng.random()
    found = choose_threshold(probabilities, truth, candidates=candidates)
    assert found in candidates
    assert found == best_by_trying(probabilities, truth, candidates)


def test_the_threshold_is_found_where_it_is():
    rng = np.random.default_rng(0)
    truth = rng.random((4, 30, 30)) < 0.2
    probabilities = np.where(truth, rng.uniform(0.31, 0.6, truth.shape), rng.uniform(0, 0.29, truth.shape))
    assert choose_threshold(probabilities.astype(np.float32), truth) == 0.3
    assert choose_threshold(probabilities, truth) == 0.3  # float64 too
    flat = probabilities[0, 0], truth[0, 0]
    assert choose_threshold(*flat) == 0.3


def test_of_equal_thresholds_the_nearest_to_a_half_is_taken():
    truth = np.array([[[True, False]]])
    probabilities = np.array([[[0.9, 0.1]]], np.float32)
    assert choose_threshold(probabilities, truth) == 0.5
    assert choose_threshold(probabilities, truth, candidates=[0.8, 0.7, 0.2]) == 0.7
    assert choose_threshold(probabilities, truth, candidates=[0.6, 0.4]) == 0.4
    assert choose_threshold(probabilities, truth, candidates=[0.55, 0.45]) == 0.45


def test_a_truth_without_foreground_wants_an_empty_mask():
    probabilities = np.array([[[0.6, 0.1]]], np.float32)
    assert choose_threshold(probabilities, np.zeros((1, 1, 2), bool)) == 0.65


@pytest.mark.parametrize(
    ("probabilities", "truth", "message"),
    [
        (np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 3), bool), "one shape"),
        (np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.uint8), "uint8"),
        (np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), bool), "bool"),
        (np.full((1, 2, 2), 1.5, np.float32), np.zeros((1, 2, 2), bool), "sigmoid"),
        (np.full((1, 2, 2), np.nan, np.float32), np.zeros((1, 2, 2), bool), "nan"),
    ],
)
def test_what_is_not_probabilities_and_truth_is_refused(probabilities, truth, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold(probabilities, truth)


@pytest.mark.parametrize("candidates", [[], [0.5, 1.5], [float("nan")]])
def test_impossible_candidates_are_refused(candidates):
    with pytest.raises(ValueError, match="The candidates are"):
        choose_threshold(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), bool), candidates=candidates)


# --- the median


@given(depth=st.integers(1, 9), size=st.sampled_from([1, 3, 5, 7]), seed=st.integers(0, 1000), is_mask=st.booleans())
@settings(deadline=None)
def test_the_median_is_that_of_the_slices_around(depth, size, seed, is_mask):
    values = np.random.default_rng(seed).random((depth, 3, 4), dtype=np.float32)
    values = values > 0.5 if is_mask else values
    before = values.copy()
    found = median_filter_z(values, size)
    padded = np.pad(values, ((size // 2, size // 2), (0, 0), (0, 0)), mode="symmetric")
    expected = np.stack([np.median(padded[z : z + size], axis=0) for z in range(depth)])
    assert found.dtype == values.dtype
    assert np.array_equal(found, expected.astype(values.dtype))
    assert np.array_equal(values, before)
    assert found is not values


def test_the_median_drops_what_one_slice_alone_shows_and_fills_what_one_alone_misses():
    mask = np.zeros((7, 2, 2), bool)
    mask[3, 0, 0] = True
    mask[:, 1, 1] = True
    mask[2, 1, 1] = False
    found = median_filter_z(mask, 3)
    assert not found[:, 0, 0].any()
    assert found[:, 1, 1].all()


def test_the_last_slices_are_not_replaced_by_their_neighbours():
    mask = np.zeros((4, 1, 1), bool)
    mask[0] = True
    assert median_filter_z(mask, 3)[:, 0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("size", [0, -1, 2, 4])
def test_the_median_needs_an_odd_size(size):
    with pytest.raises(ValueError, match=f"size is {size}"):
        median_filter_z(np.zeros((3, 2, 2), bool), size)


def test_the_median_needs_a_stack():
    with pytest.raises(ValueError, match=r"\(z, y, x\) was expected"):
        median_filter_z(np.zeros((3, 2), bool), 3)


# --- a slice and its neighbours


class AboveMinusBelow(nn.Module):
    """Takes three slices as channels, and answers with a difference of the outer two, so that their order counts."""

    ndim, n_slices, size_multiple = 2, 3, 8

    def forward(self, grey):
        assert grey.shape[1] == 3
        return (2 * grey[:, 2:] - grey[:, :1] + grey[:, 1:2]) * 2


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_each_slice_comes_with_its_neighbours_and_ends_are_reflected(depth, batch_size, window):
    image = np.random.default_rng(0).integers(0, 256, (depth, 13, 21), dtype=np.uint8)
    options = {"precision": "fp32", "batch_size": batch_size, "window": window}
    found = predict_stack(AboveMinusBelow(), image, **options)
    around = np.pad(image.astype(np.float64) / 255, ((1, 1), (0, 0), (0, 0)), mode="reflect" if depth > 1 else "edge")
    logits = 2 * (2 * around[2:] - around[:-2] + around[1:-1])
    assert np.allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_a_network_with_neighbours_looks_at_them():
    torch.manual_seed(0)
    model = encoder_unet("efficientnet_lite0", weights="imagenet", frozen=False, neighbours=True)
    image = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    changed = image.copy()
    changed[3] = 0
    before, after = (predict_stack(model, one, precision="fp32") for one in (image, changed))
    differs = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert differs == [False, False, True, True, True]


# --- eight ways to lay down a slice


def test_the_turned_prediction_is_the_mean_over_eight_ways():
    torch.manual_seed(0)
    model = UNet(width=8, depth=2)
    image = np.random.default_rng(0).integers(0, 256, (2, 19, 30), dtype=np.uint8)
    answers = []
    for transpose in (False, True):
        for flip_y, flip_x in itertools.product((1, -1), repeat=2):
            laid = image[:, ::flip_y, ::flip_x]
            laid = laid.transpose(0, 2, 1) if transpose else laid
            answer = predict_stack(model, np.ascontiguousarray(laid), precision="fp32")
            answer = answer.transpose(0, 2, 1) if transpose else answer
            answers.append(answer[:, ::flip_y, ::flip_x])
    assert np.ptp(answers, axis=0).max() > 1e-3  # the network isn't symmetric by itself
    expected = np.mean(answers, axis=0)
    assert np.allclose(predict_turned(model, image, precision="fp32"), expected, atol=1e-6)


def test_the_turned_prediction_turns_with_the_image():
    torch.manual_seed(0)
    model = UNet(width=8, depth=2)
    image = np.random.default_rng(1).integers(0, 256, (1, 24, 24), dtype=np.uint8)
    plain = predict_turned(model, image, precision="fp32")
    turned = predict_turned(model, np.rot90(image, axes=(1, 2)).copy(), precision="fp32")
    assert np.allclose(turned, np.rot90(plain, axes=(1, 2)), atol=1e-6)


# --- three views


PLANES = {"xy": "zyx->zyx", "xz": "zyx->yzx", "yz": "zyx->xzy"}


def seen_along(predict, image, plane):
    """A prediction of the slices in one plane, as a stack again; axes are moved one by one."""
    before, after = PLANES[plane].split("->")
    laid = np.einsum(f"{before}->{after}", image)
    return np.einsum(f"{after}->{before}", predict(np.ascontiguousarray(laid)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(7, 19, 30), (1, 5, 9), (24, 8, 8)])
def test_three_views_are_the_mean_of_the_predictions_of_slices_in_three_planes(shape, turned):
    model, image = small_unet(), stack_image(shape)
    predict = functools.partial(predict_turned if turned else predict_stack, model, precision="fp32")
    answers = [seen_along(predict, image, plane) for plane in PLANES]
    assert np.ptp(answers, axis=0).max() > 1e-3
    found = predict_views(model, image, precision="fp32", turned=turned)
    assert (found.dtype, found.shape) == (np.float32, shape)
    assert np.allclose(found, np.mean(answers, axis=0), atol=1e-6)


def test_three_views_of_another_lay_of_the_stack_are_the_same():
    model, image = small_unet(), stack_image((6, 12, 10))
    found = predict_views(model, image, precision="fp32", turned=True)
    laid = predict_views(model, np.ascontiguousarray(image.transpose(2, 0, 1)), precision="fp32", turned=True)
    assert np.allclose(found.transpose(2, 0, 1), laid, atol=1e-6)


def test_a_network_with_neighbours_gets_them_along_each_axis():
    torch.manual_seed(0)
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False, neighbours=True)
    model.forward = lambda x: (40 * (x[:, 2:] - x[:, :1])).clamp(-4, 4)  # the next slice less the one before
    ramp = np.arange(8)
    for axis in range(3):
        image = np.broadcast_to(np.expand_dims(ramp * 20, [i for i in range(3) if i != axis]), (8, 8, 8))
        found = predict_views(model, image.astype(np.uint8), precision="fp32")
        along = 1 / (1 + np.exp(-4)) * 1  # where brighter means next
        assert np.allclose(found.take(range(1, 7), axis), (along + 0.5 + 0.5) / 3, atol=1e-6)


def test_three_views_take_windows_and_leave_the_model_as_it_was():
    model, image = small_unet().train(), stack_image((20, 24, 28))
    whole = predict_views(model, image, precision="fp32")
    windows = predict_views(model, image, precision="fp32", window=16)
    assert model.training and windows.min() >= 0 and windows.max() <= 1
    assert np.abs(whole - windows).max() > 0 and np.abs(whole - windows).mean() < 0.1


@pytest.mark.parametrize("predict", [predict_turned, predict_views])
@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        (np.zeros((4, 4, 4), np.float32), {}, "float32"),
        (np.zeros((4, 4), np.uint8), {}, r"\(z, y, x\)"),
        (np.zeros((0, 4, 4), np.uint8), {}, r"\(0, 4, 4\)"),
        ([[[1]]], {}, "list"),
        (np.zeros((4, 4, 4), np.uint8), {"precision": "fp8"}, "fp8"),
        (np.zeros((4, 4, 4), np.uint8), {"window": 0}, "window"),
    ],
)
def test_turns_and_views_refuse_what_a_plain_prediction_refuses(predict, image, options, words):
    with pytest.raises(ValueError, match=words):
        predict(small_unet(), image, **options)


@pytest.mark.parametrize("predict", [predict_turned, predict_views, functools.partial(predict_views, turned=True)])
def test_turns_and_views_keep_memory_for_two_volumes(predict):
    class Half(nn.Module):
        size_multiple = 1

        def forward(self, x):
            return torch.zeros_like(x)

    image = stack_image((64, 128, 128))
    predict(Half(), image[:2])
    tracemalloc.start()
    try:
        predict(Half(), image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * 4 * image.size  # the sums and one answer, and bytes of the image laid down otherwise


# --- scores at thresholds


def test_the_scores_at_thresholds_are_those_of_the_masks():
    rng = np.random.default_rng(0)
    probabilities, truth = rng.random((3, 20, 20), np.float32), rng.random((3, 20, 20)) < 0.2
    found = threshold_scores(probabilities, truth, candidates=(0.7, 0.2, 0.2, 0.0))
    assert list(found) == [0.0, 0.2, 0.7]
    for threshold, pooled in found.items():
        assert pooled == scores(probabilities >= np.float32(threshold), truth)
