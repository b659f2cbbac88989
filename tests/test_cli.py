import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from small_models import SLOPE, grey_unet
from typer.testing import CliRunner

from mitoseg_lib.cli import app
from mitoseg_lib.readers import open_reader
from mitoseg_lib.stacks import read_mask
from mitoseg_lib.weights import save_weights

EPFL_FILES = ("training.tif", "training_groundtruth.tif", "testing.tif", "testing_groundtruth.tif")


def test_help_shows_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "fetch" in result.output and "run" in result.output


def test_fetch_without_a_network_is_one_sentence_and_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["fetch", "epfl"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "MITOSEG_DATA" in result.stderr and "Traceback" not in result.stderr


def test_fetch_names_the_folder_that_is_there_already(epfl_folder):
    result = CliRunner().invoke(app, ["fetch", "epfl"])
    assert result.exit_code == 0, result.output
    assert str(epfl_folder) in result.stdout.replace("\n", "")
    assert {path.name for path in epfl_folder.glob("*.tif")} >= set(EPFL_FILES)


def test_an_unknown_data_set_is_a_usage_error():
    assert CliRunner().invoke(app, ["fetch", "imagenet"]).exit_code == 2


# --- mitoseg run


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def assert_one_sentence(text):
    assert text.startswith("mitoseg: ") and text.count("\n") == 1 and text.rstrip().endswith(".")


def test_run_lists_every_recipe_and_what_it_shows():
    from mitoseg_lib.recipes import RECIPES

    result = run("--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, recipe.shows] for name, recipe in RECIPES.items()]


def test_run_makes_a_run_once_and_says_what_was_measured(tmp_path, same_threads):
    command = ("check", "--data", "phantom", "--output", tmp_path, "--seed", 2, "--threads", 1)
    result = run(*command)
    assert result.exit_code == 0, result.output
    path = tmp_path / "check-seed2.json"
    recorded = json.loads(path.read_text())
    assert torch.get_num_threads() == 1 and recorded["device"].startswith("1 CPU thread (")
    test = recorded["test"]["iou"]
    assert f"check, seed 2: IoU train {recorded['train']['iou']:.3f}, validation" in result.stdout
    assert result.stdout.endswith(f", test {test:.3f}, at threshold {recorded['threshold']:g}\n")
    assert "step" in result.stderr  # a progress bar, kept apart from what is said
    before = path.stat().st_mtime_ns
    again = run(*command)
    assert (again.exit_code, again.stdout, path.stat().st_mtime_ns) == (0, result.stdout, before)


def test_run_of_an_unknown_recipe_is_one_sentence_that_names_a_near_one(tmp_path):
    result = run("unet-widht-8", "--data", "phantom", "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert "unet-width-8" in result.stderr and list(tmp_path.iterdir()) == []


def test_run_without_a_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path / "cache"))
    result = run("check", "--output", tmp_path / "results")
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr.splitlines(keepends=True)[-1])
    assert "MITOSEG_DATA" in result.stderr and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--seed", "-1"], "seed"),
        (["check", "--seed", "one"], "seed"),
        (["check", "--threads", "0"], "threads"),
        (["check", "--data", "lucchi"], "epfl"),
        ([], "--list"),
        (["check", "too", "many"], "too"),
    ],
)
def test_run_with_arguments_that_cannot_be_meant_is_a_usage_error(arguments, words, tmp_path):
    result = run(*arguments, "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


# --- mitoseg predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "grey.safetensors"
    save_weights(grey_unet(), path, threshold=0.5)
    return path


@pytest.fixture
def stack(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 19, 27), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values)
    return values


@pytest.fixture(autouse=True)
def same_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def predict(folder, source, target, *options):
    return CliRunner().invoke(app, ["predict", str(folder / source), str(folder / target), *map(str, options)])


@pytest.mark.parametrize("target", ["m.tif", "m.zarr"])
@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_predict_writes_a_mask_and_says_what_was_decided(tmp_path, stack, weights, target, tta):
    result = predict(tmp_path, "a.tif", target, "--weights", weights, *tta)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mask written to") and result.stdout.count("\n") == 1
    for words in ("5 x 19 x 27 voxels, uint8", "5 x 5 x 5 nm is assumed", "grey levels stay as they are", "slice"):
        assert words in result.stderr
    reader = open_reader(tmp_path / target)
    assert np.array_equal(reader.read(0, 5) > 0, stack >= 128)


