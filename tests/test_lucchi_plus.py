"""The re-annotated labels: from a zip as the real one is said to be, over a real server, to a stack."""

import io
import re
import shutil
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_server import serving
from typer.testing import CliRunner

from mitoseg_lib import datasets
from mitoseg_lib.cli import app
from mitoseg_lib.datasets import EPFL_FILES, fetch_lucchi_plus, load_lucchi_plus
from mitoseg_lib.lucchi_plus import read_labels, require_same_tissue
from mitoseg_lib.stacks import StackError, file_sha256

SHAPE = (12, 24, 40)
NUMBERS = range(12)


def png(pixels, mode=None):
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "png") if mode else Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def labels_of(shape=SHAPE, seed=0):
    """A bar that is one column longer in each slice, so that each slice differs."""
    labels = np.zeros(shape, bool)
    for z, part in enumerate(labels):
        part[4 + seed : 9, : 3 + z % (shape[2] - 5)] = True
    return labels


def image_of(shape=SHAPE, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (shape[0], shape[1] // 8, shape[2] // 8), np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


def folders(shape=SHAPE, top="Lucchi++/"):
    """Names and contents of all files, as the code of others reads them."""
    files = {}
    for seed, part in enumerate(("Train", "Test")):
        for z, (image, labels) in enumerate(zip(image_of(shape, seed), labels_of(shape, seed), strict=True)):
            files[f"{top}{part}_In/mask{z:04d}.png"] = png(image)
            files[f"{top}{part}_Out/{z}.png"] = png(labels.astype(np.uint8) * 255)
    return files


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):  # as text: 10.png before 2.png
            archive.writestr(name, files[name])
    return path


def message_of(function, *arguments, **options):
    with pytest.raises(StackError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"[a-z]\. [A-Z]", text), text
    return text


# --- what the zip may look like


@pytest.mark.parametrize("top", ["Lucchi++/", "", "a/b/", "./"])
def test_labels_lie_in_the_order_of_their_numbers_under_any_top_folder(tmp_path, top):
    path = write_zip(tmp_path / "labels.zip", folders(top=top))
    assert np.array_equal(read_labels(path, "training", SHAPE), labels_of(seed=0))
    assert np.array_equal(read_labels(path, "testing", SHAPE), labels_of(seed=1))


@pytest.mark.parametrize("first", [0, 1, 100])
def test_numbers_may_begin_anywhere(tmp_path, first):
    files = folders()
    for z in NUMBERS:
        files[f"Lucchi++/Test_Out/new{z + first}.PNG"] = files.pop(f"Lucchi++/Test_Out/{z}.png")
    path = write_zip(tmp_path / "labels.zip", files)
    assert np.array_equal(read_labels(path, "testing", SHAPE), labels_of(seed=1))


def test_what_macs_and_windows_add_is_left_alone(tmp_path):
    files = folders() | {
        "__MACOSX/Lucchi++/Test_Out/._0.png": b"x",
        "__MACOSX/Test_Out/0.png": b"x",
        "Lucchi++/Test_Out/.DS_Store": b"x",
        "Lucchi++/Test_Out/._3.png": b"x",
        "Lucchi++/Test_Out/Thumbs.db": b"x",
        "Lucchi++/Test_Out/": b"",
        "Lucchi++/readme.txt": b"x",
        "Kasthuri++/Test_Output/0.png": b"x",
    }
    path = write_zip(tmp_path / "labels.zip", files)
    assert np.array_equal(read_labels(path, "testing", SHAPE), labels_of(seed=1))


def colours(mask, foreground, background):
    return np.where(mask[..., None], np.uint8(foreground), np.uint8(background))


KINDS_OF_PNG = {
    "0 and 1": lambda mask: png(mask.astype(np.uint8)),
    "one bit": lambda mask: png(mask),
    "palette": lambda mask: png(mask.astype(np.uint8) * 255, "P"),
    "grey with alpha": lambda mask: png(mask.astype(np.uint8) * 255, "LA"),
    "RGB": lambda mask: png(mask.astype(np.uint8) * 255, "RGB"),
    "RGBA": lambda mask: png(mask.astype(np.uint8) * 255, "RGBA"),
    "transparent black": lambda mask: png(colours(mask, [255] * 4, [0] * 4)),
    "transparent white": lambda mask: png(colours(mask, [255] * 4, [255, 255, 255, 0])),
}


@pytest.mark.parametrize("kind", KINDS_OF_PNG)
def test_white_is_foreground_in_every_kind_of_png(tmp_path, kind):
    files = folders()
    for z, mask in enumerate(labels_of(seed=1)):
        files[f"Lucchi++/Test_Out/{z}.png"] = KINDS_OF_PNG[kind](mask)
    path = write_zip(tmp_path / "labels.zip", files)
    assert np.array_equal(read_labels(path, "testing", SHAPE), labels_of(seed=1))


def test_nothing_is_written_whatever_the_names_are(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_zip(folder / "labels.zip", folders(top="../../") | {"../evil.txt": b"x", "/evil.txt": b"x"})
    assert np.array_equal(read_labels(path, "testing", SHAPE), labels_of(seed=1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"] and len(list(folder.iterdir())) == 1


def without(*names):
    return lambda files: {name: data for name, data in files.items() if name not in names}


def with_file(name, data):
    return lambda files: files | {name: data}


OUT = "Lucchi++/Test_Out/"
NOISE = np.random.default_rng(0).integers(0, 256, SHAPE[1:], np.uint8)  # which doesn't get smaller in a PNG
WRONG = {
    "a slice is missing": (without(f"{OUT}5.png"), "11 PNGs, numbered 0 to 11, in Test_Out, but 12"),
    "the last one is missing": (without(f"{OUT}11.png"), "11 PNGs, numbered 0 to 10"),
    "one more": (with_file(f"{OUT}12.png", b""), "13 PNGs, numbered 0 to 12"),
    "a gap": (lambda files: with_file(f"{OUT}12.png", b"")(without(f"{OUT}5.png")(files)), "numbered 0 to 12"),
    "no folder": (without(*(f"{OUT}{z}.png" for z in NUMBERS)), "has 0 PNGs, in Test_Out"),
    "two with a number": (with_file(f"{OUT}05.png", b""), "05.png"),
    "two folders": (with_file("copy/Test_Out/3.png", b""), "one numbered PNG a slice"),
    "no number": (with_file(f"{OUT}all.png", b""), "all.png, but one numbered PNG"),
    "another size": (with_file(f"{OUT}7.png", png(np.zeros((40, 24), np.uint8))), f"40 x 24 pixels in {OUT}7.png"),
    "16 bits": (with_file(f"{OUT}7.png", png(np.zeros((24, 40), np.uint16))), "more than 8 bits a pixel"),
    "a grey level": (with_file(f"{OUT}7.png", png(np.full((24, 40), 9, np.uint8))), "values 0, 9, 255 in Test_Out"),
    "no PNG": (with_file(f"{OUT}7.png", b"<html>"), "damaged or cut off"),
    "half a PNG": (with_file(f"{OUT}7.png", png(NOISE)[:500]), "damaged or cut off"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_are_not_as_expected_are_refused(tmp_path, case):
    change, said = WRONG[case]
    path = write_zip(tmp_path / "labels.zip", change(folders()))
    text = message_of(read_labels, path, "testing", SHAPE)
    assert text.startswith("labels.zip ") and said in text and str(tmp_path) not in text


def test_labels_without_foreground_are_refused(tmp_path):
    files = folders() | {f"{OUT}{z}.png": png(np.zeros((24, 40), np.uint8)) for z in NUMBERS}
    assert "the values 0 in" in message_of(read_labels, write_zip(tmp_path / "labels.zip", files), "testing", SHAPE)


def test_a_zip_that_is_damaged_is_refused(tmp_path):
    whole = write_zip(tmp_path / "labels.zip", folders()).read_bytes()
    place = whole.index(b"Test_Out/7.png") + 40
    changed = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
    for number, data in enumerate((whole[: len(whole) // 2], b"", b"<html></html>", changed)):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        assert "damaged or cut off" in message_of(read_labels, path, "testing", SHAPE)
    assert "doesn't exist" in message_of(read_labels, tmp_path / "nowhere.zip", "testing", SHAPE)


# --- whether the labels belong to a stack


def test_the_same_tissue_may_have_other_grey_levels(tmp_path):
    path, image = write_zip(tmp_path / "labels.zip", folders()), image_of(seed=1)
    require_same_tissue(path, "testing", image)
    require_same_tissue(path, "testing", image // 2 + 30)
    noise = np.random.default_rng(0).normal(0, 30, SHAPE)
    require_same_tissue(path, "testing", np.clip(image + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("change", ["other part", "one slice later", "upside down", "reversed", "inverted", "blank"])
def test_other_tissue_is_refused(tmp_path, change):
    path, image = write_zip(tmp_path / "labels.zip", folders()), image_of(seed=1)
    other = {
        "other part": image_of(seed=0),
        "one slice later": np.roll(image, 1, axis=0),
        "upside down": image[:, ::-1],
        "reversed": image[::-1],
        "inverted": 255 - image,
        "blank": np.zeros_like(image),
    }[change]
    text = message_of(require_same_tissue, path, "testing", other)
    assert re.match(r"labels.zip shows other tissue in slice \d+ of Test_In than testing.tif", text)


def test_a_slice_that_is_more_like_its_neighbour_is_refused(tmp_path):
    """As a stack would be that lacks its first slice, where neighbours are near copies."""
    path, image = write_zip(tmp_path / "labels.zip", folders()), image_of(seed=1).astype(int)
    smooth = ((9 * np.roll(image, 1, axis=0) + 5 * image) / 14).astype(np.uint8)
    assert "other tissue" in message_of(require_same_tissue, path, "testing", smooth)


# --- fetching and loading


@pytest.fixture
def served(tmp_path):
    """A folder with a zip of a few small slices."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_zip(folder / "lucchi_pp.zip", folders())
    return folder


@pytest.fixture
def server(served, monkeypatch):
    with serving(served) as running:
        monkeypatch.setattr(datasets, "EPFL_SHAPE", SHAPE)
        monkeypatch.setattr(datasets, "LUCCHI_PLUS_URL", f"{running.url}lucchi_pp.zip")
        monkeypatch.setattr(datasets, "LUCCHI_PLUS_SHA256", file_sha256(served / "lucchi_pp.zip"))
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lucchi++"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch_then_load(cache, server, served, tmp_path, monkeypatch, capsys):
    assert fetch_lucchi_plus() == cache / "lucchi_pp.zip" and names(cache) == ["lucchi_pp.zip"]
    assert "100%" in capsys.readouterr().err  # the progress bar
    fetch_lucchi_plus()
    assert server.requests == ["lucchi_pp.zip"]  # not downloaded twice
    given = tmp_path / "given"
    given.mkdir()
    for seed, part in enumerate(("training", "testing")):
        tifffile.imwrite(given / f"{part}.tif", image_of(SHAPE, seed) // 2 + 20, compression="zlib")
        mask = np.zeros(SHAPE, np.uint8)
        mask[0, 0, 0] = 255  # the old labels
        tifffile.imwrite(given / f"{part}_groundtruth.tif", mask, compression="zlib")
    monkeypatch.setenv("MITOSEG_DATA", str(given))
    for seed, part in enumerate(("training", "testing")):
        stack = load_lucchi_plus(part)
        assert np.array_equal(stack.labels, labels_of(SHAPE, seed))
        assert np.array_equal(stack.image, image_of(SHAPE, seed) // 2 + 20)
        assert stack.voxel_size_nm == (5.0, 5.0, 5.0) and stack.name == f"{part}, Lucchi++"
    assert names(given) == sorted(EPFL_FILES) and server.requests == ["lucchi_pp.zip"]
    (given / "training.tif").replace(given / "kept")
    (given / "testing.tif").replace(given / "training.tif")
    (given / "kept").replace(given / "testing.tif")
    assert "other tissue" in message_of(load_lucchi_plus, "training")


def test_a_zip_beside_the_given_stacks_is_used(cache, server, served, monkeypatch):
    monkeypatch.setenv("MITOSEG_DATA", str(served))
    assert fetch_lucchi_plus() == served / "lucchi_pp.zip"
    assert server.requests == [] and not cache.exists()
    monkeypatch.setattr(datasets, "LUCCHI_PLUS_SHA256", "0" * 64)
    assert message_of(fetch_lucchi_plus).startswith("lucchi_pp.zip has changed")


TROUBLES = {
    "ends early": "broke off",
    "ends early, length unknown": "bytes and the sha256",
    "html": "bytes and the sha256",
    404: "404",
    503: "503",
    b"": "0 bytes and the sha256",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_failed_download_leaves_nothing(cache, server, trouble):
    server.trouble["lucchi_pp.zip"] = trouble
    text = message_of(fetch_lucchi_plus)
    assert text.startswith("lucchi_pp.zip ") and re.search(TROUBLES[trouble], text)
    assert str(cache) not in text and "127.0.0.1" not in text and "EPFL" not in text
    assert names(cache) == []
    server.trouble.clear()
    assert fetch_lucchi_plus().is_file()


def test_a_zip_with_the_right_sha256_and_wrong_slices_is_refused(cache, server, monkeypatch):
    """Were the sha256 that of another file, the slices would still be looked at."""
    monkeypatch.setattr(datasets, "EPFL_SHAPE", (165, 768, 1024))
    assert "has 12 PNGs, numbered 0 to 11, in Train_Out, but 165" in message_of(fetch_lucchi_plus)
    assert names(cache) == []


def test_a_cached_zip_that_changed_is_fetched_again(cache, server, served):
    cache.mkdir(parents=True)
    (cache / "lucchi_pp.zip").write_bytes(b"half of a file")
    assert file_sha256(fetch_lucchi_plus()) == file_sha256(served / "lucchi_pp.zip")


def test_the_command_says_where_the_labels_are(cache, server):
    result = CliRunner().invoke(app, ["fetch", "lucchi++"])
    assert result.exit_code == 0, result.output
    assert f"The lucchi++ labels are in {cache / 'lucchi_pp.zip'}" in result.stdout.replace("\n", "")


def test_offline_is_one_sentence_and_exit_code_1(cache):
    result = CliRunner().invoke(app, ["fetch", "lucchi++"])
    assert result.exit_code == 1 and result.stdout == ""
    text = message_of(fetch_lucchi_plus)
    assert text in result.stderr and "`mitoseg fetch lucchi++` online" in text and "lucchi_pp.zip, too" in text


def test_another_address_must_have_the_same_file(cache, server, served, tmp_path):
    shutil.copy(served / "lucchi_pp.zip", served / "copy.zip")
    assert fetch_lucchi_plus(url=f"{server.url}copy.zip") == cache / "lucchi_pp.zip"
    assert server.requests == ["copy.zip"]


def test_other_parts_do_not_exist(cache):
    assert "'training' and 'testing'" in message_of(load_lucchi_plus, "train")
