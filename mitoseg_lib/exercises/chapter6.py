"""Checkers of chapter 6, transfer learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_array,
    as_mapping,
    as_number,
    checker,
    hint,
    is_close,
)
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.metrics import Scores, scores
from mitoseg_lib.models import EncoderUNet
from mitoseg_lib.stacks import Stack

__all__ = ["check_best_factor", "check_one_channel", "check_trap", "check_unscaled"]

STEPS = 15
SCALES = {"unscaled": 1.0, "0 to 255": 1 / 255}


@checker
def check_one_channel(weights: Any, bias: Any, model: EncoderUNet) -> str:
    """Exercise 1: weights (filter, 1, y, x) and a bias (filter,) that do to grey what the first layer does to colours.

    The layer's own input is the grey level, from 0 to 1, repeated for three colours and scaled.
    """
    first = next(layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d))
    w, mean, sd = (part.detach().cpu().double() for part in (first.weight, model.mean, model.sd))
    n, _, *sides = w.shape
    found = as_array(weights, "one channel of weights for each filter")
    hint(
        found.shape == tuple(w.shape), "These still have three channels. On a grey image, what do the three add up to?"
    )
    hint(found.shape == (n, *sides), "Keep the axis of channels, with one in it, as `conv2d` wants it: `keepdim=True`.")
    found = as_array(weights, "one channel of weights for each filter", (n, 1, *sides))
    given = as_array(bias, "a bias, one number for each filter")
    hint(given.size != n, f"The bias is one number for each of {n} filters, but this has the shape {given.shape}.")
    _judge_weights(found, w, sd)
    _judge_bias(given.reshape(n), w, mean, sd)
    return "the same answers from a third of the multiplications. A grey picture has nothing else to say."


@checker
def check_trap(trained: Any, ious: Any, pretrained: EncoderUNet, watched: Stack) -> str:
    """Exercise 2: the networks "trap" and "frozen" after 15 steps, and their IoUs on a few slices.

    `pretrained` is the network with ImageNet's encoder that no training has touched.
    """
    networks = as_mapping(trained, "the two networks", ("trap", "frozen"))
    _judge_networks(networks, pretrained)
    given = as_mapping(ious, "an IoU for each of the two networks", ("trap", "frozen"))
    found = [as_number(given[name], f"the IoU of {name!r}") for name in ("trap", "frozen")]
    expected = [_scores_of(networks[name], watched) for name in ("trap", "frozen")]
    if _are_near(found, [one.iou for one in expected]):
        words = {-1: "here the trap did worse", 0: "here both did the same", 1: "here the trap did better"}
        order = int(np.sign(expected[0].iou - expected[1].iou))
        return f"{words[order]}. It is another method in any case, and a report has to name the one that was used."
    hint(min(found) < 0 or max(found) > 1, "An IoU lies between 0 and 1. `evaluate` returns the loss and the scores.")
    hint(_are_near(found, [one.iou for one in expected[::-1]]), "The IoUs have changed places.")
    hint(
        _are_near(found, [one.dice for one in expected]), "These are Dice coefficients; the question is about the IoU."
    )
    raise NotYet("The networks are right, but the IoUs aren't theirs. Judge them on `watched`, after the last step.")


@checker
def check_best_factor(factor: Any, too_sure: Any, factors: ArrayLike, loss_of: ArrayLike) -> str:
    """Exercise 3: the one of these factors with the lowest loss, and whether the network is too sure as it is."""
    found = as_number(factor, "the factor")
    tried, losses = np.asarray(factors, float), np.asarray(loss_of, float)
    lowest, highest = int(losses.argmin()), int(losses.argmax())
    best = tried[lowest]
    if not is_close(found, best, within=0.02):
        hint(is_close(found, losses[lowest]), "That is the lowest loss; which factor gives it?")
        hint(is_close(found, tried[highest], within=0.02), "With this factor the loss is at its highest.")
        hint(found == lowest, "That is the place of the factor in the list; what stands there?")
        words = "The other way round: the logits are multiplied by the factor, not divided."
        hint(is_close(found, 1 / best, within=0.02), words)
        hint(found <= 0, "A factor of 0 or less would change the mask, too.")
        hint(not np.isclose(found, tried, rtol=0.02).any(), "Take one of `factors`.")
        raise NotYet("Another one of `factors` gives a lower loss.")
    hint(isinstance(too_sure, str) or not _is_truth(too_sure), "Is the network too sure? Hand in True or False.")
    words = "The factor is right. Does it make the logits larger, and so the network surer, or the other way round?"
    hint(not is_close(best, 1, within=0.02) and bool(too_sure) != (best < 1), words)
    return "a loss can be bettered like this without one voxel of the mask changing sides."


@checker
def check_unscaled(careless: Any, aucs: Any, pretrained: EncoderUNet, scaled_auc: Any) -> str:
    """Exercise 4: copies of a network whose input is "unscaled" or "0 to 255", and the AUC of each one's deepest probe.

    `scaled_auc` is that of `pretrained`, the network itself.
    """
    copies = as_mapping(careless, "a network for each of the two scales", SCALES)
    words = "`pretrained` itself has other scales now. Make it anew, and change a copy: `copy.deepcopy(pretrained)`."
    hint(any(copies[name] is pretrained for name in SCALES), words)
    hint(any(_has_scale(pretrained, sd) for sd in SCALES.values()), words)
    for name, sd in SCALES.items():
        _judge_copy(copies[name], pretrained, name, sd)
    given = as_mapping(aucs, "an AUC for each of the two scales", SCALES)
    found = [as_number(given[name], f"the AUC of {name!r}") for name in SCALES]
    hint(min(found) < 0 or max(found) > 1, "An AUC is a share of pairs, between 0 and 1.")
    whole = as_number(scaled_auc, "the AUC with the right scale")
    hint(whole in found, "One of these AUCs is exactly that of the scaled input. Was the probe given the copy?")
    hint(found[0] == found[1], "The copies are right, but both have the same AUC. Was the probe given each of them?")
    hint(min(found) < 0.5, "An AUC below 0.5 is worse than guessing. Does `linear_probe` get the fitted pair first?")
    have_fallen = max(found) < whole
    words = "both AUCs have fallen" if have_fallen else "not both AUCs have fallen"
    return f"{words}, and no error was raised. A scale that was forgotten has to be looked for."


def _judge_weights(found: NDArray, w: Tensor, sd: Tensor) -> None:
    """Hint at what is wrong with the weights of one channel."""
    scaled = w / sd
    if _is_near(found, scaled.sum(1, keepdim=True)):
        return
    hint(_is_near(found, scaled.mean(1, keepdim=True)), "These are means over the colours; a convolution adds them up.")
    hint(_is_near(found, w.sum(1, keepdim=True)), "The deviations are missing in the weights.")
    hint(_is_near(found, w.mean(1, keepdim=True)), "Means over the colours, without the deviations: neither is right.")
    hint(_is_near(found, (w * sd).sum(1, keepdim=True)), "The scaling divides by the deviation; here it multiplies.")
    words = "These divide by one deviation for all; each colour has its own."
    hint(_is_near(found, w.sum(1, keepdim=True) / sd.mean()), words)
    words = "These are one colour's weights; on a grey image all three act."
    hint(any(_is_near(found, part[:, [c]]) for part in (w, scaled) for c in range(3)), words)
    raise NotYet("The weights aren't right. Write down what one colour adds, w (grey - mean) / sd, and sort it.")


def _judge_bias(found: NDArray, w: Tensor, mean: Tensor, sd: Tensor) -> None:
    """Hint at what is wrong with the bias."""
    scaled, axes = w / sd, (1, 2, 3)
    expected = -(scaled * mean).sum(axes)
    if _is_near(found, expected):
        return
    start = "The weights are right. "
    hint(_is_near(found, -expected), start + "The bias has the wrong sign: the means are subtracted.")
    hint(not found.any(), start + "But a bias of 0 forgets the means.")
    words = "In the bias the deviations are missing."
    hint(any(_is_near(found, sign * (w * mean).sum(axes)) for sign in (1, -1)), start + words)
    words = "The bias counts each mean once; it acts at each place of a filter, with the weight there."
    hint(any(_is_near(found, sign * (w * mean / sd).mean(axes)) for sign in (1, -1)), start + words)
    words = "Each colour has its own mean; the bias takes one for all."
    hint(any(_is_near(found, sign * mean.mean() * scaled.sum(axes)) for sign in (1, -1)), start + words)
    raise NotYet(start + "The bias is what is left of the answer where the image is black, at a grey level of 0.")


def _judge_networks(networks: Mapping[str, Any], pretrained: EncoderUNet) -> None:
    """Hint at what is wrong with the trap and its control, in what they kept of their encoders."""
    for name in ("trap", "frozen"):
        _require_network(networks[name], pretrained, name)
    hint(networks["trap"] is networks["frozen"], "Both are the same network. Make a new one for each.")
    trap, frozen = networks["trap"].encoder, networks["frozen"].encoder
    for name, encoder in {"trap": trap, "frozen": frozen}.items():
        words = (
            f"The encoder's weights have changed in {name!r}, or aren't ImageNet's. Switch their slopes off in both."
        )
        hint(not _are_equal(encoder.parameters(), pretrained.encoder.parameters()), words)
    moved = [not _are_equal(encoder.buffers(), pretrained.encoder.buffers()) for encoder in (trap, frozen)]
    hint(moved == [False, True], "They have changed places: it is 'frozen' whose BatchNorm statistics have moved.")
    words = "In 'frozen' BatchNorm's statistics have moved, so it is a second trap. What does `frozen=True` do?"
    hint(moved[1], words)
    steps = [_n_steps(networks[name].decoder) for name in ("trap", "frozen")]
    hint(0 in steps, "One of them was never trained. `train_steps` trains the network that it is given.")
    hint(
        not moved[0], "In 'trap' BatchNorm's statistics haven't moved, so it isn't the trap. Make it as `half_frozen`."
    )
    words = f"Make both anew, and train each for {STEPS} steps; these have had {steps[0]} and {steps[1]}."
    hint(steps != [STEPS, STEPS], words)


def _judge_copy(copied: Any, pretrained: EncoderUNet, name: str, sd: float) -> None:
    """Hint at what is wrong with a copy that is to have a mean of 0 and this standard deviation."""
    _require_network(copied, pretrained, name)
    mean, deviation = copied.mean.detach().cpu().numpy(), copied.sd.detach().cpu().numpy()
    hint(mean.any(), f"The mean of {name!r} isn't 0. (`.mean.fill_(0)` sets all three.)")
    hint(
        is_close(deviation, 1 / sd) and sd != 1, "The deviation is what the input is divided by; 255 makes it smaller."
    )
    hint(not is_close(deviation, sd), f"The deviation of {name!r} isn't what was asked for. Is each a copy of its own?")
    words = f"{name!r} has another encoder than `pretrained`. It is to differ in the scale only."
    hint(not _are_equal(copied.encoder.state_dict().values(), pretrained.encoder.state_dict().values()), words)


def _require_network(answer: Any, like: EncoderUNet, name: str) -> None:
    """Hint if an answer isn't a network with the same parts as another one."""
    hint(not isinstance(answer, nn.Module), f"{name!r} is to be the network itself, as `encoder_unet` makes it.")
    is_like = isinstance(answer, EncoderUNet) and answer.state_dict().keys() == like.state_dict().keys()
    hint(not is_like, f"{name!r} is another kind of network; take `encoder_unet` with the encoder of `pretrained`.")


