import pytest
from typer.testing import CliRunner

from mitoseg_lib.cli import app

EPFL_FILES = ("training.tif", "training_groundtruth.tif", "testing.tif", "testing_groundtruth.tif")


def test_help_shows_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "fetch" in result.output


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


@pytest.mark.parametrize("command", [["--help"], ["fetch", "--help"]])
def test_the_installed_command_starts(command):
    import subprocess
    import sys
    from pathlib import Path

    executable = Path(sys.executable).with_name("mitoseg")
    assert subprocess.run([executable, *command], capture_output=True).returncode == 0
