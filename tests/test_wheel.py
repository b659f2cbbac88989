"""The built wheel, installed into an empty environment."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
    assert not [n for n in names if not n.startswith(("mitoseg_lib/", "mitoseg_lib-"))]


def test_installed_alone_it_loads_the_example(wheel, tmp_path, network_environment):
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
