"""The model that comes with the library: its file, its card, and what it finds."""

import json
import re

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

import check_shipped
import ship
from mitoseg_lib.cli import app
from mitoseg_lib.datasets import load_epfl, load_example
from mitoseg_lib.grey import choose_grey_transform
from mitoseg_lib.inference import median_filter_z, predict_stack
from mitoseg_lib.metrics import iou
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.readers import open_reader
from mitoseg_lib.runs import RESULTS, read_masks, run_path
from mitoseg_lib.stacks import read_mask
from mitoseg_lib.weights import load_weights, shipped_weights

CARD = (ship.FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def run():
    return check_shipped.shipped_run()


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_file_is_small_and_whole():
    assert shipped_weights().stat().st_size <= 12e6
    model, metadata = load_weights()  # which compares the sha256
    assert (metadata.encoder, metadata.options) == ("efficientnet_lite0", {"neighbours": True})
    assert (metadata.voxel_size_nm, model.n_slices) == ((5, 5, 5), 3)


def test_the_rule_is_the_recorded_run_s(run):
    metadata = load_weights()[1]
    median = re.search(r"median over (\d+) slices", run.model)
    assert metadata.threshold == run.threshold and metadata.median == (int(median[1]) if median else 1)
    assert ship.chosen(run, RESULTS).median == metadata.median


def test_the_card_s_figures_are_the_recorded_run_s(run):
    assert ship.fill(CARD, ship.figures(run, load_weights()[1])) == CARD, "run tools/ship.py again"
    content = json.loads(run_path(run.name, run.seed).read_text())
    for words, part in (("test stack", "test"), ("training stack (some of its slices)", "train")):
        shown = re.search(rf"^\| {re.escape(words)} \| (.+) \|$", CARD, flags=re.M)[1].split(" | ")
        assert shown == [f"{content[part][name]:.3f}" for name in ("iou", "dice", "precision", "recall")]
    assert content["command"] in CARD and content["date"] in CARD and content["device"] in CARD


def test_predict_needs_no_weights(tmp_path):
    image = load_example("test").image[:4, :96, :96]
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    invoke("predict", tmp_path / "a.tif", tmp_path / "m.tif")
    segmenter = Segmenter.load()
    grey = choose_grey_transform(open_reader(tmp_path / "a.tif"), segmenter.grey_range)
    assert grey.source is not None  # the phantom's grey levels aren't quite EPFL's
    expected = segmenter.probabilities(grey.apply(image), (5, 5, 5)) >= np.float32(segmenter.threshold)
    assert np.array_equal(read_mask(tmp_path / "m.tif"), expected)


# --- on the real stacks


def test_it_draws_the_masks_that_were_recorded(epfl_folder, tmp_path, run):
    """The run's masks came from 32-bit weights and the whole stack; one slice of it needs only those around it."""
    reach = load_weights()[1].median // 2 + 1
    z, mask = min(read_masks(run).items())
    test = load_epfl("testing")
    tifffile.imwrite(tmp_path / "a.tif", test.image[z - reach : z + reach + 1], photometric="minisblack")
    invoke("predict", tmp_path / "a.tif", tmp_path / "m.tif")
    found = read_mask(tmp_path / "m.tif")[reach]
    assert iou(found, mask) > 0.99
    assert iou(found, test.labels[z]) == pytest.approx(iou(mask, test.labels[z]), abs=0.002)


def test_the_commands_agree_with_the_long_way_round(epfl_folder, tmp_path):
    """In float32, all slices at once, and an IoU counted by hand."""
    test = load_epfl("testing").slices(slice(24))
    image, labels = (np.ascontiguousarray(part[:, :384, :512]) for part in (test.image, test.labels))
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    tifffile.imwrite(tmp_path / "t.tif", labels * np.uint8(255), photometric="minisblack")
    invoke("predict", tmp_path / "a.tif", tmp_path / "m.tif")
    found = json.loads(invoke("evaluate", tmp_path / "m.tif", tmp_path / "t.tif", "--json"))["iou"]
    model, metadata = load_weights()
    expected = median_filter_z(predict_stack(model, image, precision="fp32"), metadata.median) >= metadata.threshold
    assert labels.sum() > 50_000
    assert found == pytest.approx((expected & labels).sum() / (expected | labels).sum(), abs=0.002)
