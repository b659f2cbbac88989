import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import STEPS, bright_block, patches, quick, small_net
from torch import nn

from mitoseg_lib.checkpoints import CheckpointError, CheckpointFolder, read_state
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.interruptions import StopRequest
from mitoseg_lib.losses import DiceBCELoss
from mitoseg_lib.metrics import scores
from mitoseg_lib.patches import turn_block
from mitoseg_lib.stacks import Stack, StackError
from mitoseg_lib.training import (
    Epoch,
    History,
    NonFiniteError,
    TrainingInterrupted,
    TrainingSettings,
    evaluate,
    fit,
    mean_slice_loss,
)
from mitoseg_lib.training.loop import Training
from mitoseg_lib.training.precision import DepthwiseInFloat32, depthwise_convolutions, mixed_precision

SCRIPT = Path(__file__).with_name("small_training.py")


pytestmark = pytest.mark.usefixtures("one_thread")


def train(folder=None, *, model=None, strike=None, **changes):
    model = small_net() if model is None else model
    history = fit(model, patches(strike), validation=bright_block(1), settings=quick(**changes), checkpoints=folder)
    return model, history


def last_file(folder):
    """The whole state of a training: weights, optimizer, schedule, random states, place and history."""
    return (Path(folder) / "last-0003-000000.safetensors").read_bytes()


