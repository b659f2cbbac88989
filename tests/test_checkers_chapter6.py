"""Wrong answers to the exercises of chapter 6 get the hint that fits; right ones are in its solutions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter6 import check_best_factor, check_one_channel, check_trap, check_unscaled
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import EncoderUNet, freeze_encoder
from mitoseg_lib.stacks import Stack

JUNK = [None, ..., "text", 3, [], [1, 2], {"a": 1}, len, float("nan"), np.zeros(3), torch.zeros(2, 2), object(), int]
SOME = load_example("train")
WATCHED = Stack(SOME.image[[10, 40], :96, :96], SOME.labels[[10, 40], :96, :96], SOME.voxel_size_nm)


class Encoder(nn.Module):
    output_stride = 1

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return [x, self.norm(self.first(x))]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, features):
        return self.norm(self.conv(features[-1]))


def network(seed=0):
    torch.manual_seed(seed)
    return EncoderUNet(Encoder(), Decoder(), nn.Conv2d(4, 1, 1))


PRETRAINED = network()
W = PRETRAINED.encoder.first.weight.detach()
MEAN, SD = PRETRAINED.mean, PRETRAINED.sd
SCALED = W / SD
GREY = SCALED.sum(1, keepdim=True)
BIAS = -(SCALED * MEAN).sum((1, 2, 3))


def never_right(check, *arguments):
    """No answer of any type, in any place, raises an error or is right."""
    for place in range(2):
        for junk in JUNK:
            changed = [junk if i == place else argument for i, argument in enumerate(arguments)]
            assert not check(*changed).right, (place, junk)


def test_one_channel():
    image = torch.rand(1, 1, 9, 9)
    by_three = nn.functional.conv2d((image - MEAN) / SD, W)
    assert torch.allclose(nn.functional.conv2d(image, GREY, BIAS), by_three, atol=1e-4)
    assert check_one_channel(GREY, BIAS, PRETRAINED).right
    assert check_one_channel(GREY.numpy(), BIAS.double().reshape(4, 1, 1), PRETRAINED).right
    assert check_one_channel(nn.Parameter(GREY), nn.Parameter(BIAS), PRETRAINED).right
    never_right(check_one_channel, GREY, BIAS, PRETRAINED)


@pytest.mark.parametrize(
    ("weights", "bias", "words"),
    [
        (SCALED, BIAS, "three channels"),
        (GREY[:, 0], BIAS, "`keepdim=True`"),
        (GREY[:2], BIAS, "The shape (4, 1, 3, 3)"),
        (GREY / 3, BIAS, "means over the colours"),
        (W.sum(1, keepdim=True), BIAS, "deviations are missing"),
        (W.mean(1, keepdim=True), BIAS, "neither"),
        ((W * SD).sum(1, keepdim=True), BIAS, "divides by the deviation"),
        (W.sum(1, keepdim=True) / SD.mean(), BIAS, "each colour has its own"),
        (SCALED[:, :1], BIAS, "one colour's"),
        (GREY + 1, BIAS, "what one colour adds"),
        (GREY, -BIAS, "wrong sign"),
        (GREY, BIAS * 0, "forgets the means"),
        (GREY, -(W * MEAN).sum((1, 2, 3)), "deviations are missing"),
        (GREY, (W * MEAN).sum((1, 2, 3)), "deviations are missing"),
        (GREY, BIAS / 27, "once"),
        (GREY, -MEAN.mean() * SCALED.sum((1, 2, 3)), "one for all"),
        (GREY, BIAS + 1, "is black"),
        (GREY, BIAS[:3], "each of 4 filters"),
    ],
)
def test_one_channel_that_is_wrong(weights, bias, words):
    found = check_one_channel(weights, bias, PRETRAINED)
    assert not found.right and words in found.words


def trained(seed=0, *, frozen=False, slopes=False, steps=15):
    model = network(seed)
    model.encoder.requires_grad_(slopes)
    if frozen:
        freeze_encoder(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(2, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    return model


NETWORKS = {"trap": trained(), "frozen": trained(frozen=True)}


def ious_of(networks, score="iou"):
    masks = {k: predict_stack(model, WATCHED.image, precision="fp32") >= 0.5 for k, model in networks.items()}
    return {name: getattr(scores(mask, WATCHED.labels), score) for name, mask in masks.items()}


def test_the_trap():
    ious = ious_of(NETWORKS)
    assert check_trap(NETWORKS, ious, PRETRAINED, WATCHED).right
    assert check_trap(NETWORKS, {k: torch.tensor(round(v, 2)) for k, v in ious.items()}, PRETRAINED, WATCHED).right
    never_right(check_trap, NETWORKS, ious, PRETRAINED, WATCHED)
    for junk in JUNK:
        assert not check_trap(NETWORKS | {"trap": junk}, ious, PRETRAINED, WATCHED).right
        assert not check_trap(NETWORKS, ious | {"trap": junk}, PRETRAINED, WATCHED).right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trap": NETWORKS["frozen"]}, "the same network"),
        ({"trap": NETWORKS["frozen"], "frozen": NETWORKS["trap"]}, "changed places"),
        ({"trap": trained(slopes=True)}, "weights have changed in 'trap'"),
        ({"frozen": trained()}, "a second trap"),
        ({"trap": trained(frozen=True)}, "isn't the trap"),
        ({"trap": network()}, "never trained"),
        ({"trap": trained(steps=5)}, "5 and 15"),
        ({"trap": trained(seed=1)}, "ImageNet's"),
        ({"frozen": nn.Conv2d(1, 1, 1)}, "another kind of network"),
        ({"frozen": 0.7}, "the network itself"),
    ],
)
def test_a_trap_that_is_none(changes, words):
    found = check_trap(NETWORKS | changes, ious_of(NETWORKS), PRETRAINED, WATCHED)
    assert not found.right and words in found.words


def test_ious_of_the_trap_that_are_wrong():
    ious = ious_of(NETWORKS)
    wrong = {
        "between 0 and 1": {"trap": 1.3, "frozen": 1.2},
        "Dice": ious_of(NETWORKS, "dice"),
        "aren't theirs": {name: iou / 2 for name, iou in ious.items()},
        "'frozen' is missing": {"trap": 0.1},
    }
    if abs(ious["trap"] - ious["frozen"]) > 0.01:
        wrong["have changed places"] = {"trap": ious["frozen"], "frozen": ious["trap"]}
    for words, answer in wrong.items():
        found = check_trap(NETWORKS, answer, PRETRAINED, WATCHED)
        assert not found.right and words in found.words, words


FACTORS = np.geomspace(0.01, 1000, 41)


def losses(best):
    return 0.4 + 0.1 * np.log(FACTORS / FACTORS[best]) ** 2


def test_the_best_factor():
    for best, too_sure in ((10, True), (20, False)):
        for factor in (FACTORS[best], round(FACTORS[best], 2), torch.tensor(FACTORS[best])):
            assert check_best_factor(factor, too_sure, FACTORS, list(losses(best))).right
        found = check_best_factor(FACTORS[best], not too_sure, FACTORS, losses(best))
        assert not found.right and "surer" in found.words
    assert (
        check_best_factor(1, True, FACTORS, losses(16)).right and check_best_factor(1, False, FACTORS, losses(16)).right
    )
    assert check_best_factor(FACTORS[10], np.bool_(True), FACTORS, losses(10)).right
    never_right(check_best_factor, FACTORS[10], True, FACTORS, losses(10))


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (20, "the place"),
        (losses(20).min(), "the lowest loss"),
        (FACTORS[0], "at its highest"),
        (1 / FACTORS[20], "other way round"),
        (-1, "0 or less"),
        (1.1, "Take one of"),
        (1, "Another one"),
    ],
)
def test_a_factor_that_is_wrong(factor, words):
    found = check_best_factor(factor, False, FACTORS, losses(20))
    assert not found.right and words in found.words and f"{FACTORS[20]:.2f}" not in found.words


def with_scale(sd, mean=0.0, seed=0):
    model = copy.deepcopy(PRETRAINED) if seed == 0 else network(seed)
    model.mean.fill_(mean)
    model.sd.fill_(sd)
    return model


CARELESS = {"unscaled": with_scale(1), "0 to 255": with_scale(1 / 255)}
AUCS = {"unscaled": 0.9, "0 to 255": 0.8}


def test_careless_copies():
    assert check_unscaled(CARELESS, AUCS, PRETRAINED, 0.95).right
    assert "both AUCs have fallen" in check_unscaled(CARELESS, AUCS, PRETRAINED, np.float64(0.95)).words
    assert "not both" in check_unscaled(CARELESS, AUCS, PRETRAINED, 0.85).words
    never_right(check_unscaled, CARELESS, AUCS, PRETRAINED, 0.95)
    for junk in JUNK:
        assert not check_unscaled(CARELESS | {"unscaled": junk}, AUCS, PRETRAINED, 0.95).right
        assert not check_unscaled(CARELESS, AUCS | {"unscaled": junk}, PRETRAINED, 0.95).right


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unscaled": PRETRAINED}, "copy.deepcopy"),
        ({"unscaled": with_scale(1, 0.5)}, "mean of 'unscaled' isn't 0"),
        ({"unscaled": CARELESS["0 to 255"]}, "deviation of 'unscaled'"),
        ({"0 to 255": CARELESS["unscaled"]}, "deviation of '0 to 255'"),
        ({"0 to 255": with_scale(255)}, "255 makes it smaller"),
        ({"unscaled": with_scale(1, seed=1)}, "another encoder"),
        ({"unscaled": 0.9}, "the network itself"),
    ],
)
def test_copies_that_are_wrong(changes, words):
    found = check_unscaled(CARELESS | changes, AUCS, PRETRAINED, 0.95)
    assert not found.right and words in found.words


def test_aucs_that_are_wrong():
    changed = with_scale(1)
    copies = {"unscaled": changed, "0 to 255": CARELESS["0 to 255"]}
    assert "has other scales now" in check_unscaled(copies, AUCS, changed, 0.95).words
    assert "has other scales now" in check_unscaled(CARELESS, AUCS, with_scale(1 / 255), 0.95).words
    wrong = {
        "between 0 and 1": {"0 to 255": 90},
        "given the copy": {"0 to 255": 0.95},
        "the same AUC": {"0 to 255": 0.9},
        "worse than guessing": {"0 to 255": 0.3},
    }
    for words, changes in wrong.items():
        found = check_unscaled(CARELESS, AUCS | changes, PRETRAINED, 0.95)
        assert not found.right and words in found.words, words
