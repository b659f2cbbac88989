import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_readers import save_ome, save_slices, save_zarr
from tiff_files import message_of, write

from mitoseg_lib import stacks
from mitoseg_lib.masks import read_labels, read_mask
from mitoseg_lib.stacks import StackWarning

SHAPE = (9, 40, 50)


def mask(foreground=255, dtype="uint8", background=0):
    values = np.full(SHAPE, background, dtype)
    values[2:4, 5:20, 7:30] = foreground
    return values


TRUE = mask() > 0


def smooth(full=255, dtype="uint8"):
    """A mask with a soft edge: three values between 0 and the full scale, one of them half of it or just above."""
    values = mask(full, dtype).astype(np.float64)
    values[2:4, 5, 7:30], values[2:4, 19, 7:30], values[2:4, 5:20, 7] = full * 0.3, full * 0.502, full * 0.9
    return values.astype(dtype)


def noise(dtype="uint8"):
    return np.random.default_rng(0).integers(1, 255, SHAPE).astype(dtype)


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- two values


@pytest.mark.parametrize(
    ("foreground", "dtype"),
    [
        *[(1, "uint8"), (255, "uint8"), (7, "uint8"), (255, "uint16"), (65535, "uint16"), (2**32 - 1, "uint32")],
        *[(1, "int16"), (1, "int32"), (True, bool)],
        *[(1.0, "float16"), (1.0, "float32"), (255.0, "float32"), (0.25, "float64"), (1e-300, "float64")],
    ],
)
def test_of_two_values_the_larger_is_foreground(tmp_path, foreground, dtype):
    found = read_mask(write(tmp_path / "mask.tif", mask(foreground, dtype)))
    assert found.dtype == bool and (found == TRUE).all()


@pytest.mark.parametrize(
    ("background", "foreground", "dtype"), [(1, 2, "uint8"), (254, 255, "uint8"), (7, 65535, "uint16"), (-1, 1, "f4")]
)
def test_the_smaller_need_not_be_0(tmp_path, background, foreground, dtype):
    assert (read_mask(write(tmp_path / "mask.tif", mask(foreground, dtype, background))) == TRUE).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_one_value_is_all_background_or_all_foreground(tmp_path, dtype):
    path = tmp_path / "mask.tif"
    for value in (0, 1, 255):
        assert (read_mask(write(path, np.full(SHAPE, value, dtype))) == bool(value)).all()
    assert "only the value 37" in message_of(read_mask, write(path, np.full(SHAPE, 37, dtype)))
    for value in (False, True):
        assert (read_mask(write(path, np.full(SHAPE, value))) == value).all()


def test_a_foreground_of_one_voxel(tmp_path):
    values = np.zeros(SHAPE, "uint8")
    values[8, 39, 49] = 255
    assert np.argwhere(read_mask(write(tmp_path / "mask.tif", values))).tolist() == [[8, 39, 49]]


@settings(deadline=None, max_examples=60)
@given(arrays.arrays("uint8", (2, 3, 4), elements=st.sampled_from([0, 0, 0, 1, 3, 128, 200, 255])))
def test_what_is_accepted_is_what_the_rule_says(tmp_path_factory, values):
    path = write(tmp_path_factory.mktemp("mask") / "mask.tif", values)
    found = set(np.unique(values).tolist())
    if len(found) == 2 or found in ({0}, {1}, {255}):
        assert (read_mask(path) == (values > (min(found) if len(found) == 2 else 0))).all()
    elif len(found) >= 5 and found >= {0, 255}:
        with pytest.warns(StackWarning):
            assert (read_mask(path) == (values >= 128)).all()
    else:
        assert all(str(value) in message_of(read_mask, path) for value in found)


# --- what is no mask

