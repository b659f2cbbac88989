import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import grey_unet, random_unet

import mitoseg_lib
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import iou
from mitoseg_lib.models import UNet, calibrate_encoder, encoder_unet
from mitoseg_lib.weights import MaskRule, WeightsError, load_weights, read_metadata, save_weights, shipped_weights


def saved(tmp_path, model=None, **options):
    path = tmp_path / "a.safetensors"
    save_weights(model or random_unet(), path, **({"rule": MaskRule(0.4)} | options))
    return path


def image(shape=(2, 48, 64)):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def assert_refused(path, *words):
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert all(word in message for word in words) and message.endswith(".") and "\n" not in message, message


@pytest.fixture(scope="module")
def lite0():
    torch.manual_seed(0)
    model = encoder_unet("efficientnet_lite0", frozen=False)  # its real ImageNet weights, as in a trained model
    return calibrate_encoder(model, [torch.rand(2, 1, 64, 64)]).eval()


@pytest.mark.parametrize("options", [{}, {"normalisation": "group"}, {"normalisation": "none"}, {"residual": True}])
def test_a_unet_comes_back_with_nearly_the_same_probabilities(tmp_path, options):
    model = random_unet(**options)
    found, metadata = load_weights(saved(tmp_path, model))
    assert isinstance(found, UNet) and not found.training
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert (metadata.encoder, metadata.threshold) == ("unet", 0.4)
    before, after = (predict_stack(one, image(), precision="fp32") for one in (model, found))
    assert before.std() > 0.005  # without a normalisation, a network at random hardly differs from place to place
    assert 0 < np.abs(before - after).mean() < 0.02 * before.std()


def test_a_3d_network_comes_back_as_one(tmp_path):
    torch.manual_seed(0)
    model = UNet(3, width=8, depth=2, residual=True).eval()
    found, metadata = load_weights(saved(tmp_path, model))
    assert found.ndim == 3 and metadata.options["ndim"] == 3 and metadata.options["residual"]
    volume = torch.rand(1, 1, 8, 16, 16)
    with torch.no_grad():
        assert torch.allclose(found(volume), model(volume), atol=0.02)


def test_a_network_with_neighbours_comes_back_as_one(tmp_path):
    model = encoder_unet("efficientnet_lite0", weights=None, frozen=False, neighbours=True)
    path = saved(tmp_path, model, encoder="efficientnet_lite0")
    found, metadata = load_weights(path)
    assert read_metadata(path) == metadata
    assert metadata.options == {"neighbours": True} and found.n_slices == 3
    assert found(torch.rand(1, 3, 32, 32)).shape == (1, 1, 32, 32)


def test_an_encoder_comes_back_and_its_file_is_small(tmp_path, lite0):
    path = saved(tmp_path, lite0, encoder="efficientnet_lite0", grey_range=(30, 220))
    assert path.stat().st_size < 12e6
    found, metadata = load_weights(path)
    assert metadata.encoder == "efficientnet_lite0" and metadata.options == {}
    assert (metadata.mean, metadata.sd) == ((0.5,) * 3, (0.5,) * 3)
    assert (metadata.voxel_size_nm, metadata.grey_range) == ((5, 5, 5), (30, 220))
    assert metadata.library_version == mitoseg_lib.__version__
    before, after = (predict_stack(one, image(), precision="fp32") for one in (lite0, found))
    assert before.std() > 0.1
    # Noise, seen by a decoder that was never trained, is as sensitive to rounding as it gets.
    assert np.abs(before - after).mean() < 0.05 * before.std() and iou(before >= 0.5, after >= 0.5) > 0.95


def test_what_comes_back_is_the_half_precision_of_what_was_saved(tmp_path):
    model = random_unet()
    found, _ = load_weights(saved(tmp_path, model))
    for name, tensor in model.state_dict().items():
        keeps = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        expected = tensor if keeps else tensor.half().float()
        assert torch.equal(found.state_dict()[name], expected), name
    assert not found.training and not [p for p in found.parameters() if not p.requires_grad]


def test_saved_again_the_file_is_the_same(tmp_path):
    path = saved(tmp_path)
    content = path.read_bytes()
    model, metadata = load_weights(path)
    again = saved(tmp_path, model, rule=MaskRule(metadata.threshold))
    assert again.read_bytes() == content


