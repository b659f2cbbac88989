"""What a segmented volume is on the disk."""

import json

import ngff_zarr
import numpy as np
import pytest
import zarr

from mitoseg_lib.readers import open_reader
from mitoseg_lib.volumes.layout import (
    LABELS,
    MASK,
    NO_NUMBER,
    PROBABILITIES,
    chunk_paths,
    create_group,
    levels_of,
    open_level,
)  # fmt: skip

SHAPE, SIZE = (20, 1100, 700), (8.0, 4.0, 4.0)


@pytest.fixture
def group(tmp_path):
    path = tmp_path / "volume.zarr"
    create_group(path, levels_of(SHAPE, SIZE), SIZE, probabilities=True)
    return path


def test_levels_are_halved_until_the_last_is_small():
    assert [level.shape for level in levels_of((1065, 1536, 2048), (5, 5, 5))] == [
        (1065, 1536, 2048), (533, 768, 1024), (267, 384, 512),
    ]  # fmt: skip
    assert [level.shape for level in levels_of((3, 4, 5), (5, 5, 5))] == [(3, 4, 5)]


def test_thick_slices_are_halved_once_their_voxels_are_as_wide():
    levels = levels_of((100, 4096, 4096), (30, 8, 8))
    assert [level.factors for level in levels] == [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8)]
    assert levels[2].voxel_size((30, 8, 8)) == (30, 32, 32)


def test_a_single_slice_stays_one():
    assert {level.shape[0] for level in levels_of((1, 5000, 5000), (5, 5, 5))} == {1}


@pytest.mark.parametrize(("what", "fill"), [(MASK, 255), (LABELS, NO_NUMBER), (PROBABILITIES, 255)])
def test_what_was_not_computed_reads_as_what_nothing_computed_can_be(group, what, fill):
    for level in (0, 1):
        array = open_level(group, what, level)
        assert array.fill_value == fill and (array[0, :9, :9] == fill).all()


def test_chunks_of_background_are_written(group):
    array = open_level(group, MASK, mode="r+")
    array[:8] = 0
    for path, place in chunk_paths(group / "0", SHAPE, range(8)):
        assert path.is_file() and (array[place] == 0).all()
    assert not any(path.exists() for path, _ in chunk_paths(group / "0", SHAPE, range(8, 20)))


def test_chunks_cover_an_array_once(group):
    seen = np.zeros(SHAPE, int)
    for _, place in chunk_paths(group / "0", SHAPE, range(SHAPE[0])):
        seen[place] += 1
    assert (seen == 1).all()


def test_another_program_opens_it_with_the_right_scales(group):
    for folder in (group, group / LABELS, group / PROBABILITIES):
        images = ngff_zarr.from_ngff_zarr(str(folder)).images
        assert [image.data.shape for image in images] == [level.shape for level in levels_of(SHAPE, SIZE)]
        for image, factor in zip(images, (1, 2, 4), strict=False):
            along_z = [1, 1, 2][[1, 2, 4].index(factor)]
            assert image.dims == ("z", "y", "x") or list(image.dims) == ["z", "y", "x"]
            assert image.scale == {"z": 8 * along_z, "y": 4 * factor, "x": 4 * factor}
            assert image.translation == {
                "z": 4 * (along_z - 1) * 1.0, "y": 2 * (factor - 1) * 1.0, "x": 2 * (factor - 1) * 1.0,
            }  # fmt: skip


def test_our_own_reader_opens_mask_labels_and_coarser_levels(group):
    assert open_reader(group).voxel_size_nm == SIZE
    assert open_reader(group / LABELS).dtype == np.uint32
    assert open_reader(group / "1").voxel_size_nm == (8, 8, 8)


def test_the_metadata_name_the_labels_and_hold_no_path(group):
    labels = zarr.open_group(group / "labels", mode="r")
    assert labels.attrs["ome"]["labels"] == ["mitochondria"]
    for path in group.rglob("zarr.json"):
        assert str(group.parent) not in json.dumps(json.loads(path.read_text()))
