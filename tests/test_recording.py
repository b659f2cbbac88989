"""A run comes out as its recipe asked, whatever happens in between."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_recording import SHAPE, coded_stack, slice_numbers

from mitoseg_lib import recording
from mitoseg_lib.checkpoints import CheckpointFolder
from mitoseg_lib.choices import Choice, best_choice, pooled, read_choices
from mitoseg_lib.cli import app
from mitoseg_lib.datasets import describe_example, load_example
from mitoseg_lib.inference import median_filter_z, predict_stack, predict_turned
from mitoseg_lib.losses import DiceBCELoss
from mitoseg_lib.metrics import scores
from mitoseg_lib.models import count_parameters
from mitoseg_lib.recipes import FOLDS, RECIPES
from mitoseg_lib.recording import record, weights_path
from mitoseg_lib.runs import RecordedRun, read_masks, read_run
from mitoseg_lib.training import mean_slice_loss
from mitoseg_lib.weights import load_weights

QUICKEST = RECIPES["check"]
SCRIPT = Path(__file__).with_name("small_recording.py")
MEASURED = ("train", "validation", "test", "history", "threshold", "parameters", "split")

# The child processes use one thread too, and sums of floats depend on their number.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_stacks(monkeypatch):
    monkeypatch.setattr(recording, "_load", coded_stack)


def no_training(monkeypatch):
    monkeypatch.setattr(recording, "fit", lambda *_, **__: pytest.fail("nothing was to be trained"))


def files(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wanting(**changes):
    """The quickest recipe, with changes."""
    return dataclasses.replace(QUICKEST, **changes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of the `check` recipe on the bundled stacks, its folder, and the model that came of it."""
    folder, models = tmp_path_factory.mktemp("results"), []
    fit = recording.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "fit", lambda model, *a, **k: (models.append(model), fit(model, *a, **k))[1])
        run = record("check", 0, data="phantom", folder=folder)
    return run, folder, models[0]


def test_a_run_is_written_as_a_file_that_can_be_read(recorded):
    run, folder, model = recorded
    path = folder / "check-seed0.json"
    assert read_run(path) == run
    assert set(json.loads(path.read_text())) == {field.name for field in dataclasses.fields(RecordedRun)}
    assert (run.name, run.seed, run.command) == ("check", 0, "mitoseg run check --seed 0 --data phantom")
    assert run.data == describe_example() and run.data["name"] == "phantom"
    assert run.parameters == count_parameters(model) and run.model == "UNet(width=8, depth=2)"
    assert (run.epochs, run.batch_size, run.patch_size, run.loss) == (2, 2, 64, "DiceBCE")
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert "41 slices of 0 to 40 train, 9 of 51 to 59 validate" in run.split
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run.date) and run.wall_seconds > 0
    assert os.uname().nodename not in path.read_text() if hasattr(os, "uname") else True


def test_its_scores_are_those_of_the_model_at_the_threshold_chosen_on_the_validation(recorded):
    run, _, model = recorded
    train = load_example("train")
    validation = train.slices(range(51, 60))
    found = predict_stack(model, validation.image, precision="fp32")
    ious = {t: scores(found >= t, validation.labels).iou for t in np.round(np.arange(0.05, 1, 0.05), 2).tolist()}
    assert run.threshold_chosen_on == "validation"
    assert ious[run.threshold] == max(ious.values())
    expected = scores(found >= run.threshold, validation.labels)
    assert run.validation["iou"] == pytest.approx(expected.iou, abs=1e-4)
    assert set(run.train) == set(run.validation) == set(run.test) == {"loss", "iou", "dice", "precision", "recall"}
    loss = mean_slice_loss(found, validation.labels, loss=DiceBCELoss())
    assert run.validation["loss"] == pytest.approx(loss, abs=1e-4)
    slices = np.linspace(0, 40, 13).round().astype(int)
    seen = predict_stack(model, train.image[slices], precision="fp32") >= run.threshold
    assert run.train["iou"] == pytest.approx(scores(seen, train.labels[slices]).iou, abs=1e-4)


