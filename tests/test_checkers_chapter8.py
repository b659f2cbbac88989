"""Wrong answers to the exercises of chapter 8 get the hint that fits; right ones are in its solutions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import zarr
from scipy import ndimage
from scipy.sparse import coo_array, csgraph

from mitoseg_lib.exercises.chapter8 import check_faults, check_halo, check_join_faces, check_parts
from mitoseg_lib.instances import label_instances
from mitoseg_lib.volumes import LABELS, Verification, open_level
from mitoseg_lib.volumes.layout import create_group, levels_of
from mitoseg_lib.volumes.table import FORMAT, KEY

JUNK = [None, ..., "text", 3, [1, 2], {"a": 1}, len, float("nan"), np.zeros(3), torch.zeros(2, 2), object(), int]
SIZE = (5.0, 5.0, 5.0)


def halo(more=8, extra=-1, divide=np.ceil):
    return [more * (divide(1065 / thickness) + extra) / 1065 for thickness in (8, 32, 128)]


def test_a_halo():
    assert check_halo(halo()).right and check_halo(tuple(np.round(halo(), 2))).right
    assert check_halo(torch.tensor(halo())).right
    for junk in JUNK:
        assert not check_halo(junk).right and not check_halo([junk, *halo()[1:]]).right


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (halo(4), "one side"),
        (halo(extra=0), "how many cuts"),
        (np.round(halo(extra=0), 2), "how many cuts"),
        (halo(divide=np.floor), "the last slab"),
        (halo(10), "only read"),
        (np.multiply(halo(), 100), "0.1 for 10 %"),
        ([100, 25, 6], "0.1 for 10 %"),
        (halo()[::-1], "in the order"),
        (np.add(halo(), 1), "all the work"),
        (np.divide(halo(), np.add(halo(), 1)), "share of the work with it"),
        (np.multiply(halo(), 1065), "share of all"),
        ([0.5, 0.2, 0.1], "rounded up"),
        (halo()[:2], "3 numbers were expected"),
    ],
)
def test_a_halo_that_is_wrong(shares, words):
    found = check_halo(shares)
    assert not found.right and words in found.words and "0.25" not in found.words and "0.06" not in found.words


def joiner(*, places=((0, 0),), cuts=None, add=0):
    """A function that joins slabs: by which places below, at which cuts."""

    def join(slabs):
        offsets = np.cumsum([0] + [slab.max() for slab in slabs])
        pairs = [np.empty((0, 2), int)]
        for i, (a, b) in list(enumerate(pairwise(slabs)))[:cuts]:
            padded = np.pad(b[0], 1)
            for dy, dx in places:
                below = padded[1 + dy : 1 + dy + len(b[0]), 1 + dx : 1 + dx + len(b[0].T)]
                both = (a[-1] > 0) & (below > 0)
                pairs.append(np.stack([a[-1][both], below[both]], axis=1) - 1 + offsets[[i, i + 1]])
        rows, columns = np.concatenate(pairs).T
        graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (offsets[-1], offsets[-1]))
        return csgraph.connected_components(graph, directed=False)[0] + add

    return join


def minus_pairs(slabs):
    n = sum(slab.max() for slab in slabs)
    for a, b in pairwise(slabs):
        both = (a[-1] > 0) & (b[0] > 0)
        n -= len(np.unique(np.stack([a[-1][both], b[0][both]]), axis=1).T)
    return n


CROSS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
SQUARE = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def test_join_faces():
    assert check_join_faces(joiner()).right
    assert check_join_faces(lambda slabs: torch.tensor(joiner()(slabs))).right
    for junk in JUNK:
        assert not check_join_faces(junk).right and not check_join_faces(lambda slabs, junk=junk: junk).right


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (joiner(places=SQUARE), "share a corner"),
        (lambda slabs: label_instances(np.concatenate(slabs) > 0).max(), "share a corner"),
        (joiner(places=CROSS), "share an edge"),
        (joiner(cuts=0), "nothing was joined"),
        (joiner(cuts=1), "Only the first cut"),
        (joiner(add=1), "One too many"),
        (joiner(add=-1), "One too many or too few"),
        (joiner(add=7), "Too many objects from 3 slabs"),
        (joiner(add=-7), "Too few objects"),
        (minus_pairs, "One for each pair"),
        (lambda slabs: ndimage.label(np.concatenate(slabs))[1], "numbered anew"),
        (lambda slabs: max(slab.max() for slab in slabs), "all begin at 1"),
        (lambda slabs: (joiner()(slabs), [0, 1]), "the number of objects only"),
        (lambda slabs: None, "Hand in what the function returns"),
        (lambda slabs: slabs[5], "raised IndexError"),
        (lambda: 3, "raised TypeError"),
        (170, "the function itself"),
    ],
)
def test_a_join_that_is_wrong(function, words):
    found = check_join_faces(function)
    assert not found.right and words in found.words


def test_slabs_are_given_away_unchanged():
    def greedy(slabs):
        n = joiner()(slabs)
        for slab in slabs:
            slab[:] = 0
        return n

    assert check_join_faces(greedy).right


DAMAGED = "0/c/0/0/0 is damaged (Stored and computed checksum do not match)"
MISSING = "0/c/0/0/0 is missing"
OTHER = "0/c/1/0/0"


@pytest.fixture
def whole(tmp_path):
    for name in ("0/c/0/0/0", OTHER):
        path = tmp_path / "whole.zarr" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"chunk")
    return tmp_path / "whole.zarr"


def test_faults(whole):
    assert check_faults((DAMAGED,), (MISSING,), whole).right
    assert check_faults([DAMAGED], [f"{OTHER} is missing", DAMAGED], str(whole)).right
    for junk in [*JUNK, []]:
        assert not check_faults(junk, (MISSING,), whole).right and not check_faults([junk], (MISSING,), whole).right
        assert not check_faults((DAMAGED,), junk, whole).right and not check_faults((DAMAGED,), [junk], whole).right
        assert not check_faults((DAMAGED,), (MISSING,), junk).right


@pytest.mark.parametrize(
    ("damaged", "missing", "words"),
    [
        ([MISSING], [DAMAGED], "changed places"),
        ([], [MISSING], "written back"),
        (["measurements.csv has changed"], [MISSING], "The table"),
        ([MISSING], [MISSING], "missing already"),
        (["0/c/0/0/0 holds voxels that weren't computed"], [MISSING], "isn't that of a damaged chunk"),
        ([DAMAGED, f"{OTHER} is damaged (x)"], [MISSING], "More than one chunk is damaged"),
        ([DAMAGED], [DAMAGED], "nothing is missing"),
        ([DAMAGED], [], "nothing is missing"),
        ([DAMAGED], [MISSING, f"{OTHER} is missing"], "More than one chunk is missing"),
        ([DAMAGED], [MISSING, f"{OTHER} is damaged (x)"], "neither of the two"),
        ([DAMAGED], ["0/c/9/0/0 is missing"], "leave the volume alone"),
        (Verification(2, (DAMAGED,)), [MISSING], "the list `faults`"),
        ([1, 2], [MISSING], "in words"),
    ],
)
def test_faults_that_are_wrong(damaged, missing, words, whole):
    found = check_faults(damaged, missing, whole)
    assert not found.right and words in found.words


def objects():
    """Three rods, numbered 1 to 3, and the parts of the first and the third."""
    labels, parts = np.zeros((2, 20, 20, 12), np.uint32)
    for number, row in enumerate((2, 8, 14), start=1):
        labels[2:18, row : row + 3, 2:10] = number
    parts[labels == 1], parts[labels == 2], parts[labels == 3] = 1, 3, 4
    parts[10:18, 2:5] = np.where(labels[10:18, 2:5] == 1, 2, 0)
    parts[10:18, 14:17] = np.where(labels[10:18, 14:17] == 3, 5, 0)
    return labels, parts


def written(folder, labels, *, split=True):
    create_group(folder, levels_of(labels.shape, SIZE), SIZE, probabilities=False)
    open_level(folder, LABELS, mode="r+")[:] = labels
    zarr.open_group(folder, mode="r+").attrs[KEY] = {"format": FORMAT, "output": {"split": split}}
    return folder


def test_parts(tmp_path):
    labels, parts = objects()
    path = written(tmp_path / "parts.zarr", parts)
    assert check_parts([1, 3], path, labels).right and check_parts(np.array([3, 1]), str(path), labels).right
    assert check_parts({1, 3}, path, labels.astype(np.int64)).right
    found = check_parts([], written(tmp_path / "whole.zarr", labels), labels)
    assert found.right and "none fell apart" in found.words
    for junk in [*JUNK, [], tmp_path / "nothing", tmp_path]:
        assert not check_parts(junk, path, labels).right and not check_parts([1, 3], junk, labels).right


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([1, 2, 4, 5], "the numbers of the parts"),
        ([0, 1, 3], "background"),
        ([1, 3, 9], "no object in `labels`"),
        ([2], "stayed whole"),
        ([1, 2, 3], "still whole"),
        ([1], "from 1 to the largest"),
        ([1, 2], "others are missing"),
        (2, "A list of numbers"),
    ],
)
def test_objects_that_did_not_fall_apart(broken, words, tmp_path):
    labels, parts = objects()
    found = check_parts(broken, written(tmp_path / "parts.zarr", parts), labels)
    assert not found.right and words in found.words


def test_volumes_that_hold_other_parts(tmp_path):
    labels, parts = objects()
    fewer, other = parts.copy(), parts.copy()
    fewer[parts == 5], other[parts == 3] = 0, 1
    wrong = {
        "without `split=True`": written(tmp_path / "a.zarr", labels, split=False),
        "another shape": written(tmp_path / "b.zarr", parts[:10]),
        "keeps all voxels": written(tmp_path / "c.zarr", fewer),
        "lies in two objects": written(tmp_path / "d.zarr", other),
        "no finished volume": tmp_path / "e.zarr",
    }
    for words, path in wrong.items():
        found = check_parts([1, 3], path, labels)
        assert not found.right and words in found.words, words