def test_the_header_can_be_read_by_anyone(tmp_path):
    path = saved(tmp_path, voxel_size_nm=(8, 4, 4))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack_from("<Q", content)[0]])
    metadata = json.loads(header["__metadata__"]["mitoseg"])
    assert metadata["options"] == {"width": 8, "depth": 2, "normalisation": "batch", "residual": False}
    assert (metadata["voxel_size_nm"], metadata["threshold"], metadata["grey_range"]) == ([8, 4, 4], 0.4, None)
    dtypes = {tensor.dtype for name, tensor in load_file(path).items() if "running" not in name and "num" not in name}
    assert dtypes == {torch.float16}
    digest, name = (tmp_path / "a.safetensors.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(content).hexdigest(), "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.safetensors.sha256"]


def test_the_median_comes_back_and_files_without_one_have_none(tmp_path):
    path = saved(tmp_path, rule=MaskRule(0.4, 7))
    assert load_weights(path)[1].median == 7 and '\\"median\\": 7' in path.read_bytes()[:5000].decode("latin-1")
    path = saved(tmp_path)  # as all files from before there were medians
    assert load_weights(path)[1].median == 1 and b"median" not in path.read_bytes()


@pytest.mark.parametrize("median", [0, 2, 7.5, "7", None])
def test_a_median_that_cannot_be_meant_is_refused(tmp_path, median):
    path = saved(tmp_path)
    change_header(path, {"median": median})
    assert_refused(path, f"a.safetensors has the median of {median!r} slices")


def test_the_shipped_model_is_there_or_it_is_said_that_it_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr("mitoseg_lib.weights.bundled_folder", lambda: tmp_path)
    assert_refused(None, "efficientnet_lite0.safetensors isn't there", "--weights")
    (tmp_path / "weights").mkdir()
    save_weights(grey_unet(), tmp_path / "weights" / "efficientnet_lite0.safetensors", rule=MaskRule(0.5))
    assert shipped_weights() == tmp_path / "weights" / "efficientnet_lite0.safetensors"
    assert load_weights()[1].threshold == 0.5


# --- files that are refused


@pytest.mark.parametrize("where", [0.0, 0.001, 0.5, 0.999])
def test_a_flipped_bit_is_refused(tmp_path, where):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    assert_refused(path, "a.safetensors has changed")


def test_a_file_that_was_cut_is_refused(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(path, "a.safetensors has changed")


def test_both_files_must_be_there(tmp_path):
    path = saved(tmp_path)
    assert_refused(tmp_path / "b.safetensors", f"{tmp_path}/b.safetensors isn't a file")
    recorded = tmp_path / "a.safetensors.sha256"
    recorded.write_text("")
    assert_refused(path, "has changed")
    recorded.unlink()
    assert_refused(path, "a.safetensors.sha256 isn't a file")


def record(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  {path.name}\n")


def change_header(path, change):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["mitoseg"]) | change
    header["__metadata__"]["mitoseg"] = json.dumps(metadata)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    record(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"mitoseg": "{}"}, {"mitoseg": '{"format": 2}'}])
def test_another_programs_safetensors_are_refused(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3)}, path, metadata=metadata)
    record(path)
    assert_refused(path, "a.safetensors holds no description", "save_weights")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\0" * 100])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    record(path)
    assert_refused(path, "a.safetensors holds no description")


@pytest.mark.parametrize(
    "change", [{"options": {"width": 16}}, {"encoder": "resnet18"}, {"encoder": "no-such-network"}]
)
def test_weights_of_another_network_are_refused(tmp_path, change):
    path = saved(tmp_path)
    change_header(path, change)
    assert_refused(path, "a.safetensors isn't a network on")


# --- models that can't be saved


@pytest.mark.parametrize(
    ("model", "encoder"),
    [(UNet(3, width=1, depth=1), "resnet34"), (UNet(width=1, depth=1), "resnet34"), (torch.nn.Conv2d(1, 1, 1), None)],
)
def test_other_models_are_refused(tmp_path, model, encoder):
    with pytest.raises(WeightsError, match="was expected"):
        saved(tmp_path, model, encoder=encoder)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_needs_its_own_name(tmp_path, lite0):
    for encoder in (None, "resnet18"):
        with pytest.raises(WeightsError, match="encoder"):
            saved(tmp_path, lite0, encoder=encoder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_weights_that_16_bits_cannot_hold_are_refused(tmp_path, value):
    model = random_unet()
    with torch.no_grad():
        model.head.bias[:] = value
    with pytest.raises(WeightsError, match=r"head\.bias"):
        saved(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_running_statistics_may_be_larger(tmp_path):
    model = random_unet()
    model.first.layers[1].running_var[:] = 1e9
    found, _ = load_weights(saved(tmp_path, model))
    assert torch.equal(found.first.layers[1].running_var, model.first.layers[1].running_var)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": MaskRule(1.5)},
        {"rule": MaskRule(float("nan"))},
        {"rule": MaskRule(0.5, 2)},
        {"rule": MaskRule(0.5, -1)},
        {"rule": MaskRule(0.5, 3.0)},
        {"voxel_size_nm": (5, 5)},
        {"voxel_size_nm": (5, 0, 5)},
        {"grey_range": (200, 100)},
        {"grey_range": (0, 300)},
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(WeightsError, match="correct it"):
        saved(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
