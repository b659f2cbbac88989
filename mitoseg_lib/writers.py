"""Masks and probabilities to files that the field's tools open: TIFF for ImageJ, and OME-Zarr.

A volume is written slab by slab under another name in the same folder, flushed to the disk, and only then renamed:
what has the proper name is whole, whatever ends the process. What an error or Ctrl-C leaves is removed.

uint8 both: a mask is 0 and 255 in TIFF (what ImageJ calls a binary image), and 0 and 1 in OME-Zarr. A probability p is
``round(254 p)`` in both, so that 255 can mean "not computed" in a Zarr, where a chunk that is missing reads as the fill
value and would look like "nothing here" if that were 0.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mitoseg_lib.errors import FilePath, StackError
from mitoseg_lib.readers import is_zarr
from mitoseg_lib.tiff.metadata import VoxelSize

__all__ = [
    "NOT_COMPUTED",
    "PROBABILITY_ONE",
    "check_target",
    "chunk_shape",
    "create_ome_array",
    "describe_ome_image",
    "encode_probabilities",
    "flush",
    "flush_folder",
    "is_zarr_name",
    "replace_target",
    "write_slabs",
]

TIFF_SUFFIXES, ZARR_SUFFIX = (".tif", ".tiff"), ".zarr"
PROBABILITY_ONE, NOT_COMPUTED = 254, 255
PROBABILITY_NAME = f"probability, {PROBABILITY_ONE} is 1"  # of an image in an OME-Zarr
ZARR_CHUNK = (8, 512, 512)  # voxels: 2 MB before compression
LARGEST_TIFF = 2**32 - 2**25  # bytes: its pointers have 32 bits, and pages need some room besides pixels
NGFF_VERSION = "0.5"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Slabs = Iterable[np.ndarray]
Shape = tuple[int, int, int]


def encode_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Return probabilities in [0, 1] as uint8 0 to 254, rounded; divide by 254 to get them back within 1/508."""
    return np.rint(probabilities * np.float32(PROBABILITY_ONE)).astype(np.uint8)


def is_zarr_name(path: FilePath) -> bool:
    """Tell whether an output of this name is an OME-Zarr."""
    return os.fsdecode(path).lower().rstrip("/\\").endswith(ZARR_SUFFIX)


def check_target(path: FilePath, shape: Shape, *, overwrite: bool = False, source: FilePath | None = None) -> Path:
    """Check that a volume can be written to a path, before hours are spent on it, and return the path.

    Parameters
    ----------
    path
        Its suffix is the format: .tif or .tiff, or .zarr.
    shape
        Of the volume, (z, y, x).
    overwrite
        Whether what is there may be replaced: a file by a TIFF, a Zarr by a Zarr.
    source
        What the volume is made from; it is never replaced.

    Raises
    ------
    StackError
        If the suffix is another, the folder isn't there, something is in the way, or the volume is too large for TIFF.
    """
    path = Path(path)
    if not is_zarr_name(path) and path.suffix.lower() not in TIFF_SUFFIXES:
        raise StackError(
            f"{path.name} ends in {path.suffix or 'no suffix'}, but .tif, .tiff or .zarr was expected, which says"
            " the format; give another name."
        )
    if not is_zarr_name(path) and math.prod(shape) > LARGEST_TIFF:
        raise StackError(
            f"{path.name} would hold {math.prod(shape) / 1e9:.1f} GB, but ImageJ's TIFF ends at 4 GB; give a name that"
            " ends in .zarr."
        )
    if not path.parent.is_dir():
        raise StackError(f"{path.parent} isn't a folder, but the output was to be written there; make it first.")
    if source is not None and _lies_in(path, Path(source)):
        raise StackError(f"{path.name} would replace the input or lie inside it; give another name.")
    if os.path.lexists(path):
        _require_replaceable(path, overwrite)
    return path


def write_slabs(
    path: FilePath, slabs: Slabs, shape: Shape, *, voxel_size_nm: VoxelSize, is_mask: bool, overwrite: bool = False
) -> None:
    """Write a volume that comes slab by slab, as TIFF or OME-Zarr; whole or not at all.

    Parameters
    ----------
    path
        See `check_target`.
    slabs
        bool (a mask) or uint8 (see `encode_probabilities`), (z, y, x), one after the other from the first slice.
    shape
        Of the whole volume, (z, y, x).
    voxel_size_nm
        Written into the metadata: in µm in TIFF (ImageJ's unit of choice), in nm in OME-Zarr.
    is_mask
        Which of the two it is.
    overwrite
        As in `check_target`.

    Raises
    ------
    StackError
        As `check_target` does, and if the disk is full or can't be written to.
    """
    path = check_target(path, shape, overwrite=overwrite)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    write = _write_zarr if is_zarr_name(path) else _write_tiff
    with _removed_on_error(unfinished), _naming_disk_errors(path):
        checked = _checked(slabs, shape)
        write(unfinished, checked, shape, voxel_size_nm, is_mask)
        next(checked, None)  # a TIFF's writer stops after the last slice and wouldn't notice one too many
        flush(unfinished)
        if os.path.lexists(path):  # also what someone else has put there in the meantime
            _require_replaceable(path, overwrite)
        replace_target(unfinished, path)
        flush_folder(path.parent)


