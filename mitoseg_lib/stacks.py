"""A labelled volume in memory: read TIFF files, refuse what is damaged or isn't a stack.

Arrays are (z, y, x), images uint8, masks bool, voxel sizes in nm.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np

from mitoseg_lib.errors import FilePath, StackError, StackWarning, named_errors, require_file
from mitoseg_lib.masks import read_labels, read_mask
from mitoseg_lib.tiff import read_volume

__all__ = [
    "Stack",
    "StackError",
    "StackWarning",
    "file_sha256",
    "load_stack",
    "read_labels",
    "read_mask",
    "to_uint8",
    "verify_sha256",
]

# Percentiles of a volume that become 0 and 255: the few voxels beyond are hot or dead pixels of the detector.
DARKEST, BRIGHTEST = 0.1, 99.9
SMALLEST_RANGE = 1e-300  # below, 255 divided by it would overflow


@dataclass(frozen=True, eq=False)
class Stack:
    """A volume of electron microscopy and, where it is known, which voxels are mitochondria.

    Attributes
    ----------
    image
        Grey values, uint8 (z, y, x).
    labels
        Mask of the mitochondria, bool (z, y, x), or None.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x), or None where they aren't known.
    name
        What messages and figures call the stack.

    Raises
    ------
    StackError
        If an array has another type or number of axes, the shapes differ, or a voxel edge isn't above 0.
    """

    image: np.ndarray
    labels: np.ndarray | None = None
    voxel_size_nm: tuple[float, float, float] | None = None
    name: str = "stack"

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        for array, dtype in ((self.image, np.uint8), (self.labels, np.bool_)):
            self._require_volume(array, dtype)
        if self.labels is not None and self.labels.shape != self.image.shape:
            raise StackError(
                f"{self.name}: the labels have shape {self.labels.shape} and the image {self.image.shape},"
                " but the same (z, y, x) was expected; give the labels of this image."
            )
        if self.voxel_size_nm is not None:
            object.__setattr__(self, "voxel_size_nm", self._edges())

    def _require_volume(self, array: np.ndarray | None, dtype: type) -> None:
        if array is None and dtype is np.bool_:
            return
        is_array = isinstance(array, np.ndarray)
        if not is_array or array.dtype != dtype or array.ndim != 3 or array.size == 0:
            found = f"{array.dtype} of shape {array.shape}" if is_array else type(array).__name__
            what = "an image" if dtype is np.uint8 else "labels"
            raise StackError(
                f"{self.name}: {what} of {np.dtype(dtype)} (z, y, x) was expected and {found} found;"
                " convert it, or load files with load_stack."
            )

    def _edges(self) -> tuple[float, float, float]:
        try:
            edges = tuple(float(edge) for edge in self.voxel_size_nm)
        except (TypeError, ValueError):
            edges = ()
        if len(edges) != 3 or not all(math.isfinite(edge) and edge > 0 for edge in edges):
            raise StackError(
                f"{self.name}: the voxel size is {self.voxel_size_nm!r},"
                " but three lengths in nm above 0 were expected; give (z, y, x)."
            )
        return edges

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size in voxels, (z, y, x)."""
        return self.image.shape

    def slices(self, indices: slice | range | Sequence[int]) -> Stack:
        """Stack of some z-slices only, in the order given.

        Parameters
        ----------
        indices
            A slice object gives a view of the same memory; a range, list or array of slice numbers gives a
            copy.

        Raises
        ------
        StackError
            If a slice number isn't in the stack, or no slice is left.
        """
        if not isinstance(indices, slice):
            indices = [index(number) for number in indices]  # no floats, which would be cut off silently
            outside = [number for number in indices if not -self.shape[0] <= number < self.shape[0]]
            if outside:
                raise StackError(
                    f"{self.name}: slice {outside[0]} was asked for, but it has slices 0 to {self.shape[0] - 1};"
                    " give numbers of these."
                )
        labels = None if self.labels is None else self.labels[indices]
        return Stack(self.image[indices], labels, self.voxel_size_nm, self.name)

    def require_voxel_size(self) -> tuple[float, float, float]:
        """Edges of a voxel in nm, (z, y, x); StackError where they aren't known."""
        if self.voxel_size_nm is None:
            raise StackError(
                f"{self.name}: its voxel size is not known, but lengths in nm were asked for;"
                " load it with voxel_size_nm=(z, y, x)."
            )
        return self.voxel_size_nm

    def require_labels(self) -> np.ndarray:
        """Labels, bool (z, y, x), with both classes in them, as a training needs; StackError otherwise."""
        if self.labels is None:
            raise StackError(f"{self.name}: it has no labels, but a mask was expected; load it with its labels.")
        if not self.labels.any() or self.labels.all():
            found = "foreground" if self.labels.any() else "background"
            raise StackError(
                f"{self.name}: its labels are all {found}, but a training needs both classes;"
                " choose slices that show some mitochondria and some of the rest."
            )
        return self.labels


