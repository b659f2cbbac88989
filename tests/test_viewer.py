"""Pictures: right pixels, right lengths, right words."""

import base64
import io
import re

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from mitoseg_lib import viewer
from mitoseg_lib.datasets import load_example
from mitoseg_lib.stacks import Stack, StackError
from mitoseg_lib.viewer import SliceViewer, plot_history, show_classes, show_slices, show_views

matplotlib.use("Agg")
NM = (5.0, 5.0, 5.0)
ORANGE, BLUE = (230, 159, 0), (86, 180, 233)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def disc(shape=(60, 80), centre=(30, 40), radius=12):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def volume(depth=20, shape=(60, 80)):
    """Grey levels that differ from slice to slice, and a disc in each."""
    image = np.repeat(np.arange(depth, dtype=np.uint8)[:, None, None] * 10 + 20, shape[0], 1).repeat(shape[1], 2)
    return image, np.repeat(disc(shape)[None], depth, 0)


def pages(slice_viewer):
    return [child.value for child in slice_viewer.children[0].children]


def alt(page):
    return re.search(r'alt="([^"]*)"', page).group(1)


def picture(page):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))))


def where(pixels, colour):
    return (pixels == colour).all(axis=2)


# The slice viewer


def test_the_viewer_shows_evenly_spread_slices_from_the_first_to_the_last():
    shown = SliceViewer(volume(20)[0], n_slices=5)
    assert shown.slices == [0, 5, 10, 14, 19]
    for z, page in zip(shown.slices, pages(shown), strict=True):
        assert abs(int(np.median(picture(page))) - (z * 10 + 20)) <= 2, "the picture is that slice's"


@pytest.mark.parametrize(("depth", "expected"), [(1, 1), (3, 3), (16, 16), (17, 16), (165, 16)])
def test_the_viewer_shows_no_slice_twice_and_at_most_sixteen(depth, expected):
    shown = SliceViewer(np.zeros((depth, 8, 8), np.uint8))
    assert len(set(shown.slices)) == len(pages(shown)) == expected
    assert shown.slices[0] == 0 and shown.slices[-1] == depth - 1


def test_the_sliders_text_and_the_captions_name_the_true_slice_and_depth():
    shown = SliceViewer(*volume(20), voxel_size_nm=(50, 5, 5), n_slices=3)
    slider = shown.children[1]
    assert [label for label, _ in slider.options] == ["0", "10", "19"]
    captions = [alt(page) for page in pages(shown)]
    assert captions[0] == "slice 0 of 0 to 19, 0 nm deep; labels outlined"
    assert captions[1] == "slice 10 of 0 to 19, 500 nm deep; labels outlined"
    for caption, page in zip(captions, pages(shown), strict=True):
        assert f">{caption.split(';')[0]}<" in page, "what is heard is seen, too"


def test_the_legend_names_what_is_outlined_in_its_colour():
    image, labels = volume()
    both = pages(SliceViewer(image, labels, labels))[0]
    assert alt(both).endswith("labels and prediction outlined")
    assert re.search(r"#E69F00[^>]*>labels<", both) and re.search(r"#56B4E9[^>]*>prediction<", both)
    assert "outlined" not in alt(pages(SliceViewer(image))[0])


def test_where_the_voxel_size_is_unknown_the_viewer_says_so_and_draws_no_bar():
    page = pages(SliceViewer(*volume()))[0]
    assert "scale unknown" in alt(page)
    assert np.asarray(picture(page).convert("L")).max() < 200, "no white bar on a dark picture without labels' orange"


def test_picture_and_slider_are_linked_in_the_browser():
    shown = SliceViewer(*volume())
    pictures, slider = shown.children
    assert isinstance(pictures, widgets.Stack) and pictures.selected_index == 0
    state = widgets.Widget.get_manager_state()["state"]
    linked = [s["state"] for s in state.values() if s["model_name"] == "LinkModel"]
    ours = [s for s in linked if s["source"] == [f"IPY_MODEL_{slider.model_id}", "index"]]
    assert ours and ours[0]["target"] == [f"IPY_MODEL_{pictures.model_id}", "selected_index"]


def test_with_an_ipywidgets_that_has_no_stack_python_turns_the_pages(monkeypatch):
    monkeypatch.delattr(widgets, "Stack")
    shown = SliceViewer(*volume(20), n_slices=4)
    pictures, slider = shown.children
    assert alt(pictures.value).startswith("slice 0 of")
    slider.index = 3
    assert alt(pictures.value).startswith("slice 19 of")


