import csv
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from small_models import random_unet
from test_prediction import save_tiff, stack_image
from test_readers import save_slices, save_zarr
from typer.testing import CliRunner

from mitoseg_lib import finetuning
from mitoseg_lib.checkpoints import CheckpointError, CheckpointFolder
from mitoseg_lib.cli import app
from mitoseg_lib.datasets import load_example
from mitoseg_lib.finetuning import FineTuningOptions, plan_finetuning
from mitoseg_lib.inference import predict_stack
from mitoseg_lib.labelled import hold_out, read_labelled
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import EncoderUNet
from mitoseg_lib.stacks import read_mask
from mitoseg_lib.training import TrainingInterrupted
from mitoseg_lib.weights import MaskRule, load_weights, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """accelerate keeps the device of a process's first training; these ask for the CPU, and others may not have."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def same_signals_and_threads():
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten slices of the phantom with their labels, and small networks to start from."""
    place = tmp_path_factory.mktemp("labelled")
    stack = load_example("train")
    part = np.s_[:10, :200, 200:400]
    save_tiff(place / "image.tif", stack.image[part])
    save_tiff(place / "labels.tif", stack.labels[part] * np.uint8(255))
    save_weights(random_unet(width=4), place / "unet.safetensors", rule=MaskRule(0.3), grey_range=(20, 220))
    return place


def options(folder, **changes):
    return FineTuningOptions(**({"weights": folder / "unet.safetensors", "epochs": 1, "device": "cpu"} | changes))


def plan(folder, target, image="image.tif", labels="labels.tif", resume=False, **changes):
    return plan_finetuning(folder / image, folder / labels, target, options=options(folder, **changes), resume=resume)


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def assert_one_sentence(text):
    assert text.startswith("mitoseg: ") and text.count("\n") == 1 and text.rstrip().endswith(".")


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(finetuning, "STEPS", 2)


# --- from end to end


