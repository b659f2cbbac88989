import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import repository
from mitoseg_lib import colab

ROOT = Path(__file__).resolve().parents[1]
WANTED = ["torch>=2.10", "torchvision>=0.25", "numpy>=2.2", "albumentations==2.0.8", "tifffile>=2025.1", "pooch>=1.8"]


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # put back afterwards


def missing(versions):
    return colab.missing_requirements(WANTED, versions.get)


def test_only_what_is_missing_is_installed():
    assert missing({"albumentations": "2.0.8", "tifffile": "2026.1"}) == ["pooch>=1.8"]


def test_torch_torchvision_and_numpy_are_never_touched():
    assert missing({}) == ["albumentations==2.0.8", "tifffile>=2025.1", "pooch>=1.8"]
    old = {"torch": "1.0", "numpy": "1.0", "albumentations": "2.0.8", "tifffile": "2026.1", "pooch": "1.8"}
    assert missing(old) == []


def test_a_pinned_package_in_another_version_is_replaced_and_an_older_unpinned_one_stays():
    assert missing({"albumentations": "1.4.0", "tifffile": "2020.1", "pooch": "1.0"}) == ["albumentations==2.0.8"]


def test_nothing_is_missing_where_the_course_is_installed():
    assert colab.install_missing() == [] == colab.install_missing("onnx")


def test_programs_that_a_chapter_starts_find_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for _ in range(2):  # the set-up cell may run twice
        colab.install_missing()
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path)]
    code = "import mitoseg_lib; print(mitoseg_lib.__file__)"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(ROOT / "mitoseg_lib" / "__init__.py")


def test_the_packages_of_an_extra_are_asked_for_too(monkeypatch):
    asked = []
    monkeypatch.setattr(colab, "missing_requirements", lambda requirements: asked.extend(requirements) or [])
    colab.install_missing("onnx")
    assert {"onnx", "onnxruntime", "tifffile"} <= {line.split(">")[0] for line in asked}


def run_setup_cell(folder, *, repository_address, colab_stub):
    stub = folder / "stub" / "google"
    if colab_stub:
        (stub / "colab").mkdir(parents=True)
        (stub / "__init__.py").touch()
        (stub / "colab" / "__init__.py").touch()
    work = folder / "content"
    work.mkdir()
    code = repository.setup_cell(repository.repository_url()) + (
        "\nimport mitoseg_lib\nfrom mitoseg_lib.datasets import load_example"
        "\nprint(mitoseg_lib.__file__)\nprint(load_example('train').shape)\n"
    )
    environment = os.environ | {"MITOSEG_REPOSITORY": str(repository_address), "PYTHONPATH": str(folder / "stub")}
    return work, subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)


def test_in_colab_the_setup_cell_brings_library_and_data(tmp_path, local_clone):
    work, finished = run_setup_cell(tmp_path, repository_address=local_clone, colab_stub=True)
    assert finished.returncode == 0, finished.stderr
    library, shape = finished.stdout.split("\n")[:2]
    assert Path(library) == work / repository.FOLDER / "mitoseg_lib" / "__init__.py"
    assert len(shape.split(",")) == 3


def test_elsewhere_the_setup_cell_does_nothing(tmp_path):
    work, finished = run_setup_cell(tmp_path, repository_address="/nowhere", colab_stub=False)
    assert finished.returncode == 0, finished.stderr
    assert list(work.iterdir()) == []


def test_all_badges_and_setup_cells_derive_from_the_one_address():
    url = repository.repository_url()
    notebooks = sorted((ROOT / "chapters").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = nbformat.read(path, as_version=4).cells
        assert repository.badge(url, path.name) in cells[0].source, path.name
        assert next(c for c in cells if c.cell_type == "code").source == repository.setup_cell(url, path.name)
    readme = (ROOT / "README.md").read_text()
    for path in notebooks:
        assert repository.colab_url(url, path.name) in readme


def test_another_address_changes_every_badge():
    text = f"See {repository.colab_url(repository.repository_url(), '01_x.ipynb')})"
    changed = repository.with_badges(text, "https://github.com/someone/else")
    assert changed == "See https://colab.research.google.com/github/someone/else/blob/main/chapters/01_x.ipynb)"