BAD = {
    "three values": (np.where(TRUE, 2, noise() % 2).astype("uint8"), "the values 0, 1, 2,"),
    "three values with the full scale": (np.where(TRUE, 255, noise() % 2).astype("uint8"), "the values 0, 1, 255,"),
    "four values with the full scale": (np.where(TRUE, 255, noise() % 3).astype("uint8"), "the values 0, 1, 2, 255,"),
    "instances": (noise() // 10, "the values 0, 1, 2, 3, 4, ..., 25,"),
    "instances up to 255": (np.where(TRUE, 255, noise("int32") // 10), "the values 0, 1, 2, 3, 4, ..., 255,"),
    "instances up to 65535": (np.where(TRUE, 65535, noise("uint32")) - 1, "..., 65534,"),
    "no 0": (np.where(TRUE, 255, noise()).astype("uint8"), "..., 255,"),
    "no full scale": (np.where(TRUE, 0, noise()).astype("uint8"), "..., 254,"),
    "below 0": (mask(-1, "int16"), "the smallest is -1"),
    "255 read with a sign": (mask().view("int8"), "the smallest is -1"),
    "probabilities": ((noise() / 255).astype("float32"), "compare them with a threshold"),
    "grey floats": (noise("float32") * 9, "the values 9, 18,"),
    "two values and nan": (np.where(noise() > 250, np.nan, mask(1, "float32")).astype("float32"), "NaN"),
    "two values and infinity": (np.where(noise() > 250, np.inf, mask(1, "float32")).astype("float32"), "infinite"),
    "two and minus infinity": (np.where(noise() > 250, -np.inf, mask(1, "float32")).astype("float32"), "infinite"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_values_are_refused_and_listed(tmp_path, what):
    values, words = BAD[what]
    text = message_of(read_mask, write(tmp_path / "mask.tif", values))
    assert text.startswith("mask.tif holds ") and words in text


def test_values_that_only_a_late_slice_has_are_found(tmp_path):
    values = mask()
    values[8, 0, 0] = 9
    assert "the values 0, 9, 255" in message_of(read_mask, write(tmp_path / "mask.tif", values))


# --- smooth masks


@pytest.mark.parametrize(
    ("full", "dtype"),
    [(255, "uint8"), (255, "uint16"), (65535, "uint16"), (1, "float16"), (1, "float32"), (255, "float64")],
)
def test_a_smooth_mask_is_cut_at_half_with_a_warning(tmp_path, full, dtype):
    values = smooth(full, dtype)
    assert len(np.unique(values)) == 5
    path = write(tmp_path / "mask.tif", values)
    with pytest.warns(
        StackWarning, match=r"^mask\.tif isn't a mask of two values: [0-9,]+ of its 18,000.*\.$"
    ) as found:
        cut = read_mask(path)
    assert len(found) == 1 and cut.dtype == bool
    assert (cut == (values.astype(float) / full >= 0.5)).all()
    assert not (cut == (values == full)).all() and not (cut == (values > 0)).all()


def test_exactly_half_is_foreground(tmp_path):
    values = np.where(TRUE, np.array([0, 0.25, 0.5, 0.75, 1])[noise() % 5], 0).astype("float32")
    with pytest.warns(StackWarning):
        assert (read_mask(write(tmp_path / "mask.tif", values)) == (values >= 0.5)).all()


def test_where_most_voxels_lie_between_the_warning_says_that_it_may_be_an_image(tmp_path):
    values = noise()
    values[0, 0, :2] = 0, 255
    with pytest.warns(StackWarning, match="looks like an image"):
        read_mask(write(tmp_path / "mask.tif", values))
    with pytest.warns(StackWarning, match="number instances, use --instances"):
        read_mask(write(tmp_path / "mask.tif", smooth()))


# --- colours


def coloured(channels=3, alpha=255, dtype="uint8"):
    """A mask in green: RGB, or RGBA with an alpha."""
    values = np.zeros((*SHAPE, channels), dtype)
    values[..., 1] = mask(255, dtype)
    values[..., 0] = values[..., 1] // 2
    if channels == 4:
        values[..., 3] = alpha
    return values


COLOUR_WRITERS = {
    "contiguous": {},
    "pages": {"metadata": None},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "zlib": {"compression": "zlib", "predictor": True},
    "zlib strips": {"compression": "zlib", "rowsperstrip": 7},
    "zlib tiles": {"compression": "zlib", "tile": (16, 32)},
    "big-endian": {"byteorder": ">"},
    "one page for all slices": {"truncate": True},
    "ome": {"ome": True, "metadata": {"axes": "ZYXS"}},
    "axes": {"metadata": {"axes": "ZYXS"}},
}


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("writer", COLOUR_WRITERS)
def test_of_colours_the_largest_counts_and_a_constant_alpha_nothing(tmp_path, writer, channels):
    for alpha in (0, 255, 9):
        path = tmp_path / "mask.tif"
        write(path, coloured(channels, alpha), **COLOUR_WRITERS[writer], photometric="rgb")
        assert (read_mask(path) == TRUE).all()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"byteorder": ">", "compression": "zlib"}])
def test_colours_of_wider_types(tmp_path, dtype, options):
    path = write(tmp_path / "mask.tif", coloured(4, 1, dtype), photometric="rgb", **options)
    assert (read_mask(path) == TRUE).all()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "rowsperstrip": 7}, {"tile": (16, 32)}])
