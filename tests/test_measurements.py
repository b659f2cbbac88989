"""What is measured of trained models is what one gets by hand, and is written whole or not at all."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage import morphology
from small_models import random_unet
from small_recording import SHAPE, coded_stack
from small_trained import CHOICE, LEVELS, SEEDS, write_choice, write_run, write_runs

from mitoseg_lib import measurements, trained
from mitoseg_lib.calibration import reliability
from mitoseg_lib.choices import Choice
from mitoseg_lib.datasets import describe_example
from mitoseg_lib.error_kinds import errors_by_kind
from mitoseg_lib.grey import grey_range
from mitoseg_lib.inference import predict_stack, predict_turned, predict_views
from mitoseg_lib.measurements import (
    FROM_PHANTOM,
    MEASUREMENTS,
    SINGLE,
    Measured,
    measure,
    measurement_path,
    read_measurement,
)
from mitoseg_lib.metrics import iou, scores
from mitoseg_lib.recipes import RECIPES
from mitoseg_lib.recording import weights_path
from mitoseg_lib.robustness import CHANGES
from mitoseg_lib.runs import run_path
from mitoseg_lib.splits import cross_validation_folds
from mitoseg_lib.trained import KEPT, STURDY, Bench
from mitoseg_lib.weights import MaskRule, load_weights, save_weights

pytestmark = pytest.mark.usefixtures("one_thread", "small_stacks")

every_measurement = pytest.mark.parametrize("name", MEASUREMENTS)
THRESHOLDS = np.round(np.arange(0.05, 1, 0.05), 2).tolist()


@pytest.fixture(scope="module")
def small_stacks():
    """The bundled stacks are too large to be predicted dozens of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "_stack", coded_stack)
        trained._test_probabilities.cache_clear()
        yield
    trained._test_probabilities.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_stacks):
    return write_runs(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def figures(folder, one_thread):
    """Each measurement, made once."""
    return {name: measure(name, data="phantom", folder=folder).figures for name in MEASUREMENTS}


@pytest.fixture
def few(tmp_path):
    """Another folder with all that is needed."""
    return write_runs(tmp_path)


def loaded(folder, name=KEPT, seed=0):
    return load_weights(weights_path(name, seed, folder))[0]


def probabilities(folder, predict=predict_stack, part="test", **model):
    return predict(loaded(folder, **model), coded_stack("phantom", part).image)


def filtered(values, size=CHOICE.median):
    """A median along z, written another way."""
    padded = np.pad(values, ((size // 2,) * 2, (0, 0), (0, 0)), mode="symmetric")
    return np.median([padded[k : k + len(values)] for k in range(size)], axis=0)


def chosen_iou(values, truth):
    return iou(filtered(values) >= CHOICE.threshold, truth)


TRUTH = coded_stack("phantom", "test").labels


# --- the file


@every_measurement
def test_a_measurement_is_written_as_a_file_that_can_be_read(folder, figures, name):
    path = measurement_path(name, folder)
    found, text = read_measurement(name, folder), path.read_text()
    assert path == folder / f"{name}.json" and found.figures == figures[name]
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(Measured)}
    assert (found.name, found.command) == (name, f"mitoseg run {name} --data phantom")
    assert found.data == describe_example() and len(found.data["sha256"]) == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.date) and found.device.startswith("1 CPU thread (")
    assert found.models
    for model in found.models:
        recorded = folder / "phantom" if model["name"] == FROM_PHANTOM else folder
        path = weights_path(model["name"], model["seed"], recorded)
        assert (model["trained_on"], path.is_file()) == ("phantom", True)
        assert path.with_name(path.name + ".sha256").read_text().split()[0] == model["weights_sha256"]
    assert str(folder) not in text and "NaN" not in text


@every_measurement
def test_a_measurement_that_is_there_is_read_and_nothing_changes(folder, figures, monkeypatch, name):
    monkeypatch.setattr(trained, "_model", lambda _: pytest.fail("nothing was to be predicted"))
    monkeypatch.setattr(trained, "_test_probabilities", lambda *_: pytest.fail("nothing was to be predicted"))
    before = measurement_path(name, folder).stat().st_mtime_ns
    assert measure(name, data="phantom", folder=folder).figures == figures[name]
    assert measurement_path(name, folder).stat().st_mtime_ns == before


def test_nothing_unfinished_is_left(folder, figures):
    names = {path.name for path in folder.iterdir() if "-seed" not in path.name}
    assert names == {f"{name}.json" for name in MEASUREMENTS} | {"weights", "phantom"}


def test_no_measurement_is_named_like_a_recipe():
    assert not set(MEASUREMENTS) & set(RECIPES) and KEPT in RECIPES and FROM_PHANTOM in RECIPES
    assert not [name for name in MEASUREMENTS if "-seed" in name]  # as the files of runs are
    assert all(measurement.shows for measurement in MEASUREMENTS.values())


@every_measurement
def test_one_that_was_not_made_is_none(tmp_path, name):
    assert read_measurement(name, tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ("[]", "the keys command"), ('{"name": "boundary"}', "the keys")]
)
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    measurement_path("boundary", tmp_path).write_text(content)
    for read in (read_measurement, lambda name, folder: measure(name, data="phantom", folder=folder)):
        with pytest.raises(ValueError, match=rf"boundary\.json .*{words}.*measure again"):
            read("boundary", tmp_path)
    assert measurement_path("boundary", tmp_path).read_text() == content


@pytest.mark.parametrize("function", [measure, read_measurement])
def test_an_unknown_measurement_names_those_that_are_near(function):
    with pytest.raises(ValueError, match=r"no measurement 'robustnes', but for example robustness.*--list"):
        function("robustnes")


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'lucchi', but it must be 'epfl' or 'phantom'"):
        measure("boundary", data="lucchi", folder=tmp_path)


def test_a_folder_with_the_measurement_of_other_data_is_refused(folder, figures, monkeypatch):
    monkeypatch.setattr(measurements, "describe_data", lambda _: {"name": "epfl-official", "sha256": {}})
    with pytest.raises(
        ValueError, match=r"boundary\.json was made by `mitoseg run boundary --data phantom` on phantom"
    ):
        measure("boundary", folder=folder)


# --- models that aren't there


@every_measurement
def test_without_weights_a_sentence_names_the_command_that_makes_them(tmp_path, name):
    write_choice(tmp_path)
    with pytest.raises(ValueError, match="weights are needed; make them with `mitoseg run") as raised:
        measure(name, data="phantom", folder=tmp_path)
    first = f"{KEPT}-fold-1"
    others = {"views-on-folds": first, "single-slices": first, "transfer-from-phantom": FROM_PHANTOM}
    run = others.get(name, MEASUREMENTS[name].of)
    where = tmp_path / "phantom" if name == "transfer-from-phantom" else tmp_path
    assert f"`mitoseg run {run} --seed 0 --data phantom --output {where}`" in str(raised.value)
    assert not measurement_path(name, tmp_path).exists()


def test_a_run_without_its_weights_would_only_be_read_again(few):
    weights_path(KEPT, 0, few).unlink()
    with pytest.raises(ValueError, match=rf"move {KEPT}-seed0\.json away, since a recorded run isn't made again"):
        measure("robustness", data="phantom", folder=few)


@pytest.mark.parametrize("lost", [".safetensors.sha256", ".json"])
def test_weights_without_their_sum_or_their_run_are_not_used(few, lost):
    path = run_path(KEPT, 0, few) if lost == ".json" else weights_path(KEPT, 0, few).with_suffix(lost)
    path.unlink()
    with pytest.raises(ValueError, match="isn't there with its sha256 and its run"):
        measure("robustness", data="phantom", folder=few)


def test_without_the_folds_figures_a_sentence_names_the_command(tmp_path):
    write_run(tmp_path, KEPT, 0, random_unet())
    with pytest.raises(ValueError, match=rf"`mitoseg run {RECIPES[KEPT].chosen_on}-fold-1 --seed 0`"):
        measure("boundary", data="phantom", folder=tmp_path)


def test_a_model_of_other_data_is_refused(few):
    write_run(few, KEPT, 0, random_unet(), data={"name": "epfl-rebuilt", "sha256": {}})
    with pytest.raises(ValueError, match=r"seed0\.json is a run on epfl-rebuilt, but one on phantom was expected"):
        measure("boundary", data="phantom", folder=few)


def test_the_projects_own_folder_needs_no_option_in_the_command():
    assert trained._output_option(measurements.RESULTS) == trained._output_option(measurements.RESULTS / ".") == ""
    assert trained._output_option(measurements.RESULTS / "phantom") == " --output results/phantom"


def test_stopped_in_between_nothing_is_written(few, monkeypatch):
    monkeypatch.setattr(Bench, "predict", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = sorted(few.iterdir())
    with pytest.raises(KeyboardInterrupt):
        measure("robustness", data="phantom", folder=few)
    assert sorted(few.iterdir()) == before


def test_predictions_are_shared_until_the_weights_change(few, monkeypatch):
    asked = []

    def counted(*arguments, **options):
        asked.append(1)
        return predict_stack(*arguments, **options)

    monkeypatch.setitem(trained.WAYS, "plain", counted)
    trained._test_probabilities.cache_clear()
    measure("boundary", data="phantom", folder=few)
    measure("error-kinds", data="phantom", folder=few)
    assert len(asked) == 1
    write_run(few, KEPT, 0, random_unet(7))
    measurement_path("boundary", few).unlink()
    measure("boundary", data="phantom", folder=few)
    assert len(asked) == 2


# --- figures


def test_robustness_is_measured_on_blocks_of_neighbours(folder, figures):
    found = figures["robustness"]
    assert found["slices"] == [[1, 11], [14, 24], [27, 37]] and found["n_slices"] == 33
    assert found["n_slices_of_stack"] == SHAPE[0] and found["choice"] == dataclasses.asdict(CHOICE)
    assert set(found["changes"]) == set(CHANGES)
    model, test = loaded(folder), coded_stack("phantom", "test")
    masks = [
        filtered(predict_stack(model, test.image[first : last + 1])) >= CHOICE.threshold
        for first, last in found["slices"]
    ]
    truth = [test.labels[first : last + 1] for first, last in found["slices"]]
    expected = scores(np.concatenate(masks), np.concatenate(truth)).iou
    for name, row in found["changes"].items():
        assert [point["strength"] for point in row["curve"]] == list(CHANGES[name].strengths)
        (same,) = [point for point in row["curve"] if point["strength"] == row["unchanged"]]
        assert same["iou"] == pytest.approx(expected, abs=1e-6)
        assert len({point["iou"] for point in row["curve"]}) > 1
    assert [point["strength"] for point in found["changes"]["drift"]["curve"]] == [0, 2, 4, 8]


def test_grey_levels_are_brought_back_where_they_have_gone_far(few, monkeypatch):
    """A stack that only became brighter looks to the model as before; without levels in the file nothing is done."""
    plain = measure("grey-levels", data="phantom", folder=few).figures["changes"]
    raw = measure("robustness", data="phantom", folder=few).figures["changes"]
    assert set(plain) == {"brightness", "contrast", "noise", "blur"}
    assert all(plain[name] == raw[name] for name in plain)
    levels = grey_range(coded_stack("phantom", "test").image)
    save_weights(random_unet(0), weights_path(KEPT, 0, few), rule=MaskRule(), grey_range=levels)
    measurement_path("grey-levels", few).unlink()
    found = measure("grey-levels", data="phantom", folder=few).figures["changes"]
    near = {point["strength"]: point["iou"] for point in found["contrast"]["curve"]}
    assert near[0.6] == pytest.approx(near[1.0], abs=0.02)
    assert [p["iou"] for p in found["contrast"]["curve"]] != [p["iou"] for p in raw["contrast"]["curve"]]


@pytest.mark.parametrize("name", ["robustness", "grey-levels"])
def test_the_sturdy_recipe_is_measured_by_itself_and_in_the_same_way(folder, figures, name):
    plain, sturdy = (read_measurement(one, folder) for one in (name, f"{name}-sturdy"))
    assert [model["name"] for model in plain.models + sturdy.models] == [KEPT, STURDY]
    assert sturdy.figures["slices"] == plain.figures["slices"]
    assert [*sturdy.figures["changes"]] == [*plain.figures["changes"]]
    assert sturdy.figures["changes"] != plain.figures["changes"]


@given(st.integers(1, 200))
def test_blocks_are_neighbours_inside_the_stack_and_apart(depth):
    blocks = measurements._blocks(depth)
    assert all(block[0] >= 0 and block[-1] < depth and block.step == 1 for block in blocks)
    assert all(before[-1] < after[0] for before, after in itertools.pairwise(blocks))
    assert len({len(block) for block in blocks}) == 1 and len(blocks[0]) <= 11
    assert len(blocks) == min(3, depth) and (depth < 33 or len(blocks[0]) == 11)


def test_test_tuning_is_the_gap_between_two_choices(folder, figures):
    found = figures["test-tuning"]
    assert [row["seed"] for row in found["seeds"]] == list(SEEDS)
    for row in found["seeds"]:
        values = probabilities(folder, seed=row["seed"])
        assert row["iou"] == pytest.approx(chosen_iou(values, TRUTH), abs=1e-6)
        medians = {m: filtered(values, m) for m in (1, 3, 5, 7, 9)}
        best = max(iou(one >= np.float32(t), TRUTH) for one in medians.values() for t in THRESHOLDS)
        assert row["iou_chosen_on_test"] == pytest.approx(best, abs=1e-6)
        assert row["gap"] == pytest.approx(best - row["iou"], abs=1e-6) and row["gap"] >= 0
    ious, tuned = ([row[key] for row in found["seeds"]] for key in ("iou", "iou_chosen_on_test"))
    assert found["mean_iou"] == pytest.approx(np.mean(ious))
    assert found["mean_gap"] == pytest.approx(np.mean(tuned) - np.mean(ious))
    assert found["gap_of_best_seed_on_test"] == pytest.approx(max(ious) - np.mean(ious))
    assert found["gap_of_best_seed_and_choice_on_test"] == pytest.approx(max(tuned) - np.mean(ious))


def test_calibration_is_that_of_one_seed_of_the_mean_and_of_turns(folder, figures):
    each = [probabilities(folder, seed=seed) for seed in SEEDS]
    expected = [each[0], np.mean(each, axis=0), probabilities(folder, predict_turned)]
    rows = figures["calibration"]["rows"]
    assert [row["seeds"] for row in rows] == [[0], [0, 2], [0]]
    assert [row["way"] for row in rows] == ["one seed", "mean over seeds", "mean over 8 turns"]
    for row, values in zip(rows, expected, strict=True):
        by_hand = reliability(values, TRUTH)
        assert row["expected_calibration_error"] == pytest.approx(by_hand.expected_calibration_error, abs=1e-6)
        assert sum(row["voxels"]) == TRUTH.size and sum(row["foreground"]) == TRUTH.sum()
        for key in ("predicted", "observed"):
            shown = [np.nan if value is None else value for value in row[key]]
            assert np.allclose(shown, getattr(by_hand, key), atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(("name", "shown"), [("seeds", ["plain"]), ("views", ["plain", "turned", "views"])])
def test_seeds_and_views_are_measured_in_each_way(folder, figures, name, shown):
    found = figures[name]
    ways = {"plain": predict_stack, "turned": predict_turned, "views": predict_views}
    assert [(row["predicted"], row["median"]) for row in found["rows"]] == [(way, m) for way in shown for m in (1, 3)]
    assert found["seeds"] == list(SEEDS)
    for row in found["rows"]:
        each = [probabilities(folder, ways[row["predicted"]], seed=seed) for seed in SEEDS]
        each.append(np.mean(each, axis=0))
        for point in (row["by_threshold"][9], row["by_threshold"][3]):
            expected = [iou(filtered(one, row["median"]) >= np.float32(point["threshold"]), TRUTH) for one in each]
            assert [*point["seeds"], point["ensemble"]] == pytest.approx(expected, abs=1e-4)
        *ious, ensemble = [iou(filtered(one, row["median"]) >= np.float32(CHOICE.threshold), TRUTH) for one in each]
        assert row["threshold"] == CHOICE.threshold
        assert row["ious"] == pytest.approx(ious, abs=1e-4) and row["ensemble"] == pytest.approx(ensemble, abs=1e-4)
        assert row["mean"] == pytest.approx(np.mean(ious), abs=1e-4)
        assert row["sd"] == pytest.approx(np.std(ious, ddof=1), abs=1e-4)


def test_the_spread_is_that_of_seeds_where_one_of_them_sees_something(folder, figures):
    each = np.stack([probabilities(folder, seed=seed) for seed in SEEDS])
    votes = (each >= np.float32(CHOICE.threshold)).sum(axis=0)
    found = figures["seeds"]["spread"]
    assert found["voxels_that_a_seed_calls_foreground"] == (votes > 0).sum() > 0
    assert found["mean_sd_there"] == pytest.approx((np.abs(each[0] - each[1]) / np.sqrt(2))[votes > 0].mean(), rel=1e-4)
    assert found["share_disputed_there"] == pytest.approx((votes == 1).sum() / (votes > 0).sum())


def test_one_seed_has_no_spread(few):
    weights_path(KEPT, SEEDS[1], few).unlink()
    found = measure("seeds", data="phantom", folder=few).figures
    assert found["seeds"] == [0] and {row["sd"] for row in found["rows"]} == {None}
    assert all(row["ensemble"] == row["ious"][0] == row["mean"] for row in found["rows"])
    assert (found["spread"]["mean_sd_there"], found["spread"]["share_disputed_there"]) == (None, None)
    rows = measure("calibration", data="phantom", folder=few).figures["rows"]
    assert [row["way"] for row in rows] == ["one seed", "mean over 8 turns"]


def test_error_kinds_are_those_of_the_mask(folder, figures):
    found = figures["error-kinds"]
    mask = filtered(probabilities(folder)) >= CHOICE.threshold
    by_hand = errors_by_kind(mask, TRUTH)
    assert [row["kind"] for row in found["rows"]] == list(by_hand.voxels)
    assert [row["added"] + row["lacking"] for row in found["rows"]] == [*by_hand.voxels.values()]
    assert sum(row["added"] for row in found["rows"]) == (mask & ~TRUTH).sum() > 0
    assert sum(row["lacking"] for row in found["rows"]) == (~mask & TRUTH).sum()
    assert [row["objects"] for row in found["rows"]] == [*by_hand.objects.values()]
    assert found["iou"] == pytest.approx(iou(mask, TRUTH), abs=1e-6) and found["seed"] == SEEDS[0]
    assert all(row["iou_without"] >= found["iou"] for row in found["rows"])


def test_boundary_leaves_bands_out_and_says_what_a_pixel_costs(folder, figures):
    found = figures["boundary"]
    mask = filtered(probabilities(folder)) >= CHOICE.threshold
    assert [row["width"] for row in found["iou_by_band"]] == [0, 1, 2, 3]
    assert found["iou_by_band"][0]["iou"] == pytest.approx(iou(mask, TRUTH), abs=1e-6)
    square = morphology.footprint_rectangle((3, 3))
    grown, shrunk = (
        np.stack([change(one, square) for one in TRUTH]) for change in (morphology.dilation, morphology.erosion)
    )
    assert found["iou_of_truth_dilated_by_1"] == TRUTH.sum() / grown.sum()
    assert found["iou_of_truth_eroded_by_1"] == shrunk.sum() / TRUTH.sum()
    objects = found["objects"]
    assert objects["n_true"] == ndimage.label(TRUTH, np.ones((3, 3, 3)))[1] == 1
    assert objects["n_predicted"] == ndimage.label(mask, np.ones((3, 3, 3)))[1]
    assert objects["recall"] == objects["n_matched"] / objects["n_true"]


def test_a_truth_at_the_edge_of_the_image_has_no_boundary_there(few, monkeypatch):
    stack = coded_stack("phantom", "test")
    stack.labels[:] = False
    stack.labels[:, :, :10] = True
    monkeypatch.setattr(trained, "_stack", lambda *_: stack)
    trained._test_probabilities.cache_clear()
    found = measure("boundary", data="phantom", folder=few).figures
    assert (found["iou_of_truth_dilated_by_1"], found["iou_of_truth_eroded_by_1"]) == (10 / 11, 9 / 10)


def test_views_on_folds_are_pooled_over_what_validates(folder, figures):
    train, rows = coded_stack("phantom", "train"), figures["views-on-folds"]["rows"]
    assert [(row["predicted"], row["median"]) for row in rows] == [
        (way, median) for way in ("plain", "turned", "views") for median in (1, 3)
    ]
    folds = cross_validation_folds(SHAPE[0], left_out=range(155, 158))
    found = {}
    for k, fold in zip(LEVELS, folds, strict=True):
        part = train.slices(fold.validation)
        found[k] = predict_stack(loaded(folder, f"{KEPT}-fold-{k}"), part.image), part.labels
    for row in rows[:2]:
        counts = {
            t: [scores(filtered(values, row["median"]) >= np.float32(t), truth) for values, truth in found.values()]
            for t in THRESHOLDS
        }
        pooled = {t: (a + b + c + d).iou for t, (a, b, c, d) in counts.items()}
        shown = {point["threshold"]: point["iou"] for point in row["by_threshold"]}
        assert shown == pytest.approx(pooled, abs=1e-4)
        assert row["iou"] == max(shown.values()) == shown[row["threshold"]]
        assert row["fold_ious"] == pytest.approx([one.iou for one in counts[row["threshold"]]], abs=1e-4)


def test_a_model_of_grey_levels_sees_the_same_in_every_view(figures):
    """And so it does only if each view is brought back, and the surroundings are left out."""
    plain, _, turned, _, views, _ = [row["by_threshold"] for row in figures["views-on-folds"]["rows"]]
    for other in (turned, views):
        assert [point["iou"] for point in other] == pytest.approx([point["iou"] for point in plain], abs=1e-4)


def test_single_slices_are_judged_on_folds_first(folder, figures):
    rows = figures["single-slices"]["rows"]
    assert [row["name"] for row in rows] == [KEPT, STURDY, SINGLE]
    plain = figures["views-on-folds"]["rows"][0]  # of the same small models, which know no neighbours
    assert rows[0]["fold_ious"] == plain["fold_ious"] and rows[0]["threshold"] == plain["threshold"]
    for row in rows[:2]:
        plain = predict_stack(loaded(folder, row["name"]), coded_stack("phantom", "test").image)
        expected = iou(plain >= np.float32(CHOICE.threshold), TRUTH)
        assert row["test_iou_with_neighbours"] == pytest.approx(expected, abs=1e-6)
    assert len(rows[2]["fold_ious"]) == 4 and rows[2]["threshold"] == 0.5  # of the choices that were written
    for row in rows:
        found = predict_stack(loaded(folder, row["name"]), coded_stack("phantom", "test").image)
        assert row["test_iou"] == pytest.approx(iou(found >= np.float32(row["threshold"]), TRUTH), abs=1e-6)


def test_single_slices_want_all_folds_of_the_network_that_learned_from_them(few):
    run_path(f"{SINGLE}-fold-3", 0, few).unlink()
    with pytest.raises(ValueError, match=rf"the recorded runs {SINGLE}-fold-1 to -4, seed 0, aren't all there"):
        measure("single-slices", data="phantom", folder=few)


@given(st.integers(8, 200), st.integers(0, 10), st.integers(0, 3))
def test_the_surroundings_of_what_validates_hold_nothing_that_trains(depth, gap, number):
    try:
        fold = cross_validation_folds(depth, gap=gap, left_out=range(155, 158))[number]
    except ValueError:
        return
    around = measurements._around(fold, depth)
    inside = set(range(depth)[around])
    assert set(fold.validation) <= inside and not inside & set(fold.train)
    for neighbour in (around.start - 1, around.stop):
        assert neighbour in fold.train or neighbour in (-1, depth)


@pytest.mark.parametrize("name", ["transfer-to-phantom", "transfer-from-phantom"])
def test_transfer_is_measured_at_half_and_at_the_best_threshold(folder, figures, name):
    found = figures[name]
    where = folder / "phantom" if name == "transfer-from-phantom" else folder
    values = probabilities(where, name=FROM_PHANTOM if name == "transfer-from-phantom" else KEPT)
    assert found["at_0.5"]["iou"] == pytest.approx(iou(values >= 0.5, TRUTH), abs=1e-6)
    ious = {t: iou(values >= np.float32(t), TRUTH) for t in THRESHOLDS}
    best = found["upper_bound_with_threshold_chosen_on_test"]
    assert best["iou"] == pytest.approx(max(ious.values()), abs=1e-6) == pytest.approx(ious[best["threshold"]])


def test_a_choice_of_turns_is_kept_to(few):
    write_choice(few, Choice(turned=True, median=1, threshold=0.5))
    found = measure("test-tuning", data="phantom", folder=few).figures
    expected = iou(probabilities(few, predict_turned) >= 0.5, TRUTH)
    assert found["seeds"][0]["iou"] == pytest.approx(expected, abs=1e-6) and found["choice"]["turned"]
    bands = measure("boundary", data="phantom", folder=few).figures["iou_by_band"]
    assert bands[0]["iou"] == pytest.approx(expected, abs=1e-6)
