import numpy as np
import pytest
import torch
from small_models import grey_unet

from mitoseg_lib.models import EncoderUNet, UNet, encoder_unet
from mitoseg_lib.starts import choose_start
from mitoseg_lib.weights import MaskRule, WeightsError, save_weights

LITE0 = "efficientnet_lite0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of a network with an encoder, which sees neighbours, and of a U-Net."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    model = encoder_unet(LITE0, weights=None, frozen=False, neighbours=True)
    details = {"voxel_size_nm": (5, 10, 10), "grey_range": (30, 200)}
    save_weights(model, folder / "lite0.safetensors", rule=MaskRule(0.4), encoder=LITE0, **details)
    save_weights(grey_unet(), folder / "unet.safetensors", rule=MaskRule(0.5))
    return folder


def same_weights(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_imagenet_is_an_encoder_that_can_be_trained_under_a_decoder_of_the_seed():
    made = choose_start(weights="imagenet", seed=5)
    torch.manual_seed(5)
    assert same_weights(made.model, encoder_unet(LITE0, weights="imagenet", frozen=False))
    assert not same_weights(made.model, choose_start(weights="imagenet", seed=6).model)
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert (made.encoder, made.threshold, made.grey_range, made.is_trained) == (LITE0, None, None, False)
    assert made.voxel_size_nm == (5, 5, 5) and "ImageNet" in made.words


def test_a_file_is_a_trained_model_with_what_it_knows(trained):
    made = choose_start(weights=trained / "lite0.safetensors")
    assert (made.encoder, made.threshold, made.is_trained, made.n_slices) == (LITE0, 0.4, True, 3)
    assert (made.voxel_size_nm, made.grey_range) == ((5, 10, 10), (30, 200))
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert choose_start(LITE0, trained / "lite0.safetensors").words == made.words == f"lite0.safetensors ({LITE0})"


def test_a_unet_can_be_a_start_too(trained):
    made = choose_start(weights=trained / "unet.safetensors")
    assert isinstance(made.model, UNet) and made.encoder is None and made.n_slices == 1


def test_without_weights_it_is_the_shipped_model_or_else_imagenet(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mitoseg_lib.weights.bundled_folder", lambda: tmp_path)
    assert "ImageNet" in choose_start().words
    (tmp_path / "weights").mkdir()
    for end in ("", ".sha256"):
        content = (trained / f"lite0.safetensors{end}").read_bytes()
        (tmp_path / "weights" / f"{LITE0}.safetensors{end}").write_bytes(content)
    for encoder in (None, LITE0):
        assert choose_start(encoder).words == f"{LITE0}.safetensors ({LITE0})"
        assert "ImageNet" in choose_start(encoder, "imagenet").words
    (tmp_path / "weights" / f"{LITE0}.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="has changed"):  # not silently something else
        choose_start()


@pytest.mark.parametrize(("wanted", "depth", "expected"), [(None, 10, 3), (None, 3, 3), (None, 2, 1), (None, 1, 1),
                                                           (True, 1, 3), (False, 10, 1)])  # fmt: skip
def test_from_imagenet_neighbours_are_seen_where_there_are_some(wanted, depth, expected):
    made = choose_start(weights="imagenet")
    made.set_neighbours(wanted, depth=depth)
    assert made.n_slices == expected
    made.model.eval()
    assert made.model(torch.rand(1, expected, 64, 64)).shape == (1, 1, 64, 64)


def test_a_trained_model_keeps_its_neighbours_unless_asked(trained):
    made = choose_start(weights=trained / "lite0.safetensors")
    for wanted, depth, expected in ((None, 1, 3), (False, 9, 1), (None, 9, 1), (True, 1, 3)):
        made.set_neighbours(wanted, depth=depth)
        assert made.n_slices == expected and isinstance(made.model, EncoderUNet)


def test_a_unet_has_no_neighbours(trained):
    made = choose_start(weights=trained / "unet.safetensors")
    for wanted in (None, False):
        made.set_neighbours(wanted, depth=9)
        assert made.n_slices == 1
    with pytest.raises(WeightsError, match=r"unet\.safetensors \(unet\) takes single slices, but neighbours"):
        made.set_neighbours(True, depth=9)


@pytest.mark.parametrize(
    ("encoder", "weights", "words"),
    [
        ("resnet34", "lite0.safetensors", f"has the encoder '{LITE0}', but 'resnet34' was asked for"),
        (None, "nowhere.safetensors", "nowhere.safetensors isn't a file"),
        ("resnet3", "imagenet", "'resnet3' is unknown"),
        ("resnet3", None, "'resnet3' is unknown"),
    ],
)
def test_what_cannot_be_a_start_is_one_sentence(trained, encoder, weights, words):
    path = trained / weights if weights and weights.endswith("s") else weights
    with pytest.raises(ValueError, match=words) as caught:
        choose_start(encoder, path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_what_it_learned_from_is_the_same_for_any_state_of_the_generators():
    made = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        made.append(choose_start(weights="imagenet", seed=4).model)
    assert same_weights(*made)