def weights(model):
    return torch.cat([values.flatten().float() for values in model.state_dict().values()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The bytes of the last checkpoint of a training that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return last_file(folder)


# --- it learns, and measures what it says


def test_it_learns_a_bright_block():
    model, history = train(model=small_net(dropout=0.0), epochs=6)
    losses = history.column("train_loss")
    assert losses[-1] < 0.7 * losses[0]
    assert history.epochs[-1].validation_iou > 0.6
    assert not model.training


def test_the_history_has_the_columns_of_a_recorded_run():
    _, history = train()
    names = ["epoch", "train_loss", "validation_loss", "train_iou", "validation_iou"]
    assert [list(row) for row in history.as_rows()] == [names] * 3
    assert history.column("epoch") == [1, 2, 3]
    json.dumps(history.as_rows(), allow_nan=False)


def test_the_best_epoch_is_the_first_of_equals():
    rows = [Epoch(1, 1.0, 1.0, 0.0, 0.2), Epoch(2, 1.0, 1.0, 0.0, 0.5), Epoch(3, 1.0, 1.0, 0.0, 0.5)]
    assert History(rows).best.epoch == 2


def test_the_validation_is_that_of_the_whole_slices():
    stack = bright_block(1)
    model, history = train()
    mask = predict_stack(model, stack.image, precision="fp32") >= 0.5
    assert history.epochs[-1].validation_iou == scores(mask, stack.labels).iou
    loss, pooled = evaluate(model, stack, loss=DiceBCELoss())
    assert pooled == scores(mask, stack.labels)
    assert loss == history.epochs[-1].validation_loss


def test_the_loss_of_an_evaluation_is_that_of_the_logits():
    stack, model = bright_block(1), small_net().eval()
    with torch.no_grad():
        padded = np.pad(stack.image, ((0, 0), (0, 19), (0, 11)), mode="reflect")
        logits = model(torch.from_numpy(padded)[:, None] / 255)[..., :45, :53]
        losses = [
            DiceBCELoss()(a[None], torch.from_numpy(b)[None, None]) for a, b in zip(logits, stack.labels, strict=True)
        ]
    assert evaluate(model, stack, loss=DiceBCELoss())[0] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("loss", [DiceBCELoss(), DiceBCELoss(squared=True), nn.BCEWithLogitsLoss()])
def test_the_loss_of_probabilities_is_that_of_the_models_own_logits(loss):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 1, 20, 30, generator=generator)
    masks = torch.rand(5, 1, 20, 30, generator=generator) < 0.2
    masks[3] = False  # a slice without foreground
    expected = np.mean([float(loss(a[None], b[None].float())) for a, b in zip(logits, masks, strict=True)])
    probabilities = logits.sigmoid()[:, 0].numpy()
    before = probabilities.copy()
    assert mean_slice_loss(probabilities, masks[:, 0].numpy(), loss=loss) == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(probabilities, before)
    if not isinstance(loss, nn.BCEWithLogitsLoss):  # Dice is taken slice by slice, not over the stack
        assert expected != pytest.approx(float(loss(logits, masks.float())), abs=1e-3)


def test_a_voxel_that_is_utterly_wrong_costs_sixteen():
    wrong = np.array([[[1.0, 0.0]]], np.float32)
    truth = np.array([[[False, True]]])
    loss = mean_slice_loss(wrong, truth, loss=nn.BCEWithLogitsLoss())
    assert loss == pytest.approx(23 * math.log(2), abs=0.05)  # 15.9
    assert mean_slice_loss(wrong, ~truth, loss=nn.BCEWithLogitsLoss()) == pytest.approx(0, abs=1e-5)


def test_the_loss_of_another_number_of_slices_is_refused():
    with pytest.raises(ValueError):
        mean_slice_loss(np.zeros((2, 3, 3), np.float32), np.zeros((3, 3, 3), bool), loss=DiceBCELoss())


def test_the_training_row_is_what_the_steps_saw():
    """A rate so small that the model stays as it is: its row can be computed from outside."""
    model = small_net(dropout=0.0)
    dataset = patches()
    history = fit(model, dataset, validation=bright_block(1), settings=quick(epochs=1, learning_rate=1e-30))
    dataset.set_epoch(0)
    items = [dataset[i] for i in range(len(dataset))]
    still = small_net(dropout=0.0).train()
    losses, pooled = [], []
    for start in range(0, len(items), 4):
        images, masks = (torch.stack(part) for part in zip(*items[start : start + 4], strict=True))
        logits = still(images).detach()
        losses.append(float(DiceBCELoss()(logits, masks)))
        pooled.append(scores(logits >= 0, masks > 0.5))
    assert history.epochs[0].train_loss == pytest.approx(np.mean(losses))
    assert history.epochs[0].train_iou == pytest.approx(sum(pooled[1:], pooled[0]).iou, abs=1e-3)


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
def test_the_rates_are_those_of_the_schedule(tmp_path, schedule):
    train(tmp_path, schedule=schedule, epochs=2, checkpoint_every=3)
    found = {}
    for place in [(1, 3), (2, 0)]:
        state = read_state(tmp_path / f"last-{place[0]:04d}-{place[1]:06d}.safetensors")
        (group,) = state["optimizer"]["param_groups"]
        found[place] = group["lr"]
    optimizer = torch.optim.Adam(small_net().parameters(), lr=0.02)
    rates = [0.02] * (2 * STEPS + 1)
    if schedule == "one-cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=2 * STEPS)
        rates = [scheduler.get_last_lr()[0]]
        for _ in range(2 * STEPS):
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
    assert list(found.values()) == [rates[STEPS + 3], rates[2 * STEPS]]


def test_each_epoch_has_other_patches():
    dataset = patches()
    seen = []

    class Recording(type(dataset)):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            seen.append((int(self._epoch[0]), index, float(image.sum())))
            return image, mask

    dataset.__class__ = Recording
    fit(small_net(), dataset, validation=bright_block(), settings=quick(epochs=2))
    by_epoch = [{(i, total) for epoch, i, total in seen if epoch == e} for e in (0, 1)]
    assert len(by_epoch[0]) == len(by_epoch[1]) == len(dataset)
    assert by_epoch[0] != by_epoch[1]


def test_a_frozen_part_stays_as_it_is():
    class HalfFrozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).requires_grad_(False)
            self.head = nn.Conv2d(4, 1, 1)

        def train(self, mode=True):
            super().train(mode)
            self.encoder.eval()
            return self

        def forward(self, images):
            return self.head(self.encoder(images))

    model = HalfFrozen()
    before, head = weights(model.encoder).clone(), weights(model.head).clone()
    train(model=model)
    assert torch.equal(weights(model.encoder), before)
    assert not torch.equal(weights(model.head), head)


