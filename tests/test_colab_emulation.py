"""Chapters as Colab runs them: alone in an empty folder, with PyTorch there and the course still to be fetched.

By default the first chapter runs through, and all set-up cells. ``make test-colab`` runs all chapters, and the first
once more with the ipywidgets that Colab has had for years.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

import execute
import repository

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
PREINSTALLED = ("torch", "torchvision", "numpy")
CHAPTERS = execute.chapters()
OLD_WIDGETS = "ipywidgets==7.7.1"
STATE = f"""
import json, importlib.metadata as m
print(json.dumps({{n: [m.version(n), str(m.distribution(n).locate_file(n)), m.distribution(n)._path.stat().st_mtime]
                   for n in {PREINSTALLED}}}))
"""


def run(*command, env, **options):
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def colab(tmp_path_factory, network_environment, local_clone):
    """A fresh Python with what Colab has and the course doesn't bring: PyTorch, a kernel, and a stub of its module."""
    folder = tmp_path_factory.mktemp("colab")
    python = folder / "env" / "bin" / "python"
    newest = run(UV, "python", "find", ">=3.11", env=network_environment).strip()
    run(UV, "venv", "--quiet", "--seed", "--python", newest, folder / "env", env=network_environment)
    install = [UV, "pip", "install", "--quiet", "--python", python, *PREINSTALLED, "ipykernel", "packaging"]
    run(*install, "--constraint", ROOT / "requirements.txt", env=network_environment)
    stub = folder / "stub" / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    environment = network_environment | {
        "MITOSEG_REPOSITORY": str(local_clone),
        "MITOSEG_PRESET": "small",
        "PYTHONPATH": str(folder / "stub"),
    }
    environment.pop("MITOSEG_DATA", None)
    return python, environment


def state(python, environment):
    """Versions, places and dates of what mustn't be touched."""
    return run(python, "-c", STATE, env=environment)


class _Kernel(KernelManager):
    """A kernel of another Python than this one."""

    python = None

    @property
    def kernel_spec(self):
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Colab", language="python")


def run_alone(path, folder, colab):
    """Run a chapter in an empty folder, as if it had been opened there; return its notebook."""
    python, environment = colab
    folder.mkdir()
    shutil.copy2(path, folder)
    notebook = nbformat.read(folder / path.name, as_version=4)
    notebook.metadata.pop("widgets", None)
    kernel = type("_Own", (_Kernel,), {"python": python})
    client = NotebookClient(
        notebook, timeout=900, kernel_manager_class=kernel, resources={"metadata": {"path": folder}}
    )
    client.execute(env=environment)
    return notebook


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_the_set_up_cell_brings_what_a_chapter_needs_and_touches_nothing(path, colab, tmp_path):
    python, environment = colab
    before = state(python, environment)
    cells = nbformat.read(path, as_version=4).cells
    code = next(cell.source for cell in cells if cell.cell_type == "code")
    imports = {
        line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()
        if line.startswith(("import ", "from ")) and not line.endswith("(")
    }  # fmt: skip
    code += "\n" + "\n".join(sorted(imports)) + "\nimport mitoseg_lib; print(mitoseg_lib.__file__)"
    said = run(python, "-c", code, env=environment, cwd=tmp_path)
    assert said.split()[-1] == str(tmp_path / repository.FOLDER / "mitoseg_lib" / "__init__.py")
    assert state(python, environment) == before


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_a_chapter_runs_through(path, colab, tmp_path, request):
    if path != CHAPTERS[0] and not request.config.getoption("--all-in-colab"):
        pytest.skip("`make test-colab` runs it")
    notebook = run_alone(path, tmp_path / "content", colab)
    assert [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert os.listdir(tmp_path / "content" / repository.FOLDER)


def test_the_first_chapter_runs_with_the_widgets_that_colab_has_had_for_years(colab, tmp_path, request):
    if not request.config.getoption("--all-in-colab"):
        pytest.skip("`make test-colab` runs it")
    python, environment = colab
    run(UV, "pip", "install", "--quiet", "--python", python, OLD_WIDGETS, env=environment)
    run_alone(CHAPTERS[0], tmp_path / "content", colab)
