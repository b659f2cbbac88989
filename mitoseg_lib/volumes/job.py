"""What every step of a volume has to know, small enough to be sent to a worker with each of them."""

from __future__ import annotations

import hashlib
import io
import math
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mitoseg_lib.errors import FilePath, StackError
from mitoseg_lib.files import write_whole
from mitoseg_lib.grey import GreyTransform
from mitoseg_lib.prediction import Segmenter
from mitoseg_lib.readers import SliceReader, open_reader
from mitoseg_lib.stacks import file_sha256
from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.volumes.layout import Level, Shape, levels_of
from mitoseg_lib.weights import shipped_weights
from mitoseg_lib.writers import ZARR_CHUNK

__all__ = ["Job", "VolumeError", "sha256_of_slices", "slabs_of", "update_sha256", "weights_path"]

# Slices of a predicted slab. Thick ones cost less: what a median reaches into is predicted by both neighbours. Of thin
# ones less is lost with a worker.
THINNEST, THICKEST, SHARE = 32, 192, 4
LARGEST_SLAB = 2**25  # voxels that are numbered or coarsened at a time, unless one layer of chunks has more
GROUP, PROGRESS = "volume.zarr", "progress"  # what the folder of an unfinished volume holds


class Digest(Protocol):
    """What `hashlib.sha256` returns."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add bytes."""


class VolumeError(RuntimeError):
    """A volume that couldn't be finished: one sentence that says what is missing, and what to do."""


@dataclass(frozen=True)
class Job:
    """A volume to segment.

    Attributes
    ----------
    source
        Path of the input; see `mitoseg_lib.readers.open_reader`.
    folder
        Where the unfinished volume is.
    shape
        (z, y, x).
    voxel_size_nm
        (z, y, x).
    grey
        Transform of its grey levels, the same for all slices.
    weights, weights_sha256
        Path of the model's file (None: the shipped one), and what is in it.
    threshold, tta, device
        See `mitoseg_lib.prediction.Segmenter.load`.
    precision
        "fp32" or "bf16"; decided once, so that all workers compute alike.
    threads
        Of the processor, for each worker.
    probabilities
        Whether they are kept.
    min_volume_um3
        Smaller objects are left out of labels and table.
    split
        Whether touching objects are separated.
    """

    source: str
    folder: str
    shape: Shape
    voxel_size_nm: VoxelSize
    grey: GreyTransform
    weights: str | None
    weights_sha256: str
    threshold: float
    tta: bool
    device: str
    precision: str
    threads: int
    probabilities: bool
    min_volume_um3: float
    split: bool

    @property
    def group(self) -> Path:
        """Path of the OME-Zarr that is being made."""
        return Path(self.folder, GROUP)

    @property
    def progress(self) -> Path:
        """Folder of what finished steps have left: their done-markers, and what later steps need of them."""
        return Path(self.folder, PROGRESS)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Resolutions of the volume, the finest first."""
        return levels_of(self.shape, self.voxel_size_nm)

    @property
    def predicted_slabs(self) -> list[range]:
        """Slices that are predicted at a time: whole chunks, shared out evenly among 2, 4, 8 and more workers."""
        wanted = min(max(self.shape[0] / SHARE, THINNEST), THICKEST)
        n_slabs = math.ceil(self.shape[0] / wanted)
        return _even_slabs(self.shape[0], n_slabs + n_slabs % 2 if n_slabs > 1 else 1)

    def slabs(self, level: int = 0) -> list[range]:
        """Slices of a level that are numbered, or made from the finer level, at a time: whole chunks."""
        here, source = self.levels[level], self.levels[max(0, level - 1)]
        finer_slices = ZARR_CHUNK[0] * here.factors[0] // source.factors[0]  # that one layer of chunks is made from
        layers = LARGEST_SLAB // (finer_slices * math.prod(source.shape[1:]))
        return slabs_of(here.shape[0], ZARR_CHUNK[0] * max(1, layers))

    @property
    def n_batches(self) -> int:
        """In how many steps objects are split, and shapes are measured: known before the objects are."""
        return len(self.slabs())

    @property
    def voxel_um3(self) -> float:
        """Volume of a voxel in µm³."""
        return math.prod(self.voxel_size_nm) / 1e9

    def reader(self) -> SliceReader:
        """Return the opened input."""
        return _reader(self.source, os.stat(self.source).st_mtime_ns)

    def segmenter(self) -> Segmenter:
        """Return the model, whose file must be the one that the volume was begun with."""
        return _segmenter(self)

    def raw_slices(self, slices: range) -> NDArray:
        """Read slices as the input has them."""
        return self.reader().read(slices.start, slices.stop)

    def marker(self, name: str) -> Path:
        """Return the file that is there once a step is done."""
        return self.progress / f"{name}.npz"

    def is_done(self, name: str) -> bool:
        """Tell whether a step has left its marker, which it does at its very end."""
        return self.marker(name).is_file()

    def save(self, name: str, arrays: dict[str, NDArray]) -> None:
        """Write arrays under a name, whole or not at all."""
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        write_whole(self.marker(name), stream.getvalue())

    def load(self, name: str) -> dict[str, NDArray]:
        """Read what was saved under a name."""
        with np.load(self.marker(name), allow_pickle=False) as found:
            return dict(found)


def slabs_of(depth: int, size: int) -> list[range]:
    """Cut so many slices into slabs of one size, the last of which may be thinner."""
    return [range(start, min(start + size, depth)) for start in range(0, depth, size)]


def _even_slabs(depth: int, n_slabs: int) -> list[range]:
    """Cut so many slices into slabs of whole chunks that differ by one at most, the thicker ones first."""
    layers = slabs_of(depth, ZARR_CHUNK[0])
    few, more = divmod(len(layers), n_slabs)
    starts = [index * few + min(index, more) for index in range(n_slabs + 1)]
    return [range(layers[a].start, layers[b - 1].stop) for a, b in pairwise(starts) if a < b]


def sha256_of_slices(reader: SliceReader, slices: range) -> str:
    """sha256 of the grey levels of some slices, whatever format they are in."""
    digest = hashlib.sha256()
    for few in slabs_of(len(slices), ZARR_CHUNK[0]):
        update_sha256(digest, reader.read(slices[few[0]], slices[few[-1]] + 1))
    return digest.hexdigest()


def update_sha256(digest: Digest, values: NDArray) -> None:
    """Add grey levels to a sha256, in one byte order."""
    digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data.cast("B") if values.size else b"")


def weights_path(weights: FilePath | None) -> Path:
    """Return the file of a model; None is the shipped one."""
    return shipped_weights() if weights is None else Path(weights)


@lru_cache(maxsize=2)
def _reader(source: str, changed_ns: int) -> SliceReader:
    """Open an input once; anew when it has changed, since workers of a cluster live long."""
    return open_reader(source)


@lru_cache(maxsize=1)
def _segmenter(job: Job) -> Segmenter:
    path = weights_path(job.weights)
    found = file_sha256(path)
    if found != job.weights_sha256:
        raise StackError(
            f"{path.name} has the sha256 {found[:12]}... here, but the volume was begun with"
            f" {job.weights_sha256[:12]}...; give all workers the same file."
        )
    return Segmenter.load(job.weights, device=job.device, threshold=job.threshold, tta=job.tta, precision=job.precision)