def test_its_masks_are_those_of_the_test_slices(recorded):
    run, folder, model = recorded
    masks = read_masks(run, folder)
    assert set(masks) == {20}  # 82 and 144 are beyond the 60 slices of the bundled stack
    test = load_example("test")
    found = predict_stack(model, test.image[20:21], precision="fp32")[0]
    assert masks[20].shape == test.shape[1:] and masks[20].dtype == np.bool_
    assert (masks[20] != (found >= run.threshold)).mean() < 1e-4  # rounding, where a probability is the threshold


def test_masks_are_drawn_at_the_threshold_that_was_chosen(tmp_path, small_stacks, monkeypatch):
    monkeypatch.setattr(recording, "choose_threshold", lambda found, _: float(np.median(found)))
    run = record("check", 0, data="phantom", folder=tmp_path)
    (mask,) = read_masks(run, tmp_path).values()
    assert mask.shape == SHAPE[1:] and 0.2 < mask.mean() < 0.8


def test_its_weights_are_kept_with_the_threshold_and_the_grey_levels(recorded):
    run, folder, model = recorded
    found, described = load_weights(weights_path("check", 0, folder))
    train = load_example("train")
    levels = np.sort(train.image[:41].ravel())
    expected = tuple(float(levels[math.ceil(share * levels.size) - 1]) for share in (0.001, 0.999))
    assert (described.threshold, described.grey_range) == (run.threshold, expected)
    image = load_example("test").image[:2]
    before, after = (predict_stack(one, image, precision="fp32") for one in (model, found))
    assert 0 < np.abs(before - after).max() < 0.01  # 16 bits


def test_nothing_unfinished_is_left(recorded):
    _, folder, _ = recorded
    weights = {f"weights/check-seed0.safetensors{suffix}" for suffix in ("", ".sha256")}
    assert {str(path) for path in files(folder)} == {"check-seed0.json", "check-seed0-masks.npz"} | weights
    assert list((folder / "unfinished").iterdir()) == []


def test_a_run_that_is_recorded_is_read_and_nothing_changes(recorded, monkeypatch):
    run, folder, _ = recorded
    no_training(monkeypatch)
    before = files(folder)
    assert record("check", 0, data="phantom", folder=folder) == run
    assert files(folder) == before


def test_a_folder_with_the_run_on_other_data_is_refused(recorded, monkeypatch):
    _, folder, _ = recorded
    no_training(monkeypatch)
    monkeypatch.setattr(recording, "describe_epfl", lambda: {"name": "epfl-official", "sha256": {}})
    before = files(folder)
    with pytest.raises(ValueError, match=r"check-seed0\.json is a run on phantom, but one on epfl-official"):
        record("check", 0, folder=folder)
    assert files(folder) == before