def test_the_viewers_text_holds_no_memory_address():
    assert repr(SliceViewer(volume(20)[0])) == "SliceViewer(16 of 20 slices)"


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_viewer_of_a_bundled_stack_is_small(name):
    stack = load_example(name)
    prediction = np.roll(stack.labels, 6, axis=2)
    shown = SliceViewer(stack.image, stack.labels, prediction, voxel_size_nm=stack.voxel_size_nm)
    assert 50_000 < sum(map(len, pages(shown))) < 400_000


def test_a_noisier_stack_is_stored_in_a_lower_quality():
    noise = np.random.default_rng(0).normal(128, 20, (16, 420, 420)).astype(np.uint8)
    assert sum(map(len, pages(SliceViewer(noise)))) < 400_000


@pytest.mark.parametrize(
    ("image", "labels", "words"),
    [
        (np.zeros((8, 8), np.uint8), None, r"uint8 of shape \(8, 8\).*\(z, y, x\)"),
        (np.zeros((2, 8, 8), np.uint16), None, "uint16.*uint8"),
        (np.zeros((0, 8, 8), np.uint8), None, "at least one voxel"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 9), bool), r"labels.*\(2, 8, 9\).*\(2, 8, 8\)"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8), np.float32), "labels are float32.*bool"),
        (Stack(np.zeros((2, 8, 8), np.uint8)), None, "is a Stack.*stack.image"),
    ],
)
def test_the_viewer_refuses_what_it_cannot_show_in_one_sentence(image, labels, words):
    with pytest.raises(ValueError, match=words) as refusal:
        SliceViewer(image, labels)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [(5, 5), (5, 0, 5), (5, 5, -1), (5, 5, float("nan")), (5, 5, float("inf"))])
def test_a_voxel_size_that_is_none_is_refused(size):
    image, _ = volume(2)
    with pytest.raises(ValueError, match="three positive numbers"):
        SliceViewer(image, voxel_size_nm=size)
    with pytest.raises(ValueError, match="three positive numbers"):
        show_slices([image[0]], voxel_size_nm=size)


def test_no_slice_is_too_few():
    with pytest.raises(ValueError, match="n_slices is 0"):
        SliceViewer(volume(2)[0], n_slices=0)


# Pixels


def test_the_outline_of_a_disc_is_its_rim():
    mask = disc(radius=12)
    y, x = np.nonzero(viewer.outline(mask))
    radii = np.hypot(y - 30, x - 40)
    assert radii.min() > 10.5 and radii.max() <= 12
    assert len(y) > 2 * np.pi * 10, "closed all around"
    thick = viewer.outline(mask, 2)
    assert (thick >= viewer.outline(mask)).all() and thick.sum() > 1.8 * viewer.outline(mask).sum()
    assert not viewer.outline(np.zeros((5, 5), bool)).any()


def test_an_outline_stays_open_where_the_picture_ends():
    mask = np.zeros((9, 9), bool)
    mask[:, :4] = True
    expected = np.zeros_like(mask)
    expected[:, 3] = True
    np.testing.assert_array_equal(viewer.outline(mask), expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000), st.integers(1, 3))
def test_an_outline_lies_in_its_mask(height, width, seed, thickness):
    mask = np.random.default_rng(seed).random((height, width)) < 0.6
    assert not (viewer.outline(mask, thickness) & ~mask).any()


def test_the_overlay_has_each_colour_on_its_own_outline_and_grey_elsewhere():
    image = np.full((60, 80), 90, np.uint8)
    labels, prediction = disc(centre=(30, 20)), disc(centre=(30, 60))
    pixels = np.array(viewer.slice_picture(image, {"labels": labels, "prediction": prediction}))
    np.testing.assert_array_equal(where(pixels, ORANGE), viewer.outline(labels, 2))
    np.testing.assert_array_equal(where(pixels, BLUE), viewer.outline(prediction, 1))
    rest = ~viewer.outline(labels, 2) & ~viewer.outline(prediction, 1)
    assert (pixels[rest] == 90).all()


def test_where_labels_and_prediction_agree_both_colours_are_seen():
    mask = disc()
    pixels = np.array(viewer.slice_picture(np.zeros((60, 80), np.uint8), {"labels": mask, "prediction": mask}))
    assert where(pixels, ORANGE).any() and where(pixels, BLUE).any()


