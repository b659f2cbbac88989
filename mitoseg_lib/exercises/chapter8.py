"""Checkers of chapter 8, the whole volume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.sparse import coo_array, csgraph

from mitoseg_lib.exercises.feedback import (
    NotYet,
    as_number,
    as_numbers,
    call,
    checker,
    hint,
    require_function,
)
from mitoseg_lib.volumes.layout import LABELS, TABLE, open_level
from mitoseg_lib.volumes.table import read_provenance

__all__ = ["check_faults", "check_halo", "check_join_faces", "check_parts"]

DEPTH = 1065  # slices of EPFL's whole volume
THICKNESSES = (8, 32, 128)
REACH = 8  # slices that are predicted twice for each cut
CUTS = ([4, 8], [1, 3, 10], [6])  # where noise of 12 slices is cut


@checker
def check_halo(shares: Any) -> str:
    """Exercise 1: the share of the work that the halo adds, for slabs of 8, 32 and 128 slices."""
    found = as_numbers(shares, "the share for slabs of 8, 32 and 128 slices", 3)
    slabs = -(-DEPTH // np.array(THICKNESSES))
    expected = REACH * (slabs - 1) / DEPTH
    if _are_near(found, expected):
        return "the price is set by the filter's reach and by the slab, and not by the size of the volume."
    hint(_are_near(np.divide(found, 100), expected), "A share lies between 0 and 1 here: write 0.1 for 10 %.")
    hint(_are_near(found[::-1], expected), "Give them in the order 8, 32, 128 slices.")
    hint(_are_near(found, expected / 2), "That is one side of each cut only; both neighbours predict more.")
    hint(_are_near(found, REACH * slabs / DEPTH), "Between n slabs there are how many cuts?")
    words = "Does the last slab count, which is thinner than the others? It needs a cut, too."
    hint(_are_near(found, REACH * (DEPTH // np.array(THICKNESSES) - 1) / DEPTH), words)
    words = "The fifth slice to each side is only read; nothing is predicted for it."
    hint(_are_near(found, expected * 10 / REACH), words)
    hint(_are_near(found, 1 + expected), "That is all the work, with the halo; the question is what the halo adds.")
    words = "That is the halo's share of the work with it. Compare with the slices that are written."
    hint(_are_near(found, expected / (1 + expected)), words)
    hint(_are_near(found, REACH * (slabs - 1)), "These are slices. What share of all are they?")
    raise NotYet("Count the slabs, rounded up, then the cuts between them; each cut costs slices on both sides.")


@checker
def check_join_faces(join_faces: Any) -> str:
    """Exercise 2: a function that takes numbered slabs (z, y, x), joined by faces, and returns how many objects."""
    hint(join_faces is None or join_faces is ..., "Hand in the function, `join_faces`.")
    require_function(join_faces, "join_faces")
    noise = np.random.default_rng(8).random((12, 20, 20)) < 0.4
    for cuts in CUTS:
        slabs = [ndimage.label(part)[0] for part in np.split(noise, cuts)]
        words = f"{len(slabs)} numbered slabs of noise"
        answer = call(join_faces, [slab.copy() for slab in slabs], words=words)
        words = "It returned more than one thing. Return the number of objects only."
        hint(isinstance(answer, tuple | list), words)
        found = as_number(answer, "what the function returns, the number of objects")
        expected = ndimage.label(noise)[1]
        if found != expected:
            _judge_joined(found, expected, slabs)
    _require_numbers(join_faces)
    return "a program that counts by another rule isn't wrong. But a count without its rule can't be compared."


@checker
def check_faults(damaged: Any, missing: Any, whole: Any) -> str:
    """Exercise 3: the faults of a copy of a volume after a byte of it was changed, and after a chunk was deleted.

    `whole` is the path of the volume that was copied.
    """
    first, second = _as_faults(damaged, "the first list"), _as_faults(missing, "the second list")
    hint(not isinstance(whole, str | os.PathLike), "The third argument is the path of the volume that you copied.")
    words = "The lists have changed places: the damage comes first, then the chunk that was deleted."
    hint(_all_say(first, " is missing") and _all_say(second, " is damaged"), words)
    words = "In the first list there is no fault. Was the changed byte written back, to a chunk of the copy?"
    hint(not first, words)
    hint(any(TABLE in fault for fault in first), "The table has changed, too, or instead. Change a chunk of an array.")
    words = "In the first list something is missing already. Verify the copy before you delete anything."
    hint(any(" is missing" in fault for fault in first), words)
    hint(
        not _all_say(first, " is damaged"), "The first list isn't that of a damaged chunk. Change one byte in one file."
    )
    hint(len(first) > 1, "More than one chunk is damaged. Begin with a new copy, and change one byte of one file.")
    gone = [fault for fault in second if " is missing" in fault]
    words = "In the second list nothing is missing. Delete a chunk of the copy, and verify it again."
    hint(not gone, words)
    hint(len(gone) > 1, "More than one chunk is missing. Begin with a new copy.")
    words = "In the second list there is a fault that is in neither of the two damages. Begin with a new copy."
    hint(set(second) - set(first) - set(gone), words)
    names = [gone[0].split(" is ")[0], first[0].split(" is ")[0]]
    words = "That chunk isn't in the volume that you copied, either. Change the copy, and leave the volume alone."
    hint(not all(Path(whole, name).is_file() for name in names), words)
    return "a checksum says that something is wrong, and where. What stood there, only a second copy knows."


@checker
def check_parts(broken: Any, separate: Any, labels: NDArray[np.integer]) -> str:
    """Exercise 4: which of the numbered objects (z, y, x) fell into parts, and the path of the volume of the parts."""
    found = as_numbers(broken, "the numbers of the objects that fell apart")
    hint(not isinstance(separate, str | os.PathLike), "The second argument is the path of the new volume.")
    about = read_provenance(Path(separate))
    hint(about is None, "At that path there is no finished volume. `segment_volume` makes it; hand in the same path.")
    words = "This volume was made without `split=True`. Is it the first one, or were the options replaced?"
    hint(not about["output"]["split"], words)
    parts = open_level(Path(separate), LABELS)
    words = "The new volume has another shape. Segment the same stack again."
    hint(parts.shape != labels.shape, words)
    objects, numbers = _pairs(labels, parts).T
    words = (
        "Splitting keeps all voxels, but here one volume has voxels that the other lacks. Are all other options equal?"
    )
    hint((objects == 0).any() or (numbers == 0).any(), words)
    words = (
        "A part lies in two objects, so these aren't parts of these objects. Is the second one split from the first?"
    )
    hint(len(np.unique(numbers)) < len(numbers), words)
    which, n_parts = np.unique(objects, return_counts=True)
    expected = set(which[n_parts > 1].tolist())
    of_broken = set(numbers[np.isin(objects, list(expected))].tolist())
    if set(found) != expected:
        _judge_broken(set(found), expected, set(which.tolist()), of_broken)
    words = "a count of mitochondria has to say whether touching ones were separated, and how"
    return f"{words}." if expected else f"none fell apart here; but {words}."


def _require_numbers(join_faces: Callable[..., Any]) -> None:
    """Hint if the numbers in the slabs aren't used: two neighbours with numbers of their own stay two."""
    slab = np.zeros((2, 4, 4), int)
    slab[:, 1:3, 1], slab[:, 1:3, 2] = 1, 2
    found = call(join_faces, [slab, slab.copy()], words="two slabs with two objects each")
    words = (
        "The voxels of all slabs are numbered anew. A large volume never lies in memory whole: join numbers instead."
    )
    hint(as_number(found, "what the function returns, the number of objects") == 1, words)