def test_colours_in_planes_of_their_own(tmp_path, channels, options):
    values = np.moveaxis(coloured(channels), 3, 1)
    path = write(tmp_path / "mask.tif", values, photometric="rgb", planarconfig="separate", **options)
    assert (read_mask(path) == TRUE).all()


def test_an_rgb_stack_of_imagej(tmp_path):
    metadata = {"axes": "ZYXS", "spacing": 30.0, "unit": "nm"}
    path = write(
        tmp_path / "mask.tif", coloured(), imagej=True, photometric="rgb", resolution=(0.2, 0.2), metadata=metadata
    )
    found, voxel_size_nm = read_labels(path)
    assert (found == TRUE).all() and voxel_size_nm == pytest.approx((30, 5, 5))


def test_each_colour_alone_is_foreground(tmp_path):
    values = np.zeros((*SHAPE, 3), "uint8")
    for channel in range(3):
        values[2:4, 5:20, 7 + channel : 30 : 3, channel] = 200
    assert (read_mask(write(tmp_path / "mask.tif", values, photometric="rgb")) == TRUE).all()


def test_an_alpha_that_varies_is_refused(tmp_path):
    path = write(tmp_path / "mask.tif", coloured(4, mask()), photometric="rgb")
    assert "an alpha channel with values from 0 to 255" in message_of(read_mask, path)


def test_a_smooth_mask_in_colour(tmp_path):
    values = np.repeat(smooth()[..., None], 3, axis=3)
    with pytest.warns(StackWarning):
        assert (read_mask(write(tmp_path / "mask.tif", values, photometric="rgb")) == (smooth() >= 128)).all()


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (coloured(), {"photometric": "minisblack", "planarconfig": "contig"}, "3 samples"),
        (np.zeros((*SHAPE, 5), "uint8"), {"photometric": "rgb"}, "5 samples"),
        (np.zeros((3, *SHAPE), "uint8"), {"metadata": {"axes": "CZYX"}}, "channels"),
        (np.zeros((2, *SHAPE, 3), "uint8"), {"photometric": "rgb"}, "4D"),
    ],
)
def test_other_shapes_are_refused(tmp_path, values, options, words):
    assert words in message_of(read_mask, write(tmp_path / "mask.tif", values, **options))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 32)}, {"metadata": None}])
def test_a_colour_file_that_was_cut_is_refused(tmp_path, options):
    path = write(tmp_path / "mask.tif", coloured(4), photometric="rgb", **options)
    whole = path.read_bytes()
    for length in range(10, len(whole) - 100, len(whole) // 23):  # the last bytes may be padding
        path.write_bytes(whole[:length])
        message_of(read_mask, path)


def test_a_description_that_contradicts_the_colours_is_refused(tmp_path):
    path = write(tmp_path / "mask.tif", coloured(), photometric="rgb")
    whole = path.read_bytes()
    assert whole.count(b"[9, 40, 50, 3]") == 1
    path.write_bytes(whole.replace(b"[9, 40, 50, 3]", b"[9, 40, 50, 4]"))
    assert "damaged" in message_of(read_mask, path)


# --- instances


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "int32", "float32"])
def test_instances_are_whole_numbers_as_they_are(tmp_path, dtype):
    values = (noise() // 3).astype(dtype)
    found, _ = read_labels(write(tmp_path / "labels.tif", values), instances=True)
    assert found.dtype.kind == "u" and (found == values).all()


def test_no_instance_at_all(tmp_path):
    found, _ = read_labels(write(tmp_path / "labels.tif", np.zeros(SHAPE, "uint16")), instances=True)
    assert not found.any()


@pytest.mark.parametrize("values", [mask(), mask(True, bool), mask(1, "int32"), np.full(SHAPE, 255, "uint8")])
def test_one_instance_only_may_be_a_mask_by_mistake(tmp_path, values):
    path = write(tmp_path / "labels.tif", values)
    with pytest.warns(StackWarning, match="numbers one instance only"):
        assert (read_labels(path, instances=True)[0] == values).all()


@pytest.mark.parametrize(
    "values",
    [
        mask(-1, "int16"),
        mask(0.5, "float32"),
        mask(np.nan, "float32"),
        mask(np.inf, "float64"),
        mask(2.0**32, "float64"),
        coloured(),
    ],
    ids=["below 0", "half", "nan", "infinity", "beyond uint32", "colour"],
)
def test_what_numbers_no_instances_is_refused(tmp_path, values):
    options = {"photometric": "rgb"} if values.ndim == 4 else {}
    message_of(read_labels, write(tmp_path / "labels.tif", values, **options), instances=True)


# --- voxel sizes, and the door


def test_the_voxel_size_of_the_file_comes_along(tmp_path):
    metadata = {"axes": "ZYX", "spacing": 30.0, "unit": "nm"}
    path = write(tmp_path / "mask.tif", mask(), imagej=True, resolution=(0.125, 0.2), metadata=metadata)
    for instances in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StackWarning)
            assert read_labels(path, instances=instances)[1] == pytest.approx((30, 5, 8))
    assert read_labels(write(path, mask()))[1] is None