def test_an_unknown_recipe_names_those_that_are_near(tmp_path, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=r"no recipe 'unet-widht-8', but for example unet-width-8.*--list"):
        record("unet-widht-8", 0, data="phantom", folder=tmp_path)
    with pytest.raises(ValueError, match=r"no recipe '§', but for example check"):
        record("§", 0, data="phantom", folder=tmp_path)
    with pytest.raises(ValueError, match="'lucchi', but it must be 'epfl' or 'phantom'"):
        record("check", 0, data="lucchi", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_each_seed_and_each_data_set_has_a_place_of_its_own(recorded, tmp_path, small_stacks):
    run = record("check", 1, data="phantom", folder=tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == ["check-seed1.json"]
    assert run.seed == 1 and run.history != recorded[0].history


# --- what a run trains on, and what it measures


class StopHere(Exception):  # noqa: N818
    """Ends a run where its training would start."""


def arguments_of_fit(monkeypatch, recipe, tmp_path):
    seen = {}

    def stop(model, patches, **options):
        seen.update(options, model=model, patches=patches)
        raise StopHere

    monkeypatch.setattr(recording, "fit", stop)
    monkeypatch.setitem(RECIPES, "check", recipe)
    with pytest.raises(StopHere):
        record("check", 0, data="phantom", folder=tmp_path)
    return seen


@pytest.mark.parametrize(
    ("changes", "train", "watched"),
    [
        ({"validation_step": 1}, range(24), range(34, 40)),
        ({"validation_step": 4}, range(24), (34, 38)),
        ({"labelled": 1, "validation_step": 1}, [12], range(34, 40)),
        ({"labelled": 3}, [0, 12, 23], [34]),
    ],
)
def test_the_training_sees_its_slices_and_is_watched_on_others(
    monkeypatch, tmp_path, small_stacks, changes, train, watched
):
    seen = arguments_of_fit(monkeypatch, wanting(**changes), tmp_path)
    assert slice_numbers(seen["patches"]._image) == list(train)
    assert slice_numbers(seen["validation"].image) == list(watched)


def test_a_random_split_trains_on_no_slice_that_validates(monkeypatch, tmp_path, small_stacks):
    seen = arguments_of_fit(monkeypatch, wanting(split="random", validation_step=1), tmp_path)
    train, watched = slice_numbers(seen["patches"]._image), slice_numbers(seen["validation"].image)
    assert sorted(train + watched) == list(range(40)) and len(watched) == 8


def test_the_test_stack_is_opened_by_runs_that_are_tested_only(monkeypatch, tmp_path):
    asked = []

    def load(data, part):
        asked.append(part)
        return coded_stack(data, part)

    monkeypatch.setattr(recording, "_load", load)
    monkeypatch.setitem(RECIPES, "check", wanting(tested=False))
    run = record("check", 0, data="phantom", folder=tmp_path)
    assert asked == ["train"]
    assert run.test is None and read_masks(run, tmp_path) == {}
    assert (run.threshold, run.threshold_chosen_on) == (0.5, "fixed")
    assert run.train and run.validation


def test_a_calibrated_encoder_starts_with_the_statistics_of_training_patches(monkeypatch, tmp_path, small_stacks):
    changes = {"encoder": "efficientnet_lite0", "frozen": True}
    recipe = wanting(**changes, calibrated=True)
    seen = arguments_of_fit(monkeypatch, recipe, tmp_path)
    model, patches = seen["model"], seen["patches"]
    images = torch.stack([image for image, _ in patches])
    with torch.no_grad():
        first = model.encoder.model.conv_stem((images - model.mean) / model.sd)
    norm = model.encoder.model.bn1
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in first.split(recipe.batch_size)])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert model.encoder_frozen and not model.encoder.training
    plain = arguments_of_fit(monkeypatch, wanting(**changes), tmp_path)["model"]
    assert not plain.encoder.model.bn1.running_mean.any()
    for name, weights in plain.named_parameters():  # the weights are the same ones
        assert torch.equal(weights, dict(model.named_parameters())[name])


@pytest.mark.parametrize(
    "change", [{"mistake": "sigmoid twice"}, {"fixed": 3}, {"unet": {"ndim": 3, "width": 8, "depth": 2}}], ids=str
)
def test_a_run_says_what_is_peculiar_about_it(monkeypatch, tmp_path, small_stacks, change):
    block = {"patch_size": (8, 32, 32), "augmentation": "turns of blocks"} if "unet" in change else {}
    monkeypatch.setitem(RECIPES, "check", wanting(**change, **block, epochs=1, steps=1, tested=False))
    run = record("check", 0, data="phantom", folder=tmp_path)
    assert read_run(tmp_path / "check-seed0.json") == run
    assert ("sigmoid twice" in run.model) == ("mistake" in change)
    assert ("3 patches, again and again" in run.augmentation) == ("fixed" in change)
    assert ("ndim=3" in run.model) == ("unet" in change)
    assert run.patch_size == ([8, 32, 32] if "unet" in change else 64)


# --- interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_load", coded_stack)
        return record("check", 0, data="phantom", folder=folder), folder


