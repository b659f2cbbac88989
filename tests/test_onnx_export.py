"""The model as an ONNX file: the same numbers, for sizes that the export never saw."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib.datasets import load_example
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import iou
from mitoseg_lib.models import UNet
from mitoseg_lib.onnx_export import INPUT, OPSET, OUTPUT, OnnxNetwork, export_onnx, halve_onnx, quantise_onnx
from mitoseg_lib.weights import MaskRule, WeightsError, load_weights, save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def model():
    return load_weights()[0]


@pytest.fixture(scope="module")
def exported(folder):
    export_onnx(folder / "whole.onnx")
    return folder / "whole.onnx"


@pytest.fixture(scope="module")
def halved(folder, exported):
    halve_onnx(exported, folder / "half.onnx")
    return folder / "half.onnx"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 3), rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 100))
def test_any_size_gives_the_numbers_of_torch(n, rows, columns, seed, model, exported):
    slices = noise(n, 3, 32 * rows, 32 * columns, seed=seed)
    with torch.no_grad():
        expected = model(slices)
    found = OnnxNetwork(exported)(slices)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-3  # logits of up to 15


def test_the_file_says_what_it_needs(exported):
    loaded = onnx.load(exported)
    onnx.checker.check_model(loaded, full_check=True)
    assert [(entry.domain, entry.version) for entry in loaded.opset_import] == [("", OPSET)]
    (given_,), (returned,) = loaded.graph.input, loaded.graph.output
    assert (given_.name, returned.name) == (INPUT, OUTPUT)
    sizes = [dimension.dim_param or dimension.dim_value for dimension in given_.type.tensor_type.shape.dim]
    assert sizes[1] == 3 and all(isinstance(sizes[axis], str) for axis in (0, 2, 3))


def test_it_names_no_place_of_this_machine(exported, halved):
    for path in (exported, halved):
        assert b"site-packages" not in path.read_bytes() and b".py" not in path.read_bytes()


def test_half_the_bytes_give_nearly_the_same_mask(model, exported, halved):
    assert halved.stat().st_size < 0.52 * exported.stat().st_size and halved.stat().st_size < 12e6
    image = load_example("test").image[30:33, :256, :256]
    masks = [predict_stack(one, image, precision="fp32") >= 0.35 for one in (model, OnnxNetwork(halved))]
    assert masks[0].mean() > 0.02 and iou(*masks) > 0.995


def test_a_weight_too_large_for_16_bits_is_refused(exported, tmp_path):
    loaded = onnx.load(exported)
    tensor = next(one for one in loaded.graph.initializer if np.prod(one.dims) > 1000)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e6
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(loaded, tmp_path / "large.onnx")
    with pytest.raises(WeightsError, match="holds numbers that 16 bits can't"):
        halve_onnx(tmp_path / "large.onnx", tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


def test_eight_bits_are_a_quarter_of_the_bytes_and_find_much_the_same(model, exported, folder):
    image = load_example("test").image[20:40, :256, :256]
    examples = np.stack([image[z - 1 : z + 2] for z in range(1, 19, 4)])
    quantise_onnx(exported, folder / "eight.onnx", examples)
    assert (folder / "eight.onnx").stat().st_size < 0.3 * exported.stat().st_size
    few = image[9:12]
    masks = [predict_stack(one, few, precision="fp32") >= 0.35 for one in (model, OnnxNetwork(folder / "eight.onnx"))]
    assert iou(*masks) > 0.7 and not np.array_equal(*masks)


def test_a_stack_is_predicted_like_by_torch(model, exported):
    image = load_example("test").image[:4, :100, :70]  # sides that are padded
    expected = predict_stack(model, image, precision="fp32")
    assert np.abs(predict_stack(OnnxNetwork(exported), image, precision="fp32") - expected).max() < 1e-3


def test_a_plain_unet_is_refused(tmp_path):
    save_weights(UNet(width=2, depth=1), tmp_path / "unet.safetensors", rule=MaskRule())
    with pytest.raises(WeightsError, match=r"unet.safetensors holds a UNet, but a U-Net with an encoder was expected"):
        export_onnx(tmp_path / "a.onnx", tmp_path / "unet.safetensors")
    assert not (tmp_path / "a.onnx").exists()


def test_a_network_without_neighbours_takes_one_channel(tmp_path, lite0_alone):
    save_weights(lite0_alone, tmp_path / "one.safetensors", rule=MaskRule(), encoder="efficientnet_lite0")
    export_onnx(tmp_path / "one.onnx", tmp_path / "one.safetensors")
    network, slices = OnnxNetwork(tmp_path / "one.onnx"), noise(2, 1, 64, 96)
    assert network.n_slices == 1
    with torch.no_grad():
        expected = load_weights(tmp_path / "one.safetensors")[0](slices)
    assert (network(slices) - expected).abs().max() < 1e-3


def test_a_network_with_neighbours_can_be_given_single_slices(model, tmp_path):
    export_onnx(tmp_path / "one.onnx", single_slices=True)
    network, slices = OnnxNetwork(tmp_path / "one.onnx"), noise(2, 1, 64, 96)
    assert network.n_slices == 1
    with torch.no_grad():
        expected = model(slices.repeat(1, 3, 1, 1))
    assert (network(slices) - expected).abs().max() < 1e-3


@pytest.fixture
def lite0_alone():
    from mitoseg_lib.models import encoder_unet

    torch.manual_seed(0)
    return encoder_unet("efficientnet_lite0", frozen=False).eval()