def test_predict_takes_a_threshold_or_writes_probabilities(tmp_path, stack, weights):
    expected = 1 / (1 + np.exp(-SLOPE * (stack / 255 - 128 / 255)))
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", weights, "--threshold", 0.9, "--device", "cpu")
    assert result.exit_code == 0, result.output
    sure = np.abs(expected - 0.9) > 0.02  # convolutions may run on 16 bits
    assert np.array_equal(read_mask(tmp_path / "m.tif")[sure], (expected >= 0.9)[sure])
    result = predict(tmp_path, "a.tif", "p.tif", "--weights", weights, "--probabilities")
    assert result.exit_code == 0 and result.stdout.startswith("probabilities written")
    assert np.abs(tifffile.imread(tmp_path / "p.tif") / 254 - expected).max() < 0.05


def test_predict_takes_a_voxel_size(tmp_path, stack, weights):
    result = predict(tmp_path, "a.tif", "m.zarr", "--weights", weights, "--voxel-size", "20, 10,10")
    assert result.exit_code == 0, result.output
    assert "20 x 10 x 10 nm (z, y, x), as given" in result.stderr and "resampled to 38 x 54 pixels" in result.stderr
    reader = open_reader(tmp_path / "m.zarr")
    assert (reader.shape, reader.voxel_size_nm) == (stack.shape, (20, 10, 10))


def test_predict_replaces_nothing_unasked(tmp_path, stack, weights):
    (tmp_path / "m.tif").write_text("my thesis")
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", weights)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert "--overwrite" in result.stderr and (tmp_path / "m.tif").read_text() == "my thesis"
    assert predict(tmp_path, "a.tif", "m.tif", "--weights", weights, "--overwrite").exit_code == 0
    assert read_mask(tmp_path / "m.tif").shape == stack.shape


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("b.tif", "m.tif", "doesn't exist"),
        ("empty", "m.tif", "is empty"),
        ("a.tif", "m.png", ".tiff or .zarr was expected"),
        ("a.tif", "nowhere/m.tif", "isn't a folder"),
        ("a.tif", "a.tif", "input"),
        ("text.tif", "m.tif", "isn't a TIFF"),
        ("signed.tif", "m.tif", "int16"),
        ("nan.tif", "m.zarr", "NaN"),
    ],
)
def test_what_predict_cannot_use_is_one_sentence(tmp_path, stack, weights, source, target, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tif").write_text("a stack")
    tifffile.imwrite(tmp_path / "signed.tif", stack.astype(np.int16))
    tifffile.imwrite(tmp_path / "nan.tif", np.where(stack == 0, np.nan, stack).astype(np.float32))
    before = sorted(tmp_path.iterdir())
    result = predict(tmp_path, source, target, "--weights", weights)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert words in result.stderr and sorted(tmp_path.iterdir()) == before


def test_weights_that_are_not_there_or_changed_are_one_sentence(tmp_path, stack):
    path = tmp_path / "w.safetensors"
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", path)
    assert result.exit_code == 1 and "isn't a file" in result.stderr
    assert_one_sentence(result.stderr)
    save_weights(grey_unet(), path, threshold=0.5)
    path.write_bytes(path.read_bytes() + b" ")
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", path)
    assert result.exit_code == 1 and "has changed" in result.stderr and not (tmp_path / "m.tif").exists()
    assert_one_sentence(result.stderr)


@pytest.mark.parametrize(
    "options",
    [
        ["--voxel-size", "5"],
        ["--voxel-size", "5,5,0"],
        ["--voxel-size", "5,5,nan"],
        ["--voxel-size", "a,b,c"],
        ["--threshold", "1.5"],
        ["--threshold", "0.5", "--probabilities"],
        ["--device", "tpu"],
    ],
)
def test_predict_with_options_that_cannot_be_meant_is_a_usage_error(tmp_path, stack, options):
    result = predict(tmp_path, "a.tif", "m.tif", *options)
    assert (result.exit_code, result.stdout) == (2, "") and "Traceback" not in result.stderr
    assert predict(tmp_path, "a.tif", "m.tif", "--colour").exit_code == 2
    assert not (tmp_path / "m.tif").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_predict_stopped_by_ctrl_c_or_a_time_limit_leaves_nothing(tmp_path, weights, number):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3000, 300, 300), np.uint8))
    command = [Path(sys.executable).with_name("mitoseg"), "predict", "a.tif", "m.tif", "--weights", weights]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not list(tmp_path.glob(".m.tif*")) and time.monotonic() - waited < 120:  # until it has begun to write
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.endswith("mitoseg: stopped, and nothing was written to m.tif\n") and "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("command", [["--help"], ["fetch", "--help"], ["run", "--help"], ["predict", "--help"]])
def test_the_installed_command_starts(command):
    executable = Path(sys.executable).with_name("mitoseg")
    assert subprocess.run([executable, *command], capture_output=True).returncode == 0
