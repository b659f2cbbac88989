"""Right colours at the right places, right words, right curves."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mitoseg_lib.calibration import reliability
from mitoseg_lib.error_kinds import KINDS, errors_by_kind
from mitoseg_lib.figures import KIND_COLOURS, draw_errors, draw_reliability, draw_steps
from mitoseg_lib.viewer import scale_bar_nm
from mitoseg_lib.volumes import Step

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def masks():
    """Truth and prediction of one slice of each kind of mistake but the split."""
    truth = np.zeros((2, 40, 60), bool)
    truth[0, 2:8, 2:20] = truth[0, 12:18, 2:10] = truth[0, 12:18, 14:22] = truth[0, 25:35, 5:25] = True
    prediction = np.zeros_like(truth)
    prediction[0, 12:18, 2:22] = prediction[0, 24:35, 5:15] = prediction[0, 2:8, 40:50] = True
    return prediction, truth


def image(level=100):
    return np.full((2, 40, 60), level, np.uint8)


def distance(first, second):
    return np.abs(np.subtract(first, second)).max()


def test_wrong_voxels_have_the_colour_of_their_kind_and_right_ones_are_grey():
    found = errors_by_kind(*masks(), width=1)
    shown = np.asarray(draw_errors(image(), found, z=0).axes[0].images[0].get_array())
    assert shown.shape == (40, 60, 3)
    assert np.allclose(shown[found.kind[0] == 0], 100 / 255)
    for code, kind in enumerate(KINDS, start=1):
        here = shown[found.kind[0] == code]
        assert len(here) or kind == "split"
        nearest = [min(KINDS, key=lambda name: distance(pixel, to_rgb(KIND_COLOURS[name]))) for pixel in here]
        assert set(nearest) <= {kind}
    assert np.allclose(draw_errors(image(), found, z=1).axes[0].images[0].get_array(), 100 / 255)


def test_tissue_shows_through_the_colours():
    found = errors_by_kind(*masks())
    dark, bright = (draw_errors(image(level), found, z=0).axes[0].images[0].get_array() for level in (0, 255))
    assert (dark < bright).all()


def test_the_legend_counts_the_slice_and_has_the_colours():
    found = errors_by_kind(*masks(), width=1)
    legend = draw_errors(image(), found, z=0).legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    expected = [(found.kind[0] == code).sum() for code in range(1, 7)]
    assert names == [f"{kind} ({count})" for kind, count in zip(KINDS, expected, strict=True)]
    assert names[0] == "missed (108)" and names[3] == "split (0)"
    assert "slice 0" in legend.get_title().get_text()
    colours = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    assert colours == [to_rgb(KIND_COLOURS[kind]) for kind in KINDS]


def test_the_scale_is_drawn_or_said_to_be_unknown():
    found = errors_by_kind(*masks())
    texts = [
        " ".join(text.get_text() for text in draw_errors(image(), found, z=0, voxel_size_nm=size).axes[0].texts)
        for size in (None, (5.0, 5.0, 5.0))
    ]
    assert "unknown" in texts[0] and f"{scale_bar_nm(300):g} nm" in texts[1]


def test_errors_of_another_volume_are_refused():
    found = errors_by_kind(*masks())
    with pytest.raises(ValueError, match=r"The image is uint8 of shape \(1, 40, 60\)"):
        draw_errors(image()[:1], found, z=0)
    with pytest.raises(ValueError, match="The image is float64"):
        draw_errors(image() / 255, found, z=0)
    for z in (-1, 2):
        with pytest.raises(ValueError, match=f"z is {z}, but the volume has slices 0 to 1"):
            draw_errors(image(), found, z=z)
    with pytest.raises(ValueError, match="three positive numbers"):
        draw_errors(image(), found, z=0, voxel_size_nm=(5.0, 5.0, 0.0))


def some_reliability(power=1.0):
    probabilities = np.linspace(0, 1, 6001) ** power
    return reliability(probabilities, np.random.default_rng(0).random(6001) < probabilities)


def test_a_curve_is_that_of_the_bins():
    found = some_reliability()
    top, bottom = draw_reliability(found).axes
    diagonal, curve = top.get_lines()
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert np.array_equal(curve.get_xdata(), found.predicted) and np.array_equal(curve.get_ydata(), found.observed)
    assert np.array_equal(bottom.patches[0].get_data().values, found.voxels)
    assert top.get_xlim() == bottom.get_xlim() == (0, 1) and bottom.get_yscale() == "log"


def test_several_curves_differ_in_colour_and_marker_and_have_names():
    found = {f"model {k}": some_reliability(1 + k / 4) for k in range(6)}
    fig = draw_reliability(found)
    lines = fig.axes[0].get_lines()[1:]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 6
    texts = [text.get_text() for text in fig.legends[0].get_texts()]
    for (name, one), text in zip(found.items(), texts[1:], strict=True):
        assert text == f"{name}: expected calibration error {one.expected_calibration_error:.4f}"


def test_an_empty_bin_is_a_gap_and_no_error():
    found = reliability(np.array([0.1, 0.9]), np.array([False, True]))
    fig = draw_reliability(found)
    fig.canvas.draw()
    assert np.isnan(fig.axes[0].get_lines()[1].get_ydata()).sum() == 8


@pytest.mark.parametrize("number", [0, 7])
def test_too_few_or_too_many_curves_are_refused(number):
    with pytest.raises(ValueError, match=f"There are {number} predictions, but 1 to 6"):
        draw_reliability(dict.fromkeys(map(str, range(number)), some_reliability()))


def test_steps_are_drawn_to_the_right_of_what_they_need():
    steps = [
        Step("segment-0", (), print, ""), Step("segment-1", (), print, ""),
        Step("label-0", ("segment-0", "segment-1"), print, ""), Step("join", ("label-0", "segment-0"), print, ""),
    ]  # fmt: skip
    fig = draw_steps(steps)
    dots = {found.get_label(): found.get_offsets() for found in fig.axes[0].collections}
    assert list(dots) == ["segment", "label", "join"] == [text.get_text() for text in fig.legends[0].texts]
    assert dots["segment"][:, 0].tolist() == [0, 0] and dots["label"][0, 0] == 1 and dots["join"][0, 0] == 2
    assert len(fig.axes[0].lines) == 4
    plt.close(fig)
