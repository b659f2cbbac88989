"""What is chosen on the folds is what is best over all of them, and files bring back what was written."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mitoseg_lib.choices import Choice, best_choice, pooled, read_choices, scores_of_choices, write_choices
from mitoseg_lib.inference import THRESHOLDS, median_filter_z
from mitoseg_lib.metrics import Scores, iou, scores

counts = st.builds(Scores, *[st.integers(0, 1000)] * 4)
choices = st.builds(Choice, st.booleans(), st.sampled_from((1, 3, 5)), st.sampled_from(THRESHOLDS))
tables = st.dictionaries(choices, counts, min_size=1, max_size=6)


def volume(seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((11, 6, 7), np.float32), rng.random((11, 6, 7)) < 0.3


def test_each_choice_scores_what_its_mask_scores():
    probabilities, truth = volume()
    found = scores_of_choices(probabilities, truth, turned=True)
    assert len(found) == 5 * len(THRESHOLDS)
    for choice, counted in found.items():
        assert choice.turned
        filtered = probabilities if choice.median == 1 else median_filter_z(probabilities, choice.median)
        assert counted == scores(filtered >= np.float32(choice.threshold), truth)


def test_pooling_counts_is_scoring_the_whole():
    parts = [volume(seed) for seed in range(3)]
    tables = [scores_of_choices(*part, turned=False) for part in parts]
    whole = pooled(tables)
    for threshold in (0.05, 0.5, 0.95):
        masks = np.concatenate([p >= np.float32(threshold) for p, _ in parts])
        truth = np.concatenate([t for _, t in parts])
        assert whole[Choice(threshold=threshold)].iou == iou(masks, truth)


def test_a_choice_that_a_fold_lacks_is_not_pooled():
    plain, turned = Choice(), Choice(turned=True)
    one = Scores(1, 2, 3, 4)
    assert pooled([{plain: one, turned: one}, {plain: one}]) == {plain: Scores(2, 4, 6, 8)}


@given(tables)
def test_the_best_choice_has_the_best_iou(table):
    best = best_choice(table)
    assert all(table[best].iou >= found.iou for found in table.values())


def test_of_equal_choices_the_plainest_is_taken():
    same = Scores(5, 1, 1, 9)
    order = [
        Choice(),
        Choice(threshold=0.45),
        Choice(threshold=0.55),
        Choice(threshold=0.4),
        Choice(median=3),
        Choice(turned=True),
    ]
    for first in range(len(order)):
        assert best_choice(dict.fromkeys(reversed(order[first:]), same)) == order[first]


def test_nothing_to_choose_from_is_an_error():
    with pytest.raises(ValueError, match="no choice"):
        best_choice({})


@given(tables)
def test_a_file_brings_back_what_was_written(tmp_path_factory, table):
    folder = tmp_path_factory.mktemp("choices")
    path = write_choices("a-run", 3, table, folder)
    assert path.name == "a-run-seed3-choices.csv"
    assert read_choices("a-run", 3, folder) == table


def test_a_missing_file_names_the_command_and_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mitoseg run a-run --seed 0"):
        read_choices("a-run", 0, tmp_path)
    (tmp_path / "a-run-seed0-choices.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"begins with 'a,b'"):
        read_choices("a-run", 0, tmp_path)
