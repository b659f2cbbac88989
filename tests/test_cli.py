import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from small_models import SLOPE, grey_unet
from typer.testing import CliRunner

from mitoseg_lib.cli import app
from mitoseg_lib.readers import open_reader
from mitoseg_lib.stacks import read_mask
from mitoseg_lib.surfaces import surface_distance
from mitoseg_lib.weights import MaskRule, save_weights

EPFL_FILES = ("training.tif", "training_groundtruth.tif", "testing.tif", "testing_groundtruth.tif")


def test_help_shows_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "fetch" in result.output and "run" in result.output


def test_fetch_without_a_network_is_one_sentence_and_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["fetch", "epfl"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "MITOSEG_DATA" in result.stderr and "Traceback" not in result.stderr


def test_fetch_names_the_folder_that_is_there_already(epfl_folder):
    result = CliRunner().invoke(app, ["fetch", "epfl"])
    assert result.exit_code == 0, result.output
    assert str(epfl_folder) in result.stdout.replace("\n", "")
    assert {path.name for path in epfl_folder.glob("*.tif")} >= set(EPFL_FILES)


def test_an_unknown_data_set_is_a_usage_error():
    assert CliRunner().invoke(app, ["fetch", "imagenet"]).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [["run", "no-such-recipe"], ["train", "none.tif", "none.tif", "--output"], ["predict", "none.tif"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_compute_keep_their_memory(arguments, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mitoseg_lib.memory.reuse_memory", lambda: asked.append(True))
    more = [] if arguments[0] == "run" else [str(tmp_path / "out.tif")]
    assert CliRunner().invoke(app, arguments + more).exit_code == 1
    assert asked == [True]


# --- mitoseg run


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def assert_one_sentence(text):
    assert text.startswith("mitoseg: ") and text.count("\n") == 1 and text.rstrip().endswith(".")


def test_run_lists_every_recipe_and_every_measurement_and_what_it_shows():
    from mitoseg_lib.measurements import MEASUREMENTS
    from mitoseg_lib.recipes import RECIPES

    result = run("--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    expected = [*RECIPES.items(), *MEASUREMENTS.items()]
    assert [line.split(maxsplit=1) for line in lines] == [[name, entry.shows] for name, entry in expected]


def test_run_makes_a_run_once_and_says_what_was_measured(tmp_path, same_threads):
    command = ("check", "--data", "phantom", "--output", tmp_path, "--seed", 2, "--threads", 1)
    result = run(*command)
    assert result.exit_code == 0, result.output
    path = tmp_path / "check-seed2.json"
    recorded = json.loads(path.read_text())
    assert torch.get_num_threads() == 1 and recorded["device"].startswith("1 CPU thread (")
    test = recorded["test"]["iou"]
    assert f"check, seed 2: IoU train {recorded['train']['iou']:.3f}, validation" in result.stdout
    assert result.stdout.endswith(f", test {test:.3f}, at threshold {recorded['threshold']:g}\n")
    assert "step" in result.stderr  # a progress bar, kept apart from what is said
    before = path.stat().st_mtime_ns
    again = run(*command)
    assert (again.exit_code, again.stdout, path.stat().st_mtime_ns) == (0, result.stdout, before)


def test_run_of_an_unknown_recipe_is_one_sentence_that_names_a_near_one(tmp_path):
    result = run("unet-widht-8", "--data", "phantom", "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert "unet-width-8" in result.stderr and list(tmp_path.iterdir()) == []


def test_run_without_a_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path / "cache"))
    result = run("check", "--output", tmp_path / "results")
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr.splitlines(keepends=True)[-1])
    assert "MITOSEG_DATA" in result.stderr and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--seed", "-1"], "seed"),
        (["check", "--seed", "one"], "seed"),
        (["check", "--threads", "0"], "threads"),
        (["check", "--data", "lucchi"], "epfl"),
        ([], "--list"),
        (["check", "too", "many"], "too"),
    ],
)
def test_run_with_arguments_that_cannot_be_meant_is_a_usage_error(arguments, words, tmp_path):
    result = run(*arguments, "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


def test_run_makes_a_measurement_once_and_says_where_it_is(tmp_path, same_threads):
    from small_trained import write_runs

    write_runs(tmp_path)
    command = ("transfer-to-phantom", "--data", "phantom", "--output", tmp_path, "--threads", 1)
    result = run(*command)
    assert result.exit_code == 0, result.output
    path = tmp_path / "transfer-to-phantom.json"
    assert result.stdout == f"transfer-to-phantom is measured in {path}, of ladder-longer, seed 0\n"
    assert json.loads(path.read_text())["device"].startswith("1 CPU thread (")
    assert "prediction" in result.stderr
    before = path.stat().st_mtime_ns
    again = run(*command)
    assert (again.exit_code, again.stdout, path.stat().st_mtime_ns) == (0, result.stdout, before)


def test_a_measurement_without_its_models_is_one_sentence(tmp_path):
    result = run("boundary", "--data", "phantom", "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    sentence = result.stderr.splitlines(keepends=True)[-1]
    assert_one_sentence(sentence)
    assert "mitoseg run ladder-together-fold-1 --seed 0" in sentence and list(tmp_path.iterdir()) == []


def test_a_measurement_that_is_stopped_is_one_sentence(tmp_path, monkeypatch):
    from mitoseg_lib import measurements

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measurements, "describe_data", stopped)
    result = run("boundary", "--data", "phantom", "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (130, "")
    assert_one_sentence(result.stderr)
    assert "nothing was written" in result.stderr


def test_a_measurement_takes_no_seed(tmp_path):
    result = run("boundary", "--seed", 1, "--output", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "leave out" in result.stderr and list(tmp_path.iterdir()) == []


# --- mitoseg evaluate

SHAPE = (6, 30, 40)
NAMES = ["iou", "dice", "precision", "recall", "boundary_iou_1", "boundary_iou_2"]
NAMES += ["object_precision", "object_recall", "surface_distance_nm"]


def truth_mask():
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 3:12, 4:15] = mask[2:6, 18:27, 22:36] = 255
    return mask


def predicted_mask():
    """The first object one column to the right, the second not at all, and a wrong one."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 3:12, 5:16] = mask[0, 25:28, 2:5] = 255
    return mask


def write(path, values, size=None, **options):
    if size:
        options |= {"imagej": True, "resolution": (1 / size[2], 1 / size[1])}
        options["metadata"] = {"axes": "ZYX", "spacing": float(size[0]), "unit": "nm"}
    tifffile.imwrite(path, values, **{"photometric": "minisblack"} | options)
    return path


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "predicted.tif", predicted_mask()), write(tmp_path / "labels.tif", truth_mask())


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def only_object(text):
    """The one JSON object that a text must be."""
    found, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n" and text.startswith("{") and list(found) == NAMES
    return found


def test_evaluate_prints_one_json_object_and_nothing_else(files):
    result = evaluate(*files, "--json", "--voxel-size", "30,8,5")
    assert (result.exit_code, result.stderr) == (0, "")
    found = only_object(result.stdout)
    true, predicted = truth_mask() > 0, predicted_mask() > 0
    assert found["iou"] == (true & predicted).sum() / (true | predicted).sum()
    assert (found["object_precision"], found["object_recall"]) == (0.5, 0.5)
    assert found["surface_distance_nm"] == surface_distance(predicted, true, (30, 8, 5))


def test_evaluate_says_in_words_what_it_says_in_json(files):
    result = evaluate(*files, "--voxel-size", "5,5,5")
    found = only_object(evaluate(*files, "--voxel-size", "5,5,5", "--json").stdout)
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr, len(lines)) == (0, "", 9)
    values = [line.removesuffix(" nm").split()[-1] for line in lines]
    assert values == [*(f"{found[name]:.4f}" for name in NAMES[:-1]), f"{found['surface_distance_nm']:.1f}"]
    assert {line.rfind(".") for line in lines[:-1]} == {lines[0].rfind(".")}  # aligned


def test_a_mask_against_itself_is_perfect(files):
    found = only_object(evaluate(files[1], files[1], "--json", "--voxel-size", "30,8,5").stdout)
    assert found == dict.fromkeys(NAMES, 1.0) | {"surface_distance_nm": 0.0}


def test_without_a_voxel_size_the_distance_is_null_and_stderr_says_why(files):
    result = evaluate(*files, "--json")
    assert result.exit_code == 0 and only_object(result.stdout)["surface_distance_nm"] is None
    assert_one_sentence(result.stderr)
    assert "--voxel-size" in result.stderr
    assert evaluate(*files).stdout.endswith(" unknown\n")


@pytest.mark.parametrize("which", ["prediction", "truth", "prediction and the truth"])
def test_to_an_empty_mask_the_distance_is_null_and_stderr_says_why(files, which):
    for name, path in zip(("prediction", "truth"), files, strict=True):
        if name in which:
            write(path, np.zeros(SHAPE, np.uint8))
    result = evaluate(*files, "--json", "--voxel-size", "5,5,5")
    found = only_object(result.stdout)
    assert found["surface_distance_nm"] is None and found["iou"] == (1 if "and" in which else 0)
    assert_one_sentence(result.stderr)
    assert f"the {which} ha" in result.stderr


def test_the_voxel_size_is_the_options_then_the_truths_then_the_predictions(files):
    prediction, truth = predicted_mask() > 0, truth_mask() > 0
    a, b, c = (30, 8, 5), (50, 4, 4), (5, 5, 5)
    for stated, options, expected in [
        ((a, None), (), a),
        ((None, b), (), b),
        ((a, b), (), b),
        ((a, b), ("--voxel-size", "5,5,5"), c),
        ((b, b), (), b),
    ]:
        for path, values, size in zip(files, (predicted_mask(), truth_mask()), stated, strict=True):
            write(path, values, size)
        result = evaluate(*files, "--json", *options)
        found = only_object(result.stdout)["surface_distance_nm"]
        assert found == pytest.approx(surface_distance(prediction, truth, expected), rel=1e-5)
        if stated == (a, b) and not options:
            assert_one_sentence(result.stderr)
            assert "30 x 8 x 5" in result.stderr and "50 x 4 x 4" in result.stderr
        else:
            assert result.stderr == ""


def test_smooth_masks_are_noticed_on_stderr_with_the_files_name(files):
    smooth = predicted_mask()
    smooth[1:4, 3, 5:8] = [40, 90, 200]
    write(files[0], smooth)
    result = evaluate(*files, "--json", "--voxel-size", "5,5,5")
    only_object(result.stdout)
    assert result.exit_code == 0
    assert_one_sentence(result.stderr)
    assert result.stderr.startswith("mitoseg: predicted.tif isn't a mask of two values")


def test_instances_are_the_objects_only_where_they_are_asked_for(tmp_path):
    truth = np.zeros(SHAPE, np.uint16)
    truth[1:4, 3:12, 4:15], truth[1:4, 3:12, 15:26], truth[5, 3:9, 4:9] = 1, 2, 300  # 1 and 2 touch
    path = write(tmp_path / "labels.tif", truth)
    mask = write(tmp_path / "mask.tif", (truth > 0).astype(np.uint8))
    refused = evaluate(path, path, "--json")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert_one_sentence(refused.stderr)
    assert "0, 1, 2, 300" in refused.stderr and "--instances" in refused.stderr
    result = evaluate(path, path, "--json", "--instances", "--voxel-size", "5,5,5")
    assert only_object(result.stdout) == dict.fromkeys(NAMES, 1.0) | {"surface_distance_nm": 0.0}
    against_mask = evaluate(mask, path, "--json", "--instances", "--voxel-size", "5,5,5")
    found = only_object(against_mask.stdout)
    assert (found["iou"], found["object_precision"], found["object_recall"]) == (1, 0, 0)
    assert_one_sentence(against_mask.stderr)
    assert "mask.tif numbers one instance only" in against_mask.stderr


def broken(kind, folder):
    path = folder / "broken.tif"
    values = truth_mask()
    if kind == "missing":
        return path, "doesn't exist"
    if kind == "folder":
        return folder, "folder"
    if kind == "text":
        path.write_text("labels")
        return path, "isn't a TIFF"
    if kind == "cut":
        write(path, values)
        path.write_bytes(path.read_bytes()[:4000])
        return path, "damaged"
    if kind == "shape":
        return write(path, values[:4]), "(4, 30, 40)"
    if kind == "three values":
        values[0, 0, 0] = 7
        return write(path, values), "0, 7, 255"
    if kind == "nan":
        return write(path, np.where(values > 0, np.nan, 0).astype(np.float32)), "NaN"
    return write(path, np.stack([values] * 3 + [values // 2], axis=3), photometric="rgb"), "alpha"


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut", "shape", "three values", "nan", "alpha"])
def test_a_file_that_cannot_be_compared_is_one_sentence_and_exit_code_1(files, tmp_path, kind, options):
    path, words = broken(kind, tmp_path)
    for pair in ((path, files[1]), (files[0], path)):
        result = evaluate(*pair, *options)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert_one_sentence(result.stderr)
        assert words in result.stderr and "Traceback" not in result.stderr


def test_evaluate_takes_one_slice_and_folders_and_zarrs(tmp_path, files):
    single = [write(tmp_path / f"{n}.tif", values[2]) for n, values in enumerate((predicted_mask(), truth_mask()))]
    found = only_object(evaluate(*single, "--json", "--voxel-size", "5,5,5").stdout)
    true, predicted = truth_mask()[2] > 0, predicted_mask()[2] > 0
    assert found["iou"] == (true & predicted).sum() / (true | predicted).sum()
    for kind, values in (("predicted", predicted_mask()), ("labels", truth_mask())):
        (tmp_path / kind).mkdir()
        for number, one in enumerate(values, 8):
            write(tmp_path / kind / f"z{number}.tif", one)
    zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype="u1")[...] = truth_mask() // 255
    expected = evaluate(*files, "--json").stdout
    assert evaluate(tmp_path / "predicted", tmp_path / "labels", "--json").stdout == expected
    assert evaluate(tmp_path / "predicted", tmp_path / "a.zarr", "--json").stdout == expected


@pytest.mark.parametrize("size", ["5", "5,5", "5,5,5,5", "5,5,0", "5,5,-1", "5,5,nan", "5,5,inf", "a,b,c", ""])
def test_a_voxel_size_of_something_else_is_a_usage_error(files, size):
    result = evaluate(*files, "--json", "--voxel-size", size)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "three lengths" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], ["one.tif"], ["one.tif", "two.tif", "three.tif"], ["a", "b", "--jsn"]])
def test_evaluate_with_arguments_that_cannot_be_meant_is_a_usage_error(arguments):
    result = evaluate(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_memory_that_does_not_suffice_and_ctrl_c_are_one_sentence(files, monkeypatch):
    from mitoseg_lib import evaluation

    for error, code in ((MemoryError, 1), (KeyboardInterrupt, 130)):

        def fail(*masks, error=error):
            raise error

        monkeypatch.setattr(evaluation, "scores", fail)
        result = evaluate(*files, "--json")
        assert (result.exit_code, result.stdout) == (code, "")
        assert_one_sentence(result.stderr)


def test_the_help_of_evaluate_has_examples_and_says_what_boundary_iou_is_not():
    result = CliRunner().invoke(app, ["evaluate", "--help"])
    assert result.exit_code == 0
    assert "mitoseg evaluate predicted.tif labels.tif --voxel-size 5,5,5 --json" in result.output
    assert "Cheng" in result.output and "z,y,x" in result.output


# --- mitoseg predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "grey.safetensors"
    save_weights(grey_unet(), path, rule=MaskRule(0.5))
    return path


@pytest.fixture
def stack(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 19, 27), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values)
    return values


@pytest.fixture(autouse=True)
def same_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def predict(folder, source, target, *options):
    return CliRunner().invoke(app, ["predict", str(folder / source), str(folder / target), *map(str, options)])


@pytest.mark.parametrize("target", ["m.tif", "m.zarr"])
@pytest.mark.parametrize("tta", [[], ["--tta"]])
def test_predict_writes_a_mask_and_says_what_was_decided(tmp_path, stack, weights, target, tta):
    result = predict(tmp_path, "a.tif", target, "--weights", weights, *tta)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mask written to") and result.stdout.count("\n") == 1
    for words in ("5 x 19 x 27 voxels, uint8", "5 x 5 x 5 nm is assumed", "grey levels stay as they are", "slice"):
        assert words in result.stderr
    reader = open_reader(tmp_path / target)
    assert np.array_equal(reader.read(0, 5) > 0, stack >= 128)


def test_predict_takes_a_threshold_or_writes_probabilities(tmp_path, stack, weights):
    expected = 1 / (1 + np.exp(-SLOPE * (stack / 255 - 128 / 255)))
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", weights, "--threshold", 0.9, "--device", "cpu")
    assert result.exit_code == 0, result.output
    sure = np.abs(expected - 0.9) > 0.02  # convolutions may run on 16 bits
    assert np.array_equal(read_mask(tmp_path / "m.tif")[sure], (expected >= 0.9)[sure])
    result = predict(tmp_path, "a.tif", "p.tif", "--weights", weights, "--probabilities")
    assert result.exit_code == 0 and result.stdout.startswith("probabilities written")
    assert np.abs(tifffile.imread(tmp_path / "p.tif") / 254 - expected).max() < 0.05


def test_predict_takes_a_voxel_size(tmp_path, stack, weights):
    result = predict(tmp_path, "a.tif", "m.zarr", "--weights", weights, "--voxel-size", "20, 10,10")
    assert result.exit_code == 0, result.output
    assert "20 x 10 x 10 nm (z, y, x), as given" in result.stderr and "resampled to 38 x 54 pixels" in result.stderr
    reader = open_reader(tmp_path / "m.zarr")
    assert (reader.shape, reader.voxel_size_nm) == (stack.shape, (20, 10, 10))


def test_predict_replaces_nothing_unasked(tmp_path, stack, weights):
    (tmp_path / "m.tif").write_text("my thesis")
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", weights)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert "--overwrite" in result.stderr and (tmp_path / "m.tif").read_text() == "my thesis"
    assert predict(tmp_path, "a.tif", "m.tif", "--weights", weights, "--overwrite").exit_code == 0
    assert read_mask(tmp_path / "m.tif").shape == stack.shape


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("b.tif", "m.tif", "doesn't exist"),
        ("empty", "m.tif", "is empty"),
        ("a.tif", "m.png", ".tiff or .zarr was expected"),
        ("a.tif", "nowhere/m.tif", "isn't a folder"),
        ("a.tif", "a.tif", "input"),
        ("text.tif", "m.tif", "isn't a TIFF"),
        ("signed.tif", "m.tif", "int16"),
        ("nan.tif", "m.zarr", "NaN"),
    ],
)
def test_what_predict_cannot_use_is_one_sentence(tmp_path, stack, weights, source, target, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tif").write_text("a stack")
    tifffile.imwrite(tmp_path / "signed.tif", stack.astype(np.int16))
    tifffile.imwrite(tmp_path / "nan.tif", np.where(stack == 0, np.nan, stack).astype(np.float32))
    before = sorted(tmp_path.iterdir())
    result = predict(tmp_path, source, target, "--weights", weights)
    assert (result.exit_code, result.stdout) == (1, "")
    assert_one_sentence(result.stderr)
    assert words in result.stderr and sorted(tmp_path.iterdir()) == before


def test_weights_that_are_not_there_or_changed_are_one_sentence(tmp_path, stack):
    path = tmp_path / "w.safetensors"
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", path)
    assert result.exit_code == 1 and "isn't a file" in result.stderr
    assert_one_sentence(result.stderr)
    save_weights(grey_unet(), path, rule=MaskRule(0.5))
    path.write_bytes(path.read_bytes() + b" ")
    result = predict(tmp_path, "a.tif", "m.tif", "--weights", path)
    assert result.exit_code == 1 and "has changed" in result.stderr and not (tmp_path / "m.tif").exists()
    assert_one_sentence(result.stderr)


@pytest.mark.parametrize(
    "options",
    [
        ["--voxel-size", "5"],
        ["--voxel-size", "5,5,0"],
        ["--voxel-size", "5,5,nan"],
        ["--voxel-size", "a,b,c"],
        ["--threshold", "1.5"],
        ["--threshold", "0.5", "--probabilities"],
        ["--device", "tpu"],
    ],
)
def test_predict_with_options_that_cannot_be_meant_is_a_usage_error(tmp_path, stack, options):
    result = predict(tmp_path, "a.tif", "m.tif", *options)
    assert (result.exit_code, result.stdout) == (2, "") and "Traceback" not in result.stderr
    assert predict(tmp_path, "a.tif", "m.tif", "--colour").exit_code == 2
    assert not (tmp_path / "m.tif").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_predict_stopped_by_ctrl_c_or_a_time_limit_leaves_nothing(tmp_path, weights, number):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3000, 300, 300), np.uint8))
    command = [Path(sys.executable).with_name("mitoseg"), "predict", "a.tif", "m.tif", "--weights", weights]
    # What a shell starts in the background inherits that Ctrl-C is ignored.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes, **heeding)
    waited = time.monotonic()
    while not list(tmp_path.glob(".m.tif*")) and time.monotonic() - waited < 120:  # until it has begun to write
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.endswith("mitoseg: stopped, and nothing was written to m.tif\n") and "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["a.tif"]


@pytest.mark.parametrize(
    "command", [["--help"], ["fetch", "--help"], ["run", "--help"], ["predict", "--help"], ["evaluate", "--help"]]
)
def test_the_installed_command_starts(command):
    executable = Path(sys.executable).with_name("mitoseg")
    assert subprocess.run([executable, *command], capture_output=True).returncode == 0
