"""The built wheel, installed into an empty environment."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mitoseg_lib.stacks import read_mask
from mitoseg_lib.weights import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
PROBE = """
import mitoseg_lib, sys
from mitoseg_lib.datasets import load_example
for part in ("train", "test"):
    stack = load_example(part)
    print(part, stack.shape, stack.labels.any(), stack.voxel_size_nm)
assert "site-packages" in mitoseg_lib.__file__
"""
PREDICT = """
import sys, tifffile
from mitoseg_lib.cli import app
from mitoseg_lib.datasets import load_example
tifffile.imwrite("a.tif", load_example("test").image[:3, :64, :96], photometric="minisblack")
sys.argv = ["mitoseg", "predict", "a.tif", "m.tif"]
app()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling is installed here, so nothing has to be downloaded to build.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_and_the_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "mitoseg_lib/_data/phantom_train.tif" in names
    assert "mitoseg_lib/stacks.py" in names
    assert {f"mitoseg_lib/_data/weights/{name}" for name in (SHIPPED, f"{SHIPPED}.sha256", "README.md")} <= set(names)
    assert not [n for n in names if not n.startswith(("mitoseg_lib/", "mitoseg_lib-"))]


def test_the_model_in_it_is_small(wheel):
    assert zipfile.ZipFile(wheel).getinfo(f"mitoseg_lib/_data/weights/{SHIPPED}").file_size <= 12e6


def test_installed_alone_it_loads_the_example_and_predicts(wheel, tmp_path, network_environment):
    python = tmp_path / "empty" / "bin" / "python"
    create = [str(UV), "venv", "--quiet", "--python", sys.executable, str(tmp_path / "empty")]
    install = [str(UV), "pip", "install", "--quiet", "--python", str(python), str(wheel)]
    constrain = ["--constraint", str(ROOT / "requirements.txt")]  # what is in the cache already
    for command in (create, install + constrain):
        done = subprocess.run(command, env=network_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    loaded = subprocess.run([python, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert "train (" in loaded.stdout and "test (" in loaded.stdout
    predicted = subprocess.run([python, "-c", PREDICT], cwd=tmp_path, capture_output=True, text=True)
    assert (predicted.returncode, predicted.stdout) == (0, "mask written to m.tif\n"), predicted.stderr
    assert read_mask(tmp_path / "m.tif").shape == (3, 64, 96)
