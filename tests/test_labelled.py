import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_prediction import disc, save_tiff, stack_image
from test_readers import save_ome, save_slices, save_zarr
from tiff_files import message_of

from mitoseg_lib.grey import choose_grey_transform
from mitoseg_lib.labelled import hold_out, read_labelled
from mitoseg_lib.readers import open_reader
from mitoseg_lib.splits import block_split
from mitoseg_lib.stacks import Stack, StackError, StackWarning

SHAPE = (12, 40, 70)


def mask(shape=SHAPE):
    labels = np.zeros(shape, bool)
    labels[:, shape[1] // 4 : shape[1] // 2, ::3] = True
    return labels


def pair(folder, image=None, labels=None, size=None):
    image = stack_image(SHAPE) if image is None else image
    labels = mask(image.shape) * np.uint8(255) if labels is None else labels
    return save_tiff(folder / "image.tif", image, size), save_tiff(folder / "labels.tif", labels)


# --- reading


def test_a_stack_of_5_nm_is_read_as_it_is(tmp_path):
    found = read_labelled(*pair(tmp_path, size=(5, 5, 5)))
    assert np.array_equal(found.stack.image, stack_image(SHAPE)) and np.array_equal(found.stack.labels, mask())
    assert found.stack.voxel_size_nm == pytest.approx((5, 5, 5))
    low, high = found.grey_range
    beyond = [(found.stack.image < low).mean(), (found.stack.image > high).mean()]
    assert max(beyond) <= 0.001 and low < high


def test_every_container_gives_the_same(tmp_path):
    values, labels = stack_image(SHAPE, np.uint16), mask() * np.uint8(1)
    expected = read_labelled(*pair(tmp_path, values, labels))
    names = [f"slice{number}" for number in range(3, 3 + len(values))]  # slice3 to slice14
    for kind, image in (("image", values), ("labels", labels)):
        save_slices(tmp_path / f"{kind}-png", image, names, ".png")
        save_slices(tmp_path / f"{kind}-tif", image, names, ".tif")
        save_zarr(tmp_path / f"{kind}-zarr", image)
        save_ome(tmp_path / f"{kind}-ome", image, scale=(5, 5, 5))
    kinds = ("png", "tif", "zarr", "ome")
    for one, other in zip(kinds, kinds[1:] + kinds[:1], strict=True):  # image and labels needn't be of one kind
        found = read_labelled(tmp_path / f"image-{one}", tmp_path / f"labels-{other}")
        assert np.array_equal(found.stack.image, expected.stack.image)
        assert np.array_equal(found.stack.labels, expected.stack.labels)
        assert found.grey_range == expected.grey_range == (0, 255)


def test_a_single_2d_tiff_is_a_stack_of_one_slice(tmp_path):
    image, labels = pair(tmp_path, stack_image((1, 40, 70))[0], mask((1, 40, 70))[0] * np.uint8(1))
    assert read_labelled(image, labels).stack.shape == (1, 40, 70)


@pytest.mark.parametrize("model_range", [None, (28.0, 228.0)])
@pytest.mark.parametrize("kind", ["uint8", "dark uint8", "uint16", "8 bits in uint16", "float32"])
def test_a_trained_model_is_given_the_grey_levels_that_it_was_trained_with(tmp_path, model_range, kind):
    values = stack_image(SHAPE, np.uint8 if "8" in kind else np.uint16)
    values = values // 8 if "dark" in kind else values
    image, labels = pair(tmp_path, values.astype(kind.split()[-1]))
    found = read_labelled(image, labels, model_grey_range=model_range)
    reader = open_reader(image)
    for known in (model_range, found.grey_range):
        how = choose_grey_transform(reader, known)
        assert np.array_equal(how.apply(reader.read(0, SHAPE[0])), found.stack.image)
    assert str(choose_grey_transform(reader, model_range)) in found.notes


@pytest.mark.parametrize("size", [(20, 10, 10), (5, 2.5, 2.5), (5, 3.3, 7.1)])
def test_another_voxel_size_is_resampled_in_the_plane_alone(tmp_path, size):
    grey = disc()
    grey[:, :2, :2] = 90  # an image of two values would be a mask
    image, labels = pair(tmp_path, grey, (grey > 128) * np.uint8(255), size)
    found = read_labelled(image, labels)
    plane = tuple(round(n * edge / 5) for n, edge in zip(grey.shape[1:], size[1:], strict=True))
    assert found.stack.shape == (3, *plane)
    assert found.stack.voxel_size_nm == pytest.approx((size[0], 5, 5))
    scale = size[1] * size[2] / 25
    assert found.stack.labels.sum() == pytest.approx((grey > 128).sum() * scale, rel=0.04)
    assert found.stack.labels.sum() == pytest.approx((found.stack.image > 120).sum(), rel=0.03)
    centre = ndimage.center_of_mass(found.stack.labels[1])
    expected = [(c + 0.5) * edge / 5 - 0.5 for c, edge in zip((37, 62), size[1:], strict=True)]
    assert centre == pytest.approx(expected, abs=0.3)
    assert any("resampled" in note for note in found.notes)


def test_the_voxel_size_is_the_one_given_and_the_models_counts(tmp_path):
    image, labels = pair(tmp_path, size=(5, 5, 5))
    found = read_labelled(image, labels, voxel_size_nm=(30, 8, 8), model_size_nm=(8, 4, 8))
    assert found.stack.shape == (12, 80, 70) and found.stack.voxel_size_nm == (30, 4, 8)
    assert any("8 x 8 nm (z, y, x), as given, although" in note for note in found.notes)


def test_instances_are_foreground_where_they_are_asked_for(tmp_path):
    numbers = mask() * np.uint16(7)
    numbers[5:] *= 100
    image, labels = pair(tmp_path, labels=numbers)
    assert np.array_equal(read_labelled(image, labels, instances=True).stack.labels, mask())
    assert "0, 7, 700" in message_of(read_labelled, image, labels)


def test_smooth_labels_are_cut_at_half_with_a_notice(tmp_path):
    values = mask() * np.uint8(255)
    values[0, 10, :9:3] = 40, 90, 200
    with pytest.warns(StackWarning, match=r"labels\.tif isn't a mask of two values"):
        found = read_labelled(*pair(tmp_path, labels=values))
    assert np.array_equal(found.stack.labels, values >= 128)


def test_slices_without_foreground_are_named(tmp_path):
    labels = mask() * np.uint8(255)
    labels[[2, 7]] = 0
    (note,) = [note for note in read_labelled(*pair(tmp_path, labels=labels)).notes if "no foreground" in note]
    assert note.startswith("2 of 12 slices have no foreground (from 0: 2, 7)")
    labels[1:9] = 0
    assert any("1, 2, 3, 4, 5, 6, ..." in note for note in read_labelled(*pair(tmp_path, labels=labels)).notes)


@pytest.mark.parametrize(
    ("image", "labels", "words"),
    [
        (mask() * np.uint8(255), stack_image(SHAPE), "only two values (0 and 255), but grey levels"),
        (np.full(SHAPE, 9, np.uint8), None, "only the value 9"),
        (None, mask()[:5] * np.uint8(1), "labels.tif has shape (5, 40, 70), but image.tif has (12, 40, 70)"),
        (None, np.zeros(SHAPE, np.uint8), "image.tif: its labels are all background"),
        (None, np.ones(SHAPE, np.uint8), "image.tif: its labels are all foreground"),
        (None, stack_image(SHAPE) // 4 + 1, "a mask of two values was expected"),
        (np.where(mask(), np.nan, stack_image(SHAPE)).astype(np.float32), None, "image.tif holds NaN"),
        (stack_image(SHAPE).astype(np.int16), None, "int16"),
    ],
)
def test_what_cannot_be_used_together_is_one_sentence(tmp_path, image, labels, words):
    assert words in message_of(read_labelled, *pair(tmp_path, image, labels))


def test_one_file_for_both_and_files_that_are_not_there(tmp_path):
    image, labels = pair(tmp_path)
    (tmp_path / "link.tif").symlink_to(image)
    assert "name the image first" in message_of(read_labelled, image, tmp_path / "link.tif")
    assert "doesn't exist" in message_of(read_labelled, tmp_path / "nowhere", labels)
    assert "doesn't exist" in message_of(read_labelled, image, tmp_path / "nowhere")


# --- holding out


def coded(labels, voxel_size_nm=None):
    """A stack in whose grey levels it shows, as a bit each, where a voxel was along two axes."""
    z, _, x = np.indices(labels.shape)
    return Stack((16 * (z % 16) + x % 16).astype(np.uint8), labels, voxel_size_nm, "mine")


def assert_cut(part, stack, where):
    assert np.array_equal(part.image, stack.image[where]) and np.array_equal(part.labels, stack.labels[where])
    assert part.voxel_size_nm == stack.voxel_size_nm


@pytest.mark.parametrize(
    ("depth", "thickness", "gap"), [(165, 5, 10), (20, 5, 4), (20, 30, 2), (30, 50, 1), (99, 8, 7)]
)
def test_of_20_slices_or_more_the_last_are_held_out(depth, thickness, gap):
    stack = coded(mask((depth, 8, 9)), (thickness, 5, 5))
    parts = hold_out(stack)
    split = block_split(depth, gap=gap)
    assert_cut(parts.train, stack, list(split.train))
    assert_cut(parts.validation, stack, list(split.validation))
    assert f"the last slices ({split.validation[0]} to {depth - 1}; {gap} beside them" in parts.note


@pytest.mark.parametrize("depth", [1, 2, 10, 19])
@pytest.mark.parametrize(("width", "validation", "gap"), [(512, 128, 32), (100, 25, 6), (12, 3, 0), (3, 1, 0)])
def test_of_fewer_the_right_quarter_of_each_slice_is_held_out(depth, width, validation, gap):
    stack = coded(mask((depth, 8, width)) | (np.arange(width) == width - 1) & (np.arange(8) > 4)[:, None])
    parts = hold_out(stack)
    assert_cut(parts.train, stack, np.s_[:, :, : width - validation - gap])
    assert_cut(parts.validation, stack, np.s_[:, :, width - validation :])
    assert f"the right quarter of each slice ({validation} of {width} columns; {gap} beside" in parts.note


@pytest.mark.parametrize(
    ("where", "held_out", "words"),
    [
        (np.s_[:, 10:20, :60], np.s_[:, :, :25], "left quarter"),  # nothing in the right quarter
        (np.s_[:, ::2, 40:60], np.s_[:, 30:], "lower quarter"),  # in the middle of the columns only
        (np.s_[:, :20, 40:60], np.s_[:, :10], "upper quarter"),
        (np.s_[:, 12:28, 40:60], np.s_[:, 20:], "lower half"),  # in the middle
    ],
)
def test_the_part_is_where_there_is_enough_foreground(where, held_out, words):
    labels = np.zeros((3, 40, 100), bool)
    labels[where] = True
    stack = coded(labels)
    parts = hold_out(stack)
    assert_cut(parts.validation, stack, held_out)
    assert words in parts.note


def test_slices_are_taken_from_the_other_end_where_the_last_are_empty():
    labels = mask((40, 8, 9))
    labels[30:] = False
    stack = coded(labels)
    parts = hold_out(stack)
    assert_cut(parts.validation, stack, np.s_[:6])
    assert_cut(parts.train, stack, np.s_[14:])
    assert "the first slices (0 to 5; 8 beside them" in parts.note


def test_labels_that_cannot_be_parted_are_one_sentence():
    labels = np.zeros((3, 40, 100), bool)
    labels[:, 15:20, 45:50] = True
    assert "mine: wherever a part is held out" in message_of(hold_out, coded(labels))
    one = np.zeros((2, 1, 1), bool)
    one[1] = True
    message_of(hold_out, coded(one))
    message_of(hold_out, coded(np.zeros((3, 4, 5), bool)))


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_both_parts_have_both_classes_and_share_no_voxel(data):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30)))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    stack = coded(rng.random(shape) < data.draw(st.sampled_from([0.01, 0.1, 0.5, 0.99])))
    try:
        parts = hold_out(stack)
    except StackError:
        return
    for part in (parts.train, parts.validation):
        assert part.labels.any() and not part.labels.all()
    axis = [axis for axis in range(3) if parts.train.shape[axis] != shape[axis]]
    assert len(axis) == 1  # one axis is cut, the others are whole
    sides = [part.shape[axis[0]] for part in (parts.train, parts.validation)]
    gap = int(re.search(r"; (\d+) beside", parts.note)[1])
    assert sum(sides) + gap == shape[axis[0]]
    assert sides[0] >= sides[1] or "half" in parts.note and sides[1] == round(shape[axis[0]] / 2)  # a half is a half