def _n_steps(module: nn.Module) -> int:
    """How many batches the first BatchNorm layer of a module has seen in training."""
    return next(int(b) for name, b in module.named_buffers() if name.endswith("num_batches_tracked"))


def _scores_of(network: nn.Module, stack: Stack) -> Scores:
    return scores(predict_stack(network, stack.image, precision="fp32") >= 0.5, stack.labels)


def _has_scale(network: EncoderUNet, sd: float) -> bool:
    return not bool(network.mean.any()) and is_close(network.sd.detach().cpu().numpy(), sd)


def _are_equal(some: Any, others: Any) -> bool:
    """Tell whether tensors are the same, one by one, whatever they lie on."""
    return all(torch.equal(a.detach().cpu(), b.detach().cpu()) for a, b in zip(some, others, strict=True))


def _is_near(found: NDArray, expected: Tensor) -> bool:
    """Tell whether weights agree, up to what 32 bits or four printed digits leave of them."""
    right = expected.numpy()
    return bool(np.abs(found - right).max() <= 1e-3 * np.abs(right).max())


def _are_near(found: list[float], expected: list[float]) -> bool:
    """Tell whether scores agree, also those that were rounded to two digits."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.006)


def _is_truth(answer: Any) -> bool:
    return isinstance(answer, bool | np.bool_) or (
        getattr(answer, "shape", None) == () and getattr(answer, "dtype", None) in (np.dtype(bool), torch.bool)
    )
