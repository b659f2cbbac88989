import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from small_server import serving

from mitoseg_lib import datasets
from mitoseg_lib.datasets import (
    EPFL_FILES,
    EPFL_SHAPE,
    describe_epfl,
    describe_example,
    fetch_epfl,
    load_epfl,
    load_example,
)
from mitoseg_lib.stacks import StackError, file_sha256


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """Four small files of the right structure: blank slices, and some noise in one."""
    folder = tmp_path_factory.mktemp("stand-ins")
    rng = np.random.default_rng(0)
    for number, name in enumerate(EPFL_FILES):
        values = np.zeros(EPFL_SHAPE, np.uint8)
        values[number] = rng.choice([0, 255], EPFL_SHAPE[1:]) if "groundtruth" in name else rng.integers(0, 255, 1024)
        tifffile.imwrite(folder / name, values, compression="zlib")
    return folder


@pytest.fixture
def server(stand_ins):
    with serving(stand_ins) as running:
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own, and no folder with data."""
    monkeypatch.delenv("MITOSEG_DATA", raising=False)
    monkeypatch.setenv("MITOSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "epfl"


def message_of(function, *arguments, **options):
    with pytest.raises(StackError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"[a-z]\. [A-Z]", text), text
    return text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


ACCEPTED = sorted([*EPFL_FILES, *(f"{name}.sha256" for name in EPFL_FILES)])


# --- bundled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_bundled_stacks(part):
    stack = load_example(part)
    assert stack.name == part and stack.voxel_size_nm == (5.0, 5.0, 5.0)
    assert stack.shape[0] >= 50 and min(stack.shape[1:]) >= 400
    assert 0.02 < stack.require_labels().mean() < 0.2


def test_other_parts_do_not_exist():
    assert "'train' and 'test'" in message_of(load_example, "training")
    assert "'training' and 'testing'" in message_of(load_epfl, "train")


# --- downloading --------------------------------------------------------------------------------------------


def test_fetch_then_load(cache, server, stand_ins, capsys):
    assert fetch_epfl(base_url=server.url) == cache
    assert sorted(server.requests) == sorted(EPFL_FILES)
    assert names(cache) == ACCEPTED
    assert "100%" in capsys.readouterr().err  # the progress bar
    for part, number in (("training", 0), ("testing", 2)):
        stack = load_epfl(part)
        assert stack.shape == EPFL_SHAPE and stack.voxel_size_nm == (5.0, 5.0, 5.0) and stack.name == part
        assert stack.image[number].any() and not stack.image[number + 1].any()
        assert 0.4 < stack.require_labels()[number + 1].mean() < 0.6
    fetch_epfl(base_url=server.url)
    assert len(server.requests) == 4  # nothing was downloaded twice


def test_load_fetches_what_is_not_there(cache, server, monkeypatch):
    monkeypatch.setattr(datasets, "EPFL_URL", server.url)
    monkeypatch.setattr(datasets, "EPFL_BYTES", (server.folder / "training.tif").stat().st_size)
    text = message_of(load_epfl, "training")  # the stand-ins aren't of one size, as the official files are
    assert text.startswith("training_groundtruth.tif has ") and "bytes" in text
    assert names(cache) == ["training.tif", "training.tif.sha256"]


TROUBLES = {
    "ends early": "broke off",
    "ends early, length unknown": "damaged",
    "html": "web page",
    404: "404",
    503: "503",
    b"": "empty",
    b"II*\0 and more": "damaged",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_failed_download_leaves_nothing(cache, server, trouble):
    server.trouble["training_groundtruth.tif"] = trouble
    text = message_of(fetch_epfl, base_url=server.url)
    assert text.startswith("training_groundtruth.tif ") and TROUBLES[trouble] in text
    assert str(cache) not in text and "127.0.0.1" not in text
    assert names(cache) == ["training.tif", "training.tif.sha256"]
    server.trouble.clear()
    fetch_epfl(base_url=server.url)
    assert names(cache) == ACCEPTED
    assert server.requests.count("training.tif") == 1


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("training.tif", np.zeros((164, 768, 1024), np.uint8), "shape"),
        ("training.tif", np.zeros((165, 768, 1024), np.uint16), "uint16"),
        ("training_groundtruth.tif", np.zeros(EPFL_SHAPE, np.uint8), "one value"),
        (
            "training_groundtruth.tif",
            np.arange(768, dtype=np.uint8)[:, None] % 3 * np.ones(EPFL_SHAPE, np.uint8),
            "0, 1, 2",
        ),
    ],
)
def test_a_file_of_another_structure_is_refused(cache, server, tmp_path, name, values, expected):
    tifffile.imwrite(tmp_path / name, values, compression="zlib")
    server.trouble[name] = (tmp_path / name).read_bytes()
    text = message_of(fetch_epfl, base_url=server.url)
    assert text.startswith(name) and expected in text
    assert name not in names(cache)


def test_a_cached_file_that_changed_is_refused_and_fetched_again(cache, server):
    fetch_epfl(base_url=server.url)
    path = cache / "testing.tif"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    text = message_of(load_epfl, "testing")
    assert text.startswith("testing.tif has changed") and str(cache) not in text
    load_epfl("training")
    fetch_epfl(base_url=server.url)
    assert path.read_bytes() == data and server.requests.count("testing.tif") == 2
    load_epfl("testing")


@pytest.mark.parametrize("record", [b"", b"\xff\xfe", b"0" * 64 + b"  testing.tif\n"])
def test_a_damaged_record_is_not_trusted(cache, server, record):
    fetch_epfl(base_url=server.url)
    (cache / "testing.tif.sha256").write_bytes(record)
    message_of(load_epfl, "testing")
    fetch_epfl(base_url=server.url)
    load_epfl("testing")


def test_a_file_that_was_never_accepted_is_not_taken_for_data(cache, server):
    cache.mkdir(parents=True)
    (cache / "training.tif").write_bytes(b"half of a file")  # as a program that died might leave it
    fetch_epfl(base_url=server.url)
    load_epfl("training")


def test_two_fetches_at_once_do_no_harm(cache, server):
    with ThreadPoolExecutor(2) as pool:
        for folder in pool.map(lambda _: fetch_epfl(base_url=server.url), range(2)):
            assert folder == cache
    assert names(cache) == ACCEPTED
    load_epfl("training")
    load_epfl("testing")


FETCH_WITH_LITTLE_ROOM = """
import resource, signal, sys
from mitoseg_lib.datasets import fetch_epfl
from mitoseg_lib.stacks import StackError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    fetch_epfl(base_url=sys.argv[1])
except StackError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk(cache, server):
    command = [sys.executable, "-c", FETCH_WITH_LITTLE_ROOM, server.url]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert result.stdout.startswith("training.tif couldn't be downloaded") and "make room" in result.stdout
    assert names(cache) == []