def small_net_3d():
    torch.manual_seed(0)
    first, second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, 1)
    model = nn.Sequential(first, nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout3d(0.2), second)
    model.ndim, model.size_multiple = 3, 1
    return model


def blocks(strike=None):
    return patches(strike, patch_size=(4, 16, 16), augmentation=turn_block)


def train_3d(folder, strike=None):
    return fit(small_net_3d(), blocks(strike), validation=bright_block(1), settings=quick(), checkpoints=folder)


def test_a_3d_model_learns_and_goes_on_after_a_signal_as_if_there_had_been_none(tmp_path):
    history = train_3d(tmp_path / "a")
    losses = history.column("train_loss")
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(TrainingInterrupted):
        train_3d(tmp_path / "b", strike=(1, 9, signal.SIGTERM))
    torch.manual_seed(99)
    assert train_3d(tmp_path / "b") == history
    assert last_file(tmp_path / "a") == last_file(tmp_path / "b")


@pytest.mark.parametrize(
    ("make", "train_set", "layout"),
    [(small_net, patches, torch.channels_last), (small_net_3d, blocks, torch.channels_last_3d)],
    ids=["2D", "3D"],
)
def test_convolutions_get_the_order_of_memory_in_which_they_are_fastest(make, train_set, layout):
    model, seen = make(), set()

    def look(module, _, out):
        if module.training:  # alone, a small image goes through other code
            seen.add(out.is_contiguous(memory_format=layout))

    model[1].register_forward_hook(look)
    fit(model, train_set(), validation=bright_block(1), settings=quick(epochs=1))
    assert seen == {True}
    assert model[0].weight.is_contiguous(memory_format=layout)


def test_a_model_that_mixes_2d_and_3d_can_be_trained():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep = nn.Conv2d(1, 2, 3, padding=1), nn.Conv3d(2, 1, (1, 3, 3), padding=(0, 1, 1))

        def forward(self, images):
            return self.deep(self.flat(images)[:, :, None])[:, :, 0]

    _, history = train(model=Mixed(), epochs=1)
    assert math.isfinite(history.epochs[0].train_loss)


def test_workers_change_nothing():
    results = [train(epochs=2, workers=workers) for workers in (0, 2)]
    assert results[0][1] == results[1][1]
    assert torch.equal(weights(results[0][0]), weights(results[1][0]))


def test_the_fastest_precision_is_what_a_device_computes_with_itself(monkeypatch):
    assert mixed_precision(torch.device("cuda")) == "auto"  # the loop asks the GPU
    is_native = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    assert mixed_precision(torch.device("cpu")) == ("bf16" if is_native else "auto")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert mixed_precision(torch.device("cpu")) == "auto"  # fp32: emulated, bf16 is slower


def test_mixed_precision_on_request_only():
    seen = set()

    class Watched(nn.Conv2d):
        def forward(self, images):
            logits = super().forward(images)
            seen.add((self.training, logits.dtype))
            return logits

    train(model=Watched(1, 1, 1), epochs=1)
    assert seen == {(True, torch.float32), (False, torch.float32)}
    seen.clear()
    train(model=Watched(1, 1, 1), epochs=1, precision="bf16")
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    seen.clear()
    train(model=Watched(1, 1, 1), epochs=1, precision="fp16")
    assert seen == {(True, torch.float16), (False, torch.float32)}


@pytest.mark.parametrize("channels_first", [False, True])
def test_depthwise_convolutions_are_computed_in_float32_and_others_are_not(channels_first):
    torch.manual_seed(0)
    wide, deep = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
    grouped, multiplied = nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 16, 3, groups=8)
    image = torch.rand(2, 8, 9, 9)
    image = image if channels_first else image.to(memory_format=torch.channels_last)
    half = image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = [conv(half) for conv in (wide, deep, grouped, multiplied)]
        with depthwise_convolutions(torch.device("cpu"), torch.bfloat16):
            found = [conv(half) for conv in (wide, deep, grouped, multiplied)]
    assert [answer.dtype for answer in found] == [torch.bfloat16] * 4
    exact = deep(half.float())
    assert torch.equal(found[1], exact.bfloat16()) and not torch.equal(found[1], plain[1])
    for number in (0, 2, 3):
        assert torch.equal(found[number], plain[number])


