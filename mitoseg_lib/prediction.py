"""From a stack in a file to a mask in a file: what ``mitoseg predict`` does.

Slices pass through some at a time: read, brought to the model's grey levels and voxel size, predicted, filtered along
z, brought back to the stack's own grid, and written. So memory doesn't grow with the number of slices; and each is
predicted once, although what becomes of it depends on slices of the slabs before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import nn
from tqdm.auto import tqdm

from mitoseg_lib.errors import FilePath, StackError, named_errors
from mitoseg_lib.fusion import fuse
from mitoseg_lib.grey import GreyRange, GreyTransform, choose_grey_transform
from mitoseg_lib.inference import predict_stack, predict_turned
from mitoseg_lib.readers import SliceReader, open_reader
from mitoseg_lib.streams import median_of_blocks, median_slices, overlapping_blocks, surroundings
from mitoseg_lib.tiff.metadata import VoxelSize
from mitoseg_lib.weights import WeightsMetadata, load_weights, read_metadata
from mitoseg_lib.writers import check_target, encode_probabilities, write_slabs

__all__ = [
    "ASSUMED_NM",
    "Conversion",
    "PredictionPlan",
    "Segmenter",
    "choose_conversion",
    "choose_device",
    "metadata_for_slices",
    "plan_prediction",
    "resample",
]

ASSUMED_NM = (5.0, 5.0, 5.0)
ONE_SLICE = (
    "this model compares a slice with the ones above and below it, and here is one only, which stands in for them, too;"
    " a stack gives a better mask"
)
SLAB = 8  # slices at a time, as many as a chunk of the written Zarr has
LARGEST_SLAB = 2**28  # bytes of input as float32 that are read at a time, unless a single slice is larger
LARGEST_BLOCK = 2**26  # bytes of probabilities at a time, of which a median keeps several times as many
SAME_SIZE = 0.01  # voxel sizes that differ by less count as equal
LARGEST_FACTOR = 16.0  # between two voxel sizes; beyond, one of them is a mistake
LARGEST_WHOLE = 2**22  # pixels of a slice that the model is given whole; larger ones are cut into windows
WINDOW = 1024


@dataclass(frozen=True)
class Segmenter:
    """A trained model with what it needs to be used on other stacks.

    Attributes
    ----------
    model
        For slices; see `mitoseg_lib.inference.predict_stack`.
    voxel_size_nm
        That it was trained with, (z, y, x).
    threshold
        Probability from which a voxel is foreground.
    grey_range
        See `mitoseg_lib.grey.choose_grey_transform`.
    tta
        Test-time augmentation: predict each slice in 8 orientations and average; 8 times as slow.
    median
        Slices of a median along z that the probabilities go through before the threshold, for voxels of the model's
        size; 1 for none. Of thicker slices it takes fewer; see `mitoseg_lib.streams.median_slices`.
    precision
        See `mitoseg_lib.inference.predict_stack`.
    """

    model: nn.Module
    voxel_size_nm: VoxelSize = ASSUMED_NM
    threshold: float = 0.5
    grey_range: GreyRange | None = None
    tta: bool = False
    median: int = 1
    precision: str = "auto"

    @classmethod
    def load(
        cls,
        weights: FilePath | None = None,
        *,
        device: str = "auto",
        threshold: float | None = None,
        tta: bool = False,
        precision: str = "auto",
    ) -> Segmenter:
        """Read weights (None: those that come with the library; see `mitoseg_lib.weights.load_weights`).

        On a CPU the network is written as fewer operations, see `mitoseg_lib.fusion.fuse`.

        Parameters
        ----------
        weights
            Path of a file, or None.
        device
            "cpu", "cuda", or "auto": a GPU where there is one.
        threshold
            Instead of the one in the file.
        tta, precision
            See the attributes.

        Raises
        ------
        WeightsError
            See `mitoseg_lib.weights.load_weights`.
        ValueError
            If the device or the threshold can't be had.
        """
        chosen = choose_device(device)
        metadata = metadata_for_slices(weights, threshold)
        model, _ = load_weights(weights)
        return cls(
            fuse(model) if chosen.type == "cpu" else model.to(chosen),  # on a GPU nobody has measured it
            metadata.voxel_size_nm,
            metadata.threshold,
            metadata.grey_range,
            tta,
            metadata.median,
            precision,
        )

    def probabilities(self, image: NDArray[np.uint8], voxel_size_nm: VoxelSize) -> NDArray[np.float32]:
        """Return the probabilities of a whole stack on its own grid; parameters as for `stream`."""
        return np.concatenate(list(self.stream([image], image.shape, voxel_size_nm)))

    def stream(
        self,
        slabs: Iterable[NDArray[np.uint8]],
        shape: tuple[int, ...],
        voxel_size_nm: VoxelSize,
        part: range | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the probabilities of a stack on its own grid, some slices at a time.

        They are those of `mitoseg_lib.inference.predict_stack` and `mitoseg_lib.inference.median_filter_z` for the
        whole stack, for slabs of any depths.

        Parameters
        ----------
        slabs
            uint8 (z, y, x), with grey levels as the model saw them, one after the other from the first slice that is
            needed (`needed_slices`).
        shape
            Of the whole stack.
        voxel_size_nm
            Of the stack, (z, y, x). Another size in the plane than the model's is resampled, and what the model and
            the median say is resampled back. Along z nothing is resampled: a model that sees the slices above and
            below sees them farther apart than in its training if they are thicker, and nearer if they are thinner.
        part
            Slices that are wanted; all by default.
        """
        depth, *plane = shape
        plane = tuple(plane)
        part = range(depth) if part is None else part
        inner = _model_plane(plane, voxel_size_nm, self.voxel_size_nm)
        size = min(SLAB, max(1, LARGEST_BLOCK // (4 * math.prod(plane))))
        median = self.median_for(voxel_size_nm)
        predicted = surroundings(part, median // 2, depth)
        found = self._predicted((_resample_grey(slab, inner) for slab in slabs), depth, size, predicted)
        if median > 1:
            blocks = overlapping_blocks(found, depth, size=size, reach=median // 2, mode="symmetric", part=part)
            found = median_of_blocks(blocks, median)
        yield from (block if inner == plane else np.clip(resample(block, plane), 0, 1) for block in found)

    def needed_slices(self, part: range, depth: int, voxel_size_nm: VoxelSize) -> range:
        """Return the slices of a stack, `depth` slices deep, that the probabilities of a part of it depend on."""
        predicted = surroundings(part, self.median_for(voxel_size_nm) // 2, depth)
        return surroundings(predicted, getattr(self.model, "n_slices", 1) // 2, depth)

    def median_for(self, voxel_size_nm: VoxelSize) -> int:
        """Return over how many slices the median is taken in a stack with such voxels, (z, y, x)."""
        return median_slices(self.median, self.voxel_size_nm[0], voxel_size_nm[0])

    def _predicted(
        self, slabs: Iterable[NDArray[np.uint8]], depth: int, size: int, part: range
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the model's probabilities of slices on its own grid, so many at a time."""
        predict = predict_turned if self.tta else predict_stack
        n_slices = getattr(self.model, "n_slices", 1)
        for block in overlapping_blocks(slabs, depth, size=size, reach=n_slices // 2, mode="reflect", part=part):
            window = WINDOW if math.prod(block.shape[1:]) > LARGEST_WHOLE else None
            if n_slices > 1:  # each slice with its neighbours as channels, without a copy
                block = np.moveaxis(np.lib.stride_tricks.sliding_window_view(block, n_slices, axis=0), -1, 1)
            yield predict(self.model, block, window=window, precision=self.precision)


def metadata_for_slices(weights: FilePath | None = None, threshold: float | None = None) -> WeightsMetadata:
    """Return what weights say of themselves, with a threshold instead of their own.

    Raises
    ------
    WeightsError
        See `mitoseg_lib.weights.load_weights`.
    ValueError
        If they are a 3D network's, or the threshold isn't a probability.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"The threshold is {threshold}, but a probability from 0 to 1 was expected; correct it.")
    metadata = read_metadata(weights)
    if metadata.options.get("ndim") == 3:
        raise ValueError(
            f"{weights} holds a 3D network, but one for slices was expected; call "
            "mitoseg_lib.inference.predict_stack with it, or use another file."
        )
    return metadata if threshold is None else replace(metadata, threshold=threshold)


@dataclass(frozen=True)
class PredictionPlan:
    """What `plan_prediction` decided; nothing was predicted or written yet.

    Attributes
    ----------
    reader, target, segmenter
        What is predicted, where it will be written, and by which model.
    voxel_size_nm
        Of the input, (z, y, x).
    grey
        Transform of its grey levels.
    notes
        What the user should know of it, one sentence each.
    overwrite
        Whether `target` may be replaced.
    """

    reader: SliceReader
    target: Path
    segmenter: Segmenter
    voxel_size_nm: VoxelSize
    grey: GreyTransform
    notes: tuple[str, ...]
    overwrite: bool = False

    def run(self, *, probabilities: bool = False, progress: bool = False) -> None:
        """Predict, and write a mask or, if asked for, probabilities; whole or not at all.

        Raises
        ------
        StackError
            If the input is damaged inside, or the output can't be written.
        """
        shape = self.reader.shape
        with tqdm(total=shape[0], unit="slice", disable=not progress) as bar:
            found = self._watched(self.segmenter.stream(self._slabs(), shape, self.voxel_size_nm), bar)
            threshold = np.float32(self.segmenter.threshold)
            slabs = (encode_probabilities(slab) if probabilities else slab >= threshold for slab in found)
            write_slabs(
                self.target,
                slabs,
                shape,
                voxel_size_nm=self.voxel_size_nm,
                is_mask=not probabilities,
                overwrite=self.overwrite,
            )

    def _slabs(self) -> Iterator[NDArray[np.uint8]]:
        """Grey levels of the whole stack as the model takes them, slab by slab."""
        depth, step = self.reader.shape[0], _slab_depth(self.reader)
        for start in range(0, depth, step):
            values = self.reader.read(start, min(start + step, depth))
            with named_errors(self.reader.name):
                image = self.grey.apply(values)
            yield image

    @staticmethod
    def _watched(slabs: Iterable[NDArray], bar: tqdm) -> Iterator[NDArray]:
        """Hand slabs on, and count their slices."""
        for slab in slabs:
            yield slab
            bar.update(len(slab))


def plan_prediction(
    source: FilePath,
    target: FilePath,
    segmenter: Segmenter,
    *,
    voxel_size_nm: VoxelSize | None = None,
    overwrite: bool = False,
) -> PredictionPlan:
    """Open a stack, decide how it is brought to what the model saw, and check that the output can be written.

    Parameters
    ----------
    source
        See `mitoseg_lib.readers.open_reader`.
    target
        A path that ends in .tif, .tiff or .zarr; see `mitoseg_lib.writers.check_target`.
    segmenter
        The model.
    voxel_size_nm
        Of the input, (z, y, x); it counts more than what the input itself says. Where neither says it, 5 nm is assumed.
    overwrite
        Replace what is at `target`.

    Returns
    -------
    PredictionPlan
        Whose `run` does it, and whose `notes` say what was decided.

    Raises
    ------
    StackError
        If the input isn't a grey volume or is damaged, the voxel size can't be meant, or something is in the way.
    """
    reader = open_reader(source)
    target = check_target(target, reader.shape, overwrite=overwrite, source=source)
    found = choose_conversion(reader, segmenter.voxel_size_nm, segmenter.grey_range, voxel_size_nm=voxel_size_nm)
    notes = list(found.notes)
    if found.plane != reader.shape[1:]:
        notes[-1] += ", and the result is brought back"
    median = segmenter.median_for(found.voxel_size_nm)
    if median != segmenter.median:
        notes.append(
            f"the median along z takes {_slices(median)} of {found.voxel_size_nm[0]:g} nm instead of"
            f" {_slices(segmenter.median)} of {segmenter.voxel_size_nm[0]:g} nm"
        )
    if reader.shape[0] == 1 and getattr(segmenter.model, "n_slices", 1) > 1:
        notes.append(ONE_SLICE)
    return PredictionPlan(reader, target, segmenter, found.voxel_size_nm, found.grey, tuple(notes), overwrite)


@dataclass(frozen=True)
class Conversion:
    """How a stack is brought to what a model saw; `choose_conversion` decides it.

    Attributes
    ----------
    voxel_size_nm
        Of the stack as it is, (z, y, x).
    plane
        Pixels of a slice, (y, x), with which it has the model's voxel size.
    grey
        Transform of its grey levels.
    notes
        What the user should know of it, one sentence each.
    """

    voxel_size_nm: VoxelSize
    plane: tuple[int, int]
    grey: GreyTransform
    notes: tuple[str, ...]

    def apply(self, values: NDArray) -> NDArray[np.uint8]:
        """Return slices, (z, y, x), as the model takes them; StackError for NaN and infinite values."""
        return _resample_grey(self.grey.apply(values), self.plane)


def choose_conversion(
    reader: SliceReader,
    model_size_nm: VoxelSize,
    grey_range: GreyRange | None,
    *,
    voxel_size_nm: VoxelSize | None = None,
) -> Conversion:
    """Decide how a stack is brought to the grey levels and, in the plane, the voxel size of a model.

    Parameters
    ----------
    reader
        The stack.
    model_size_nm
        The model's voxel size, (z, y, x). Only y and x count, since slices are resampled and no slice is made up.
    grey_range
        The model's; see `mitoseg_lib.grey.choose_grey_transform`.
    voxel_size_nm
        Of the stack, (z, y, x), instead of what it states itself. Where neither says it, 5 nm is assumed.

    Raises
    ------
    StackError
        If the values are of another type or not finite, or the voxel size can't be meant.
    """
    size, note = _voxel_size(reader, voxel_size_nm)
    plane = _model_plane(reader.shape[1:], size, model_size_nm)
    grey = choose_grey_transform(reader, grey_range)
    notes = [f"{reader.name} is {reader.description}: {_times(reader.shape)} voxels, {reader.dtype}", note, str(grey)]
    if plane != reader.shape[1:]:
        notes.append(f"slices are resampled to {_times(plane)} pixels of {_times(model_size_nm[1:])} nm for the model")
    return Conversion(size, plane, grey, tuple(notes))


def choose_device(name: str) -> torch.device:
    """Return the device that a word stands for: "cpu", "cuda", or "auto", a GPU where there is one that works.

    Raises
    ------
    ValueError
        If it is another word, or a GPU is asked for that isn't there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"The device is {name!r}, but 'auto', 'cpu' or 'cuda' was expected; choose one of them.")
    has_gpu = False
    with suppress(RuntimeError):  # a driver that doesn't work is no GPU
        has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("The device 'cuda' was asked for, but there is no GPU that works; use --device cpu.")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def resample(values: NDArray, plane: tuple[int, int], *, cubic: bool = False) -> NDArray[np.float32]:
    """Return slices on another grid of the same extent: edges stay edges, and what is in the middle stays there.

    Linear or cubic interpolation, one axis after the other. Where the new grid is coarser, the kernel is as wide as its
    pixels, so that what lies between them counts too (as in Pillow, and in torch's ``antialias=True``).

    Parameters
    ----------
    values
        (z, y, x).
    plane
        New number of pixels, (y, x).
    cubic
        Keeps edges sharper, and can overshoot.

    Returns
    -------
    ndarray
        float32.
    """
    down, across = (_interpolation(n, new, cubic) for n, new in zip(values.shape[1:], plane, strict=True))
    return np.stack([down @ (across @ grey.T.astype(np.float32)).T for grey in values])


def _resample_grey(image: NDArray[np.uint8], plane: tuple[int, ...]) -> NDArray[np.uint8]:
    """Slices on another grid, as grey levels; those that have it already come back as they are."""
    if image.shape[1:] == tuple(plane):
        return image
    return np.clip(np.rint(resample(image, plane, cubic=True)), 0, 255).astype(np.uint8)


def _interpolation(n_in: int, n_out: int, cubic: bool) -> sparse.csr_array:
    """Matrix, (n_out, n_in), whose rows are the weights with which old pixels count in a new one."""
    scale = n_in / n_out
    width = max(scale, 1.0)
    centres = (np.arange(n_out)[:, None] + 0.5) * scale - 0.5  # of new pixels, in old ones
    reach = math.ceil(2 * width)
    columns = np.floor(centres).astype(int) + np.arange(-reach, reach + 2)
    distance = np.abs(columns - centres) / width
    weights = _keys_kernel(distance) if cubic else np.maximum(1 - distance, 0)
    weights[(columns < 0) | (columns >= n_in)] = 0
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    rows = np.broadcast_to(np.arange(n_out)[:, None], columns.shape)
    used = weights != 0
    return sparse.csr_array((weights[used], (rows[used], columns[used])), shape=(n_out, n_in))


def _keys_kernel(x: NDArray) -> NDArray:
    """Cubic convolution, Keys 1981, with a = -1/2, at distances from the centre."""
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _model_plane(plane: tuple[int, ...], size: VoxelSize, model_size: VoxelSize) -> tuple[int, ...]:
    """Number of pixels, (y, x), with which slices have the model's voxel size; StackError for absurd sizes."""
    factors = [own / wanted for own, wanted in zip(size[1:], model_size[1:], strict=True)]
    if not all(1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR for factor in factors):
        raise StackError(
            f"The voxel size is {_times(size)} nm (z, y, x), but the model was made for {_times(model_size)} nm and at"
            f" most {LARGEST_FACTOR:g} times as large or small was expected; give the right one with --voxel-size."
        )
    if all(abs(factor - 1) <= SAME_SIZE for factor in factors):
        return tuple(plane)
    return tuple(max(1, round(side * factor)) for side, factor in zip(plane, factors, strict=True))


def _voxel_size(reader: SliceReader, given: VoxelSize | None) -> tuple[VoxelSize, str]:
    """Voxel size of a stack in nm, (z, y, x), and a sentence that says where it is from."""
    stated = reader.voxel_size_nm
    if given is None:
        if stated is not None:
            return stated, f"voxels of {_times(stated)} nm (z, y, x), as its metadata say"
        return ASSUMED_NM, f"its voxel size isn't stated, so {_times(ASSUMED_NM)} nm is assumed (--voxel-size gives it)"
    if len(given) != 3 or not all(math.isfinite(edge) and edge > 0 for edge in given):
        raise StackError(f"The voxel size is {given}, but three lengths in nm above 0 were expected; give z,y,x.")
    note = f"voxels of {_times(given)} nm (z, y, x), as given"
    if stated is not None and not np.allclose(stated, given, rtol=SAME_SIZE):
        note += f", although its metadata say {_times(stated)} nm"
    return tuple(given), note


def _slab_depth(reader: SliceReader) -> int:
    """Slices to read at a time: whole chunks of the input, and of the output, if they are small enough."""
    fitting = _fitting(reader.shape)
    wanted = math.ceil(reader.chunk_depth / SLAB) * SLAB
    return min(wanted, fitting // SLAB * SLAB) or max(1, fitting)


def _fitting(shape: tuple[int, ...]) -> int:
    """Slices that are small enough to be worked on at a time, or 0."""
    return LARGEST_SLAB // (math.prod(shape[1:]) * 4)  # as float32, of which there are some copies


def _times(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)


def _slices(number: int) -> str:
    return f"{number} slice{'s' if number > 1 else ''}"