def _judge_joined(found: float, expected: int, slabs: list[NDArray]) -> None:
    """Hint at what is wrong with the number of objects that a function found in slabs."""
    largest = [int(slab.max()) for slab in slabs]
    words = "The numbers of all slabs were added up, and nothing was joined. Are the pairs lines of the graph?"
    hint(found == sum(largest), words)
    corners = ndimage.generate_binary_structure(3, 3)
    whole = np.concatenate(slabs) > 0
    words = "That is as if voxels that share a corner were joined, too. Does it call `touching_faces`?"
    hint(found in (_joined(slabs, 3), ndimage.label(whole, corners)[1]), words)
    hint(found == _joined(slabs, 2), "Voxels that share an edge are joined here. Only the place right below counts.")
    words = "One for each pair was taken away. But two objects can touch in several pairs, by way of others."
    hint(found == sum(largest) - _n_pairs(slabs), words)
    hint(found == max(largest), "That is the largest number of one slab. The slabs' numbers all begin at 1.")
    words = "One too many or too few. Is the background counted, or is a number shifted by 1?"
    hint(abs(found - expected) == 1, words)
    words = "Only the first cut was joined. Does the loop go over all pairs of neighbouring slabs?"
    hint(len(slabs) > 2 and found == _joined(slabs[:2], 1) + sum(largest[2:]), words)
    words = f"Too {'many' if found > expected else 'few'} objects from {len(slabs)} slabs of noise."
    raise NotYet(f"{words} Are the slabs' numbers shifted by those of all slabs before?")


