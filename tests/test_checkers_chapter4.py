"""Wrong answers to the exercises of chapter 4 get the hint that fits; right ones are in its solutions."""

import numpy as np
import pytest
import torch
from scipy import special
from small_answers import JUNK
from torch import nn

from mitoseg_lib.datasets import load_example
from mitoseg_lib.exercises.chapter4 import check_group_norm, check_iou_in_eval, check_repaired, check_weights
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import iou, scores
from mitoseg_lib.models import ConvBlock, UNet
from mitoseg_lib.stacks import Stack

BLOCK = ConvBlock(1, 8)


@pytest.mark.parametrize("number", [680, 680.0, np.int64(680), torch.tensor(680)])
def test_the_number_of_weights(number):
    assert check_weights(number, BLOCK).right


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (680 + 16, "biases"),
        (72 + 576, "trained numbers, too"),
        (72 + 576 + 16, "two trained numbers a channel"),
        (680 + 32, "remembers"),
        (72, "one convolution"),
        (576 + 16, "one convolution"),
        (72 + 72 + 32, "each channel that it is given"),
        (9 + 72 + 32, "each channel that it makes"),
        (700, "each layer by itself"),
        ("680", "A number was expected"),
    ],
)
def test_a_wrong_number_of_weights(number, words):
    found = check_weights(number, BLOCK)
    assert not found.right and words in found.words and "680" not in found.words


def watched(model, steps=20, differ=False):
    """Rows as `train_and_watch` returns them, of a network that has been trained for a step."""
    model(torch.rand(2, 1, 16, 16)).mean().backward()
    answer = {"foreground": np.float64(0.5), "iou": 0.2, "lowest": np.float32(-1), "highest": np.float32(2)}
    other = answer | ({"iou": 0.1} if differ else {})
    return [{"step": s, "loss": 1.0, "train()": answer, "eval()": other} for s in range(10, steps + 1, 10)]


def test_group_norm():
    grouped, batch, none = (UNet(width=8, depth=1, normalisation=kind) for kind in ("group", "batch", "none"))
    rows = watched(grouped)
    assert check_group_norm(rows, grouped).right and check_group_norm(tuple(watched(grouped, 60)), grouped).right
    assert "a BatchNorm in this network" in check_group_norm(watched(batch, differ=True), batch).words
    assert "no normalisation" in check_group_norm(watched(none), none).words
    assert "another network's" in check_group_norm(watched(grouped, differ=True), grouped).words
    assert "The last row is of step 10" in check_group_norm(rows[:1], grouped).words
    assert "never trained" in check_group_norm(rows, UNet(width=8, depth=1, normalisation="group")).words
    assert "the network itself" in check_group_norm(rows, "grouped").words
    odd = {"iou": 0.5, 3: 1, (): 2}
    assert check_group_norm([{"step": 20, "train()": odd, "eval()": odd}], grouped).right
    assert "'eval()' is missing" in check_group_norm([{"step": 20, "train()": {}}], grouped).words
    for junk in JUNK:
        assert not check_group_norm(junk, grouped).right and not check_group_norm([junk], grouped).right
        assert not check_group_norm(rows, junk).right


def loop(train=True, sigmoid=False, forget="first", backward=True):
    def repaired(model, loss_function, optimizer, data):
        model.train(train)
        for images, masks in data:
            if forget == "first":
                optimizer.zero_grad()
            logits = model(images)
            loss = loss_function(torch.sigmoid(logits) if sigmoid else logits, masks)
            if backward:
                loss.backward()
            if forget == "too late":
                optimizer.zero_grad()
            optimizer.step()
            if forget == "last":
                model.zero_grad()

    return repaired


def test_repaired_loops_are_right():
    state = torch.get_rng_state()
    assert check_repaired(loop()).right and check_repaired(loop(forget="last")).right
    assert torch.equal(state, torch.get_rng_state())


def one_batch(model, loss_function, optimizer, data):
    model.train()
    for images, masks in data:
        loss_function(model(images), masks).backward()
        optimizer.step()
        return


def twice(*given):
    loop()(*given)
    loop()(*given)


def replaces_a_layer(model, loss_function, optimizer, data):
    model[3] = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 1, 1))
    loop()(model.double(), loss_function, optimizer, [(images.double(), masks.double()) for images, masks in data])


def never_asks(model, loss_function, optimizer, data):
    model.train()


def own_optimizer(model, loss_function, optimizer, data):
    loop()(model, loss_function, torch.optim.Adam(model.parameters()), data)


def swapped(model, loss_function, optimizer, data):
    loop()(model, lambda logits, masks: loss_function(masks, logits), optimizer, data)


def mode_of_the_first_batch_only(model, loss_function, optimizer, data):
    loop()(model, loss_function, optimizer, data[:1])
    loop(train=False)(model, loss_function, optimizer, data[1:])


