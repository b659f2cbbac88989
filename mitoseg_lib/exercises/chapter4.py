"""Checkers of chapter 4, a plain U-Net."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_array,
    as_mapping,
    as_number,
    call,
    checker,
    hint,
    is_close,
    require_function,
)
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import iou, scores
from mitoseg_lib.models import count_parameters
from mitoseg_lib.stacks import Stack

__all__ = ["check_group_norm", "check_iou_in_eval", "check_repaired", "check_weights"]

FIVE = 5  # slices that iou_in_eval looks at
STEPS = 20
N_BATCHES = 4  # that a repaired loop is tried on


@checker
def check_weights(number: Any, layers: nn.Module) -> str:
    """Exercise 1: the number of parameters of a block of convolutions and normalisations."""
    found = as_number(number, "the number of parameters")
    expected = count_parameters(layers)
    if found == expected:
        return "most of them are the second convolution's. Twice as many channels would make those four times as many."
    convolutions = [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]
    weights = [layer.weight.numel() for layer in convolutions]
    channels = sum(layer.out_channels for layer in convolutions)
    of_norms = expected - sum(weights)
    window = [9 * layer.out_channels for layer in convolutions]  # as if each saw one channel
    one_set = [9 * layer.in_channels for layer in convolutions]  # as if each made one channel
    hint(found == expected + channels, "Did you count biases? `bias=False` leaves them away.")
    hint(found == sum(weights), "Those are the convolutions. The normalisations have trained numbers, too.")
    words = (
        "Each normalisation has two trained numbers a channel, a scale and a shift; the convolutions have no biases."
    )
    hint(found == expected - of_norms / 2, words)
    words = "The mean and the deviation that BatchNorm remembers aren't trained, so they are no parameters."
    hint(found == expected + of_norms, words)
    words = "That is one convolution. A block has two, each with a normalisation."
    halves = [n + extra for n in weights for extra in (0, of_norms / 2)]
    hint(found in halves, words)
    words = "A convolution has a window for each channel that it is given. How many is the second one given?"
    hint(found in (sum(window), sum(window) + of_norms), words)
    words = "That is as if each convolution made one channel. It has a set of weights for each channel that it makes."
    hint(found in (sum(one_set), sum(one_set) + of_norms), words)
    raise NotYet(
        "Write down each layer by itself: its windows of 3 x 3, and how many of them; then the normalisations."
    )


@checker
def check_group_norm(rows: Any, model: Any) -> str:
    """Exercise 2: what `train_and_watch` returned for a U-Net with GroupNorm, and that network."""
    hint(rows is None or rows is ..., "Hand in what `train_and_watch` returned, and the network.")
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
    hint(not is_list or not rows, "The first argument is what `train_and_watch` returned, a list of one row or more.")
    seen = [as_mapping(row, "a row of `train_and_watch`", ("step", "train()", "eval()")) for row in rows]
    words = "The second argument is the network itself, the one that `train_and_watch` trained."
    hint(not isinstance(model, nn.Module), words)
    words = "There is a BatchNorm in this network. What does `small_unet` make when it isn't told otherwise?"
    hint(_has(model, nn.modules.batchnorm._BatchNorm), words)
    hint(not _has(model, nn.GroupNorm), "This network has no normalisation at all; `small_unet` can be asked for one.")
    words = "This network was never trained. Make it once, train that one, and hand it in."
    hint(all(weight.grad is None for weight in model.parameters()), words)
    words = "In these rows `train()` and `eval()` differ, which this network can't do. Are they another network's?"
    hint(not all(_modes_agree(row) for row in seen), words)
    last = as_number(seen[-1]["step"], "the step of a row")
    hint(last < STEPS, f"The last row is of step {last:.0f}. Train for {STEPS} steps, and hand in all rows.")
    return "a normalisation that remembers nothing can't remember wrongly, and no batch is too small for it."


@checker
def check_repaired(repaired: Any) -> str:
    """Exercise 3: the loop without its mistakes, repaired(model, loss_function, optimizer, data)."""
    hint(repaired is None or repaired is ..., "Hand in the function, `repaired`.")
    require_function(repaired, "repaired")
    weights, seen = _after(repaired)
    expected, right = _after(_correct_loop)
    if seen == right and _equal(weights, expected):
        return "none of the three raises an error, and a loss can fall with each of them; so somebody has to look."
    words = "The loss was never asked. Compare with the `loss_function` that the function is given."
    hint(not seen, words)
    words = "The masks came to the loss in place of the logits; the network's answer is its first argument."
    hint(any(one["given"] == "masks" for one in seen), words)
    words = "A batch was answered in `eval()`, in which BatchNorm doesn't look at the batch and collects no statistics."
    words += " The function must see to the mode itself, whatever it finds."
    hint(not all(one["training"] for one in seen), words)
    words = "The loss was given numbers from 0 to 1 only. It takes logits, and applies a sigmoid of its own to them."
    hint(any(one["given"] == "probabilities" for one in seen), words)
    n = len(seen)
    hint(n < N_BATCHES, f"Of {N_BATCHES} batches only {n} came to the loss. Does the function return within its loop?")
    hint(n > N_BATCHES, f"{N_BATCHES} batches came to the loss {n} times; go through the data once.")
    hint(_equal(weights, _after(_nothing_moves)[0]), "No weight has moved. A step needs slopes, and they must be new.")
    words = "The slopes of all steps add up here, since nothing forgets those of the step before."
    hint(_equal(weights, _after(_piling_loop)[0]), words)
    words = (
        "The weights aren't those of a correct loop. In each step: answer, compare, forget the old slopes, work out the"
        " new ones, nudge, with the optimizer that the function is given."
    )
    raise NotYet(words)


@checker
def check_iou_in_eval(iou_in_eval: Any, pairs: Any, model: Any, train: Stack, validation: Stack) -> str:
    """Exercise 4: the function, and its IoU of (training, validation) slices after each of three rounds."""
    hint(iou_in_eval is None or iou_in_eval is ..., "Hand in the function, `iou_in_eval`, and the three pairs.")
    require_function(iou_in_eval, "iou_in_eval")
    _check_function(iou_in_eval)
    found = as_array(pairs, "three pairs (IoU on training slices, IoU on validation slices)", (3, 2)).astype(float)
    hint(not ((found >= 0) & (found <= 1)).all(), "The function is right. But the pairs aren't IoUs, from 0 to 1.")
    words = "The function is right. As its third argument the checker needs the network of the three rounds."
    hint(not isinstance(model, nn.Module), words)
    last = call(lambda: [_iou_in_eval(model, part) for part in (train, validation)], words="this network's slices")
    ignorant = [0.0, *(part.labels[:FIVE].mean() for part in (train, validation))]  # answers all black or all white
    constant = any(_is_near(found[0, 0], value) for value in ignorant)
    words = "The function is right. But all rounds gave the same pair; is the network made anew in each round?"
    hint((found == found[0]).all() and not constant, words)
    hint(_is_near(found[-1], last[::-1]) and not _is_near(*last), "In each pair the training slices come first.")
    words = (
        "The function is right. But of this network, as it is now, it says something else than your last pair. Note a"
        " pair after each round, and train on with the same network."
    )
    hint(not _is_near(found[-1], last), words)
    return "the first number of each pair costs a second, and it can spare you the search for a gap that isn't there."


def _has(model: nn.Module, kind: type) -> bool:
    return any(isinstance(layer, kind) for layer in model.modules())


def _modes_agree(row: Mapping[str, Any]) -> bool:
    """Tell whether a row says the same of `train()` and of `eval()`."""
    modes = [as_mapping(row[mode], "what was seen in one mode", ("iou",)) for mode in ("train()", "eval()")]
    names = set(modes[0]) & set(modes[1])
    values = [[as_number(mode[name], f"`{name}` of a row") for name in sorted(names, key=str)] for mode in modes]
    return is_close(*values)


class _Spy:
    """A loss that notes how it was called."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        values = logits.detach()
        given = "logits"
        if ((values == 0) | (values == 1)).all():
            given = "masks"
        elif values.min() >= 0 and values.max() <= 1:
            given = "probabilities"
        modes = [module.training for module in self.model.modules()]
        self.seen.append({"training": all(modes), "given": given})
        return nn.functional.binary_cross_entropy_with_logits(logits, masks)


