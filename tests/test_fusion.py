"""A fused network: equal to the network it was made from, for all encoders, sizes and weights, or not used."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mitoseg_lib.fusion import _doubling_weight, fuse
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.models import UNet, encoder_unet, freeze_encoder
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.weights import load_weights

ENCODERS = ("resnet34", "efficientnet_lite0", "densenet121", "vgg11_bn", "mit_b0", "mobilenet_v2")


def model_with_statistics(name, *, neighbours=False, seed=0):
    """A network whose normalisations do something: their statistics and factors are random."""
    torch.manual_seed(seed)
    model = encoder_unet(name, weights=None, frozen=False, neighbours=neighbours)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
    return model.eval()


def images(n, height, width, n_channels=1):
    return torch.rand(n, n_channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("neighbours", [False, True])
def test_it_answers_like_the_model(name, neighbours):
    model = model_with_statistics(name, neighbours=neighbours)
    fused = fuse(model)
    assert fused is not model and (fused.n_slices, fused.size_multiple) == (model.n_slices, model.size_multiple)
    for shape in ((2, 32, 96), (1, 160, 64)):
        slices = images(*shape, n_channels=model.n_slices)
        with torch.no_grad():
            expected, found = model(slices), fused(slices)
        assert (found - expected).abs().max() < 5e-5 * expected.abs().max()


def test_it_has_fewer_operations():
    fused = fuse(model_with_statistics("resnet34"))
    kinds = [type(layer) for layer in fused.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.ConvTranspose2d) == 5
    assert not any(weight.requires_grad for weight in fused.parameters()) and not fused.training


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen):
    model = model_with_statistics("efficientnet_lite0").train()
    if frozen:
        freeze_encoder(model)
    before, modes = copy.deepcopy(model.state_dict()), [layer.training for layer in model.modules()]
    fuse(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [layer.training for layer in model.modules()] == modes


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_doubling_and_a_convolution_are_one_transposed_convolution(n_in, n_out, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n_in, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_out, n_in, 3, 3, generator=generator, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    found = F.conv_transpose2d(x, _doubling_weight(weight), stride=2, padding=1)
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_network_whose_layers_are_applied_in_another_order_stays_itself():
    model = model_with_statistics("resnet34")

    # Named conv1, bn1, and applied as convolution, ReLU, normalisation: merging them would change the answer.
    class Encoder(type(model.encoder)):
        def forward(self, image):
            x = self.relu(self.conv1(image))
            features = [image, self.bn1(x)]
            for stage in (nn.Sequential(self.maxpool, self.layer1), self.layer2, self.layer3, self.layer4):
                features.append(stage(features[-1]))
            return features

    model.encoder.__class__ = Encoder
    assert fuse(model) is model


def test_other_networks_are_returned_as_they_are():
    model = UNet(width=4, depth=2)
    assert fuse(model) is model


def test_the_shipped_model_is_fused_and_gives_the_same_probabilities():
    segmenter = Segmenter.load(device="cpu", precision="fp32")
    model, _ = load_weights()
    assert nn.BatchNorm2d not in map(type, segmenter.model.modules())
    image = np.random.default_rng(0).integers(0, 256, (3, 70, 101), dtype=np.uint8)
    found = predict_stack(segmenter.model, image, precision="fp32")
    assert np.abs(found - predict_stack(model, image, precision="fp32")).max() < 1e-4
