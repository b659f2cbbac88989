import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mitoseg_lib.readers import open_reader
from mitoseg_lib.stacks import StackError, read_mask
from mitoseg_lib.writers import check_target, encode_probabilities, write_slabs

SHAPE = (11, 33, 47)
SIZE = (8.0, 4.0, 5.0)
NAMES = ["a.tif", "a.TIFF", "a.zarr", "a.ome.zarr"]


def mask(shape=SHAPE):
    return np.random.default_rng(0).random(shape) < 0.3


def slabs(values, depth=4):
    return (values[z : z + depth] for z in range(0, len(values), depth))


def write(path, values, **options):
    write_slabs(
        path, slabs(values), values.shape, **({"voxel_size_nm": SIZE, "is_mask": values.dtype == bool} | options)
    )


# --- what is written can be read


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 6), (1, 1, 1), (3, 600, 2), (17, 2, 600)])
def test_what_is_written_comes_back_with_its_voxel_size(tmp_path, name, shape):
    values = mask(shape)
    write(tmp_path / name, values)
    reader = open_reader(tmp_path / name)
    assert reader.shape == shape and reader.dtype == np.uint8
    assert reader.voxel_size_nm == pytest.approx(SIZE)
    one = 1 if "zarr" in name else 255
    assert np.array_equal(reader.read(0, shape[0]), values * np.uint8(one))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("size", [(5.0, 5.0, 5.0), (30.0, 3.7, 3.7), (0.5, 0.25, 0.25), (50, 2000, 2000)])
@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_any_voxel_size_comes_back(tmp_path, name, size):
    write(tmp_path / name, mask(), voxel_size_nm=size)
    assert open_reader(tmp_path / name).voxel_size_nm == pytest.approx(size, rel=1e-6)


def test_the_tiff_is_one_that_imagej_opens(tmp_path):
    write(tmp_path / "a.tif", mask())
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_imagej and len(file.pages) == SHAPE[0]
        found = file.imagej_metadata
        assert (found["slices"], found["unit"], found["spacing"]) == (SHAPE[0], "um", 0.008)
        tags = file.pages[0].tags
        per_um = [tags[key].value[0] / tags[key].value[1] for key in ("YResolution", "XResolution")]
        assert per_um == pytest.approx([250, 200])
        assert np.array_equal(file.asarray(), mask() * np.uint8(255))
        assert set(np.unique(file.asarray())) == {0, 255}
    assert np.array_equal(read_mask(tmp_path / "a.tif"), mask())


def test_the_zarr_is_one_that_ngff_describes(tmp_path):
    write(tmp_path / "a.zarr", mask())
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    image = group.attrs["ome"]
    assert image["version"] == "0.5" and group.metadata.zarr_format == 3
    (scales,) = image["multiscales"]
    assert scales["axes"] == [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    (level,) = scales["datasets"]
    assert level["coordinateTransformations"] == [{"type": "scale", "scale": [8.0, 4.0, 5.0]}]
    array = group[level["path"]]
    assert (array.dtype, array.fill_value) == (np.uint8, 255)
    assert np.array_equal(array[:], mask())


def test_a_chunk_that_is_missing_reads_as_not_computed(tmp_path):
    write(tmp_path / "a.zarr", np.zeros((8, 600, 600), bool))
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["0"]
    chunks = sorted(path for path in (tmp_path / "a.zarr" / "0" / "c").rglob("*") if path.is_file())
    assert len(chunks) == 4 and not array[:].any()  # background is written, not left out
    chunks[0].unlink()
    assert (array[:, :512, :512] == 255).all()


def test_a_changed_chunk_is_noticed(tmp_path):
    write(tmp_path / "a.zarr", mask())
    (chunk,) = (tmp_path / "a.zarr" / "0" / "c" / "0").rglob("0/0")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StackError, match="damaged"):
        open_reader(tmp_path / "a.zarr").read(0, 8)


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
@settings(deadline=None)
def test_probabilities_keep_a_254th(values):
    probabilities = np.array(values, np.float32)
    encoded = encode_probabilities(probabilities)
    assert encoded.dtype == np.uint8 and encoded.max() <= 254
    assert np.abs(encoded / 254 - probabilities).max() <= 1 / 508 + 1e-6


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_probabilities_are_written_alike(tmp_path, name):
    values = encode_probabilities(np.random.default_rng(0).random(SHAPE, np.float32))
    write(tmp_path / name, values)
    assert np.array_equal(open_reader(tmp_path / name).read(0, SHAPE[0]), values)


