import json

import pytest
import torch
from typer.testing import CliRunner

from mitoseg_lib.cli import app

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


@pytest.mark.parametrize("command", [["--help"], ["fetch", "--help"], ["run", "--help"]])
def test_the_installed_command_starts(command):
    import subprocess
    import sys
    from pathlib import Path

    executable = Path(sys.executable).with_name("mitoseg")
    assert subprocess.run([executable, *command], capture_output=True).returncode == 0
