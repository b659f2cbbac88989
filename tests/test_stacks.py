import logging
import os
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tiff_files import message_of, write

from mitoseg_lib.stacks import (
    Stack,
    StackError,
    StackWarning,
    file_sha256,
    load_stack,
    read_mask,
    to_uint8,
    verify_sha256,
)

SHAPE = (9, 40, 50)


def grey(dtype="uint8", shape=SHAPE):
    values = np.random.default_rng(0).integers(1, 255, shape)
    return values.astype(dtype)


def mask(foreground=255, dtype="uint8"):
    values = np.zeros(SHAPE, dtype)
    values[2:4, 5:20, 7:30] = foreground
    return values


# --- reading ------------------------------------------------------------------------------------------------

WRITERS = {
    "contiguous": {},
    "pages": {"metadata": None},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "tiles larger than a slice": {"tile": (64, 64), "compression": "zlib"},
    "zlib": {"compression": "zlib"},
    "predictor": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"},
    "lossless jpeg 2000": {"compression": "jpeg2000"},
    "lossless jpeg xl": {"compression": "jpegxl", "compressionargs": {"lossless": True}},
    "bigtiff": {"bigtiff": True},
    "big-endian": {"byteorder": ">"},
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "imagej without axes": {"imagej": True},
    "imagej with slices called frames": {"imagej": True, "metadata": {"axes": "TYX"}},
    "one page for all slices": {"truncate": True},
    "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
    "white is zero": {"photometric": "miniswhite"},
}


@pytest.mark.parametrize("shape", [SHAPE, (9, 2, 2), (8, 40, 2), (9, 31, 97)])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_flavour_gives_the_values_that_were_written(tmp_path, writer, shape):
    values = grey(shape=shape)
    path = write(tmp_path / "stack.tif", values, **WRITERS[writer])
    stack = load_stack(path)
    assert stack.image.dtype == np.uint8 and stack.shape == shape
    assert (stack.image == values).all()
    assert stack.image.flags.writeable and stack.labels is None and stack.name == "stack"


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"byteorder": ">"}, {"byteorder": ">", "compression": "zlib"}])
def test_wider_types_become_uint8_by_the_rule(tmp_path, dtype, options):
    values = (grey() * 100.0).astype(dtype)
    stack = load_stack(write(tmp_path / "stack.tif", values, **options))
    assert (stack.image == to_uint8(values)).all()
    assert stack.image.min() == 0 and stack.image.max() == 255


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"])
@pytest.mark.parametrize("mode", ["L", "I;16", "F", "1"])
def test_files_of_another_writer(tmp_path, mode, compression):
    """Pillow writes TIFF by itself, and with libtiff where it compresses."""
    values = {"L": grey(), "I;16": grey("uint16") * 200, "F": grey("float32"), "1": mask() > 0}[mode]
    pages = [Image.fromarray(page) for page in values]
    assert pages[0].mode == mode
    path = tmp_path / "stack.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:], compression=compression)
    if mode == "1":
        assert (read_mask(path) == values).all()
    else:
        assert (load_stack(path).image == to_uint8(values)).all()


def test_one_slice_is_a_stack_if_the_file_says_so(tmp_path):
    path = write(tmp_path / "stack.tif", grey(shape=(1, 40, 50)))
    assert load_stack(path).shape == (1, 40, 50)


def test_lossy_jpeg_is_read(tmp_path):
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8), (3, 64, 64)).copy()
    path = write(tmp_path / "stack.tif", smooth, compression="jpeg", compressionargs={"level": 98}, tile=(32, 32))
    assert np.abs(load_stack(path).image.astype(int) - smooth).max() <= 3


def test_paths_may_be_long_and_in_any_script(tmp_path):
    folder = tmp_path / ("a" * 200) / "線粒體 митохондрия"
    folder.mkdir(parents=True)
    path = write(folder / f"{'é' * 60}.tif", grey())
    assert load_stack(str(path)).shape == SHAPE


def test_a_stack_is_read_into_memory(tmp_path):
    path = write(tmp_path / "stack.tif", grey())
    stack = load_stack(path)
    path.unlink()
    stack.image[:] = 0  # neither needs the file nor changes it


