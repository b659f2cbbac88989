"""What workers do: the steps from slices to numbered, measured objects.

Each step writes chunks that no other step writes, waits until they are on the disk, and then leaves its marker. So it
can be stopped anywhere, and done again: it computes the same.

================  =====================================================================  ==========================
step              what it does                                                           needs
================  =====================================================================  ==========================
segment           slices in, mask (and probabilities) out                                nothing
label             numbers the objects of a slab, and sums over their voxels              the mask around the slab
join              finds which objects of neighbouring slabs are one                      all of label
split             separates touching objects, if that was asked for                      join
order             numbers what is large enough, in the order of first voxels             join, split
number            writes the numbers of the objects of a slab                            order
coarsen           writes a slab of a coarser level                                       the finer level
measure           measures the axes of some objects                                      all of number and coarsen
================  =====================================================================  ==========================
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mitoseg_lib.errors import named_errors
from mitoseg_lib.instances import label_instances
from mitoseg_lib.memory import release_memory, reuse_memory
from mitoseg_lib.shapes import find_axis, split_touching
from mitoseg_lib.volumes.job import Digest, Job, slabs_of, update_sha256
from mitoseg_lib.volumes.joining import Face, SlabObjects, join_slabs, label_slab, number_objects
from mitoseg_lib.volumes.layout import LABELS, MASK, PROBABILITIES, flush_chunks, open_level
from mitoseg_lib.volumes.pyramid import coarsen_labels, coarsen_mask, coarsen_probabilities
from mitoseg_lib.volumes.sums import ObjectSums, sum_objects, with_margin
from mitoseg_lib.writers import ZARR_CHUNK, encode_probabilities

LARGEST_CROP = 2**25  # voxels of a box around an object that are looked at at once

Box = tuple[slice, ...]


def perform(kind: str, job: Job, *arguments: int) -> None:
    """Do a step of some kind, and leave no more memory taken than before."""
    STEPS[kind](job, *arguments)
    release_memory()


def segment(job: Job, index: int) -> None:
    """Predict one slab of slices, and write its mask and, if they are wanted, its probabilities."""
    reuse_memory()
    torch.set_num_threads(job.threads)
    slices, segmenter = job.predicted_slabs[index], job.segmenter()
    needed = segmenter.needed_slices(slices, job.shape[0], job.voxel_size_nm)
    threshold, digest = np.float32(segmenter.threshold), hashlib.sha256()
    found = segmenter.stream(_model_slabs(job, needed, slices, digest), job.shape, job.voxel_size_nm, slices)
    outputs = {MASK: lambda p: (p >= threshold).astype(np.uint8)}
    if job.probabilities:
        outputs[PROBABILITIES] = encode_probabilities
    arrays = {what: open_level(job.group, what, mode="r+") for what in outputs}
    start = slices.start
    for layer in _layers(found):
        for what, convert in outputs.items():
            arrays[what][start : start + len(layer)] = convert(layer)
        start += len(layer)
    for what in outputs:
        flush_chunks(job.group / what / "0", job.shape, slices)
    job.save(f"segment-{index}", {"input": np.array(digest.hexdigest())})


def label(job: Job, index: int) -> None:
    """Number the objects in one slab of the mask, and sum over their voxels."""
    slices, depth = job.slabs()[index], job.shape[0]
    around = range(max(0, slices.start - 1), min(depth, slices.stop + 1))
    mask = open_level(job.group, MASK)[around.start : around.stop] == 1
    before = mask[0] if around.start < slices.start else None
    after = mask[-1] if around.stop > slices.stop else None
    own = mask[slices.start - around.start :][: len(slices)]
    found = label_slab(own, job.raw_slices(slices), slices.start, job.shape, before=before, after=after)
    faces = {
        "top_places": found.top.places,
        "top_numbers": found.top.numbers,
        "bottom_places": found.bottom.places,
        "bottom_numbers": found.bottom.numbers,
    }
    job.save(f"label-{index}", found.sums.as_arrays() | faces)


def join(job: Job) -> None:
    """Join the objects of all slabs."""
    slabs = [_slab_objects(job.load(f"label-{index}")) for index in range(len(job.slabs()))]
    owner, sums = join_slabs(slabs, job.shape[1:])
    for batch in range(job.n_batches if job.split else 0):
        which = np.arange(batch, len(sums), job.n_batches)
        job.save(f"joined-{batch}", {"which": which} | sums.take(which).as_arrays())
    counts = np.array([len(slab.sums) for slab in slabs])
    job.save("join", {"owner": owner, "counts": counts} | sums.as_arrays())


def split(job: Job, batch: int) -> None:
    """Separate the touching objects among some objects, and sum over the voxels of the parts."""
    loaded = job.load(f"joined-{batch}")
    sums = _sums(loaded)
    small = np.flatnonzero(np.prod(sums.upper - sums.lower, axis=1) <= LARGEST_CROP)  # others stay as they are
    found = [(loaded["which"][i], _parts(job, sums.take([i]))) for i in small]
    broken = [(owner, parts) for owner, parts in found if parts is not None]
    offsets = np.cumsum([0, *(len(parts.sums) for _, parts in broken)])
    none = np.empty(0, np.int64)
    voxels = {
        "owners": np.array([owner for owner, _ in broken], np.int64),
        "places": np.concatenate([none, *(parts.places for _, parts in broken)]),
        "numbers": np.concatenate([none, *(parts.numbers + n for (_, parts), n in zip(broken, offsets, strict=False))]),
    }
    kept = ObjectSums.concatenate([sums.take(none), *(parts.sums for _, parts in broken)])
    job.save(f"split-{batch}", voxels | kept.as_arrays())


def order(job: Job) -> None:
    """Number what is large enough, and write for each slab which numbers its objects get."""
    joined = job.load("join")
    owner, counts, sums = joined["owner"], joined["counts"], _sums(joined)
    splits = [job.load(f"split-{batch}") for batch in range(job.n_batches if job.split else 0)]
    is_split = np.zeros(len(sums), bool)
    is_split[np.concatenate([np.empty(0, np.int64), *(found["owners"] for found in splits)])] = True
    pieces = ObjectSums.concatenate([sums, *(_sums(found) for found in splits)])
    kept = np.flatnonzero(np.concatenate([~is_split, np.ones(len(pieces) - len(sums), bool)]))
    smallest = job.min_volume_um3 / job.voxel_um3 * (1 - 1e-9)  # a volume of exactly the limit stays
    numbers = np.zeros(len(pieces), np.uint32)
    numbers[kept], ordered = number_objects(pieces.take(kept), smallest)
    _save_numbers(job, np.split(numbers[: len(sums)][owner], np.cumsum(counts)[:-1]))
    _save_pieces(job, splits, numbers[len(sums) :])
    for batch in range(job.n_batches):
        which = np.arange(batch, len(ordered), job.n_batches)
        own = {"number": which + 1, "lower": ordered.lower[which], "upper": ordered.upper[which]}
        job.save(f"ordered-{batch}", own)
    job.save("order", ordered.as_arrays())


def number(job: Job, index: int) -> None:
    """Write the numbers of the objects of one slab."""
    slices = job.slabs()[index]
    mask = open_level(job.group, MASK)[slices.start : slices.stop] == 1
    numbers = np.concatenate([[0], job.load(f"numbers-{index}")["numbers"]]).astype(np.uint32)
    labels = numbers[label_instances(mask)]
    if job.split:
        pieces = job.load(f"pieces-{index}")
        labels.ravel()[pieces["places"] - slices.start * math.prod(job.shape[1:])] = pieces["numbers"]
    open_level(job.group, LABELS, mode="r+")[slices.start : slices.stop] = labels
    flush_chunks(job.group / LABELS / "0", job.shape, slices)
    job.save(f"number-{index}", {})


def coarsen(job: Job, level: int, index: int) -> None:
    """Write one slab of a level from the finer level before it."""
    finer, coarser = job.levels[level - 1], job.levels[level]
    slices = job.slabs(level)[index]
    steps = tuple(new // old for old, new in zip(finer.factors, coarser.factors, strict=True))
    source = slice(slices.start * steps[0], min(slices.stop * steps[0], finer.shape[0]))
    values = open_level(job.group, MASK, level - 1)[source]
    mask = coarsen_mask(values, steps)
    found = {
        MASK: mask,
        LABELS: coarsen_labels(open_level(job.group, LABELS, level - 1)[source], mask, steps),
    }
    if job.probabilities:
        found[PROBABILITIES] = coarsen_probabilities(open_level(job.group, PROBABILITIES, level - 1)[source], steps)
    for what, coarse in found.items():
        open_level(job.group, what, level, mode="r+")[slices.start : slices.stop] = coarse
        flush_chunks(job.group / what / str(level), coarser.shape, slices)
    job.save(f"coarsen-{level}-{index}", {})


def measure(job: Job, batch: int) -> None:
    """Measure the axes of some objects."""
    loaded = job.load(f"ordered-{batch}")
    rows = [_axis(job, *row) for row in zip(loaded["number"], loaded["lower"], loaded["upper"], strict=True)]
    job.save(f"measure-{batch}", {"number": loaded["number"], "axes": np.array(rows, np.float64).reshape(-1, 3)})


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (segment, label, join, split, order, number, coarsen, measure)
}


# --- segment ------------------------------------------------------------------------------------------------


def _model_slabs(job: Job, needed: range, own: range, digest: Digest) -> Iterator[NDArray[np.uint8]]:
    """Read slices as the model takes them, some at a time, and take the sha256 of those that are the slab's own."""
    for few in slabs_of(len(needed), ZARR_CHUNK[0]):
        slices = needed[few.start : few.stop]
        values = job.raw_slices(slices)
        update_sha256(digest, values[max(0, own.start - slices.start) : max(0, own.stop - slices.start)])
        with named_errors(job.source):
            image = job.grey.apply(values)
        yield image


