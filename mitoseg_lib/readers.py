"""Stacks of any size, read some slices at a time: TIFF files, folders of slices, Zarr arrays and OME-Zarr.

`open_reader` looks at what a path leads to, checks its structure, and reads no pixel. Nothing is guessed: a voxel size
counts only where all three edges are stated with their units.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mitoseg_lib.errors import FilePath, StackError, named_errors, require_file
from mitoseg_lib.tiff import TiffVolume
from mitoseg_lib.tiff.metadata import UNITS, VoxelSize

__all__ = ["FolderReader", "SliceReader", "TiffReader", "ZarrReader", "is_zarr", "natural_order", "open_reader"]

TIFF_SUFFIXES, PNG_SUFFIXES = (".tif", ".tiff"), (".png",)
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")  # each node of a Zarr has one; the first is version 3's
OLDEST_OME_AXES = ("t", "c", "z", "y", "x")  # of OME-NGFF before 0.3, which didn't name them
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_GREY = 0  # value of IHDR's colour type


class SliceReader(Protocol):
    """A grey volume of which some slices at a time are read.

    Attributes
    ----------
    name : str
        What messages call it.
    description : str
        What was found, in a few words.
    shape : tuple of int
        (z, y, x).
    dtype : dtype
        In this machine's byte order.
    voxel_size_nm : tuple of float or None
        Edges of a voxel, (z, y, x), where the input states them.
    chunk_depth : int
        Slices that are stored together: reading fewer of them costs as much.
    """

    name: str
    description: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    voxel_size_nm: VoxelSize | None
    chunk_depth: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the slices `start` to `stop` - 1, at least one, (z, y, x); StackError where they are damaged."""


def open_reader(path: FilePath) -> SliceReader:
    """Open a TIFF stack, a folder of TIFF or PNG slices, a Zarr array or an OME-Zarr image.

    Parameters
    ----------
    path
        A file, or a folder: of a Zarr if it has a Zarr's metadata, of slices otherwise.

    Returns
    -------
    SliceReader
        `TiffReader`, `FolderReader` or `ZarrReader`.

    Raises
    ------
    StackError
        If there is nothing, or not one grey volume whose structure is whole.
    """
    if not os.path.isdir(path):
        return TiffReader(path)
    return ZarrReader(path) if is_zarr(path) else FolderReader(path)


def is_zarr(path: FilePath) -> bool:
    """Tell whether a folder is an array or a group of a Zarr."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ZARR_FILES)


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Return a key to sort names by, with numbers in them as numbers: slice2 before slice10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part)) if part.isdigit() and part.isascii() else (1, part) for part in parts]


class TiffReader:
    """A TIFF stack, or a single 2D TIFF as a stack of one slice; see `SliceReader`."""

    chunk_depth = 1

    def __init__(self, path: FilePath) -> None:
        self._volume = TiffVolume(path, one_slice=True)
        self.name = _last_part(path)
        self.shape, self.dtype = self._volume.shape, self._volume.dtype
        self.voxel_size_nm = self._volume.voxel_size_nm
        self.description = "a TIFF stack"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the slices `start` to `stop` - 1, (z, y, x)."""
        return self._volume.read(start, stop)


class FolderReader:
    """A folder of slices, TIFF or PNG, one file a slice, in the natural order of their names; see `SliceReader`.

    Hidden files and files of other kinds are left alone.
    """

    chunk_depth = 1

    def __init__(self, path: FilePath) -> None:
        self.name = _last_part(path)
        with named_errors(path):
            names = _slice_names(path)
        self._slices = [_open_slice(os.path.join(path, name)) for name in names]
        first = self._slices[0]
        for name, one in zip(names, self._slices, strict=True):
            with named_errors(os.path.join(path, name)):
                _require_like_first(one, first, names[0])
        self.shape, self.dtype = (len(names), *first.shape[1:]), first.dtype
        sizes = {one.voxel_size_nm for one in self._slices}
        self.voxel_size_nm = sizes.pop() if len(sizes) == 1 else None
        self.description = f"a folder of slices, {names[0]} to {names[-1]}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the slices `start` to `stop` - 1, (z, y, x)."""
        return np.concatenate([one.read(0, 1) for one in self._slices[start:stop]])