def test_nothing_is_printed_for_damaged_files(tmp_path, caplog, capsys):
    path = write(tmp_path / "stack.tif", grey(), compression="zlib")
    path.write_bytes(path.read_bytes()[:-2000])
    message_of(load_stack, path)
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("tifffile").handlers == []


# --- voxel sizes --------------------------------------------------------------------------------------------


def imagej(tmp_path, unit, per_unit, spacing, **options):
    metadata = {"axes": "ZYX", "spacing": spacing, "unit": unit}
    return write(tmp_path / "stack.tif", grey(), imagej=True, resolution=per_unit, metadata=metadata, **options)


@pytest.mark.parametrize(
    "unit, nm", [("nm", 1), ("um", 1e3), ("micron", 1e3), ("\\u00B5m", 1e3), ("mm", 1e6), ("cm", 1e7), ("inch", 2.54e7)]
)
def test_imagej_voxel_size(tmp_path, unit, nm):
    path = imagej(tmp_path, unit, (0.25 * nm, 0.2 * nm), 8 / nm)  # resolution is (x, y), in pixels per unit
    assert load_stack(path).voxel_size_nm == pytest.approx((8, 5, 4), rel=1e-5)


def test_imagej_writes_a_real_micro_sign_too(tmp_path):
    path = imagej(tmp_path, "XYm", (200, 200), 0.005)
    path.write_bytes(path.read_bytes().replace(b"unit=XYm", "unit=µm".encode()))
    assert load_stack(path).voxel_size_nm == pytest.approx((5, 5, 5), rel=1e-5)


@pytest.mark.parametrize("unit", ["pixel", "parsec", "", "sec"])
def test_an_unknown_unit_gives_no_voxel_size(tmp_path, unit):
    assert load_stack(imagej(tmp_path, unit, (200, 200), 0.005)).voxel_size_nm is None


def test_contradicting_units_give_no_voxel_size(tmp_path):
    path = imagej(tmp_path, "um", (200, 200), 0.005, resolutionunit="CENTIMETER")
    assert load_stack(path).voxel_size_nm is None


def test_without_a_spacing_there_is_no_voxel_size(tmp_path):
    path = write(
        tmp_path / "stack.tif", grey(), imagej=True, resolution=(200, 200), metadata={"axes": "ZYX", "unit": "um"}
    )
    assert load_stack(path).voxel_size_nm is None
    path = write(tmp_path / "stack.tif", grey(), resolution=(2e6, 2e6), resolutionunit="CENTIMETER")
    assert load_stack(path).voxel_size_nm is None


def test_tifffile_voxel_size(tmp_path):
    metadata = {"axes": "ZYX", "spacing": 5.0, "unit": "nm"}
    path = write(tmp_path / "stack.tif", grey(), resolution=(0.25, 0.25), resolutionunit="NONE", metadata=metadata)
    assert load_stack(path).voxel_size_nm == pytest.approx((5, 4, 4))


@pytest.mark.parametrize(
    "units, expected",
    [
        ({}, (5000, 4000, 3000)),  # OME's default is µm
        ({"PhysicalSizeXUnit": "nm"}, (5000, 4000, 3)),
        ({"PhysicalSizeXUnit": "pixel"}, None),
        ({"PhysicalSizeX": 0}, None),
    ],
)
def test_ome_voxel_size(tmp_path, units, expected):
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 5, "PhysicalSizeY": 4, "PhysicalSizeX": 3} | units
    path = write(tmp_path / "stack.ome.tif", grey(), ome=True, metadata=metadata)
    found = load_stack(path).voxel_size_nm
    assert found == (expected and pytest.approx(expected))


def test_the_argument_wins_over_the_file(tmp_path):
    path = imagej(tmp_path, "nm", (0.2, 0.2), 5)
    assert load_stack(path, voxel_size_nm=(30, 8, 8)).voxel_size_nm == (30.0, 8.0, 8.0)


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_are_read_as_a_mask(tmp_path):
    path = write(tmp_path / "labels.tif", mask())
    assert (load_stack(write(tmp_path / "image.tif", grey()), path).labels == (mask() > 0)).all()


def test_smooth_labels_are_cut_with_a_warning(tmp_path):
    smooth = mask()
    smooth[2:4, 4, 7:30] = [[50, *[200] * 22], [127, *[128] * 22]]
    image, path = write(tmp_path / "image.tif", grey()), write(tmp_path / "labels.tif", smooth)
    with pytest.warns(StackWarning, match="labels.tif isn't a mask of two values"):
        assert (load_stack(image, path).labels == (smooth >= 128)).all()


