import json
import os
import pickle
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib.readers import FolderReader, TiffReader, ZarrReader, natural_order, open_reader
from mitoseg_lib.stacks import StackError, load_stack


def volume(shape=(5, 7, 9), dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def assert_reads(reader, values):
    """All of it, every single slice, and slabs that don't start at 0."""
    assert (reader.shape, reader.dtype) == (values.shape, values.dtype.newbyteorder("="))
    depth = len(values)
    ranges = [(0, depth), *((z, z + 1) for z in range(depth)), (depth // 2, depth)]
    for start, stop in ranges:
        found = reader.read(start, stop)
        assert found.dtype == reader.dtype and found.dtype.isnative
        assert np.array_equal(found, values[start:stop])
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).read(0, 1), values[:1])  # as workers get it


def assert_refused(path, *words):
    with pytest.raises(StackError) as caught:
        reader = open_reader(path)
        reader.read(0, reader.shape[0])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
    return message


# --- TIFF


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"compression": "zlib"},
        {"compression": "lzw", "predictor": True},
        {"tile": (16, 16)},
        {"rowsperstrip": 2},
        {"bigtiff": True, "byteorder": ">"},
        {"byteorder": ">", "compression": "zlib"},
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_slabs_of_every_flavour_of_tiff(tmp_path, options, dtype):
    values = volume(dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    reader = open_reader(tmp_path / "a.tif")
    assert isinstance(reader, TiffReader) and reader.name == "a.tif"
    assert_reads(reader, values)


def test_slabs_of_one_page_that_all_slices_follow(tmp_path):
    """As ImageJ writes large volumes."""
    values = volume()
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    assert len(tifffile.TiffFile(tmp_path / "a.tif").pages) == 1
    assert_reads(open_reader(tmp_path / "a.tif"), values)


def test_a_single_2d_tiff_is_a_stack_of_one_slice(tmp_path):
    values = volume((1, 7, 9))
    tifffile.imwrite(tmp_path / "a.tif", values[0])
    assert_reads(open_reader(tmp_path / "a.tif"), values)
    with pytest.raises(StackError, match="one 2D image"):  # a labelled stack still has to be one
        load_stack(tmp_path / "a.tif")


def test_a_tiff_states_its_voxel_size(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif",
        volume(),
        imagej=True,
        resolution=(1 / 0.004, 1 / 0.005),
        metadata={"axes": "ZYX", "spacing": 0.008, "unit": "um"},
    )
    assert open_reader(tmp_path / "a.tif").voxel_size_nm == pytest.approx((8, 5, 4))


def test_a_tiff_that_was_cut_or_replaced_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume())
    reader = open_reader(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(StackError, match=r"^a\.tif is damaged .*its size changed"):
        reader.read(4, 5)
    path.unlink()
    with pytest.raises(StackError, match="doesn't exist"):
        reader.read(0, 1)


def test_damage_in_a_page_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume((5, 60, 60)), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[2].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    reader = open_reader(path)
    reader.read(0, 2)
    with pytest.raises(StackError, match=r"^a\.tif is damaged"):
        reader.read(2, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((4, 5, 6, 3), np.uint8), ["colour"]),
        (np.zeros((5, 5, 6), np.complex64), ["complex"]),
    ],
)
def test_what_is_not_grey_is_refused(tmp_path, values, words):
    options = {"photometric": "rgb"} if values.ndim == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    assert_refused(tmp_path / "a.tif", "a.tif", *words)


def test_what_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "a.tif", str(tmp_path), "doesn't exist")
    (tmp_path / "a.txt").write_text("a stack")
    assert_refused(tmp_path / "a.txt", "isn't a TIFF")
    (tmp_path / "b.tif").touch()
    assert_refused(tmp_path / "b.tif", "is empty")


# --- folders


def save_png(path, grey):
    path.write_bytes(imagecodecs.png_encode(grey))