@dataclass(frozen=True)
class PngSlice:
    """A grey PNG of 8 or 16 bits as a volume of one slice; its header alone is read at first."""

    path: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    voxel_size_nm: None = None  # PNG knows the resolution of a print only

    @classmethod
    def open(cls, path: str) -> PngSlice:
        """Read the header; StackError if it isn't a grey image's."""
        with _decoding(path, "a grey PNG"):
            require_file(path)
            with open(path, "rb") as stream:
                width, height, bits = _png_header(stream.read(33))
        return cls(path, (1, height, width), np.dtype(np.uint8 if bits == 8 else np.uint16))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the slice, (1, y, x)."""
        import imagecodecs

        with _decoding(self.path, "a grey PNG"):
            grey = imagecodecs.png_decode(Path(self.path).read_bytes())[None]
            if grey.shape != self.shape or grey.dtype != self.dtype:
                raise StackError(
                    f"decodes to {grey.dtype} {grey.shape[1:]}, but grey levels of {self.dtype} {self.shape[1:]} were"
                    " expected; save it again as a grey PNG"
                )
        return grey[start:stop]


class ZarrReader:
    """A Zarr array (version 2 or 3) or the finest level of an OME-Zarr image; see `SliceReader`.

    Axes before (z, y, x) must have length 1. The voxel size is that of the OME-NGFF metadata, also where the path
    leads to a level inside the image.
    """

    def __init__(self, path: FilePath) -> None:
        self.path, self.name = os.fspath(path), _last_part(path)
        with _decoding(path, "a Zarr array or an OME-Zarr image"):
            array, axes, self.voxel_size_nm = _open_zarr(Path(path))
            _require_volume(array.shape, axes)
            self._array = array
        self._leading = (0,) * (array.ndim - 3)
        self.shape = (1,) * (3 - array.ndim) + array.shape[len(self._leading) :]
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        stored = array.shards or array.chunks
        self.chunk_depth = min(stored[-3], self.shape[0]) if array.ndim > 2 else 1
        self.description = f"a Zarr array (version {array.metadata.zarr_format})"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the slices `start` to `stop` - 1, (z, y, x)."""
        with _decoding(self.path, "a whole Zarr array"):
            values = self._array[...] if self._array.ndim == 2 else self._array[(*self._leading, slice(start, stop))]
        values = np.asarray(values, self.dtype)
        return values[None][start:stop] if values.ndim == 2 else values


# --- folders ------------------------------------------------------------------------------------------------


def _last_part(path: FilePath) -> str:
    return os.path.basename(os.path.normpath(os.fsdecode(path)))


def _slice_names(folder: FilePath) -> list[str]:
    """Names of a folder's slices in natural order; StackError if there are none, or of two kinds."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    kinds = [[name for name in names if name.lower().endswith(ends)] for ends in (TIFF_SUFFIXES, PNG_SUFFIXES)]
    tiffs, pngs = kinds
    if tiffs and pngs:
        raise StackError(
            f"holds {len(tiffs)} TIFF and {len(pngs)} PNG files, but slices of one kind were expected; move the others"
            " to another folder"
        )
    if not tiffs and not pngs:
        found = f"holds {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else "is empty"
        raise StackError(f"{found}, but TIFF or PNG slices, or a Zarr, were expected; give their folder")
    return sorted(tiffs or pngs, key=natural_order)


def _open_slice(path: str) -> TiffVolume | PngSlice:
    is_png = path.lower().endswith(PNG_SUFFIXES)
    return PngSlice.open(path) if is_png else TiffVolume(path, one_slice=True)


def _require_like_first(one: TiffVolume | PngSlice, first: TiffVolume | PngSlice, first_name: str) -> None:
    """Raise StackError unless a file is one slice of the first one's size and type."""
    if one.shape[0] != 1:
        raise StackError(
            f"holds {one.shape[0]} slices, but one file a slice was expected in a folder; give the path of the file"
        )
    if one.shape != first.shape or one.dtype != first.dtype:
        found, expected = (f"{part.dtype} of {part.shape[1]} x {part.shape[2]} pixels" for part in (one, first))
        raise StackError(
            f"is {found} and {first_name} is {expected}, but slices of one size and type were expected;"
            " leave only the slices of one stack in the folder"
        )