def _write_tiff(path: Path, slabs: Iterator[np.ndarray], shape: Shape, voxel_size_nm: VoxelSize, is_mask: bool) -> None:
    """Write a TIFF of one zlib-compressed page a slice, with ImageJ's metadata."""
    import tifffile

    z, y, x = (edge / 1000 for edge in voxel_size_nm)
    one = np.uint8(255 if is_mask else 1)
    with tifffile.TiffWriter(path, imagej=True) as writer:
        writer.write(
            (grey for slab in slabs for grey in slab.astype(np.uint8) * one),
            shape=shape,
            dtype=np.uint8,
            compression="zlib",
            resolution=(1 / x, 1 / y),
            metadata={"axes": "ZYX", "spacing": z, "unit": "um"},
        )


def _write_zarr(path: Path, slabs: Iterator[np.ndarray], shape: Shape, voxel_size_nm: VoxelSize, is_mask: bool) -> None:
    """Write an OME-NGFF image of one level, as Zarr version 3, each chunk with a checksum."""
    import zarr

    name = "mask" if is_mask else PROBABILITY_NAME
    image = describe_ome_image(name, [voxel_size_nm])
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": image})
    array = create_ome_array(group, "0", shape, np.uint8, NOT_COMPUTED)
    start = 0
    for slab in slabs:
        array[start : start + len(slab)] = slab.astype(np.uint8)
        start += len(slab)


def create_ome_array(group: Any, name: str, shape: Shape, dtype: type, fill_value: int) -> Any:
    """Create an empty array in a Zarr group: chunks of `chunk_shape`, each with a checksum, also if it is all 0."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    return group.create_array(
        name,
        shape=shape,
        chunks=chunk_shape(shape),
        dtype=dtype,
        fill_value=fill_value,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=("z", "y", "x"),
        config={"write_empty_chunks": True},
    )


def chunk_shape(shape: Shape) -> Shape:
    """Return the shape of the chunks of an array of some shape."""
    return tuple(min(side, n) for side, n in zip(ZARR_CHUNK, shape, strict=True))


def describe_ome_image(name: str, voxel_sizes_nm: Sequence[VoxelSize]) -> dict:
    """Return the metadata (OME-NGFF 0.5, "multiscales") of an image whose levels, the finest first, are 0, 1, ...

    A coarse voxel covers a block of fine ones, so its centre lies half a block less half a voxel farther.
    """
    datasets = []
    for number, size in enumerate(voxel_sizes_nm):
        steps = [{"type": "scale", "scale": [float(edge) for edge in size]}]
        shift = [(coarse - fine) / 2 for coarse, fine in zip(size, voxel_sizes_nm[0], strict=True)]
        if any(shift):
            steps.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(number), "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    return {"version": NGFF_VERSION, "multiscales": [{"name": name, "axes": axes, "datasets": datasets}]}


def _checked(slabs: Slabs, shape: Shape) -> Iterator[np.ndarray]:
    """Hand the slabs on; ValueError unless they are exactly the volume."""
    depth = 0
    for slab in slabs:
        depth += len(slab)
        if slab.shape[1:] != shape[1:] or depth > shape[0]:
            raise ValueError(f"A slab of shape {slab.shape} doesn't fit a volume of {shape}; pass slabs of its slices.")
        yield slab
    if depth != shape[0]:
        raise ValueError(f"{depth} slices came, but the volume has {shape[0]}; pass all of them.")


# --- whole or not at all ------------------------------------------------------------------------------------


def _require_replaceable(path: Path, overwrite: bool) -> None:
    """Raise StackError unless what is there may be replaced, and is of the kind that replaces it."""
    if not overwrite:
        raise StackError(f"{path.name} exists already, and is left as it is; use --overwrite, or give another name.")
    fits = is_zarr(path) if is_zarr_name(path) else path.is_file()
    if not fits:
        what = "a folder" if path.is_dir() else "something else"
        raise StackError(
            f"{path.name} is {what}, but an output of this name would replace only"
            f" {'a Zarr' if is_zarr_name(path) else 'a file'}; give another name."
        )


def _lies_in(path: Path, source: Path) -> bool:
    """Tell whether a path is that of the source, or of something in it."""
    path, source = path.resolve(), source.resolve()
    same = path.exists() and source.exists() and path.samefile(source)
    return same or source in (path, *path.parents) or path in source.parents


def replace_target(unfinished: Path, path: Path) -> None:
    """Give what is finished its name. A folder can't be renamed to one that has files in it, so that steps aside."""
    if not path.is_dir():
        os.replace(unfinished, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.replace(path, old)
    try:
        os.replace(unfinished, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


@contextmanager
def _removed_on_error(unfinished: Path) -> Iterator[None]:
    """Remove what was written so far, also after Ctrl-C."""
    try:
        yield
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def _naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk answers into a sentence."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in FULL_DISK
        remedy = "make room, or write to another disk" if is_full else "check the folder's permissions and its disk"
        reason = error.strerror or str(error)
        raise StackError(f"{path.name} couldn't be written ({reason}), and nothing of it is left; {remedy}.") from None


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk; only POSIX can."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