def save_slices(folder, values, names, suffix):
    folder.mkdir(exist_ok=True)
    for name, grey in zip(names, values, strict=True):
        path = folder / f"{name}{suffix}"
        save_png(path, grey) if suffix.lower() == ".png" else tifffile.imwrite(path, grey)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".TIFF"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_folder_is_read_in_natural_order(tmp_path, suffix, dtype):
    values = volume(dtype=dtype)
    names = ["slice1", "slice2", "Slice9", "slice10", "slice100"]
    save_slices(tmp_path / "stack", values, names, suffix)
    (tmp_path / "stack" / "notes.txt").write_text("5 nm")
    (tmp_path / "stack" / f"._slice1{suffix}").write_bytes(b"what macOS leaves")
    reader = open_reader(tmp_path / "stack")
    assert isinstance(reader, FolderReader) and reader.voxel_size_nm is None
    assert f"slice1{suffix} to slice100{suffix}" in reader.description
    assert_reads(reader, values)


def test_a_folder_of_float_tiffs(tmp_path):
    values = volume((2, 5, 6), np.float32)
    save_slices(tmp_path / "stack", values, ["b", "c"], ".tif")
    assert_reads(open_reader(f"{tmp_path}/stack/"), values)


def test_an_interlaced_png_and_one_by_another_writer(tmp_path):
    from PIL import Image

    values = volume((2, 33, 21))
    Image.fromarray(values[0]).save(tmp_path / "1.png", optimize=True)
    Image.fromarray(values[1]).save(tmp_path / "2.png", interlace=True)
    assert_reads(open_reader(tmp_path), values)
    wide = volume((1, 33, 21), np.uint16)
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide[0]).save(tmp_path / "wide" / "1.png")
    assert_reads(open_reader(tmp_path / "wide"), wide)


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1))
@settings(deadline=None)
def test_numbers_in_names_are_sorted_as_numbers(numbers):
    names = [f"a{number}_b.tif" for number in numbers]
    assert sorted(names, key=natural_order) == [f"a{number}_b.tif" for number in sorted(numbers)]


def test_names_of_all_kinds_can_be_compared():
    names = ["", "1", "a", "a1b2", "a01b2", "1a", "²", "A10", "٣", "a-b"]
    assert sorted(sorted(names, key=natural_order), key=natural_order) == sorted(names, key=natural_order)
    assert natural_order("slice2") < natural_order("Slice10")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("other", [np.zeros((7, 8), np.uint8), np.zeros((7, 9), np.uint16)])
def test_slices_of_different_kinds_are_refused(tmp_path, suffix, other):
    save_slices(tmp_path, volume((2, 7, 9)), ["1", "2"], suffix)
    save_slices(tmp_path, [other], ["10"], suffix)
    assert_refused(tmp_path, f"10{suffix} is {other.dtype} of 7 x {other.shape[1]}", f"1{suffix} is uint8 of 7 x 9")


def test_a_folder_that_is_no_stack_is_refused(tmp_path):
    assert_refused(tmp_path, tmp_path.name, "is empty")
    (tmp_path / "a.jpg").touch()
    assert_refused(tmp_path, "holds a.jpg,")
    save_slices(tmp_path, volume((1, 7, 9)), ["1"], ".png")
    save_slices(tmp_path, volume((1, 7, 9)), ["2"], ".tif")
    assert_refused(tmp_path, "1 TIFF and 1 PNG")


def test_a_folder_with_a_whole_stack_in_it_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", volume())
    assert_refused(tmp_path, "stack.tif holds 5 slices")


@pytest.mark.parametrize(
    ("grey", "words"),
    [(np.zeros((4, 5, 3), np.uint8), "colour"), (np.zeros((4, 5, 2), np.uint8), "colour")],
)
def test_a_colour_png_is_refused(tmp_path, grey, words):
    save_png(tmp_path / "1.png", grey)
    assert_refused(tmp_path, "1.png", words)


def test_a_png_of_single_bits_is_refused(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((4, 5), bool)).save(tmp_path / "1.png")
    assert_refused(tmp_path, "1 bits")