@pytest.mark.parametrize(("shape", "size"), [
    ((768, 1024), (420, 315)), ((450, 450), (420, 420)), ((1000, 100), (42, 420)), ((60, 80), (80, 60)),
    ((1, 5000), (420, 1)),
])  # fmt: skip
def test_pictures_are_reduced_but_never_enlarged(shape, size):
    assert viewer.slice_picture(np.zeros(shape, np.uint8), {}).size == size


def test_reducing_averages_pixels():
    stripes = np.zeros((840, 840), np.uint8)
    stripes[:, ::2] = 200
    assert (np.array(viewer.slice_picture(stripes, {})) == 100).all()


def test_pixels_that_are_not_square_are_drawn_in_proportion():
    assert viewer.slice_picture(np.zeros((50, 100), np.uint8), {}, voxel_size_nm=(30, 8, 4)).size == (100, 100)


@pytest.mark.parametrize(("width", "nm", "expected"), [(400, 5, 100), (1024, 5, 420 * 1000 / 5120), (420, 2, 100)])
def test_the_scale_bar_is_as_long_as_it_says(width, nm, expected):
    picture_ = viewer.slice_picture(np.zeros((400, width), np.uint8), {}, voxel_size_nm=(nm, nm, nm))
    row = np.array(picture_)[picture_.height - 10, :, 0]
    assert abs((row == 255).sum() - expected) <= 0.5
    assert (np.diff((row == 255).astype(int)) != 0).sum() == 2, "in one piece"


@settings(deadline=None)
@given(st.floats(0.01, 1e9))
def test_a_scale_bar_is_round_and_from_an_eighth_to_a_third_of_the_width(width):
    nm = viewer.scale_bar_nm(width)
    assert width / 8.4 <= nm <= width / 3
    assert f"{nm:.0e}"[0] in "125" and float(f"{nm:.0e}") == pytest.approx(nm)


@pytest.mark.parametrize(("nm", "text"), [(5, "5 nm"), (500, "500 nm"), (1000, "1 µm"), (2500, "2.5 µm"), (0, "0 nm")])
def test_lengths_are_written_with_the_unit_that_fits(nm, text):
    assert viewer.format_length(nm) == text


# Figures


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_show_slices_draws_each_slice_with_title_outline_and_bar():
    image, labels = volume(3)
    fig = show_slices(image, titles=["a", "b", "c"], labels=[labels[0], None, labels[2]], voxel_size_nm=NM)
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c"]
    for ax, z in zip(fig.axes, range(3), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), image[z])
        assert ax.images[0].get_clim() == (0, 255), "grey levels can be compared between slices"
        bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        assert [bar.get_width() for bar in bars] == [20], "100 nm of 5 nm a pixel"
        assert texts(ax) == ["100 nm"]
    assert [len(ax.collections) for ax in fig.axes] == [1, 0, 1]
    assert tuple(fig.axes[0].collections[0].get_edgecolor()[0][:3]) == to_rgb("#E69F00")


def test_a_contour_follows_the_disc():
    image, labels = volume(1)
    (path,) = show_slices([image[0]], labels=[labels[0]]).axes[0].collections[0].get_paths()
    radii = np.hypot(path.vertices[:, 0] - 40, path.vertices[:, 1] - 30)
    assert radii.min() > 11 and radii.max() < 13


def test_labels_and_predictions_together_bring_a_legend():
    image, labels = volume(1)
    fig = show_slices([image[0]], labels=[labels[0]], predictions=[~labels[0]])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["labels", "predictions"]
    assert not show_slices([image[0]], labels=[labels[0]]).legends


def test_an_unknown_scale_is_said():
    assert texts(show_slices([np.zeros((8, 8), np.uint8)]).axes[0]) == ["scale unknown"]


def test_empty_and_full_masks_have_no_outline():
    image = np.zeros((8, 8), np.uint8)
    fig = show_slices([image, image], labels=[np.zeros((8, 8), bool), np.ones((8, 8), bool)])
    assert [len(ax.collections) for ax in fig.axes] == [0, 0]


def test_show_slices_takes_colour_probabilities_and_masks():
    fig = show_slices([np.zeros((8, 8, 3)), np.zeros((8, 8), np.float32), np.ones((8, 8), bool)], columns=2)
    assert [ax.images[0].get_clim() for ax in fig.axes if ax.images] == [(0, 1)] * 3
    assert len(fig.axes) == 4 and not fig.axes[3].images


