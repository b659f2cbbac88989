"""Each mistake does what it says, and nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mitoseg_lib.inference import predict_stack
from mitoseg_lib.losses import DiceBCELoss
from mitoseg_lib.mistakes import AlwaysTraining, Masks255, ScaledInput, SigmoidTwice, slow_statistics
from mitoseg_lib.models import UNet, count_parameters, encoder_unet

WRAPPERS = {
    "scaled": lambda model: ScaledInput(model, training=1, evaluation=255),
    "sigmoid": SigmoidTwice,
    "no eval": AlwaysTraining,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small_unet(ndim=2, **options):
    """A U-Net whose running statistics are those of some images, and whose logits differ from place to place."""
    torch.manual_seed(0)
    model = UNet(ndim, width=8, depth=2, **options)
    nn.init.normal_(model.head.weight, std=3)
    for _ in range(10):
        model(torch.rand(2, 1, *(16,) * ndim))
    return model.eval()


def images(ndim=2, seed=1):
    return torch.rand(2, 1, *(16,) * ndim, generator=torch.Generator().manual_seed(seed))


def stack_image(shape=(3, 20, 24)):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def statistics(model):
    return {name: values.clone() for name, values in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_wrapped_model_passes_for_the_one_inside(name, ndim):
    model = small_unet(ndim)
    wrapped = WRAPPERS[name](model)
    assert (wrapped.ndim, wrapped.size_multiple) == (ndim, model.size_multiple) == (ndim, 4)
    assert count_parameters(wrapped) == count_parameters(model)
    assert wrapped(images(ndim)).shape == (2, 1, *(16,) * ndim)
    assert predict_stack(wrapped, stack_image((9, 21, 22)), window=8 if ndim == 3 else None).shape == (9, 21, 22)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_learns_with_the_gradients_of_the_one_inside(name):
    wrapped = WRAPPERS[name](small_unet(normalisation="none")).train()
    wrapped(images()).mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in wrapped.parameters())


def test_an_encoder_can_be_wrapped_too():
    wrapped = SigmoidTwice(encoder_unet("efficientnet_lite0", weights=None))
    assert (wrapped.ndim, wrapped.size_multiple) == (2, 32)


# --- input in another scale


def test_input_scaled_for_the_training_only_is_the_model_in_training_and_255_times_the_input_in_eval():
    model, x = small_unet(), images()
    wrapped = ScaledInput(model, training=1, evaluation=255)
    with torch.no_grad():
        assert torch.equal(wrapped.train()(x), model.train()(x))
        assert torch.equal(wrapped.eval()(x), model.eval()(x * 255))
        assert not torch.allclose(wrapped(x), model(x))


def test_input_that_nobody_scaled_is_255_times_too_large_throughout():
    model, x = small_unet(), images()
    wrapped = ScaledInput(model, training=255, evaluation=255)
    with torch.no_grad():
        assert torch.equal(wrapped.train()(x), model.train()(x * 255))
        assert torch.equal(wrapped.eval()(x), model.eval()(x * 255))


def test_batch_normalisation_hides_a_scale_that_no_bias_betrays():
    """Why the raw input is a mistake that shows without BatchNorm only: in training, both scales give the same."""
    model, x = small_unet().train(), images()
    with torch.no_grad():
        raw = ScaledInput(model, training=255, evaluation=255).train()(x)
        assert torch.allclose(raw, model(x), atol=0.01)
        plain = small_unet(normalisation="none").train()
        assert not torch.allclose(ScaledInput(plain, training=255, evaluation=255).train()(x), plain(x), atol=1)


# --- a sigmoid too many


def test_a_second_sigmoid_leaves_no_probability_below_a_half():
    model, image = small_unet(), stack_image()
    right = predict_stack(model, image, precision="fp32")
    twice = predict_stack(SigmoidTwice(model), image, precision="fp32")
    assert right.min() < 0.45 < 0.55 < right.max()
    assert twice.min() >= 0.5 and twice.max() <= 1 / (1 + np.exp(-1)) + 1e-6
    np.testing.assert_allclose(twice, 1 / (1 + np.exp(-right)), atol=1e-6)


# --- eval() forgotten


def test_a_model_that_is_always_training_stays_so_whatever_is_asked_for():
    wrapped = AlwaysTraining(small_unet())
    for model in (wrapped, wrapped.eval(), wrapped.train(False), wrapped.train()):
        assert all(module.training for module in model.modules())


def test_it_predicts_by_the_statistics_of_the_slice_at_hand_and_is_left_as_found():
    model, image = small_unet(), stack_image((3, 16, 16))
    wrapped, during = AlwaysTraining(model).train(), []
    model.head.register_forward_hook(lambda *_: during.append(all(module.training for module in wrapped.modules())))
    found = predict_stack(wrapped, image, precision="fp32", batch_size=1)
    assert during == [True] * 3
    assert all(module.training for module in wrapped.modules())
    with torch.no_grad():
        grey = torch.from_numpy(image)[:, None, None] / 255
        expected = np.stack([model.train()(slice_).sigmoid()[0, 0].numpy() for slice_ in grey])
        right = predict_stack(model, image, precision="fp32")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - right).max() > 0.01


def test_while_it_predicts_its_running_statistics_go_on_moving():
    model = small_unet()
    before = statistics(model)
    predict_stack(AlwaysTraining(model), stack_image())
    assert not any(torch.equal(before[name], values) for name, values in statistics(model).items())


# --- masks of 255


def by_hand(logits, masks):
    """Dice and cross-entropy, voxel by voxel."""
    p, t = torch.sigmoid(logits), 255 * masks
    dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return 1 - dice - (t * p.log() + (1 - t) * (1 - p).log()).mean()


def test_masks_of_255_are_dice_and_cross_entropy_by_their_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 6, 7, generator=generator)
    masks = (torch.rand(2, 1, 6, 7, generator=generator) < 0.3).float()
    assert float(Masks255()(logits, masks)) == pytest.approx(float(by_hand(logits, masks)), rel=1e-5)
    assert float(Masks255()(logits, masks)) != pytest.approx(float(DiceBCELoss()(logits, masks)), rel=0.1)
    empty = torch.zeros_like(masks)  # where there is no 255, nothing is wrong
    assert float(Masks255()(logits, empty)) == pytest.approx(float(DiceBCELoss()(logits, empty)), rel=1e-5)


def test_masks_of_255_have_no_lower_bound():
    """Cross-entropy rewards a logit without end where the target is above 1."""
    masks = torch.ones(1, 1, 4, 4)
    losses = [float(Masks255()(torch.full_like(masks, logit), masks)) for logit in (0.0, 10.0, 100.0)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < -10_000
    half = Masks255()(torch.full((1, 1, 4, 4), 3.0, dtype=torch.bfloat16), masks)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="255"):
        DiceBCELoss()(masks, masks * 255)


# --- statistics that lag behind


def test_slow_statistics_change_the_momentum_and_nothing_else():
    model = small_unet()
    weights = {name: values.clone() for name, values in model.state_dict().items()}
    assert slow_statistics(model) is model
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert layers and {layer.momentum for layer in layers} == {0.001}
    assert all(torch.equal(weights[name], values) for name, values in model.state_dict().items())
    cube = slow_statistics(small_unet(3), momentum=0.5)
    assert {m.momentum for m in cube.modules() if isinstance(m, nn.BatchNorm3d)} == {0.5}


def test_slow_statistics_are_left_behind_by_the_batches():
    fresh = UNet(width=8, depth=2).train()
    norm = slow_statistics(fresh).first.layers[1]
    x = images()
    with torch.no_grad():
        for _ in range(50):
            fresh(x)
        seen = F.conv2d(x, fresh.first.layers[0].weight, padding=1).mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, seen * (1 - 0.999**50), rtol=1e-3, atol=1e-6)  # 5 % of the way