def test_a_cache_that_cannot_be_made(cache, server):
    cache.parent.write_text("a file where the folder should be")
    assert "couldn't be downloaded" in message_of(fetch_epfl, base_url=server.url)


def test_offline_without_data(cache):
    for call in (fetch_epfl, lambda: load_epfl("training")):
        text = message_of(call)
        assert "no connection" in text and "MITOSEG_DATA" in text and "mitoseg fetch epfl" in text


# --- a folder that is there ---------------------------------------------------------------------------------


def test_a_given_folder_is_read_and_not_written(cache, stand_ins, monkeypatch):
    monkeypatch.setenv("MITOSEG_DATA", str(stand_ins))
    before = {path.name: path.stat().st_mtime_ns for path in stand_ins.iterdir()}
    assert fetch_epfl() == stand_ins
    assert load_epfl("testing").shape == EPFL_SHAPE
    assert {path.name: path.stat().st_mtime_ns for path in stand_ins.iterdir()} == before
    assert not cache.exists()


def test_a_given_folder_without_the_files(cache, tmp_path, monkeypatch):
    (tmp_path / "training.tif").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "nowhere"):
        monkeypatch.setenv("MITOSEG_DATA", str(folder))
        for call in (fetch_epfl, lambda: load_epfl("training")):
            text = message_of(call)
            assert f"MITOSEG_DATA is {str(folder)!r}" in text and "testing_groundtruth.tif" in text