def test_the_gradients_of_a_depthwise_convolution_are_those_in_float32():
    torch.manual_seed(0)
    conv, image = nn.Conv2d(8, 8, 5, padding=2, groups=8), torch.rand(2, 8, 12, 12)
    conv(image).square().mean().backward()
    expected = conv.weight.grad.clone()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), depthwise_convolutions(torch.device("cpu"), torch.bfloat16):
        answer = conv(image)
    answer.square().mean().backward()
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_only_bf16_on_a_cpu_needs_that():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float16)):
        assert not isinstance(depthwise_convolutions(torch.device(device), dtype), DepthwiseInFloat32)


def test_the_callers_random_states_are_left_alone():
    model, dataset, stack = small_net(), patches(), bright_block()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(model, dataset, validation=stack, settings=quick(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_progress_bar_goes_to_stderr_on_request(capsys):
    fit(small_net(), patches(), validation=bright_block(), settings=quick(epochs=1), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1/1" in err and f"{STEPS}/{STEPS}" in err
    train(epochs=1)
    assert capsys.readouterr() == ("", "")


# --- interrupted and resumed


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_changes_nothing(tmp_path, folder):
    a, b = train(), train(tmp_path if folder else None)
    assert a[1] == b[1]
    assert torch.equal(weights(a[0]), weights(b[0]))


# Not one of the first four, which are looked at once more before the training: a second Ctrl-C doesn't wait.
RANDOM_PATCH = 4 + int.from_bytes(os.urandom(2)) % (12 * STEPS - 4)


@pytest.mark.parametrize(
    "strike", [(0, 4), (0, 4 * STEPS - 1), (2, 4 * STEPS - 1), divmod(RANDOM_PATCH, 4 * STEPS)], ids=str
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_training_is_the_uninterrupted_one(tmp_path, uninterrupted, strike, number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(TrainingInterrupted, match=signal.Signals(number).name):
        train(tmp_path, strike=(*strike, number))
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    epoch, patch = strike
    # The first patches are looked at before the first step, to know the training by them.
    steps = 1 if epoch == 0 and patch < 4 else patch // 4 + 1
    assert CheckpointFolder(tmp_path).places("last")[-1] == (epoch, steps)
    torch.manual_seed(99)  # as another process would have it
    _, history = train(tmp_path)
    assert last_file(tmp_path) == uninterrupted
    assert history.as_rows() == read_state(tmp_path / "last-0003-000000.safetensors")["history"]


def test_a_signal_is_no_matter_for_workers(tmp_path, uninterrupted):
    with pytest.raises(TrainingInterrupted, match="SIGINT"):
        train(tmp_path, strike=(1, 9, signal.SIGINT), workers=2)
    train(tmp_path, workers=1)
    assert last_file(tmp_path) == uninterrupted


def test_a_second_control_c_does_not_wait(tmp_path):
    class Impatient(type(patches())):
        def __getitem__(self, index):
            if int(self._epoch[0]) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    dataset = patches()
    dataset.__class__ = Impatient
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(small_net(), dataset, validation=bright_block(1), settings=quick(), checkpoints=tmp_path)
    assert caught.type is KeyboardInterrupt
    assert CheckpointFolder(tmp_path).places("last")[-1] == (1, 0)


def test_it_trains_outside_the_main_thread_too():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(epochs=1)))
    thread.start()
    thread.join()
    assert len(results[0][1].epochs) == 1


def run_script(*arguments, launcher=(sys.executable,), **environment):
    return subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
def test_kill_9_in_mid_epoch_and_resume(tmp_path, uninterrupted):
    patch = int.from_bytes(os.urandom(1)) % (4 * STEPS)
    child = run_script("killed", tmp_path, 1, patch)
    assert child.returncode == -signal.SIGKILL, child.stderr
    steps = patch // 4 // 2 * 2  # those before the patch was asked for, of which every second is saved
    assert CheckpointFolder(tmp_path).places("last")[-1] == (1, steps)
    train(tmp_path)
    assert last_file(tmp_path) == uninterrupted


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_from_the_checkpoint_before_a_damaged_one_it_ends_at_the_same(tmp_path, uninterrupted, harm):
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, strike=(2, 13, signal.SIGTERM))
    path = tmp_path / "last-0002-000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-9]), "delete": path.unlink}[
        harm
    ]()
    with pytest.warns(UserWarning, match="last-0002-000004.*before it"):
        train(tmp_path)
    assert last_file(tmp_path) == uninterrupted


def test_where_no_checkpoint_is_whole_nothing_is_trained(tmp_path):
    train(tmp_path)
    for path in tmp_path.glob("last-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    model = small_net()
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="No checkpoint"):
        warnings.simplefilter("ignore")
        train(tmp_path, model=model)
    assert torch.equal(weights(model), weights(small_net()))


def test_a_finished_training_is_read_not_repeated(tmp_path):
    model, history = train(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, same_history = train(tmp_path)
    assert same_history == history
    assert torch.equal(weights(again), weights(model))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_constant_rate_can_go_on_for_longer(tmp_path):
    train(tmp_path / "a", schedule="constant", epochs=1)
    longer, _ = train(tmp_path / "a", schedule="constant", epochs=3)
    once, _ = train(tmp_path / "b", schedule="constant", epochs=3)
    assert torch.equal(weights(longer), weights(once))


def test_the_best_weights_are_those_of_the_best_epoch(tmp_path):
    _, history = train(tmp_path, learning_rate=0.2)
    model = small_net()
    assert CheckpointFolder(tmp_path).load_best(model) == history.best.epoch
    assert evaluate(model, bright_block(1), loss=DiceBCELoss())[1].iou == history.best.validation_iou


def other_patches(**changes):
    return lambda folder: fit(
        small_net(), patches(**changes), validation=bright_block(1), settings=quick(), checkpoints=folder
    )


@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("learning_rate was 0.02 and is 0.01", lambda folder: train(folder, learning_rate=0.01)),
        ("epochs", lambda folder: train(folder, epochs=4)),
        ("seed", lambda folder: train(folder, seed=1)),
        ("loss", lambda folder: train(folder, loss=DiceBCELoss(smooth=2.0))),
        ("model", lambda folder: train(folder, model=small_net(nn.InstanceNorm2d))),
        ("patches", other_patches(seed=1)),
        ("patches", other_patches(augmentation=None)),
        ("patches per epoch", other_patches(patches_per_epoch=8)),
        (
            "validation",
            lambda folder: fit(
                small_net(), patches(), validation=bright_block(2), settings=quick(), checkpoints=folder
            ),
        ),
    ],
)
def test_another_trainings_folder_is_refused(tmp_path_factory, finished, named, other):
    before = sorted(finished.iterdir())
    with pytest.raises(CheckpointError, match=rf"another training \(.*{named}.*give each training a folder"):
        other(finished)
    assert sorted(finished.iterdir()) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