@pytest.mark.parametrize("foreground", [0, 1, 255])
def test_labels_of_one_value_load_but_do_not_train(tmp_path, foreground):
    path = write(tmp_path / "labels.tif", np.full(SHAPE, foreground, "uint8"))
    stack = load_stack(write(tmp_path / "image.tif", grey()), path)
    assert (stack.labels == bool(foreground)).all()
    assert ("foreground" if foreground else "background") in message_of(stack.require_labels)


def test_image_and_labels_of_different_shapes_name_both_files(tmp_path):
    image, labels = write(tmp_path / "image.tif", grey()), write(tmp_path / "labels.tif", mask()[1:])
    text = message_of(load_stack, image, labels)
    assert "image.tif" in text and "labels.tif" in text and str(SHAPE) in text


# --- conversion ---------------------------------------------------------------------------------------------


def test_uint16_is_stretched_between_percentiles():
    values = np.arange(100_001, dtype=np.float64).reshape(1, 1, -1)
    result = to_uint8(values).ravel()
    assert result[100] == 0 and result[99_900] == 255 and result[50_000] in (127, 128)
    assert (np.diff(result.astype(int)) >= 0).all()


def test_a_hot_pixel_does_not_darken_the_rest():
    values = (1000 + 10 * grey("uint16")).astype("uint16")
    values[0, 0, 0] = 65535
    assert to_uint8(values).std() > 60


def test_eight_bit_values_in_uint16_are_kept():
    assert (to_uint8(grey("uint16")) == grey()).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -1e30, 1e308])
def test_a_constant_volume_becomes_0(value):
    assert not to_uint8(np.full(SHAPE, value)).any()


def test_a_nearly_constant_volume_keeps_its_few_other_values():
    values = np.zeros((10, 40, 50), "float32")
    values[0, 0, 0] = 7
    assert to_uint8(values)[0, 0, 0] == 255 and to_uint8(values).sum() == 255


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_widest_and_narrowest_ranges_are_stretched_or_refused(dtype):
    values = np.linspace(0, 1, 200_000).reshape(2, 1000, 100).astype(dtype)
    assert abs(to_uint8(values).mean() - 127.5) < 0.5
    values[0], values[1] = -np.finfo(dtype).max, np.finfo(dtype).max
    if dtype == "float64":
        with pytest.raises(StackError):
            to_uint8(values)
    else:
        assert sorted(set(to_uint8(values).ravel())) == [0, 255]
    values[0], values[1] = 0, np.finfo(dtype).smallest_subnormal
    assert set(to_uint8(values).ravel()) <= {0, 255}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path, bad):
    values = grey("float32")
    values[3, 4, 5] = bad
    assert "NaN or infinite" in message_of(load_stack, write(tmp_path / "stack.tif", values))


@settings(deadline=None, max_examples=60)
@given(arrays.arrays(st.sampled_from(["uint16", "float32", "float64"]), (2, 3, 4)))
def test_any_finite_values_become_uint8_in_the_same_order(values):
    with np.errstate(over="ignore", invalid="ignore"):
        too_wide = not np.isfinite(float(values.max()) - float(values.min()))
    if too_wide:
        with pytest.raises(StackError):
            to_uint8(values)
        return
    result = to_uint8(values)
    order = np.argsort(values, axis=None, kind="stable")
    assert result.dtype == np.uint8 and (np.diff(result.ravel()[order].astype(int)) >= 0).all()


# --- what isn't a stack -------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_its_path(tmp_path):
    path = tmp_path / "nowhere" / "stack.tif"
    assert str(path) in message_of(load_stack, path)
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"hello, this is text\n" * 9, "isn't a TIFF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "isn't a TIFF"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"II*\0", "damaged"),
        (b"II*\0\0\0\0\0" + bytes(50), "no page"),
        (b"II*\0\x08\0\0\0" + bytes(50), "tags"),
        (b"II+\0\x09\0\0\0" + bytes(50), "header"),
    ],
)
def test_a_file_that_is_no_tiff(tmp_path, content, expected):
    path = tmp_path / "stack.tif"
    path.write_bytes(content)
    text = message_of(load_stack, path)
    assert text.startswith("stack.tif ") and expected in text and str(tmp_path) not in text