def test_a_given_folder_with_another_stack(cache, tmp_path, monkeypatch):
    for name in EPFL_FILES:
        tifffile.imwrite(tmp_path / name, np.zeros((5, 40, 50), np.uint8))
    monkeypatch.setenv("MITOSEG_DATA", str(tmp_path))
    text = message_of(load_epfl, "training")
    assert text.startswith("training.tif has shape (5, 40, 50)") and str(tmp_path) not in text


# --- which copy it is ---------------------------------------------------------------------------------------


def folder_of_sizes(folder, sizes):
    """Files that hold nothing, and as good as no room on the disk, of these sizes."""
    folder.mkdir()
    for name, size in zip(EPFL_FILES, sizes, strict=True):
        with open(folder / name, "wb") as stream:
            stream.truncate(size)
    return folder


OFFICIAL = datasets.EPFL_BYTES


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ([OFFICIAL] * 4, "epfl-official"),
        ([OFFICIAL] * 3 + [OFFICIAL - 1], "epfl-rebuilt"),
        ([OFFICIAL + 1] + [OFFICIAL] * 3, "epfl-rebuilt"),
        ([0, 1, 2, 3], "epfl-rebuilt"),
    ],
    ids=["official", "last", "first", "none"],
)
def test_a_copy_is_official_if_all_four_files_have_the_official_size(cache, tmp_path, monkeypatch, sizes, name):
    monkeypatch.setenv("MITOSEG_DATA", str(folder_of_sizes(tmp_path / "given", sizes)))
    monkeypatch.setattr(datasets, "file_sha256", lambda path: f"hash of {path.name}")  # half a gigabyte, else
    assert describe_epfl() == {"name": name, "sha256": {file: f"hash of {file}" for file in EPFL_FILES}}
    assert not cache.exists()


def test_a_copy_is_described_by_the_hashes_of_its_files(cache, server):
    cache_folder = fetch_epfl(base_url=server.url)
    described = describe_epfl()
    assert described["name"] == "epfl-rebuilt"  # the stand-ins are small
    assert described["sha256"] == {name: file_sha256(cache_folder / name) for name in EPFL_FILES}
    assert len(set(described["sha256"].values())) == 4


def test_a_copy_that_is_not_there_cannot_be_described(cache):
    assert "no connection" in message_of(describe_epfl)


def test_the_bundled_stacks_are_described_by_the_hashes_of_their_files():
    described = describe_example()
    assert described["name"] == "phantom"
    files = [f"phantom_{part}.tif" for part in ("test", "test_labels", "train", "train_labels")]
    data = Path(__file__).parents[1] / "data"
    assert described["sha256"] == {name: file_sha256(data / name) for name in files}


def test_the_real_stacks(epfl_folder, monkeypatch):
    monkeypatch.setenv("MITOSEG_DATA", str(epfl_folder))
    before = sorted(os.listdir(epfl_folder))
    for part, foreground in (("training", 0.0563), ("testing", 0.0531)):
        stack = load_epfl(part)
        assert stack.shape == EPFL_SHAPE and stack.voxel_size_nm == (5.0, 5.0, 5.0)
        assert stack.require_labels().mean() == pytest.approx(foreground, abs=0.001)
        assert stack.image.mean() == pytest.approx(129.5, abs=1)
    assert sorted(os.listdir(epfl_folder)) == before
