"""Damaged files: load_stack raises StackError or returns what was written, in every flavour of TIFF.

MITOSEG_FUZZ=5000 pytest tests/test_stacks_fuzz.py tries that many damages of each flavour instead of a few.
"""

import os
import random
import tracemalloc

import numpy as np
import pytest
import tifffile

from mitoseg_lib.stacks import StackError, file_sha256, load_stack, verify_sha256

CASES = int(os.environ.get("MITOSEG_FUZZ", "80"))
MOST_MEMORY = 64 * 2**20  # bytes; the volumes have 24,000 voxels

FLAVOURS = {
    "contiguous": {},
    "plain pages": {"metadata": None},
    "strips": {"metadata": None, "rowsperstrip": 7},
    "imagej": {"imagej": True, "resolution": (200, 200), "metadata": {"spacing": 0.005, "unit": "um"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeZ": 0.005}},
    "one page": {"truncate": True},
    "imagej one page": {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX"}},
    "zlib strips": {"compression": "zlib", "rowsperstrip": 7},
    "zlib predictor": {"compression": "zlib", "predictor": True},
    "zlib tiles": {"compression": "zlib", "tile": (16, 16)},
    "zlib ome": {"compression": "zlib", "ome": True, "metadata": {"axes": "ZYX"}},
    "zlib plain pages": {"compression": "zlib", "metadata": None},
    "tiles": {"tile": (16, 32), "metadata": None},
    "lzw": {"compression": "lzw", "predictor": True},
    "packbits": {"compression": "packbits"},
    "zstd": {"compression": "zstd"},
    "bigtiff": {"bigtiff": True},
    "bigtiff zlib": {"bigtiff": True, "compression": "zlib"},
    "big-endian": {"byteorder": ">"},
    "big-endian zlib uint16": {"byteorder": ">", "compression": "zlib", "predictor": True, "dtype": "uint16"},
    "big-endian uint16": {"byteorder": ">", "dtype": "uint16"},
    "float predictor": {"compression": "zlib", "predictor": 3, "dtype": "float32"},
}
PIXELS, STARTS = 1, 2
CHECKED = {name for name, options in FLAVOURS.items() if options.get("compression") == "zlib"}  # Adler-32


def volume(dtype):
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.add.outer(np.arange(12) * 9, np.arange(40)), np.arange(50))
    return (ramp + rng.integers(0, 40, ramp.shape)).astype(dtype)


@pytest.fixture(params=FLAVOURS, scope="module")
def written(request, tmp_path_factory):
    """A file of one flavour: its name, its bytes, where its pixels are, and the image that it holds."""
    options = dict(FLAVOURS[request.param])
    path = tmp_path_factory.mktemp("flavour") / "whole.tif"
    tifffile.imwrite(path, volume(options.pop("dtype", "uint8")), **options)
    image = load_stack(path).image
    return request.param, path.read_bytes(), pixel_bytes(path, image), image


def pixel_bytes(path, image):
    """For each byte of a file 1 if it is pixels, 2 if it says where pixels start, else 0.

    Parts of a file may lie a few unused bytes apart: a start that is changed by so little contradicts nothing.
    """
    kinds = np.zeros(path.stat().st_size, np.uint8)
    with tifffile.TiffFile(path) as tiff:
        pages = list(tiff.pages)
    for page in pages:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            kinds[offset : offset + (count if len(pages) > 1 else image.nbytes)] = PIXELS
        starts = page.tags.get("TileOffsets") or page.tags["StripOffsets"]
        kinds[starts.valueoffset : starts.valueoffset + starts.valuebytecount] = STARTS
    return kinds


def damage(whole, kinds, rng):
    """Damaged bytes, and whether pixels, or where they start, were changed."""
    data, kind = bytearray(whole), rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))], False
    if kind == 1:  # cut out or doubled, as by a broken transfer
        start, size = rng.randrange(len(data)), rng.choice([1, 4, 12, 64, 512, 2000])
        return data[:start] + rng.choice([b"", data[start : start + size] * 2]) + data[start + size :], True
    outside = np.flatnonzero(kinds != PIXELS)
    places = outside if kind < 7 else range(len(data))
    touched = False
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place, size = int(rng.choice(places)), rng.choice([1, 1, 2, 4, 8])
        for at in range(place, min(place + size, len(data))):
            data[at] = {
                2: data[at] ^ (1 << rng.randrange(8)),
                3: 0,
                4: 255,
                5: (data[at] + rng.choice([-1, 1])) % 256,
            }.get(kind, rng.randrange(256))
            touched = touched or bool(kinds[at])
    return data, touched


def test_damage_is_found_or_harmless(written, tmp_path):
    name, whole, kinds, image = written
    path = tmp_path / "damaged.tif"
    seeds = range(CASES)
    harmless = 0
    for seed in seeds:
        data, pixels_changed = damage(whole, kinds, random.Random(f"{name} {seed}"))
        path.write_bytes(data)
        tracemalloc.start()
        try:
            loaded = load_stack(path).image
        except StackError as error:
            assert str(error).startswith("damaged.tif ") and str(error).endswith("."), f"seed {seed}: {error}"
            loaded = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST_MEMORY, f"seed {seed}: {peak:,} bytes of memory"
        if loaded is None:
            continue
        harmless += 1
        assert loaded.shape == image.shape or pixels_changed, f"seed {seed} gave another shape"
        if name in CHECKED or not pixels_changed:
            assert (loaded == image).all(), f"seed {seed} gave other values"
    assert harmless < len(seeds)


def test_with_a_known_sha256_every_change_is_found(written, tmp_path):
    name, whole, kinds, _ = written
    path = tmp_path / "damaged.tif"
    path.write_bytes(whole)
    expected = file_sha256(path)
    verify_sha256(path, expected)
    for seed in range(min(CASES, 50)):
        data, _ = damage(whole, kinds, random.Random(f"{name} {seed}"))
        if data != whole:
            path.write_bytes(data)
            with pytest.raises(StackError, match="has changed"):
                verify_sha256(path, expected)


def test_cut_anywhere(written, tmp_path):
    _, whole, _, image = written
    path = tmp_path / "cut.tif"
    for length in range(0, len(whole), max(1, len(whole) // CASES)):
        path.write_bytes(whole[:length])
        try:
            loaded = load_stack(path).image
        except StackError:
            continue
        assert (loaded == image).all(), f"{length} of {len(whole)} bytes gave other values"