def test_a_folder_a_pipe_and_a_file_without_permission(tmp_path):
    assert "folder" in message_of(load_stack, tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.tif")
        assert "not a regular file" in message_of(load_stack, tmp_path / "pipe.tif")
    path = write(tmp_path / "stack.tif", grey())
    assert "doesn't exist" in message_of(load_stack, path / "inside")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may read anything
        assert "Permission denied" in message_of(load_stack, path)


@pytest.mark.parametrize(
    "shape, options, expected",
    [
        ((40, 50), {}, "2D"),
        ((40, 50), {"imagej": True}, "2D"),
        ((40, 50), {"ome": True}, "2D"),
        ((40, 50, 3), {"photometric": "rgb"}, "colour"),
        ((9, 40, 50, 3), {"photometric": "rgb"}, "colour"),
        ((6, 48, 64, 3), {"photometric": "rgb", "compression": "jpeg", "tile": (16, 16)}, "colour"),
        ((3, 40, 50), {"photometric": "rgb", "planarconfig": "separate"}, "colour"),
        ((2, 9, 40, 50), {}, "4D"),
        ((2, 9, 40, 50), {"imagej": True, "metadata": {"axes": "TZYX"}}, "4D"),
        ((2, 9, 40, 50), {"ome": True, "metadata": {"axes": "TZYX"}}, "4D"),
        ((6, 2, 40, 50), {"imagej": True, "metadata": {"axes": "ZCYX"}}, "channels"),
        ((3, 40, 50), {"ome": True, "metadata": {"axes": "CYX"}}, "channels"),
        ((6, 48, 64), {"volumetric": True, "tile": (6, 16, 16)}, "one page"),
    ],
)
def test_other_shapes_are_refused(tmp_path, shape, options, expected):
    path = write(tmp_path / "picture.tif", grey(shape=shape), **options)
    assert expected in message_of(load_stack, path)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "uint64", "complex64", "bool"])
def test_other_types_are_refused(tmp_path, dtype):
    path = write(tmp_path / "stack.tif", grey().astype(dtype))
    assert message_of(load_stack, path).startswith("stack.tif holds ")


def test_pages_of_different_sizes_are_refused(tmp_path):
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as writer:
        for size in (40, 40, 38):
            writer.write(grey(shape=(size, 50)), metadata=None)
    assert "page 3 isn't like page 1" in message_of(load_stack, path)


def test_two_volumes_in_one_file_are_refused(tmp_path):
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(grey())
        writer.write(grey())
    message_of(load_stack, path)
    with tifffile.TiffWriter(tmp_path / "stack.ome.tif", ome=True) as writer:
        writer.write(grey(), metadata={"axes": "ZYX"})
        writer.write(grey(), metadata={"axes": "ZYX"})
    assert "2 OME images" in message_of(load_stack, tmp_path / "stack.ome.tif")


# --- damage that leaves a readable file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, found, replaced",
    [
        ({"metadata": {"axes": "ZYX"}}, b"[9, 40, 50]", b"[7, 40, 50]"),
        ({"compression": "zlib"}, b"[9, 40, 50]", b"[8, 40, 50]"),
        ({"imagej": True, "metadata": {"axes": "ZYX"}}, b"images=9\nslices=9", b"images=8\nslices=8"),
        ({"imagej": True, "metadata": {"axes": "ZYX"}}, b"images=9", b"images=5"),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b'SizeZ="9"', b'SizeZ="7"'),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b'SizeZ="9"', b'SizeZ="5"'),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b'SizeY="40"', b'SizeY="41"'),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b"</Pixels>", b"</Pixel>>"),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b'IFD="0"', b'IFD="1"'),
    ],
)
def test_a_declared_shape_that_the_pages_contradict(tmp_path, options, found, replaced):
    path = write(tmp_path / "stack.tif", grey(), **options)
    whole = path.read_bytes()
    assert whole.count(found) == 1 and len(found) == len(replaced)
    path.write_bytes(whole.replace(found, replaced))
    message_of(load_stack, path)