def _judge_broken(found: set[float], expected: set[int], objects: set[int], parts: set[int]) -> None:
    """Hint at what is wrong with the numbers of the objects that fell apart."""
    hint(0 in found, "0 is the background, and no object.")
    hint(found == parts, "These are the numbers of the parts; hand in those of the objects, in `labels`.")
    hint(found - objects, "There are numbers among these that no object in `labels` has.")
    hint(found == objects - expected, "These are the objects that stayed whole.")
    hint(found > expected, "Some of these are still whole. Has an object more than one number among its parts?")
    hint(found < expected, "Some are missing. Does the loop go over all numbers, from 1 to the largest one?")
    raise NotYet("Some stayed whole, and others are missing. Look which numbers the parts have in each object.")


def _joined(slabs: list[NDArray], connectivity: int) -> int:
    """How many objects there are if slabs are joined by faces (1), edges too (2), or corners too (3)."""
    offsets = np.cumsum([0, *(int(slab.max()) for slab in slabs)])
    pairs = [np.empty((0, 2), np.int64)]
    for i, (above, below) in enumerate(pairwise(slabs)):
        pairs.append(_touching(above[-1], below[0], connectivity) - 1 + offsets[[i, i + 1]])
    rows, columns = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (offsets[-1], offsets[-1]))
    return int(csgraph.connected_components(graph, directed=False)[0])


def _touching(last: NDArray, first: NDArray, connectivity: int = 1) -> NDArray[np.int64]:
    """Pairs of numbers in two slices that touch."""
    padded, pairs = np.pad(first, 1), []
    for dy, dx in np.argwhere(ndimage.generate_binary_structure(3, connectivity)[0]):
        shifted = padded[dy : dy + last.shape[0], dx : dx + last.shape[1]]
        both = (last > 0) & (shifted > 0)
        pairs.append(np.stack([last[both], shifted[both]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def _n_pairs(slabs: list[NDArray]) -> int:
    return sum(len(_touching(above[-1], below[0])) for above, below in pairwise(slabs))


def _as_faults(answer: Any, what: str) -> list[str]:
    """Return an answer as a list of faults in words, or hint."""
    hint(answer is None or answer is ..., f"Hand in {what} of faults.")
    hint(hasattr(answer, "faults"), "Hand in the list `faults` of what `verify_volume` returns.")
    is_list = isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping)
    faults = list(answer) if is_list and getattr(answer, "ndim", 1) else [None]
    hint(not all(isinstance(fault, str) for fault in faults), f"{what.capitalize()} isn't one of faults, in words.")
    return faults


def _all_say(faults: list[str], words: str) -> bool:
    return bool(faults) and all(words in fault for fault in faults)


def _pairs(labels: NDArray[np.integer], parts: Any) -> NDArray[np.int64]:
    """Return the pairs of numbers, int64 (pair, 2), that lie in the same voxels; parts are read slab by slab."""
    codes, step = [], parts.chunks[0]
    for start in range(0, len(labels), step):
        ours, theirs = labels[start : start + step], parts[start : start + step]
        inside = (ours > 0) | (theirs > 0)
        codes.append(np.unique(ours[inside].astype(np.uint64) << np.uint64(32) | theirs[inside].astype(np.uint64)))
    found = np.unique(np.concatenate(codes))
    return np.stack([found >> np.uint64(32), found & np.uint64(2**32 - 1)], axis=1).astype(np.int64)


def _are_near(found: ArrayLike, expected: ArrayLike) -> bool:
    """Tell whether shares agree, also those that were rounded to whole per cent."""
    return bool(np.abs(np.subtract(found, expected)).max() <= 0.0051)