def child(folder, number):
    """The command in a process of its own, which a signal meets in the second epoch."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), "1", "5", str(int(number))],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """For each signal: folder, exit code and stderr of a run that it ended; both at once, since imports take long."""
    numbers = (signal.SIGTERM, signal.SIGKILL)
    folders = {number: tmp_path_factory.mktemp(number.name) for number in numbers}
    children = {number: child(folder, number) for number, folder in folders.items()}
    errors = {number: process.communicate(timeout=900)[1] for number, process in children.items()}
    return {number: (folders[number], children[number].returncode, errors[number]) for number in numbers}


@pytest.mark.skipif(os.name != "posix", reason="there is no kill -9")
@pytest.mark.parametrize(("name", "place"), [("SIGTERM", (1, 3)), ("SIGKILL", (1, 0))])
def test_stopped_in_mid_epoch_it_goes_on_as_if_nobody_had(interrupted, uninterrupted, small_stacks, name, place):
    folder, exit_code, stderr = interrupted[signal.Signals[name]]
    unfinished = folder / "unfinished" / "check-seed0-phantom"
    if name == "SIGTERM":
        assert exit_code == 130 and "stopped by SIGTERM" in stderr and "Traceback" not in stderr
        before = float((unfinished / "seconds.txt").read_text())
    else:
        assert exit_code == -signal.SIGKILL
        before = 0.0
    assert not list(folder.glob("*.json"))
    assert CheckpointFolder(unfinished).places("last")[-1] == place  # a signal lets the step end, kill -9 doesn't
    run, (expected, other) = record("check", 0, data="phantom", folder=folder), uninterrupted
    assert {field: getattr(run, field) for field in MEASURED} == {f: getattr(expected, f) for f in MEASURED}
    masks, others = read_masks(run, folder), read_masks(expected, other)
    assert masks.keys() == others.keys() == {20}
    assert np.array_equal(masks[20], others[20])
    assert run.wall_seconds > before
    assert not unfinished.exists()


def test_a_run_that_went_on_elsewhere_names_both_devices(tmp_path, small_stacks, monkeypatch):
    monkeypatch.setattr(recording, "choose_threshold", lambda *_: (_ for _ in ()).throw(StopHere()))
    monkeypatch.setattr(recording, "device_name", lambda: "a GPU")
    with pytest.raises(StopHere):
        record("check", 0, data="phantom", folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(recording, "_load", coded_stack)
    run = record("check", 0, data="phantom", folder=tmp_path)
    assert run.device == f"a GPU, then {recording.device_name()}"


def test_stopped_between_the_training_and_the_file_it_is_not_trained_again(
    tmp_path, uninterrupted, small_stacks, monkeypatch
):
    monkeypatch.setattr(recording, "choose_threshold", lambda *_: (_ for _ in ()).throw(StopHere()))
    with pytest.raises(StopHere):
        record("check", 0, data="phantom", folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(recording, "_load", coded_stack)
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_, **__: steps.append(1))
    run = record("check", 0, data="phantom", folder=tmp_path)
    assert steps == []
    assert (run.history, run.test) == (uninterrupted[0].history, uninterrupted[0].test)


def test_the_command_goes_on_too(tmp_path, small_stacks, monkeypatch):
    """Its exit code is 130 after Ctrl-C, as a shell expects; the second call ends well."""
    from typer.testing import CliRunner

    measure = recording.mean_slice_loss
    monkeypatch.setattr(recording, "mean_slice_loss", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt("x")))
    command = ["run", "check", "--data", "phantom", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 130
    monkeypatch.setattr(recording, "mean_slice_loss", measure)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "check-seed0.json").is_file()


# --- folds, and what is chosen on them


FOLD_NAMES = [f"check-fold-{k}" for k in range(1, 5)]


@pytest.fixture
def on_folds(tmp_path, small_stacks, monkeypatch):
    """A folder with the runs of four folds, and recipes for them and for the run on all slices."""
    for name, split in zip(FOLD_NAMES, FOLDS, strict=True):
        monkeypatch.setitem(RECIPES, name, wanting(split=split, tested=False, compare_turned=True))
    monkeypatch.setitem(RECIPES, "check", wanting(split="all", chosen_on="check"))
    return tmp_path


def test_a_fold_writes_down_what_each_choice_scores(on_folds):
    run = record("check-fold-2", 0, data="phantom", folder=on_folds)
    found = read_choices("check-fold-2", 0, on_folds)
    assert found[Choice()].iou == run.validation["iou"] and run.test is None
    assert {choice.turned for choice in found} == {False, True} and len(found) == 190
    assert sum(dataclasses.astuple(found[Choice()])) == 10 * SHAPE[1] * SHAPE[2]  # one block of four


def test_a_fold_tries_turns_on_request_only(on_folds, monkeypatch):
    monkeypatch.setitem(RECIPES, "check-fold-2", dataclasses.replace(RECIPES["check-fold-2"], compare_turned=False))
    record("check-fold-2", 0, data="phantom", folder=on_folds)
    found = read_choices("check-fold-2", 0, on_folds)
    assert {choice.turned for choice in found} == {False} and len(found) == 95


def test_the_run_on_all_slices_takes_the_choice_that_is_best_on_all_folds(on_folds, monkeypatch):
    for name in FOLD_NAMES:
        record(name, 0, data="phantom", folder=on_folds)
    expected = best_choice(pooled(read_choices(name, 0, on_folds) for name in FOLD_NAMES))
    models = []
    fit = recording.fit
    monkeypatch.setattr(recording, "fit", lambda model, *a, **k: (models.append(model), fit(model, *a, **k))[1])
    run = record("check", 0, data="phantom", folder=on_folds)
    assert run.threshold == expected.threshold and run.threshold_chosen_on == "validation"
    test = coded_stack(part="test")
    predict = predict_turned if expected.turned else predict_stack
    probabilities = median_filter_z(predict(models[0], test.image, precision="fp32"), expected.median)
    assert run.test["iou"] == scores(probabilities >= expected.threshold, test.labels).iou
    described = load_weights(weights_path("check", 0, on_folds))[1]
    assert (described.threshold, described.median) == (expected.threshold, expected.median)
    assert ("8 turns" in run.model) == expected.turned and ("median" in run.model) == (expected.median > 1)


def test_without_its_folds_nothing_is_trained(on_folds, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match="mitoseg run check-fold-1"):
        record("check", 0, data="phantom", folder=on_folds)


def test_a_network_that_sees_neighbours_is_given_them_wherever_it_is_measured(monkeypatch, tmp_path, small_stacks):
    changes = {"encoder": "efficientnet_lite0", "neighbours": True, "patch_size": 32, "validation_step": 3}
    recipe = wanting(**changes, epochs=1, steps=1, tested=False)
    seen = arguments_of_fit(monkeypatch, recipe, tmp_path)
    assert slice_numbers(seen["validation"].image) == [34, 35]  # of 34 to 39
    measured = []
    predict = recording.predict_stack
    monkeypatch.undo()
    monkeypatch.setattr(recording, "_load", coded_stack)
    monkeypatch.setitem(RECIPES, "check", recipe)
    monkeypatch.setattr(
        recording, "predict_stack", lambda model, image, **k: (measured.append(image), predict(model, image, **k))[1]
    )
    record("check", 0, data="phantom", folder=tmp_path)
    for image in measured:
        assert set(np.diff(slice_numbers(image))) == {1}


def test_a_run_says_which_gpu_made_it(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")  # raises if torch has no such name
    assert recording.device_name() == "a GPU"


def test_a_median_is_measured_on_neighbouring_slices():
    train = load_example("train")
    apart, together = (recording._some_slices(train, are_neighbours) for are_neighbours in (False, True))
    middle = (len(train.image) - 13) // 2
    assert np.array_equal(together.image, train.image[middle : middle + 13])
    assert np.array_equal(apart.image[[0, -1]], train.image[[0, -1]]) and len(apart.image) == 13