def test_missing_and_damaged_files(tmp_path):
    assert "doesn't exist" in message_of(read_labels, tmp_path / "nowhere.tif")
    path = write(tmp_path / "mask.tif", mask())
    path.write_bytes(path.read_bytes()[:9000])
    assert "damaged" in message_of(read_labels, path)


# --- other containers


@pytest.mark.parametrize("values", [mask()[2], coloured()[2], mask()[2:3]])
def test_a_single_2d_tiff_is_a_mask_of_one_slice(tmp_path, values):
    options = {"photometric": "rgb"} if values.shape[-1] == 3 else {}
    assert (read_mask(write(tmp_path / "mask.tif", values, **options)) == TRUE[2:3]).all()


@pytest.mark.parametrize("foreground", [1, 255])
def test_folders_and_zarrs_hold_masks_by_the_same_rules(tmp_path, foreground):
    values = mask(foreground)
    names = [f"slice{number}" for number in range(2, 2 + len(values))]  # slice2 to slice10
    save_slices(tmp_path / "png", values, names, ".png")
    save_slices(tmp_path / "tif", values, names, ".tif")
    save_zarr(tmp_path / "a.zarr", values)
    save_ome(tmp_path / "ome.zarr", values, scale=(30, 5, 8))
    for name in ("png", "tif", "a.zarr", "ome.zarr"):
        found, voxel_size_nm = read_labels(tmp_path / name)
        assert found.dtype == bool and (found == TRUE).all() and found.flags.writeable
        assert voxel_size_nm == (pytest.approx((30, 5, 8)) if name == "ome.zarr" else None)


def test_a_folder_says_what_is_wrong_as_a_file_does(tmp_path):
    values = mask()
    values[3, 7, 9] = 9
    save_slices(tmp_path / "labels", values, [str(number) for number in range(len(values))], ".png")
    text = message_of(read_mask, f"{tmp_path / 'labels'}/")
    assert "holds the values 0, 9, 255" in text
    save_zarr(tmp_path / "smooth.zarr", smooth())
    with pytest.warns(StackWarning, match=r"^smooth\.zarr isn't a mask of two values"):
        assert (read_mask(f"{tmp_path / 'smooth.zarr'}/") == (smooth() >= 128)).all()
    save_zarr(tmp_path / "c.zarr", values.astype("complex64"))
    assert "complex" in message_of(read_mask, tmp_path / "c.zarr")


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint64", ">u2", "float32"])
def test_a_zarr_of_any_numbers(tmp_path, dtype):
    save_zarr(tmp_path / "a.zarr", mask(1, dtype))
    assert (read_mask(tmp_path / "a.zarr") == TRUE).all()
    numbers = mask(3, dtype if dtype != "bool" else "uint8")
    numbers[5, 5, 5] = 1
    save_zarr(tmp_path / "b.zarr", numbers)
    assert (read_labels(tmp_path / "b.zarr", instances=True)[0] == numbers).all()


def test_stacks_is_the_door():
    assert (stacks.read_mask, stacks.read_labels) == (read_mask, read_labels)