def test_no_damaged_png_is_read_as_if_it_were_whole(tmp_path):
    grey = volume((1, 40, 40))[0]
    content = imagecodecs.png_encode(grey)
    path = tmp_path / "1.png"
    rng = np.random.default_rng(0)
    damages = [content[:n] for n in (0, 5, 20, 33, 100, len(content) // 2, len(content) - 20)]
    for place in rng.integers(0, len(content), 60):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        damages.append(bytes(changed))
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            found = open_reader(tmp_path).read(0, 1)
        except StackError as error:
            assert str(error).startswith("1.png ")
            refused += 1
        else:
            assert np.array_equal(found[0], grey)
    assert refused > 60


def test_a_png_with_a_wrong_header_checksum_is_refused(tmp_path):
    content = bytearray(imagecodecs.png_encode(volume((1, 4, 5))[0]))
    content[19] = 6  # its width
    (tmp_path / "1.png").write_bytes(content)
    assert_refused(tmp_path, "checksum")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")  # now the pixels don't fit
    (tmp_path / "1.png").write_bytes(content)
    assert_refused(tmp_path, "1.png")


# --- Zarr


def save_zarr(path, values, version=3, **options):
    options = {"chunks": (2, 4, 4)[-values.ndim :], "zarr_format": version} | options
    array = zarr.create_array(path, shape=values.shape, dtype=values.dtype, **options)
    array[...] = values
    return array


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<f4", ">f8"])
def test_slabs_of_a_zarr_array(tmp_path, version, dtype):
    values = volume(dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    save_zarr(tmp_path / "a.zarr", values, version)
    reader = open_reader(tmp_path / "a.zarr")
    assert isinstance(reader, ZarrReader) and reader.voxel_size_nm is None
    assert (reader.name, reader.chunk_depth) == ("a.zarr", 2) and f"version {version}" in reader.description
    assert_reads(reader, values)


def test_a_sharded_array_is_read_by_shards(tmp_path):
    values = volume((9, 8, 8))
    save_zarr(tmp_path / "a.zarr", values, chunks=(2, 4, 4), shards=(4, 8, 8))
    assert open_reader(tmp_path / "a.zarr").chunk_depth == 4
    assert_reads(open_reader(tmp_path / "a.zarr"), values)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
def test_leading_axes_of_length_1_are_left_out(tmp_path, leading):
    values = volume()
    save_zarr(tmp_path / "a.zarr", values.reshape(leading + values.shape), chunks=(1,) * len(leading) + (2, 4, 4))
    assert_reads(open_reader(tmp_path / "a.zarr"), values)


def test_a_2d_array_is_one_slice(tmp_path):
    values = volume((1, 7, 9))
    save_zarr(tmp_path / "a.zarr", values[0])
    assert_reads(open_reader(tmp_path / "a.zarr"), values)


def save_ome(path, values, *, version="0.5", axes="zyx", unit="nanometer", scale=(8, 4, 4), of_all=None):
    """An OME-Zarr of two levels, by the words of the specification."""
    named = [{"name": axis, "type": "space"} | ({"unit": unit} if unit and axis in "zyx" else {}) for axis in axes]
    image = {
        "axes": list(axes) if version == "0.3" else named,
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [{"type": "scale", "scale": [s * 2**level for s in scale]}],
            }
            for level in (0, 1)
        ],
    }
    if of_all:
        image["coordinateTransformations"] = [{"type": "scale", "scale": of_all}]
    attributes = {"multiscales": [image | {"version": version}]}
    is_3 = version == "0.5"
    group = zarr.create_group(
        path,
        zarr_format=3 if is_3 else 2,
        attributes={"ome": attributes | {"version": version}} if is_3 else attributes,
    )
    for level in (0, 1):
        small = values[..., :: 2**level, :: 2**level]
        group.create_array(str(level), shape=small.shape, dtype=small.dtype, chunks=small.shape)[...] = small


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("unit", "scale", "expected"),
    [
        ("nanometer", (8, 4, 5), (8, 4, 5)),
        ("micrometer", (0.008, 0.004, 0.005), (8, 4, 5)),
        ("angstrom", (80, 40, 50), (8, 4, 5)),
        ("parsec", (8, 4, 5), None),
        (None, (8, 4, 5), None),
        ("nanometer", (8, 0, 5), None),
    ],
)
def test_an_ome_zarr_states_its_voxel_size(tmp_path, version, unit, scale, expected):
    values = volume()
    save_ome(tmp_path / "a.zarr", values, version=version, unit=unit, scale=scale)
    reader = open_reader(tmp_path / "a.zarr")
    assert reader.voxel_size_nm == (expected and pytest.approx(expected))
    assert_reads(reader, values)