def _after(loop: Callable[..., Any]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Let a loop train a tiny network that is in `eval()`; return the weights, and what the loss saw."""
    with torch.random.fork_rng(devices=[]):  # the learner's own random numbers go on as if nothing had been drawn
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
        images = torch.rand(N_BATCHES, 2, 1, 8, 8)
    data = [(batch, (batch > 0.6).float()) for batch in images]
    with torch.no_grad():
        model[3].bias -= 0.5  # so that some logits are below 0
    spy = _Spy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    words = "a small network with BatchNorm, a loss, an optimizer, and a list of pairs (images, masks)"
    call(loop, model, spy, optimizer, data, words=words)
    return [weight.detach().cpu().float().clone() for weight in model.parameters()], spy.seen


def _correct_loop(model: nn.Module, loss: _Spy, optimizer: torch.optim.Optimizer, data: list) -> None:
    model.train()
    for images, masks in data:
        optimizer.zero_grad()
        loss(model(images), masks).backward()
        optimizer.step()


def _piling_loop(model: nn.Module, loss: _Spy, optimizer: torch.optim.Optimizer, data: list) -> None:
    model.train()
    for images, masks in data:
        loss(model(images), masks).backward()
        optimizer.step()


def _nothing_moves(*_: Any) -> None:
    """Train nothing."""


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    if [weight.shape for weight in some] != [weight.shape for weight in others]:  # the loop replaced a layer
        return False
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(some, others, strict=True))


def _iou_in_eval(model: nn.Module, part: Stack) -> float:
    probabilities = predict_stack(model, part.image[:FIVE], precision="fp32")
    return iou(probabilities >= 0.5, part.labels[:FIVE])


def _is_near(found: Any, expected: Any) -> bool:
    """Tell whether scores agree, also those that were rounded to two digits."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.01)


def _check_function(iou_in_eval: Callable[..., Any]) -> None:
    """Try the function on two networks and a small stack, and hint at what is wrong with it."""
    part = _small_stack()
    turned = Stack(part.image[::-1].copy(), part.labels[::-1].copy())
    networks = [_point_network(8, 140), _point_network(-8, 80)]  # bright is foreground, dark is
    given = [(network, part) for network in networks] + [(networks[0], turned)]
    tried = [_try(iou_in_eval, *pair, training=True) for pair in given]
    found = [one for one, _ in tried]
    expected = [_iou_in_eval(*pair) for pair in given]
    again, stays_in_eval = _try(iou_in_eval, *given[0], training=False)
    if is_close([*found, again], [*expected, expected[0]]):
        words = "The IoU is right. But the network isn't in the mode in which it was given; leave it as you found it."
        hint(not stays_in_eval or not all(kept for _, kept in tried), words)
        return
    for mistake, words in _MISTAKES.items():
        hint(is_close(found, [mistake(*pair) for pair in given]), words)
    hint(is_close(found[0], found[1]), "Two different networks got the same number. Is `model` the one that is used?")
    hint(is_close(found[0], found[2]), "Two different stacks got the same number. Is `part` the one that is used?")
    words = "A network that was handed in in `train()` was scored in another way than one in `eval()`."
    hint(is_close(again, expected[0]), words)
    raise NotYet("Predict the first five slices of `part` in `eval()`, and score all of them at once at 0.5.")


def _try(function: Callable[..., Any], network: nn.Module, part: Stack, *, training: bool) -> tuple[float, bool]:
    """Return what the function says of a network in this mode, and whether it leaves it there."""
    model = copy.deepcopy(network).train(training)
    value = call(function, model, part, words="a small network and a small stack")
    hint(value is None, "The function returns nothing; the IoU belongs after a `return`.")
    kept = all(module.training is training for module in model.modules())
    return as_number(value, "the IoU that the function returns"), kept


def _small_stack() -> Stack:
    """A stack of twelve slices with four grey levels and a mask that follows them roughly, less so further up."""
    rng = np.random.default_rng(0)
    image = rng.choice(np.array([0, 70, 150, 230], np.uint8), (12, 32, 32), p=[0.1, 0.15, 0.25, 0.5])
    doubt = np.linspace(0.05, 0.6, len(image))[:, None, None]
    labels = (image >= 150) ^ (rng.random(image.shape) < doubt)
    labels[[1, 3]] &= rng.random((2, *image.shape[1:])) > 0.9  # little in two slices, so that a mean over them differs
    return Stack(image, labels)


def _point_network(slope: float, level: float) -> nn.Module:
    """A network that compares each pixel with a grey level, and has a BatchNorm that remembers mean 0 and sd 1."""
    with torch.random.fork_rng(devices=[]):
        network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    with torch.no_grad():
        network[0].weight.fill_(slope)
        network[0].bias.fill_(-slope * level / 255)
    network.size_multiple = 1
    return network


def _logits(network: nn.Module, part: Stack, *, training: bool = False, largest: float = 255) -> NDArray[np.float32]:
    images = torch.from_numpy(part.image[:, None]).float() / largest
    with torch.no_grad():
        model = copy.deepcopy(network).train(training)
        if not training:
            return model(images)[:, 0].numpy()
        return torch.cat([model(images[:FIVE]), images[FIVE:]])[:, 0].numpy()


def _first(mask: NDArray[np.bool_], part: Stack, score: str = "iou") -> float:
    return getattr(scores(mask[:FIVE], part.labels[:FIVE]), score)


def _in_train(network: nn.Module, part: Stack) -> float:
    return _first(_logits(network, part, training=True) > 0, part)


def _in_train_one_by_one(network: nn.Module, part: Stack) -> float:
    single = [Stack(part.image[z : z + 1], part.labels[z : z + 1]) for z in range(FIVE)]
    return _first(np.concatenate([_logits(network, one, training=True) for one in single]) > 0, part)


def _all_slices(network: nn.Module, part: Stack) -> float:
    return iou(_logits(network, part) > 0, part.labels)


def _last_five(network: nn.Module, part: Stack) -> float:
    return iou(_logits(network, part)[-FIVE:] > 0, part.labels[-FIVE:])


def _one_slice(network: nn.Module, part: Stack) -> float:
    return iou(_logits(network, part)[:1] > 0, part.labels[:1])


def _mean_over_slices(network: nn.Module, part: Stack) -> float:
    mask = _logits(network, part) > 0
    return float(np.mean([iou(m, t) for m, t in zip(mask[:FIVE], part.labels[:FIVE], strict=True)]))


def _dice(network: nn.Module, part: Stack) -> float:
    return _first(_logits(network, part) > 0, part, "dice")


def _percent(network: nn.Module, part: Stack) -> float:
    return 100 * _iou_in_eval(network, part)


def _white(network: nn.Module, part: Stack) -> float:
    return _first(np.ones(part.shape, bool), part)


def _logits_at_half(network: nn.Module, part: Stack) -> float:
    return _first(_logits(network, part) >= 0.5, part)


def _unscaled(network: nn.Module, part: Stack) -> float:
    return _first(_logits(network, part, largest=1) > 0, part)


_EVAL = (
    "That is the answer of `train()`, from the batch's own statistics. Switch to `eval()` before the network answers."
)
_MISTAKES = {
    _in_train: _EVAL,
    _in_train_one_by_one: _EVAL,
    _all_slices: "That is the IoU of all slices of `part`; five were asked for.",
    _last_five: "Those are the last five slices; take the first five.",
    _one_slice: "That is the IoU of one slice; five were asked for.",
    _mean_over_slices: "That is a mean over slices; count all five at once.",
    _dice: "That is the Dice coefficient.",
    _percent: "That is a percentage; hand back the IoU itself, from 0 to 1.",
    _white: "Every pixel is called foreground here. Probabilities are all above 0; compare them with 0.5.",
    _logits_at_half: "That is the mask of logits above 0.5; a probability of 0.5 is another logit.",
    _unscaled: "The network was shown grey levels up to 255; it takes 0 to 1.",
}
