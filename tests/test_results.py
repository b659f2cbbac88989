"""The numbers that the README shows are those of the recorded runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from mitoseg_lib import runs
from mitoseg_lib.recipes import RECIPES

README = (Path(__file__).parents[1] / "README.md").read_text()
ROWS = re.findall(r"^\| .*\(`([\w.-]+)`.*\) \| (.+) \| (.+) \| (.+) \|$", README, flags=re.M)


def test_the_readme_has_rows_of_recorded_runs():
    assert len(ROWS) >= 3


@pytest.mark.parametrize(("name", "train", "validation", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_readme_is_the_mean_of_its_recorded_runs(name, train, validation, test):
    found = runs.read_runs(name)
    for shown, part in ((train, "train"), (validation, "validation"), (test, "test")):
        expected = "not run yet"
        if found:
            expected = f"{np.mean([getattr(run, part)['iou'] for run in found]):.3f}"
        assert shown == expected


def test_every_recorded_run_has_a_recipe_and_says_what_it_was_measured_on():
    for path in runs.RESULTS.glob("*.json"):
        run = runs.read_run(path)
        recipe = RECIPES[run.name]
        assert run.data["name"] in ("epfl-rebuilt", "epfl-official")
        assert (run.epochs, run.batch_size, run.loss) == (recipe.epochs, recipe.batch_size, recipe.loss)
        assert len(run.history) == run.epochs
        assert (run.test is not None) == recipe.tested == bool(runs.read_masks(run))
