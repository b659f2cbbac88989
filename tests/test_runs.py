import dataclasses
import json

import pytest
import torch

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
    for path in runs.RESULTS.glob("*.json"):
        run = runs.read_run(path)
        assert path.name == f"{run.name}-seed{run.seed}.json"