# --- whole or not at all


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("is_there", [False, True])
def test_an_error_on_the_way_leaves_what_was_there(tmp_path, name, error, is_there):
    if is_there:
        write(tmp_path / name, mask((2, 3, 3)))
    before = listed(tmp_path)

    def failing():
        yield mask()[:4]
        assert listed(tmp_path) != before  # it has begun, under another name
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_slabs(tmp_path / name, failing(), SHAPE, voxel_size_nm=SIZE, is_mask=True, overwrite=True)
    assert listed(tmp_path) == before
    if is_there:
        assert open_reader(tmp_path / name).shape == (2, 3, 3)


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_a_killed_process_leaves_nothing_under_the_name(tmp_path, name):
    code = f"""
        import os, numpy as np
        from mitoseg_lib.writers import write_slabs
        def slabs():
            yield np.ones((4, 30, 30), bool)
            os.kill(os.getpid(), 9)
        write_slabs({name!r}, slabs(), (8, 30, 30), voxel_size_nm=(5, 5, 5), is_mask=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True)
    assert done.returncode == -9, done.stderr
    left = os.listdir(tmp_path)
    assert name not in left and all(other.startswith(".") and other.endswith(".part") for other in left)
    write(tmp_path / name, mask())  # and isn't in the way
    assert open_reader(tmp_path / name).shape == SHAPE


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_a_full_disk_is_a_sentence(tmp_path, name):
    resource = pytest.importorskip("resource")
    code = f"""
        import resource, numpy as np
        from mitoseg_lib.writers import write_slabs
        import tifffile, zarr, zarr.codecs
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        values = np.random.default_rng(0).integers(0, 255, (8, 200, 200), np.uint8)
        try:
            write_slabs({name!r}, [values], values.shape, voxel_size_nm=(5, 5, 5), is_mask=False)
        except ValueError as error:
            print(error)
    """
    assert resource.RLIM_INFINITY in resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"{name} couldn't be written ({os.strerror(errno.EFBIG)})"), done.stderr
    assert done.stdout.count("\n") == 1 and "make room" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_overwriting_must_be_asked_for(tmp_path, name):
    write(tmp_path / name, mask((2, 3, 3)))
    with pytest.raises(StackError, match=rf"^{name} exists already.*--overwrite"):
        write(tmp_path / name, mask())
    assert open_reader(tmp_path / name).shape == (2, 3, 3)
    write(tmp_path / name, mask(), overwrite=True)
    assert open_reader(tmp_path / name).shape == SHAPE
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_what_someone_else_put_there_in_the_meantime_stays(tmp_path, name):
    def slow():
        yield mask()
        (tmp_path / name).write_text("mine")

    with pytest.raises(StackError, match="exists already"):
        write_slabs(tmp_path / name, slow(), SHAPE, voxel_size_nm=SIZE, is_mask=True)
    assert (tmp_path / name).read_text() == "mine" and os.listdir(tmp_path) == [name]


def test_only_a_zarr_is_replaced_by_a_zarr_and_a_file_by_a_file(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("years")
    (tmp_path / "a.tif").mkdir()
    for name in ("a.zarr", "a.tif"):
        with pytest.raises(StackError, match="is a folder"):
            write(tmp_path / name, mask(), overwrite=True)
    assert listed(tmp_path) == ["a.tif", "a.zarr", "a.zarr/thesis.txt"]


@pytest.mark.parametrize("parts", [[mask()[:5]], [mask(), mask()], [mask()[:, 1:]]])
@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_slabs_that_are_not_the_volume_are_refused(tmp_path, parts, name):
    with pytest.raises(ValueError, match="pass"):
        write_slabs(tmp_path / name, parts, SHAPE, voxel_size_nm=SIZE, is_mask=True)
    assert os.listdir(tmp_path) == []


# --- what can't be a target


@pytest.mark.parametrize("name", ["a", "a.png", "a.tif.gz", "zarr", ".tif"])
def test_a_suffix_must_be_known(tmp_path, name):
    with pytest.raises(StackError, match=r"\.tif, \.tiff or \.zarr was expected"):
        check_target(tmp_path / name, SHAPE)


def test_the_folder_must_be_there(tmp_path):
    with pytest.raises(StackError, match="isn't a folder"):
        check_target(tmp_path / "nowhere" / "a.tif", SHAPE)


def test_a_tiff_ends_at_4_gb(tmp_path):
    check_target(tmp_path / "a.tif", (100, 6400, 6400))
    with pytest.raises(StackError, match=r"a\.tif would hold 4\.7 GB.*\.zarr"):
        check_target(tmp_path / "a.tif", (115, 6400, 6400))
    check_target(tmp_path / "a.zarr", (100_000, 6400, 6400))


def test_the_input_is_never_replaced(tmp_path):
    (tmp_path / "a.tif").touch()
    (tmp_path / "b.tif").symlink_to("a.tif")
    (tmp_path / "slices").mkdir()
    for source, target in (("a.tif", "a.tif"), ("a.tif", "b.tif"), ("b.tif", "a.tif"), ("slices", "slices/a.tif")):
        with pytest.raises(StackError, match="input"):
            check_target(tmp_path / target, SHAPE, overwrite=True, source=tmp_path / source)
    (tmp_path / "a.zarr" / "raw").mkdir(parents=True)
    with pytest.raises(StackError, match="input"):
        check_target(tmp_path / "a.zarr", SHAPE, overwrite=True, source=tmp_path / "a.zarr" / "raw")
    check_target(tmp_path / "c.tif", SHAPE, source=tmp_path / "a.tif")


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("only where permissions bind")
    tmp_path.chmod(0o500)
    with pytest.raises(StackError, match="couldn't be written"):
        write(tmp_path / "a.tif", mask())