def load_stack(
    image: FilePath,
    labels: FilePath | None = None,
    *,
    voxel_size_nm: tuple[float, float, float] | None = None,
) -> Stack:
    """Read a stack from TIFF files into memory.

    Parameters
    ----------
    image
        TIFF of one grey volume (see `mitoseg_lib.tiff.read_volume`). uint8 stays as it is; `to_uint8` says
        what becomes of uint16 and floats.
    labels
        TIFF of its mask (see `read_mask`), or None.
    voxel_size_nm
        Edges of a voxel in nm, (z, y, x). Without it the image file's own metadata count (ImageJ's,
        tifffile's or OME's), if they state all three with a unit.

    Returns
    -------
    Stack
        With `voxel_size_nm` None where neither the argument nor the file gives it.

    Raises
    ------
    StackError
        If a file is missing, damaged, or not a stack; if image and labels differ in shape; see also
        `read_mask`. Changed pixel values of a file without compression leave no trace in it: where a file's
        sha256 is known, call `verify_sha256` first.
    """
    values, found_nm = read_volume(image)
    with named_errors(image):
        values = to_uint8(values)
    mask = None if labels is None else read_mask(labels)
    if mask is not None and mask.shape != values.shape:
        with named_errors(labels):
            raise StackError(
                f"has shape {mask.shape}, but {os.path.basename(os.fsdecode(image))} has {values.shape} and the same"
                " (z, y, x) was expected; give the labels of this image"
            )
    name = os.path.splitext(os.path.basename(os.fsdecode(image)))[0]
    return Stack(values, mask, voxel_size_nm if voxel_size_nm is not None else found_nm, name)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Convert grey values to uint8 by one rule.

    Parameters
    ----------
    values
        Array (z, y, x). uint8 comes back as it is. uint16 and floats are stretched linearly so that the volume's
        0.1 and 99.9 percentiles become 0 and 255 (or its minimum and maximum where those percentiles are
        equal), rounded, and cut off beyond; a volume of one value becomes 0. uint16 that holds no value above
        255 keeps its values: it is an 8-bit image in a wider file.

    Returns
    -------
    numpy.ndarray
        uint8, same shape.

    Raises
    ------
    StackError
        If there are NaN, infinite or enormous values, or the type is another (signed whole numbers, say, whose zero
        could mean anything).
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype != np.uint16 and values.dtype.kind != "f":
        raise StackError(f"holds {values.dtype}, but grey values of uint8, uint16 or float were expected; convert them")
    lowest, highest = float(values.min()), float(values.max())  # NaN if any is
    if not math.isfinite(highest - lowest):
        raise StackError("holds NaN or infinite values, but finite grey values were expected; replace them")
    if values.dtype == np.uint16 and highest <= 255:
        return values.astype(np.uint8)
    if values.dtype == np.float16:
        values = values.astype(np.float32)  # NumPy would count the voxels for its percentiles in float16 too
    dark, bright = np.percentile(values, [DARKEST, BRIGHTEST]).astype(np.float64).tolist()
    if dark == bright:
        dark, bright = lowest, highest
    scale = 255 / (bright - dark) if bright - dark > SMALLEST_RANGE else 0.0
    result = np.empty(values.shape, np.uint8)
    for target, grey in zip(result, values, strict=True):  # by slices: no float64 copy of the volume
        target[...] = np.clip(np.rint((grey.astype(np.float64) - dark) * scale), 0, 255)
    return result


def file_sha256(path: FilePath) -> str:
    """sha256 of a file's bytes, as hexadecimal digits; StackError if it can't be read."""
    with named_errors(path):
        require_file(path)
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_sha256(path: FilePath, expected: str) -> None:
    """Raise StackError unless a file's sha256 (hexadecimal digits) is the one expected."""
    found = file_sha256(path)
    if found != expected.lower():
        with named_errors(path):
            raise StackError(
                f"has changed: its sha256 is {found[:12]}..., but {expected[:12]}... was recorded; get the file again"
            )
