"""A rung's figures are those of its folds, and its verdict follows from them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitoseg_lib.choices import Choice, write_choices
from mitoseg_lib.ladder import Gain, Rung, gain, ladder_table, read_rung
from mitoseg_lib.metrics import Scores
from mitoseg_lib.runs import RESULTS, RecordedRun, read_run

IOUS = st.lists(st.floats(0, 1), min_size=4, max_size=4)


def write_folds(folder, name, ious, *, threshold=0.4, seconds=60.0):
    """Four folds' files: the wanted IoU (of 100 voxels) at one threshold, and 0.1 less at all others and turned."""
    some = read_run(next(RESULTS.glob("unet-seed0.json")))
    for k, iou in enumerate(ious, 1):
        run = dataclasses.replace(some, name=f"{name}-fold-{k}", seed=0, wall_seconds=seconds * k, test=None)
        run.write(folder)
        good, bad = round(100 * iou), round(100 * iou) - 10
        found = {Choice(threshold=t): Scores(bad, 100 - bad, 0, 900) for t in (0.3, 0.5)}
        found[Choice(threshold=threshold)] = Scores(good, 100 - good, 0, 900)
        found[Choice(turned=True, threshold=0.5)] = Scores(99, 1, 0, 900)
        found[Choice(median=3, threshold=0.5)] = Scores(99, 1, 0, 900)
        write_choices(run.name, 0, found, folder)


def rung(*ious):
    return Rung("", Choice(), ious, 0.0)


def test_a_rung_has_the_iou_of_each_fold_at_the_threshold_that_is_best_on_all(tmp_path):
    write_folds(tmp_path, "ladder-a", [0.5, 0.6, 0.7, 0.9])
    found = read_rung("ladder-a", tmp_path)
    assert found == Rung("ladder-a", Choice(threshold=0.4), (0.5, 0.6, 0.7, 0.9), 150.0)


def test_a_rung_of_which_a_fold_is_missing_was_not_run(tmp_path):
    write_folds(tmp_path, "ladder-a", [0.5, 0.6, 0.7, 0.9])
    (tmp_path / "ladder-a-fold-3-seed0.json").unlink()
    assert read_rung("ladder-a", tmp_path) is None
    table = ladder_table({"this one": "ladder-a"}, "ladder-a", tmp_path)
    assert "not run yet: mitoseg run ladder-a-fold-1 to ladder-a-fold-4" in table


@given(IOUS, IOUS)
def test_a_gain_is_that_of_pairs(first, second):
    found, back = gain(rung(*second), rung(*first)), gain(rung(*first), rung(*second))
    assert found.mean == pytest.approx(np.mean(second) - np.mean(first), abs=1e-12)
    assert found.mean == pytest.approx(-back.mean) and found.sd == pytest.approx(back.sd)
    assert {found.verdict, back.verdict} in ({"better", "worse"}, {"no difference"})


def test_what_all_folds_share_is_no_spread():
    assert gain(rung(0.51, 0.61, 0.71, 0.91), rung(0.5, 0.6, 0.7, 0.9)).sd < 1e-9


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [(0.02, 0.019, "better"), (0.02, 0.02, "no difference"), (0.0, 0.0, "no difference"), (-0.02, 0.01, "worse")],
)
def test_a_gain_no_larger_than_its_spread_is_no_difference(mean, sd, verdict):
    assert Gain(mean, sd).verdict == verdict


def test_the_table_compares_with_the_start(tmp_path):
    write_folds(tmp_path, "ladder-a", [0.5, 0.6, 0.7, 0.9])
    write_folds(tmp_path, "ladder-b", [0.55, 0.64, 0.76, 0.93], seconds=120.0)
    table = ladder_table({"start": "ladder-a", "other": "ladder-b", "third": "ladder-c"}, "ladder-a", tmp_path)
    head, start, other, third, last = table.splitlines()
    assert head.split() == ["#1", "#2", "#3", "#4", "mean", "gain", "min"]
    assert start.split() == ["start", "0.500", "0.600", "0.700", "0.900", "0.675", "2"]
    assert other.split() == [
        "other",
        "0.550",
        "0.640",
        "0.760",
        "0.930",
        "0.720",
        "+0.045",
        "±",
        "0.013",
        "5",
        "better",
    ]
    assert "not run yet" in third and last.startswith("IoU, recorded on ")
    assert isinstance(read_run(tmp_path / "ladder-a-fold-1-seed0.json"), RecordedRun)