@contextmanager
def _decoding(path: FilePath, expected: str) -> Iterator[None]:
    """Name errors as `named_errors` does; what a decoder raises for bytes that make no sense to it is damage."""
    with named_errors(path):
        try:
            yield
        except (StackError, OSError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise StackError(f"is damaged or cut off ({reason}), but {expected} was expected; get it again") from error


def _png_header(data: bytes) -> tuple[int, int, int]:
    """Width, height and bits of a PNG (PNG specification, 11.2.2); StackError if they aren't a slice's."""
    if len(data) < 33 or data[:8] != PNG_START or data[12:16] != b"IHDR":
        raise StackError("isn't a PNG, but a grey PNG was expected; save it again")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    if zlib.crc32(data[12:29]) != struct.unpack(">I", data[29:33])[0]:
        raise StackError("is damaged (its header's checksum), but a grey PNG was expected; get it again")
    if colour != PNG_GREY:
        raise StackError("is a colour image, but a grey slice was expected; convert it to 8-bit grey")
    if bits not in (8, 16):
        raise StackError(f"has {bits} bits a pixel, but 8 or 16 were expected; convert it to 8-bit grey")
    return width, height, bits


# --- Zarr ---------------------------------------------------------------------------------------------------


def _open_zarr(path: Path) -> tuple[Any, tuple[str, ...] | None, VoxelSize | None]:
    """The array that a path leads to, the names of its axes, and its voxel size, where the metadata state them."""
    import zarr

    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        parent = zarr.open_group(path.parent, mode="r") if is_zarr(path.parent) else None
        image = _ome_image(parent) if parent is not None else None
        levels = [level for level in image["datasets"] if level["path"] == path.name] if image else []
    else:
        image = _ome_image(node)
        if image is None:
            _refuse_group(node)
        levels = image["datasets"][:1]
        node = node[levels[0]["path"]]
    if not levels:
        return node, None, None
    axes, units = _ome_axes(image)
    return node, axes, _ome_voxel_size(axes, units, [levels[0], image])


def _ome_image(group: Any) -> dict | None:
    """OME-NGFF's description of the group's image (0.5: under "ome"; before: at the top), or None."""
    attributes = group.attrs.asdict()
    images = attributes.get("ome", attributes).get("multiscales")
    return images[0] if images else None


def _ome_axes(image: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and units of the axes; in versions before 0.4 they had no units."""
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", OLDEST_OME_AXES)]
    return tuple(axis["name"].lower() for axis in axes), tuple(str(axis.get("unit", "")).lower() for axis in axes)


def _ome_voxel_size(axes: Sequence[str], units: Sequence[str], levels: list[dict]) -> VoxelSize | None:
    """Product of the scales of a level and of the whole image, in nm, or None where it isn't stated completely."""
    scale = np.ones(len(axes))
    is_stated = False
    for level in levels:
        for step in level.get("coordinateTransformations", []):
            if step["type"] == "scale" and "scale" in step:
                scale, is_stated = scale * np.array(step["scale"], float), True
    in_nm = [UNITS.get(unit, math.nan) * length for unit, length in zip(units, scale.tolist(), strict=True)]
    lengths = dict(zip(axes, in_nm, strict=True))
    size = tuple(lengths.get(axis, math.nan) for axis in "zyx")
    return size if is_stated and all(math.isfinite(edge) and edge > 0 for edge in size) else None


def _refuse_group(group: Any) -> None:
    """Raise StackError for a group that isn't an OME image."""
    arrays = sorted(name for name, _ in group.arrays())
    found = f"the arrays {json.dumps(arrays[:4])[1:-1]}" if arrays else "no array"
    raise StackError(
        f"is a Zarr group without OME metadata that holds {found}, but one volume was expected; give the path of an"
        " array in it"
    )


def _require_volume(shape: tuple[int, ...], axes: tuple[str, ...] | None) -> None:
    """Raise StackError unless there is one volume in the order (z, y, x)."""
    if len(shape) < 2 or 0 in shape:
        raise StackError(f"has shape {shape}, but a volume (z, y, x) was expected; give another array")
    if max(shape[:-3], default=1) > 1:
        raise StackError(
            f"has shape {shape}, but one grey volume (z, y, x) was expected; save the channel or time point wanted"
        )
    if axes is not None and tuple(axes[-3:]) != ("z", "y", "x")[-len(shape) :]:
        raise StackError(f"has the axes {', '.join(axes)}, but z, y, x were expected; save it in this order")
