"""The minutes and the memory that chapters state are those that were recorded."""

import json

import nbformat
import pytest

import execute
import times

RECORD = json.loads(times.RECORD.read_text())
CHAPTERS = execute.chapters()


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_a_chapter_states_what_was_measured_of_it(path):
    assert times.table(path, RECORD) in nbformat.read(path, as_version=4).cells[0].source + "\n", "tools/times.py"
    assert path.stem in RECORD["small"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, ("not measured yet", "not measured yet")),
        ({"seconds": 3.2, "memory_gb": 0.512}, ("10 s", "0.5 GB")),
        ({"seconds": 84.9, "memory_gb": 2.0}, ("80 s", "2.0 GB")),
        ({"seconds": 251.0, "memory_gb": 1.26}, ("4.2 min", "1.3 GB")),
    ],
)
def test_figures_in_words(found, words):
    assert times.figures(found) == words


def test_the_first_page_states_what_was_measured():
    assert times.summary(RECORD) in times.INTRO.read_text(), "tools/times.py"
    found = {"a": {"seconds": 4, "memory_gb": 2.51}, "b": {"seconds": 181, "memory_gb": 1}}
    said = times.summary({"small": found, "cores": 2})
    assert said.endswith("code takes 10 s to 3.0 min, and up to 2.5 GB of memory, on 2 CPU cores")


def test_what_needs_a_gpu_is_said_where_training_can_be_asked_for():
    tables = {path.stem: times.table(path, RECORD) for path in CHAPTERS}
    assert "| full, `retrain=True` | GPU (T4) | not measured yet |" in tables["04_plain_unet"]
    assert "retrain" not in tables["01_explore_the_data"]