def next_page_pointers(path):
    """Where each page's pointer to the next page stands in a classic little-endian file."""
    data, places = path.read_bytes(), []
    (offset,) = struct.unpack_from("<I", data, 4)
    while offset:
        (count,) = struct.unpack_from("<H", data, offset)
        places.append(offset + 2 + 12 * count)
        (offset,) = struct.unpack_from("<I", data, places[-1])
    return data, places


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"compression": "zlib", "metadata": None}])
def test_a_chain_of_pages_that_ends_early(tmp_path, options):
    path = write(tmp_path / "stack.tif", grey(), **options)
    data, places = next_page_pointers(path)
    assert len(places) == SHAPE[0]
    for place in places[:-1]:
        path.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
        if options or place != places[0]:  # a single page may stand for all that follow, and their pixels are there
            message_of(load_stack, path)
        else:
            assert (load_stack(path).image == grey()).all()


def test_a_chain_of_pages_that_runs_in_a_circle(tmp_path):
    path = write(tmp_path / "stack.tif", grey(), metadata=None)
    data, places = next_page_pointers(path)
    first = data[4:8]
    for place in places:
        path.write_bytes(data[:place] + first + data[place + 4 :])
        assert "circle" in message_of(load_stack, path)


def test_a_page_that_is_another_page_is_refused(tmp_path):
    path = write(tmp_path / "stack.tif", grey(), metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offsets = [page.tags["StripOffsets"] for page in tiff.pages]
        place, (other,) = offsets[3].valueoffset, offsets[2].value
    data = path.read_bytes()
    path.write_bytes(data[:place] + struct.pack("<I", other) + data[place + 4 :])
    assert "overlap" in message_of(load_stack, path)


# --- checksums ----------------------------------------------------------------------------------------------


def test_sha256(tmp_path):
    path = write(tmp_path / "stack.tif", grey())
    digest = file_sha256(path)
    assert len(digest) == 64
    verify_sha256(path, digest.upper())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load_stack(path)  # pixels without compression leave no other trace
    assert "has changed" in message_of(verify_sha256, path, digest)
    assert "doesn't exist" in message_of(verify_sha256, tmp_path / "other.tif", digest)


# --- Stack --------------------------------------------------------------------------------------------------


def test_slices():
    stack = Stack(grey(), mask() > 0, (30, 8, 8), "mine")
    for indices in ([1, 3], range(1, 4, 2), np.array([1, 3]), (1, 3), slice(1, 4, 2)):
        part = stack.slices(indices)
        assert part.shape == (2, 40, 50) and part.name == "mine" and part.voxel_size_nm == (30, 8, 8)
        assert (part.image == stack.image[[1, 3]]).all() and (part.labels == stack.labels[[1, 3]]).all()
    assert np.shares_memory(stack.slices(slice(1, 3)).image, stack.image)
    assert stack.slices([-1]).shape == (1, 40, 50)
    for not_whole in ([1.0], np.arange(9) > 5):
        with pytest.raises(TypeError):
            stack.slices(not_whole)
    for nothing in ([9], [-10], [], range(0), slice(3, 3)):
        message_of(stack.slices, nothing)


@pytest.mark.parametrize(
    "arguments",
    [
        (grey("uint16"),),
        (grey()[0],),
        (grey()[:0],),
        (grey().tolist(),),
        (grey(), mask()),
        (grey(), mask()[1:] > 0),
        (grey(), None, (5, 5)),
        (grey(), None, (5, 5, 0)),
        (grey(), None, (5, 5, np.nan)),
        (grey(), None, 5),
        (grey(), None, ("a", "b", "c")),
    ],
)
def test_parts_that_do_not_make_a_stack(arguments):
    message_of(Stack, *arguments)


def test_what_is_missing_is_asked_for():
    stack = Stack(grey())
    assert "voxel_size_nm" in message_of(stack.require_voxel_size)
    assert "no labels" in message_of(stack.require_labels)
    full = Stack(grey(), mask() > 0, [np.float32(5), 5, 5])
    assert full.require_voxel_size() == (5.0, 5.0, 5.0) and full.require_labels() is full.labels
    with pytest.raises(AttributeError):
        full.image = grey()


def test_the_real_stacks_load_as_tifffile_reads_them(epfl_folder):
    path = epfl_folder / "training_groundtruth.tif"
    assert (read_mask(path) == (tifffile.imread(path) == 255)).all()