@pytest.mark.parametrize(
    ("images", "more", "words"),
    [
        ([], {}, "0 images"),
        ([np.zeros((4, 4, 4), np.uint8)], {}, r"shape \(4, 4, 4\)"),
        ([np.zeros((4, 4), np.uint16)], {}, "uint16"),
        ([np.zeros((4, 4), np.uint8)], {"titles": ["a", "b"]}, "1 images and 2 titles"),
        ([np.zeros((4, 4), np.uint8)], {"labels": [np.zeros((4, 5), bool)]}, r"\(4, 4\).*labels \(4, 5\)"),
    ],
)
def test_show_slices_refuses_what_it_cannot_show(images, more, words):
    with pytest.raises(ValueError, match=words):
        show_slices(images, **more)


def test_show_classes_blends_each_kinds_colour_into_its_pixels():
    image, labels = volume(1)
    fig = show_classes(image[0], {"found": labels[0]}, voxel_size_nm=NM)
    shown = np.asarray(fig.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown[30, 40], 0.4 * 20 / 255 + 0.6 * np.array(to_rgb("#009E73")), atol=1e-6)
    np.testing.assert_allclose(shown[0, 0], 20 / 255)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["found"]


def test_show_classes_refuses_other_shapes_and_too_many_kinds():
    image, labels = volume(2)
    with pytest.raises(ValueError, match=r"\(60, 80\).*'found'.*\(2, 60, 80\)"):
        show_classes(image[0], {"found": labels})
    with pytest.raises(ValueError, match="4 kinds"):
        show_classes(image[0], dict.fromkeys("abcd", labels[0]))
    with pytest.raises(ValueError, match=r"uint8 \(y, x\)"):
        show_classes(image, {})


def test_show_views_cuts_through_the_voxel_in_true_proportion():
    rng = np.random.default_rng(0)
    stack = Stack(rng.integers(0, 256, (6, 40, 50), dtype=np.uint8), voxel_size_nm=(40, 5, 5))
    fig = show_views(stack, z=2, y=10, x=30)
    fig.canvas.draw()
    cuts = {ax.get_title(): ax for ax in fig.axes if ax.images}
    expected = {"xy, z = 2": stack.image[2], "xz, y = 10": stack.image[:, 10], "yz, x = 30": stack.image[:, :, 30].T}
    lines = {"xy, z = 2": (30, 10), "xz, y = 10": (30, 2), "yz, x = 30": (2, 10)}
    nm = {"xy, z = 2": (5, 5), "xz, y = 10": (5, 40), "yz, x = 30": (40, 5)}
    assert cuts.keys() == expected.keys()
    for name, ax in cuts.items():
        np.testing.assert_array_equal(ax.images[0].get_array(), expected[name])
        across, down = ax.lines[1].get_xdata()[0], ax.lines[0].get_ydata()[0]
        assert (across, down) == lines[name]
        corner, one = ax.transData.transform([[0, 0], [1, 1]])
        dots_a_nm = np.abs(one - corner) / nm[name]
        np.testing.assert_allclose(dots_a_nm, dots_a_nm[0], rtol=0.01)
        np.testing.assert_allclose(dots_a_nm[0], scale(cuts["xy, z = 2"]) / 5, rtol=0.03)


def scale(ax):
    corner, one = ax.transData.transform([[0, 0], [1, 1]])
    return abs(one[0] - corner[0])


def test_show_views_needs_a_voxel_size_and_a_voxel_inside():
    with pytest.raises(StackError):
        show_views(Stack(np.zeros((4, 5, 6), np.uint8)), z=0, y=0, x=0)
    stack = Stack(np.zeros((4, 5, 6), np.uint8), voxel_size_nm=NM)
    with pytest.raises(ValueError, match="y is 5, but the stack has y from 0 to 4"):
        show_views(stack, z=0, y=5, x=0)


def test_the_font_has_every_sign_that_a_scale_bar_needs():
    from PIL import ImageFont

    font = ImageFont.truetype(viewer.FONT, 13)
    missing = bytes(font.getmask("\U0010fffe"))
    for sign in "0123456789.nmµ":
        assert bytes(font.getmask(sign)) != missing, sign


# Curves