def test_other_frozen_weights_are_another_training(tmp_path):
    def frozen(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1).requires_grad_(False), nn.Conv2d(4, 1, 1))

    train(tmp_path, model=frozen(0))
    with pytest.raises(CheckpointError, match="model"):
        train(tmp_path, model=frozen(1))


# --- what goes wrong


class Exploding(nn.Module):
    """A loss that is NaN from some call on."""

    def __init__(self, after):
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, logits, masks):
        self.calls += 1
        return DiceBCELoss()(logits, masks) * (math.nan if self.calls > self.after else 1.0)


def test_a_loss_of_nan_stops_with_the_step_named(tmp_path):
    per_epoch = STEPS + bright_block().shape[0]  # its steps and its validation slices
    with pytest.raises(NonFiniteError, match="loss is nan at step 4 of epoch 2"):
        train(tmp_path, loss=Exploding(per_epoch + 3))
    assert CheckpointFolder(tmp_path).places("last") == [(1, 0), (1, 2)]
    assert all(values.isfinite().all() for values in CheckpointFolder(tmp_path).load_last()[0]["model"].values())


def test_the_weights_stay_finite_when_the_loss_does_not():
    model = small_net()
    with pytest.raises(NonFiniteError):
        train(model=model, loss=Exploding(3))
    assert weights(model).isfinite().all()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A gradient can be NaN where the loss is finite, as that of a square root at 0."""

    class Root(nn.Conv2d):
        def forward(self, images):
            logits = super().forward(images)
            return logits + (logits * 0).sqrt() if self.training else logits

    with pytest.raises(NonFiniteError, match="weight isn't finite"):
        train(tmp_path, model=Root(1, 1, 1), checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []


class SmallMemory(nn.Module):
    """A model for which a GPU's memory holds so many patches at once."""

    def __init__(self, inner, most):
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, images):
        if self.training and len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(images)