@pytest.mark.parametrize(
    ("repaired", "words"),
    [
        (loop(train=False), "answered in `eval()`"),
        (mode_of_the_first_batch_only, "answered in `eval()`"),
        (loop(sigmoid=True), "numbers from 0 to 1"),
        (loop(forget="never"), "add up"),
        (loop(forget="too late"), "No weight has moved"),
        (loop(backward=False), "No weight has moved"),
        (one_batch, "only 1 came"),
        (twice, "8 times"),
        (never_asks, "never asked"),
        (own_optimizer, "with the optimizer"),
        (replaces_a_layer, "aren't those of a correct loop"),
        (swapped, "the masks came to the loss"),
        (lambda: None, "raised TypeError"),
        (None, "Hand in the function"),
        ([1], "without brackets"),
    ],
)
def test_a_loop_with_a_mistake(repaired, words):
    found = check_repaired(repaired)
    assert not found.right and words.lower() in found.words.lower()


EXAMPLE = load_example("train")
TRAIN, VALIDATION = (Stack(EXAMPLE.image[z, :64, :64], EXAMPLE.labels[z, :64, :64]) for z in np.s_[:8, 40:48])


def iou_in_eval(model, part):
    five = part.slices(range(5))
    return iou(predict_stack(model, five.image, precision="fp32") >= 0.5, five.labels)


def by_hand(*, mode="eval", keep=True, first=5, largest=255.0, answer=lambda p, x: p >= 0.5, score=iou):
    """The function written without `predict_stack`, with one mistake or none."""

    def function(model, part):
        was = model.training
        model.train(mode == "train")
        with torch.no_grad():
            logits = model(torch.from_numpy(part.image[:first, None]).float() / largest)[:, 0].numpy()
        if keep:
            model.train(was)
        return score(answer(special.expit(logits), logits), part.labels[:first])

    return function


@pytest.fixture(scope="module")
def rounds():
    """A network that has changed twice, and the pairs noted on the way."""
    torch.manual_seed(0)
    model, pairs = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), []
    with torch.no_grad():
        for level in (60, 85, 100):
            model[0].weight.fill_(-9)
            model[0].bias.fill_(9 * level / 255)
            pairs.append((iou_in_eval(model, TRAIN), iou_in_eval(model, VALIDATION)))
    return model, pairs


def check(function, pairs, model):
    return check_iou_in_eval(function, pairs, model, TRAIN, VALIDATION)


@pytest.mark.parametrize("function", [iou_in_eval, by_hand(), lambda m, p: torch.tensor(iou_in_eval(m, p))])
def test_iou_in_eval_and_three_pairs(function, rounds):
    model, pairs = rounds
    state = torch.get_rng_state()
    assert check(function, pairs, model).right and check(function, np.round(pairs, 2), model).right
    assert torch.equal(state, torch.get_rng_state())


def mean_over_slices(mask, labels):
    return np.mean([iou(m, t) for m, t in zip(mask, labels, strict=True)])


MODEL = nn.Conv2d(1, 1, 1)  # another network, to which grey levels above 180 are foreground
nn.init.constant_(MODEL.weight, 9)
nn.init.constant_(MODEL.bias, -9 * 180 / 255)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (by_hand(mode="train"), "the answer of `train()`"),
        (by_hand(keep=False), "leave it as you found it"),
        (by_hand(first=None), "all slices"),
        (by_hand(first=1), "one slice"),
        (by_hand(largest=1), "up to 255"),
        (by_hand(answer=lambda p, x: p > 0), "compare them with 0.5"),
        (by_hand(answer=lambda p, x: x >= 0.5), "another logit"),
        (by_hand(score=lambda p, t: scores(p, t).dice), "Dice"),
        (by_hand(score=mean_over_slices), "mean over slices"),
        (lambda m, p: 100 * iou_in_eval(m, p), "percentage"),
        (lambda m, p: iou_in_eval(m, p.slices(range(-5, 0))), "last five"),
        (lambda m, p: iou_in_eval(MODEL, p), "Two different networks"),
        (lambda m, p: iou_in_eval(m, TRAIN), "Two different stacks"),
        (lambda m, p: print(end=""), "returns nothing"),
        (lambda m: 1, "raised TypeError"),
        (lambda m, p: "0.5", "A number was expected"),
        (lambda m, p: 0.01 * len(p.image) * m[0].weight.item() + p.image[0, 0, 0], "at 0.5"),
    ],
)
def test_a_wrong_function(function, words, rounds):
    found = check(function, rounds[1], rounds[0])
    assert not found.right and words in found.words, found


def test_wrong_pairs(rounds):
    model, pairs = rounds
    wrong = {
        "come first": [pair[::-1] for pair in pairs],
        "made anew": [pairs[-1]] * 3,
        "something else than your last pair": pairs[::-1],
        "from 0 to 1": np.multiply(100, pairs),
        "The shape (3, 2) was expected": pairs[:2],
    }
    for words, answer in wrong.items():
        found = check(iou_in_eval, answer, model)
        assert not found.right and words in found.words, found
    assert "the network of the three rounds" in check(iou_in_eval, pairs, None).words
    black = nn.Conv2d(1, 1, 1)
    nn.init.constant_(black.bias, -9)
    assert check(iou_in_eval, [[0, 0]] * 3, black).right  # black after each round, which can happen


def test_no_answer_raises_an_error(rounds):
    for junk in JUNK:
        assert not check_weights(junk, BLOCK).right
        assert not check_repaired(junk).right
        assert not check(junk, rounds[1], rounds[0]).right
        assert not check(iou_in_eval, junk, rounds[0]).right
        assert not check(iou_in_eval, rounds[1], junk).right