def test_a_level_inside_an_ome_zarr_has_its_own_voxel_size(tmp_path):
    values = volume((4, 8, 8))
    save_ome(tmp_path / "a.zarr", values, scale=(4, 4, 4))
    reader = open_reader(tmp_path / "a.zarr" / "1")
    assert reader.voxel_size_nm == (8, 8, 8)
    assert_reads(reader, values[:, ::2, ::2])


def test_the_scale_of_the_whole_image_counts_too(tmp_path):
    save_ome(tmp_path / "a.zarr", volume(), scale=(1, 1, 1), of_all=(8, 4, 4))
    assert open_reader(tmp_path / "a.zarr").voxel_size_nm == (8, 4, 4)


def test_all_five_axes(tmp_path):
    values = volume()
    save_ome(tmp_path / "a.zarr", values[None, None], version="0.4", axes="tczyx", scale=(1, 1, 8, 4, 4))
    reader = open_reader(tmp_path / "a.zarr")
    assert reader.voxel_size_nm == (8, 4, 4)
    assert_reads(reader, values)


def test_axes_without_units_give_no_voxel_size(tmp_path):
    save_ome(tmp_path / "a.zarr", volume(), version="0.3")
    assert open_reader(tmp_path / "a.zarr").voxel_size_nm is None


def test_zarrs_that_are_not_one_volume_are_refused(tmp_path):
    save_ome(tmp_path / "channels.zarr", volume((2, 4, 5, 6)), axes="czyx", scale=(1, 8, 4, 4))
    assert_refused(tmp_path / "channels.zarr", "channels.zarr has shape (2, 4, 5, 6)")
    save_ome(tmp_path / "order.zarr", volume(), axes="xyz")
    assert_refused(tmp_path / "order.zarr", "axes x, y, z")
    save_zarr(tmp_path / "line.zarr", volume((5,)), chunks=(5,))
    assert_refused(tmp_path / "line.zarr", "shape (5,)")
    save_zarr(tmp_path / "none.zarr", np.zeros((0, 4, 4), np.uint8))
    assert_refused(tmp_path / "none.zarr", "shape (0, 4, 4)")
    group = zarr.create_group(tmp_path / "group.zarr")
    assert_refused(tmp_path / "group.zarr", "no array")
    group.create_array("raw", shape=(2, 2, 2), dtype="u1")
    assert_refused(tmp_path / "group.zarr", 'the arrays "raw"', "path of an array")
    assert open_reader(tmp_path / "group.zarr" / "raw").shape == (2, 2, 2)


def test_damaged_zarrs_are_refused(tmp_path):
    values = volume()
    path = tmp_path / "a.zarr"
    save_zarr(path, values, compressors=[zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()])
    chunk = path / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    assert_refused(path, "a.zarr is damaged", "checksum")
    chunk.write_bytes(content[:3])
    assert_refused(path, "a.zarr is damaged")
    (path / "zarr.json").write_text("{")
    assert_refused(path, "a.zarr is damaged")
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 4}))
    assert_refused(path, "a.zarr")


def test_ome_metadata_that_make_no_sense_are_refused(tmp_path):
    save_ome(tmp_path / "a.zarr", volume())
    path = tmp_path / "a.zarr" / "zarr.json"
    whole = json.loads(path.read_text())
    for change in (
        {"datasets": []},
        {"datasets": [{"path": "7"}]},
        {"datasets": 3},
        {"axes": ["z"]},
        {"axes": [1, 2, 3]},
    ):
        whole_image = whole["attributes"]["ome"]["multiscales"][0]
        changed = json.loads(json.dumps(whole))
        changed["attributes"]["ome"]["multiscales"][0] = whole_image | change
        path.write_text(json.dumps(changed))
        assert_refused(tmp_path / "a.zarr", "a.zarr")


def test_a_folder_without_permission_is_a_sentence(tmp_path):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("only where permissions bind")
    (tmp_path / "a").mkdir(mode=0)
    assert_refused(tmp_path / "a", "can't be read")
