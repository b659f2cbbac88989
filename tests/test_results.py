"""The numbers that the README and the book's first page show are those of the recorded runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from mitoseg_lib import runs
from mitoseg_lib.datasets import describe_example
from mitoseg_lib.measurements import MEASUREMENTS, measurement_path, read_measurement
from mitoseg_lib.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README, INTRO = ((ROOT / name).read_text() for name in ("README.md", "intro.md"))
ROW = re.compile(r"^\| .*\(`([\w.-]+)`.*\) \| (.+) \| (.+) \| (.+) \|$", flags=re.M)
ROWS = ROW.findall(README)


def test_the_readme_has_rows_of_recorded_runs():
    assert len(ROWS) >= 3


@pytest.mark.parametrize(("name", "train", "validation", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_readme_is_the_mean_of_its_recorded_runs(name, train, validation, test):
    found = runs.read_runs(name)
    for shown, part in ((train, "train"), (validation, "validation"), (test, "test")):
        expected = "not run yet"
        if found and part == "validation" and RECIPES[name].split == "all":
            expected = "-"  # it trained on all slices but the damaged ones
        elif found:
            expected = f"{np.mean([getattr(run, part)['iou'] for run in found]):.3f}"
        assert shown == expected


def test_the_first_page_has_the_rows_of_the_readme_that_were_run():
    assert ROW.findall(INTRO) == [row for row in ROWS if "not run yet" not in row]


def test_the_first_picture_is_of_the_run_that_the_page_names():
    run = runs.read_run(runs.RESULTS / "phantom" / "lite0-imagenet-finetuned-seed0.json")
    assert f"IoU {run.test['iou']:.3f} on the whole stack" in INTRO and run.wall_seconds < 300


def test_every_recorded_run_has_a_recipe_and_says_what_it_was_measured_on():
    for path in runs.RESULTS.glob("*-seed*.json"):
        run = runs.read_run(path)
        recipe = RECIPES[run.name]
        assert run.data["name"] in ("epfl-rebuilt", "epfl-official")
        assert (run.epochs, run.batch_size, run.loss) == (recipe.epochs, recipe.batch_size, recipe.loss)
        assert len(run.history) == run.epochs
        assert (run.test is not None) == recipe.tested == bool(runs.read_masks(run))


def test_no_2d_run_is_much_worse_on_slices_that_it_was_trained_on_than_on_the_test_stack():
    # A median over slices from here and there once left half of the masks: it was measured wrongly, not learned badly.
    for path in runs.RESULTS.glob("*-seed*.json"):
        run = runs.read_run(path)
        if run.test is not None and RECIPES[run.name].unet.get("ndim") != 3:
            assert run.train["iou"] > run.test["iou"] - 0.05, run.name


def test_every_other_file_of_figures_is_a_measurement():
    seedless = {path for path in runs.RESULTS.glob("*.json") if "-seed" not in path.name}
    assert seedless <= {measurement_path(name) for name in MEASUREMENTS}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_says_what_it_was_made_of(name):
    found = read_measurement(name)
    if found is None:
        pytest.skip("not measured yet")
    assert (found.name, found.command) == (name, f"mitoseg run {name}")
    some_run = runs.read_runs("unet")[0]
    expected = describe_example() if MEASUREMENTS[name].on_phantom else some_run.data
    assert found.data == expected
    assert found.models and found.figures
    for model in found.models:
        assert model["name"] in RECIPES and re.fullmatch(r"[0-9a-f]{64}", model["weights_sha256"])
