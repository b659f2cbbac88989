import dataclasses
import json
import os
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib import runs
from mitoseg_lib.stacks import StackError

SCORES = {"loss": 0.2, "iou": 0.8, "dice": 0.89, "precision": 0.9, "recall": 0.88}
RUN = runs.RecordedRun(
    name="unet",
    seed=0,
    command="mitoseg run unet --seed 0",
    library_version="0.1.0",
    date="2026-01-01",
    device="2 CPU cores",
    wall_seconds=12.5,
    data={"name": "phantom", "sha256": {"train": "00"}},
    model="UNet",
    encoder=None,
    encoder_weights=None,
    parameters=1_900_000,
    split="block",
    epochs=1,
    batch_size=2,
    patch_size=128,
    optimizer="Adam",
    learning_rate=1e-3,
    loss="DiceBCE",
    augmentation="flips",
    threshold=0.5,
    threshold_chosen_on="fixed",
    train=SCORES,
    validation=SCORES,
    test=None,
    history=[{"epoch": 1, "train_loss": 1.0, "validation_loss": 1.1, "train_iou": 0.1, "validation_iou": 0.1}],
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("MITOSEG_PRESET", raising=False)
    monkeypatch.delenv("MITOSEG_RETRAIN", raising=False)


def test_the_small_preset_is_the_default_and_fixes_two_threads():
    torch.set_num_threads(1)
    assert runs.preset() == runs.Preset("small", retrain=False)
    assert torch.get_num_threads() == 2


def test_the_environment_names_the_preset_and_an_argument_goes_before_it(monkeypatch):
    monkeypatch.setenv("MITOSEG_PRESET", "full")
    assert runs.preset().name == "full"
    assert runs.preset("small").name == "small"


def test_an_unknown_preset_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'large'.*'small' or 'full'"):
        runs.preset("large")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_training_again_without_a_gpu_says_what_to_change(monkeypatch):
    monkeypatch.setenv("MITOSEG_RETRAIN", "1")
    with pytest.raises(ValueError, match=r"no GPU.*Change runtime type"):
        runs.preset("full")
    assert runs.preset("full", retrain=False).retrain is False


def test_the_small_preset_loads_the_bundled_stacks_and_chooses_its_values():
    small = runs.preset("small")
    train, test = small.load("train"), small.load("test")
    assert train.labels is not None and test.labels is not None
    assert train.image.shape == train.labels.shape
    assert (train.image[0] != test.image[0]).any()
    assert small.choose(small=1, full=2) == 1
    assert runs.Preset("full").choose(small=1, full=2) == 2


def test_a_preset_names_the_files_of_its_images():
    assert runs.preset("small").image_path("test").name == "phantom_test.tif"
    assert runs.preset("small").image_path("train").is_file()


def test_the_full_preset_names_the_real_files(epfl_folder):
    assert runs.preset("full").image_path("test") == epfl_folder / "testing.tif"
    assert runs.preset("full").image_path("train") == epfl_folder / "training.tif"


def test_the_full_preset_without_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MITOSEG_DATA", str(tmp_path))
    with pytest.raises(StackError, match=r"training\.tif"):
        runs.preset("full").load("train")


def test_the_full_preset_loads_the_real_stacks(epfl_folder):
    full = runs.preset("full")
    assert full.load("train").shape == full.load("test").shape == (165, 768, 1024)


def test_a_recorded_run_comes_back_as_it_was_written(tmp_path):
    path = RUN.write(tmp_path)
    assert path.name == "unet-seed0.json"
    assert runs.read_run(path) == RUN
    assert [p.name for p in tmp_path.iterdir()] == ["unet-seed0.json"]


def test_runs_are_read_by_name_in_the_order_of_seeds(tmp_path):
    for seed in (10, 2, 0):
        dataclasses.replace(RUN, seed=seed).write(tmp_path)
    dataclasses.replace(RUN, name="unet-seed-study").write(tmp_path)
    assert [run.seed for run in runs.read_runs("unet", tmp_path)] == [0, 2, 10]
    assert runs.read_runs("not-run-yet", tmp_path) == []


def test_a_run_with_other_keys_or_no_json_is_refused(tmp_path):
    path = RUN.write(tmp_path)
    content = json.loads(path.read_text())
    del content["device"]
    path.write_text(json.dumps(content | {"gpu": "none"}))
    with pytest.raises(ValueError, match="device, gpu"):
        runs.read_run(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="seed"):
        runs.read_run(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        runs.read_run(path)


def test_a_run_that_does_not_say_where_its_threshold_comes_from_is_refused():
    with pytest.raises(ValueError, match="'guess'"):
        dataclasses.replace(RUN, threshold_chosen_on="guess")


def test_a_score_that_is_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        dataclasses.replace(RUN, wall_seconds=float("nan")).write(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_every_recorded_run_in_the_project_can_be_read():
    for path in runs.RESULTS.glob("*-seed*.json"):
        run = runs.read_run(path)
        assert path.name == f"{run.name}-seed{run.seed}.json"


# --- masks


@given(
    shape=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    slices=st.lists(st.integers(0, 200), min_size=1, max_size=4, unique=True),
    kind=st.sampled_from(["random", "empty", "all foreground"]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=40)
def test_masks_come_back_as_they_were_written(tmp_path_factory, shape, slices, kind, seed):
    folder = tmp_path_factory.mktemp("masks")
    share = {"random": 0.3, "empty": 0.0, "all foreground": 1.0}[kind]
    rng = np.random.default_rng(seed)
    masks = {z: rng.random(shape) < share for z in slices}
    path = runs.write_masks(RUN, masks, folder)
    assert path.name == "unet-seed0-masks.npz" and [p.name for p in folder.iterdir()] == [path.name]
    found = runs.read_masks(RUN, folder)
    assert list(found) == slices
    for z, mask in masks.items():
        assert found[z].dtype == np.bool_ and np.array_equal(found[z], mask)


def test_masks_take_a_bit_a_pixel_at_most(tmp_path):
    masks = {z: np.random.default_rng(z).random((768, 1024)) < 0.5 for z in (20, 82, 144)}  # what can't be compressed
    path = runs.write_masks(RUN, masks, tmp_path)
    assert path.stat().st_size < 1.01 * 3 * 768 * 1024 / 8 + 1000


def test_each_run_has_masks_of_its_own_or_none(tmp_path):
    other = dataclasses.replace(RUN, seed=1)
    runs.write_masks(other, {0: np.ones((2, 3), bool)}, tmp_path)
    assert runs.read_masks(RUN, tmp_path) == {}
    assert runs.read_runs("unet", tmp_path) == []  # masks aren't taken for a run
    assert runs.read_masks(other, tmp_path)[0].all()


@pytest.mark.parametrize("write", ["masks", "run"])
def test_a_file_is_written_whole_or_what_was_there_stays(tmp_path, monkeypatch, write):
    def write_one(value):
        if write == "run":
            return dataclasses.replace(RUN, wall_seconds=float(value)).write(tmp_path)
        return runs.write_masks(RUN, {0: np.full((9, 9), value == 2)}, tmp_path)

    path = write_one(1)
    before = path.read_bytes()

    def full_disk(descriptor):
        os.ftruncate(descriptor, 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_one(2)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert write_one(2).read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- tables


def write_seeds(folder, name, ious, **changes):
    """Recorded runs with these test IoUs, on the phantom unless it is said."""
    for seed, iou in enumerate(ious):
        test = None if iou is None else SCORES | {"iou": iou}
        dataclasses.replace(RUN, name=name, seed=seed, test=test, **changes).write(folder)


def test_a_table_gives_means_over_seeds_and_their_sample_standard_deviation(tmp_path):
    ious = [0.70, 0.74, 0.81]
    write_seeds(tmp_path, "one", [0.6154])
    write_seeds(tmp_path, "several", ious)
    head, one, several, origin = runs.results_table({"a single": "one", "three": "several"}, tmp_path).splitlines()
    assert head.split() == ["train", "validation", "test", "seeds"]
    assert one.split() == ["a", "single", "0.800", "0.800", "0.615", "0"]
    mean, sd = statistics.mean(ious), statistics.stdev(ious)
    assert " ".join(several.split()) == f"three 0.800 ± 0.000 0.800 ± 0.000 {mean:.3f} ± {sd:.3f} 0, 1, 2"
    assert origin == "IoU, recorded on phantom; 2 CPU cores; 2026-01-01."


def test_the_columns_of_a_table_stand_under_their_heads(tmp_path):
    write_seeds(tmp_path, "one", [0.6])
    write_seeds(tmp_path, "several", [0.5, 0.7])
    lines = runs.results_table({"short": "one", "a much longer label": "several"}, tmp_path).splitlines()
    for column in ("train", "validation", "test"):
        end = lines[0].index(column) + len(column)
        for line in lines[1:3]:
            assert line[end - 1].isdigit() and line[end] == " "


def test_a_part_that_was_not_measured_is_a_dash(tmp_path):
    write_seeds(tmp_path, "untested", [None, None])
    write_seeds(tmp_path, "half", [0.5, None])
    _, untested, half, _ = runs.results_table({"untested": "untested", "half": "half"}, tmp_path).splitlines()
    assert " ".join(untested.split()) == "untested 0.800 ± 0.000 0.800 ± 0.000 - 0, 1"
    assert " ".join(half.split()) == "half 0.800 ± 0.000 0.800 ± 0.000 0.500 0, 1"


def test_a_row_that_was_not_run_names_its_command(tmp_path):
    write_seeds(tmp_path, "one", [0.6])
    rows = {"here": "one", "on a GPU": "resnet34-report-gpu"}
    lines = runs.results_table(rows, tmp_path).splitlines()
    assert lines[2].endswith("  not run yet: mitoseg run resnet34-report-gpu") and len(lines) == 4
    nothing = runs.results_table({"on a GPU": "resnet34-report-gpu"}, tmp_path)
    assert len(nothing.splitlines()) == 2 and "recorded on" not in nothing
    assert len(runs.results_table({}, tmp_path).splitlines()) == 1


def test_the_origin_names_every_device_every_data_set_and_the_days():
    other = dataclasses.replace(RUN, device="NVIDIA T4", date="2026-02-03", data={"name": "epfl-rebuilt"})
    assert runs.origin([other, RUN, RUN]) == (
        "IoU, recorded on epfl-rebuilt, phantom; 2 CPU cores, NVIDIA T4; 2026-01-01 to\n2026-02-03."
    )


def test_masks_of_recorded_runs_in_the_project_are_those_of_the_three_slices():
    for path in runs.RESULTS.glob("*-seed*.json"):
        run = runs.read_run(path)
        masks = runs.read_masks(run)
        assert bool(masks) == (run.test is not None)
        if run.data["name"].startswith("epfl") and masks:
            assert list(masks) == [20, 82, 144]
            assert {mask.shape for mask in masks.values()} == {(768, 1024)}