def _layers(slabs: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Put slabs together to layers as deep as a chunk, so that each chunk is written once."""
    kept: list[NDArray] = []
    for part in slabs:
        for grey in part:
            kept.append(grey)
            if len(kept) == ZARR_CHUNK[0]:
                yield np.stack(kept)
                kept.clear()
    if kept:
        yield np.stack(kept)


# --- objects ------------------------------------------------------------------------------------------------


def _sums(loaded: dict[str, NDArray]) -> ObjectSums:
    return ObjectSums(**{name: loaded[name] for name in ObjectSums.__dataclass_fields__})


def _slab_objects(loaded: dict[str, NDArray]) -> SlabObjects:
    top, bottom = (Face(loaded[f"{face}_places"], loaded[f"{face}_numbers"]) for face in ("top", "bottom"))
    return SlabObjects(_sums(loaded), top, bottom)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Parts of an object: indices of its voxels in the volume, the part of each from 0, and the parts' sums."""

    places: NDArray[np.int64]
    numbers: NDArray[np.int64]
    sums: ObjectSums


def _parts(job: Job, one: ObjectSums) -> _Parts | None:
    """Parts of an object, given its sums; None if it is one."""
    lower, upper = one.lower[0], one.upper[0]
    box = tuple(slice(a, b) for a, b in zip(lower.tolist(), upper.tolist(), strict=True))
    labels = label_instances(open_level(job.group, MASK)[box] == 1)
    index = tuple(i - a for i, a in zip(np.unravel_index(one.first[0], job.shape), lower, strict=True))
    parts = split_touching(labels == labels[index], job.voxel_size_nm)
    if parts.max() < 2:
        return None
    where = np.flatnonzero(parts)
    places = [i + a for i, a in zip(np.unravel_index(where, parts.shape), lower, strict=True)]
    sums = sum_objects(parts, with_margin(parts), _raw_box(job, box), tuple(lower.tolist()), job.shape)
    return _Parts(np.ravel_multi_index(places, job.shape), parts.ravel()[where].astype(np.int64) - 1, sums)


def _raw_box(job: Job, box: Box) -> NDArray:
    """Grey levels of the input in a box; some slices at a time, since readers give whole slices."""
    z, *plane = box
    few = slabs_of(z.stop - z.start, ZARR_CHUNK[0])
    return np.concatenate([job.raw_slices(range(z.start + part.start, z.start + part.stop))[:, *plane] for part in few])


def _save_numbers(job: Job, slabs: list[NDArray[np.uint32]]) -> None:
    for index, numbers in enumerate(slabs):
        job.save(f"numbers-{index}", {"numbers": numbers})


def _save_pieces(job: Job, splits: list[dict[str, NDArray]], numbers: NDArray[np.uint32]) -> None:
    """Write for each slab which voxels in it belong to parts of objects that were split, and their numbers."""
    if not job.split:
        return
    n_parts = np.cumsum([0, *(len(found["voxels"]) for found in splits)])
    places = np.concatenate([found["places"] for found in splits])
    own = np.concatenate([numbers[found["numbers"] + n] for found, n in zip(splits, n_parts[:-1], strict=True)])
    for index, slices in enumerate(job.slabs()):
        z = places // math.prod(job.shape[1:])
        inside = (z >= slices.start) & (z < slices.stop)
        job.save(f"pieces-{index}", {"places": places[inside], "numbers": own[inside]})


# --- shapes -------------------------------------------------------------------------------------------------


def _axis(job: Job, number: int, lower: NDArray, upper: NDArray) -> tuple[float, float, float]:
    """Length of an object's axis, of axis and branches, in nm, and how many branches; NaN where it is too thin."""
    level, box = _fitting_box(job, lower, upper)
    mask = open_level(job.group, LABELS, level)[box] == number
    parts = label_instances(mask)
    if not parts.any():  # thinner than a voxel of the coarse level that a box as large as this needs
        return (np.nan, np.nan, np.nan)
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    axis = find_axis(largest, job.levels[level].voxel_size(job.voxel_size_nm))
    return axis.length_nm, axis.total_length_nm, axis.branches


def _fitting_box(job: Job, lower: NDArray, upper: NDArray) -> tuple[int, Box]:
    """Finest level at which the box around an object is small enough, and the box in it."""
    boxes = []
    for level in job.levels:
        start, stop = lower // level.factors, -(-upper // np.array(level.factors))
        boxes.append(tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)))
        if np.prod(stop - start) <= LARGEST_CROP:
            break
    return len(boxes) - 1, boxes[-1]