@pytest.fixture(scope="module")
def from_imagenet(folder):
    """The whole command, from ImageNet, for one epoch of patches that are smaller than usual."""
    target = folder / "from imagenet"
    files = folder / "image.tif", folder / "labels.tif"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetuning, "PATCH_SIZE", 96)
        result = train(*files, "--output", target, "--weights", "imagenet", "--epochs", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return target, result


def test_train_says_what_was_decided_and_how_good_it_is(from_imagenet, folder):
    target, result = from_imagenet
    for words in (
        "image.tif is a TIFF stack: 10 x 200 x 200 voxels, uint8",
        "5 x 5 x 5 nm is assumed",
        "grey levels stay as they are",
        "held out for validation: the right quarter of each slice (50 of 200 columns; 12 beside",
        "sees each slice with its neighbours and starts from efficientnet_lite0's ImageNet weights",
        "30/30",  # the progress bar
    ):
        assert words in result.stderr
    said, where, command = result.stdout.splitlines()
    model, metadata = load_weights(target / "model.safetensors")
    validation = hold_out(read_labelled(folder / "image.tif", folder / "labels.tif").stack).validation
    found = scores(predict_stack(model, validation.image) >= metadata.threshold, validation.labels)
    stated = re.match(r"IoU (\S+) on the part held out, at threshold (\S+), which was chosen there$", said)
    assert float(stated[1]) == pytest.approx(found.iou, abs=0.01)  # the file has 16-bit weights
    assert float(stated[2]) == metadata.threshold and 0.2 <= metadata.threshold <= 0.8 and found.iou > 0.3
    assert where == f"model written to {target / 'model.safetensors'}; use it with"
    assert sorted(os.listdir(target)) == ["history.csv", "model.safetensors", "model.safetensors.sha256"]
    assert shlex.split(command)[:3] == ["mitoseg", "predict", str(folder / "image.tif")]


def test_the_file_says_what_the_model_was_made_for(from_imagenet, folder):
    model, metadata = load_weights(from_imagenet[0] / "model.safetensors")
    assert isinstance(model, EncoderUNet) and model.n_slices == 3
    assert (metadata.encoder, metadata.options) == ("efficientnet_lite0", {"neighbours": True})
    assert metadata.voxel_size_nm == (5, 5, 5) and metadata.mean == pytest.approx((0.5, 0.5, 0.5))
    assert metadata.grey_range == read_labelled(folder / "image.tif", folder / "labels.tif").grey_range


def test_the_history_is_a_table_of_the_epochs(from_imagenet):
    with open(from_imagenet[0] / "history.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert list(row) == ["epoch", "train_loss", "validation_loss", "train_iou", "validation_iou"]
    assert row["epoch"] == "1" and 0 <= float(row["validation_iou"]) <= 1


def test_predict_goes_on_with_the_command_that_was_printed(from_imagenet, folder):
    _, *arguments = shlex.split(from_imagenet[1].stdout.splitlines()[-1])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    mask = read_mask(from_imagenet[0] / "mask.tif")
    assert scores(mask, read_mask(folder / "labels.tif")).iou > 0.3


def test_more_steps_are_better_than_none(from_imagenet, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "PATCH_SIZE", 96)
    weights = from_imagenet[0] / "model.safetensors"
    found = plan(folder, tmp_path / "out", weights=weights, epochs=2).run()
    assert found.validation.iou > found.before.iou + 0.03
    assert f"(before the training: {found.before.iou:.3f})" in found.summary()
    start, metadata = load_weights(weights)
    assert len(found.history.epochs) == 2 and not torch.equal(next(start.parameters()), found_parameter(found))
    validation = hold_out(read_labelled(folder / "image.tif", folder / "labels.tif").stack).validation
    assert found.before == scores(predict_stack(start, validation.image) >= metadata.threshold, validation.labels)


def found_parameter(found):
    return next(load_weights(found.model_path)[0].parameters())


# --- the start


def test_a_model_of_another_voxel_size_and_grey_range_is_given_what_it_knows(folder, tmp_path):
    path = tmp_path / "coarse.safetensors"
    save_weights(random_unet(width=4), path, rule=MaskRule(0.3), voxel_size_nm=(5, 10, 10), grey_range=(200, 250))
    made = plan(folder, tmp_path / "out", weights=path)
    assert made.parts.train.shape[1] == 100 and made.parts.train.voxel_size_nm == (5, 10, 10)
    assert made.grey_range == (200, 250) and any("become 200 to 250" in note for note in made.notes)


def test_a_trained_model_goes_on_as_it_is(from_imagenet, folder, tmp_path, few_steps):
    weights = from_imagenet[0] / "model.safetensors"
    made = plan(folder, tmp_path / "out", weights=weights)
    assert made.start.model.n_slices == 3 and made.start.encoder == "efficientnet_lite0"
    assert any("starts from model.safetensors (efficientnet_lite0)" in note for note in made.notes)
    assert load_weights(made.run().model_path)[0].n_slices == 3
    assert plan(folder, tmp_path / "other", weights=weights, neighbours=False).start.model.n_slices == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "resnet34"}, "has the encoder 'unet', but 'resnet34' was asked for"),
        ({"neighbours": True}, "takes single slices, but neighbours"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors isn't a file"),
        ({"weights": "imagenet", "encoder": "resnet3"}, "'resnet3' is unknown"),
        ({"device": "tpu"}, "'tpu'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_one_sentence(folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        plan(folder, tmp_path / "out", **changes)
    assert str(caught.value).endswith(".") and not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_model_and_another_another(folder, tmp_path, few_steps):
    made = [
        plan(folder, tmp_path / str(n), seed=seed).run().model_path.read_bytes() for n, seed in enumerate((1, 1, 2))
    ]
    assert made[0] == made[1] != made[2]


# --- small, odd and other stacks


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("shape", [(1, 33, 47), (2, 5, 90), (3, 16, 16), (1, 2, 3), (24, 31, 37), (1, 400, 7)])
def test_any_size_can_be_trained_on(from_imagenet, folder, tmp_path, few_steps, shape, neighbours):
    labels = np.zeros(shape, np.uint8)
    labels[..., : shape[1] // 2, :] = 1
    image = stack_image(shape) // 2 + labels * np.uint8(90)
    save_tiff(tmp_path / "image.tif", image)
    save_tiff(tmp_path / "labels.tif", labels)
    weights = from_imagenet[0] / "model.safetensors" if neighbours else folder / "unet.safetensors"
    found = plan(tmp_path, tmp_path / "out", weights=weights).run()
    assert 0 <= found.validation.iou <= 1
    result = CliRunner().invoke(
        app, ["predict", str(tmp_path / "image.tif"), str(tmp_path / "m.tif"), "--weights", str(found.model_path)]
    )
    assert result.exit_code == 0 and read_mask(tmp_path / "m.tif").shape == shape


def test_every_labelled_slice_can_be_in_the_middle_of_a_patch():
    for depth in (1, 2, 3, 7):
        labels = np.zeros((depth, 100, 110), bool)
        labels[:, :50] = True
        image = np.repeat(np.arange(depth, dtype=np.uint8) + 1, 100 * 110).reshape(labels.shape)
        stack = finetuning.Stack(image, labels)
        patches = finetuning._patches(stack, EncoderLike(3), seed=0)
        patches.blocks.augmentation = None
        numbers = {tuple((patches[i][0][:, 0, 0] * 255).round().int().tolist()) for i in range(180)}
        reflected = np.pad(np.arange(depth) + 1, 1, "reflect").tolist()
        assert numbers == {tuple(reflected[z : z + 3]) for z in range(depth)}


class EncoderLike(torch.nn.Module):
    """What `_patches` asks a network."""

    size_multiple = 32

    def __init__(self, n_slices):
        super().__init__()
        self.n_slices = n_slices


@pytest.mark.parametrize(
    ("plane", "multiple", "side"),
    [((512, 384), 32, 160), ((160, 130), 32, 160), ((128, 900), 32, 128), ((5, 900), 32, 96), ((1, 1), 64, 128)],
)
def test_patches_are_as_large_as_slices_allow(plane, multiple, side):
    assert finetuning._patch_side(plane, multiple) == side


@pytest.mark.parametrize(("steps", "epochs", "share"), [(30, 20, 0.98), (30, 1, 0.6), (2, 3, 0.0), (30, 100, 0.996)])
def test_the_average_of_weights_looks_back_on_a_twelfth_of_the_steps(monkeypatch, steps, epochs, share):
    monkeypatch.setattr(finetuning, "STEPS", steps)
    settings = finetuning._settings(FineTuningOptions(epochs=epochs, device="cpu"), from_model=True)
    assert settings.averaging == pytest.approx(share) and settings.device == "cpu"


def test_folders_and_zarrs_are_trained_on_as_tiffs_are(folder, tmp_path, few_steps):
    image, labels = load_example("train").image[:3, :120, :160], load_example("train").labels[:3, :120, :160]
    kinds = {"image": image, "labels": labels * np.uint8(1)}
    for name, values in kinds.items():
        save_tiff(tmp_path / f"{name}.tif", values)
        save_slices(tmp_path / f"{name}-png", values, ["a9", "a10", "a11"], ".png")
        save_zarr(tmp_path / f"{name}.zarr", values)
    weights = {"weights": folder / "unet.safetensors"}
    made = [
        plan(tmp_path, tmp_path / f"out{end}", f"image{end}", f"labels{end}", **weights).run().model_path.read_bytes()
        for end in (".tif", "-png", ".zarr")
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("image", "labels", "words"),
    [
        ("labels.tif", "image.tif", "labels.tif holds only two values"),
        ("image.tif", "image.tif", "as the image and as its labels"),
        ("image.tif", "empty.tif", "its labels are all background"),
        ("image.tif", "short.tif", "short.tif has shape (2, 200, 200), but image.tif has (10, 200, 200)"),
        ("image.tif", "three.tif", "holds the values 0, 1, 2"),
        ("nowhere.tif", "labels.tif", "doesn't exist"),
        ("image.tif", "nowhere", "doesn't exist"),
    ],
)
def test_what_train_cannot_use_is_one_sentence_and_exit_code_1(folder, tmp_path, image, labels, words):
    true = read_mask(folder / "labels.tif") * np.uint8(1)
    three = true.copy()
    three[0, 0, 0] = 2
    for name, values in (("empty", true * 0), ("short", true[:2]), ("three", three)):
        save_tiff(folder / f"{name}.tif", values)
    result = train(
        folder / image, folder / labels, "--output", tmp_path / "out", "--weights", folder / "unet.safetensors"
    )
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert_one_sentence(result.stderr)
    assert words in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong", [["--epochs", "0"], ["--voxel-size", "5"], ["--device", "tpu"], ["--seed", "-1"], ["--threads", "0"], []]
)
def test_train_with_arguments_that_cannot_be_meant_is_a_usage_error(folder, tmp_path, wrong):
    output = ["--output", tmp_path / "out"] if wrong else []
    result = train(folder / "image.tif", folder / "labels.tif", *output, *wrong)
    assert (result.exit_code, result.stdout) == (2, "") and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_takes_a_voxel_size_and_hands_it_on(folder, tmp_path, few_steps):
    files = folder / "image.tif", folder / "labels.tif"
    weights = ("--weights", folder / "unet.safetensors", "--epochs", 1, "--threads", 1)
    result = train(*files, "--output", tmp_path / "my out", *weights, "--voxel-size", "20,10,10")
    assert result.exit_code == 0, result.output
    assert "resampled to 400 x 400 pixels of 5 x 5 nm" in result.stderr
    assert load_weights(tmp_path / "my out" / "model.safetensors")[1].voxel_size_nm == (20, 5, 5)
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[-4:] == ["--weights", str(tmp_path / "my out" / "model.safetensors"), "--voxel-size", "20,10,10"]


def test_the_help_of_train_has_examples():
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert "mitoseg train slices.tif labels.tif --output trained" in result.output and "--resume" in result.output


# --- interrupted, resumed, refused


def test_a_folder_with_a_training_in_it_is_left_alone(folder, tmp_path, few_steps):
    target = tmp_path / "out"
    plan(folder, target).run()
    before = {path: path.read_bytes() for path in target.iterdir()}
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a finished training"):
            plan(folder, target, resume=resume)
    assert {path: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize(("name", "words"), [("", "is a file"), ("history.csv", "holds a history.csv")])
def test_what_is_in_the_way_stays(folder, tmp_path, name, words):
    path = tmp_path / "out" / name if name else tmp_path / "out"
    path.parent.mkdir(exist_ok=True)
    path.write_text("my thesis")
    with pytest.raises(ValueError, match=words):
        plan(folder, tmp_path / "out")
    assert path.read_text() == "my thesis"


def test_a_folder_with_other_files_can_be_used(folder, tmp_path, few_steps):
    (tmp_path / "notes.txt").write_text("10 slices")
    plan(folder, tmp_path).run()
    assert (tmp_path / "notes.txt").read_text() == "10 slices"


class Interrupting:
    """Patches of which one sends a signal to this process."""

    def __init__(self, patches, number):
        self.patches, self.number, self.asked = patches, number, 0
        self.set_epoch = patches.set_epoch

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        self.asked += 1
        if self.asked == 30:
            os.kill(os.getpid(), self.number)
        return self.patches[index]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_by_resume_as_if_it_was_not(folder, tmp_path, few_steps, monkeypatch, number):
    expected = plan(folder, tmp_path / "whole", epochs=3).run()
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "_patches", lambda *a, made=finetuning._patches: Interrupting(made(*a), number))
        with pytest.raises(TrainingInterrupted, match=r"^The training was stopped; the same command with --resume"):
            plan(folder, tmp_path / "out", epochs=3).run()
    assert os.listdir(tmp_path / "out") == ["checkpoints"]
    with pytest.raises(ValueError, match=r"holds an interrupted training, .* --resume"):
        plan(folder, tmp_path / "out", epochs=3)
    made = plan(folder, tmp_path / "out", epochs=3, resume=True)
    epochs, steps = CheckpointFolder(tmp_path / "out" / "checkpoints").places("last")[-1]
    assert made.notes[-1] == f"the training goes on after {epochs} of 3 epochs and {steps} steps"
    found = made.run()
    assert found.model_path.read_bytes() == expected.model_path.read_bytes()
    assert dataclasses.replace(found, model_path=None) == dataclasses.replace(expected, model_path=None)
    assert (tmp_path / "out" / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()


def test_other_options_than_those_of_the_interrupted_training_are_refused(folder, tmp_path, few_steps, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            finetuning, "_patches", lambda *a, made=finetuning._patches: Interrupting(made(*a), signal.SIGTERM)
        )
        with pytest.raises(TrainingInterrupted):
            plan(folder, tmp_path / "out", epochs=3).run()
    for change, words in (({"epochs": 4}, "epochs was 3 and is 4"), ({"epochs": 3, "seed": 1}, "seed was 0 and is 1")):
        with pytest.raises(CheckpointError, match=words):
            plan(folder, tmp_path / "out", resume=True, **change).run()


def test_resume_in_an_empty_folder_begins_and_says_so(folder, tmp_path, few_steps):
    made = plan(folder, tmp_path / "out", resume=True)
    assert made.notes[-1].endswith("holds no training to go on with, so a new one begins")
    assert made.run().model_path.is_file()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_command_stopped_by_a_time_limit_saves_and_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "STEPS", 4)
    arguments = [folder / "image.tif", folder / "labels.tif", "--weights", folder / "unet.safetensors"]
    arguments = [str(part) for part in (*arguments, "--epochs", 10, "--threads", 1, "--device", "cpu")]
    code = "from mitoseg_lib import cli, finetuning; finetuning.STEPS = 4; cli.app()"
    command = [sys.executable, "-c", code, "train", *arguments, "--output"]
    environment = os.environ | {"PYTHONPATH": str(Path(finetuning.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    process = subprocess.Popen([*command, str(tmp_path / "out")], **pipes)
    waited = time.monotonic()
    while not list(tmp_path.glob("out/checkpoints/last-*")) and time.monotonic() - waited < 120:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert stderr.endswith("\nmitoseg: The training was stopped; the same command with --resume goes on from there.\n")
    assert "Traceback" not in stderr and os.listdir(tmp_path / "out") == ["checkpoints"]
    result = train(*arguments, "--output", tmp_path / "out", "--resume")
    assert result.exit_code == 0 and "goes on after" in result.stderr
    assert len((tmp_path / "out" / "history.csv").read_text().splitlines()) == 1 + 10