def epochs(n, seed=0):
    """Rows as `History.as_rows` gives them."""
    rng = np.random.default_rng(seed)
    names = ("train_loss", "validation_loss", "train_iou", "validation_iou")
    return [{"epoch": epoch} | dict(zip(names, rng.random(4).tolist(), strict=True)) for epoch in range(1, n + 1)]


def drawn(ax):
    """(line style, colour) and the points of each curve, in the order of drawing."""
    return [(line.get_linestyle(), line.get_color(), line.get_xydata().tolist()) for line in ax.lines]


def points(rows, column):
    return [[row["epoch"], row[column]] for row in rows]


def test_curves_are_the_rows_that_were_given_dashed_for_training_and_solid_for_validation():
    histories = {"first": epochs(5), "second": epochs(3, seed=1)}
    fig = plot_history(histories)
    iou, loss = fig.axes
    for ax, quantity in ((iou, "iou"), (loss, "loss")):
        expected = []
        for rows, colour in zip(histories.values(), viewer.CURVE_COLOURS, strict=False):
            expected += [
                ("-", colour, points(rows, f"validation_{quantity}")),
                ("--", colour, points(rows, f"train_{quantity}")),
            ]
        assert drawn(ax) == expected
    assert (iou.get_ylabel(), loss.get_ylabel(), iou.get_xlabel()) == ("IoU", "loss", "epoch")
    assert iou.get_ylim() == (-0.02, 1) and loss.get_ylim() != (-0.02, 1)


def test_the_legend_names_each_training_and_what_the_lines_mean():
    fig = plot_history({"first": epochs(2), "second": epochs(2)})
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second", "validation", "training"]
    styles = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert styles == [(viewer.CURVE_COLOURS[0], "-"), (viewer.CURVE_COLOURS[1], "-"), ("black", "-"), ("black", "--")]


def test_one_column_is_one_solid_curve_a_training():
    histories = {str(n): epochs(4, seed=n) for n in range(7)}
    fig = plot_history(histories, what=["validation_iou", "train_loss", "iou"])
    assert [ax.get_ylabel() for ax in fig.axes if ax.lines] == ["validation IoU", "train loss", "IoU"]
    for ax, column in zip(fig.axes, ("validation_iou", "train_loss"), strict=False):
        assert [(style, xy) for style, _, xy in drawn(ax)] == [("-", points(h, column)) for h in histories.values()]
        assert len({colour for _, colour, _ in drawn(ax)}) == 7
    assert len(fig.axes[2].lines) == 14
    assert len(fig.axes) == 4 and not fig.axes[3].axison  # an empty corner
    only = plot_history(histories, what=["validation_iou"])
    assert [text.get_text() for text in only.legends[0].get_texts()] == list(histories)


def test_no_label_touches_the_panel_beside_it_and_epochs_are_whole_numbers():
    fig = plot_history({"first": epochs(3)})
    fig.draw_without_rendering()
    left, right = fig.axes
    assert right.yaxis.label.get_window_extent().x0 > left.get_window_extent().x1 + 3
    assert all(tick == round(tick) for ax in fig.axes for tick in ax.get_xticks())


@pytest.mark.parametrize(("columns", "shape"), [(1, (3, 1)), (2, (2, 2)), (3, (1, 3)), (9, (1, 3))])
def test_panels_fill_rows_of_so_many_columns(columns, shape):
    fig = plot_history({"a": epochs(2)}, what=["iou", "loss", "train_iou"], columns=columns)
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape


def test_a_training_of_one_epoch_and_one_that_was_cut_short_can_be_drawn():
    fig = plot_history({"short": epochs(1), "not begun": []})
    assert [len(xy) for _, _, xy in drawn(fig.axes[0])] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("n_trainings", "what", "words"),
    [
        (0, ["iou"], "0 trainings and 1 quantities"),
        (8, ["iou"], "8 trainings.*1 to 7"),
        (1, [], "1 trainings and 0 quantities"),
    ],
)
def test_curves_that_cannot_be_told_apart_are_refused(n_trainings, what, words):
    with pytest.raises(ValueError, match=words):
        plot_history({str(n): epochs(2) for n in range(n_trainings)}, what=what)
    assert not plt.get_fignums()


def test_curve_colours_can_be_seen_on_black_and_on_white():
    for colour in viewer.CURVE_COLOURS:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        luminance = np.dot(linear, (0.2126, 0.7152, 0.0722))
        assert min((luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)) > 2  # contrast, as WCAG defines it