@pytest.mark.parametrize(("most", "pieces"), [(3, "2 at a time"), (1, "1 at a time")])
def test_too_little_memory_halves_the_batch_and_adds_up_gradients(tmp_path, most, pieces):
    options = {"loss": nn.BCEWithLogitsLoss(), "epochs": 2}
    whole, history = train(model=small_net(nn.GroupNorm, dropout=0.0), **options)
    small = SmallMemory(small_net(nn.GroupNorm, dropout=0.0), most)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, small_history = train(tmp_path, model=small, **options)
    assert pieces in str(caught[-1].message)
    assert "BatchNorm and a Dice over the whole batch" in str(caught[-1].message)
    assert torch.allclose(weights(small.inner), weights(whole), atol=1e-5)
    for row, other in zip(history.as_rows(), small_history.as_rows(), strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_a_resumed_training_remembers_how_much_fits(tmp_path):
    with pytest.warns(UserWarning), pytest.raises(TrainingInterrupted):
        train(tmp_path, model=SmallMemory(small_net(), 2), strike=(1, 9, signal.SIGTERM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, model=SmallMemory(small_net(), 2))


def test_a_patch_that_does_not_fit_alone_is_an_error():
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("ignore")
        train(model=SmallMemory(small_net(), 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"schedule": "cosine"}, "schedule is 'cosine'.*one-cycle, constant"),
        ({"device": "tpu"}, "device is 'tpu'.*auto, cpu, cuda"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"seed": -1}, "seed is -1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        quick(**changes)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingSettings(epochs=1).epochs = 2


def test_patches_must_fill_their_batches():
    with pytest.raises(ValueError, match="24 patches in an epoch, in batches of 5"):
        train(batch_size=5)


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        train(model=small_net().requires_grad_(False))


def test_a_validation_without_labels_is_refused():
    with pytest.raises(StackError, match="no labels"):
        fit(small_net(), patches(), validation=Stack(bright_block().image), settings=quick())


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from(["one-cycle", "constant"]))
@settings(deadline=None, max_examples=8)
def test_trainings_of_a_step_or_two_work(epochs, batch_size, schedule):
    settings = quick(epochs=epochs, batch_size=batch_size, schedule=schedule)
    history = fit(small_net(), patches(patches_per_epoch=4), validation=bright_block(), settings=settings)
    assert history.column("epoch") == list(range(1, epochs + 1))


def test_the_last_and_the_best_are_kept_twice(tmp_path):
    train(tmp_path, epochs=5, checkpoint_every=100)
    folder = CheckpointFolder(tmp_path)
    assert folder.places("last") == [(4, 0), (5, 0)]
    assert 1 <= len(folder.places("best")) <= 2


# --- several processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_two_processes_give_the_result_of_one(tmp_path):
    from small_training import shared_out

    shared_out(str(tmp_path / "one"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    # --multi_gpu is accelerate's name for its launcher of several processes; without it, it starts one on a CPU.
    launcher += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = run_script(
        "shared_out", tmp_path / "two", launcher=launcher, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"
    )
    assert result.returncode == 0, result.stderr
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1"))
    assert first == second
    assert np.allclose(one["weights"], first["weights"], atol=1e-5)
    for row, other in zip(one["history"], first["history"], strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    with pytest.raises(CheckpointError, match="processes was 2 and is 1"):
        os.rename(tmp_path / "two-checkpoints", tmp_path / "one-moved-checkpoints")
        shared_out(str(tmp_path / "one-moved"))


# --- a lower rate for the encoder, and averaged weights


class WithEncoder(nn.Sequential):
    """The small net, whose first convolution is called its encoder."""

    def __init__(self):
        super().__init__(*small_net(dropout=0.0))

    @property
    def encoder(self):
        return self[0]


def test_the_encoder_takes_smaller_steps():
    moved = {}
    for rate in (1.0, 0.01):
        model = WithEncoder()
        before = copy.deepcopy(model.state_dict())
        train(model=model, epochs=1, encoder_rate=rate, schedule="constant")
        moved[rate] = {name: float((after - before[name]).float().norm()) for name, after in model.state_dict().items()}
    assert 0 < moved[0.01]["0.weight"] < 0.1 * moved[1.0]["0.weight"]
    assert moved[0.01]["3.weight"] > 0.5 * moved[1.0]["3.weight"]


def test_both_rates_go_through_the_same_cycle():
    training = Training(WithEncoder(), patches(), bright_block(1), quick(encoder_rate=0.25))
    rates = []
    for images, masks in training.remaining_batches():
        training.take_step(images, masks, StopRequest())
        rates.append([group["lr"] for group in training.optimizer.param_groups])
    rates = np.array(rates)
    assert np.allclose(rates[:, 0], 0.25 * rates[:, 1]) and np.ptp(rates[:, 1]) > 0


def test_a_model_without_an_encoder_has_one_rate():
    training = Training(small_net(), patches(), bright_block(1), quick(encoder_rate=0.25))
    assert len(training.optimizer.param_groups) == 1


def test_the_average_is_what_is_validated_and_returned():
    def numbers(model):  # all but BatchNorm's count of batches, a whole number
        return torch.cat([values.flatten() for values in model.state_dict().values() if values.is_floating_point()])

    share, model, expected = 0.8, small_net(), None
    training = Training(model, patches(), bright_block(1), quick(averaging=share, epochs=1))
    for images, masks in training.remaining_batches():
        training.take_step(images, masks, StopRequest())
        now = numbers(model)
        expected = now if expected is None else share * expected + (1 - share) * now
    assert torch.allclose(numbers(training.measured), expected, atol=1e-5)
    assert not torch.allclose(numbers(training.measured), numbers(model), atol=1e-3)
    returned, history = train(averaging=share, epochs=1)
    assert torch.allclose(numbers(returned), expected, atol=1e-5)
    mask = predict_stack(returned, bright_block(1).image, precision="fp32") >= 0.5
    assert history.epochs[-1].validation_iou == scores(mask, bright_block(1).labels).iou


def test_an_averaged_training_goes_on_as_if_nobody_had_stopped_it(tmp_path):
    whole, _ = train(tmp_path / "whole", averaging=0.9)
    with pytest.raises(TrainingInterrupted):
        train(tmp_path / "stopped", averaging=0.9, strike=(1, 9, signal.SIGTERM))
    resumed, _ = train(tmp_path / "stopped", averaging=0.9)
    assert torch.equal(weights(resumed), weights(whole))
    assert last_file(tmp_path / "stopped") == last_file(tmp_path / "whole")


def test_the_best_weights_are_the_average(tmp_path):
    returned, _ = train(tmp_path, averaging=0.9, epochs=1)
    best = small_net()
    CheckpointFolder(tmp_path).load_best(best)
    assert torch.equal(weights(best), weights(returned))
    last = small_net()
    last.load_state_dict(read_state(tmp_path / "last-0001-000000.safetensors")["model"])
    assert not torch.equal(weights(last), weights(returned))


@pytest.mark.parametrize("wrong", [{"encoder_rate": 0}, {"encoder_rate": 1.5}, {"averaging": 1.0}, {"averaging": -0.1}])
def test_rates_and_shares_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quick(**wrong)
