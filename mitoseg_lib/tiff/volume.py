"""Read the pages of a TIFF file as one volume, and refuse every file whose structure is damaged.

tifffile opens as much as it can of any file: a missing page comes back as fewer pages or as zeros, with a
line in a log. A measurement needs the opposite. So the directories are read and checked here, before anything
is allocated, and tifffile only decodes segments that lie where they should.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import tifffile

from mitoseg_lib.errors import FilePath, StackError, damaged, named_errors, require_file
from mitoseg_lib.tiff import directories as tags
from mitoseg_lib.tiff.directories import Directory, TiffFile
from mitoseg_lib.tiff.metadata import Description, VoxelSize, read_description, voxel_size

UNSIGNED, SIGNED, FLOAT, COMPLEX_INTEGER, COMPLEX = 1, 2, 3, 5, 6  # values of SampleFormat
DATA_TYPES = {
    **{(UNSIGNED, 1): "?", (UNSIGNED, 8): "u1", (UNSIGNED, 16): "u2", (UNSIGNED, 32): "u4"},
    **{(SIGNED, 8): "i1", (SIGNED, 16): "i2", (SIGNED, 32): "i4"},
    **{(FLOAT, 16): "f2", (FLOAT, 32): "f4", (FLOAT, 64): "f8"},
}
RGB = 2  # value of PhotometricInterpretation
SEPARATE_PLANES = 2  # value of PlanarConfiguration

# The most bytes that one compressed byte can stand for: a larger size is damage, and would only fill the
# memory. Deflate: 258 bytes in 2 bits; LZW: at most 4,096 bytes in 12 bits; PackBits: 128 bytes in 2.
UNCOMPRESSED = 1
LARGEST_RATIO = {UNCOMPRESSED: 1, 5: 2731, 8: 1032, 32773: 64, 32946: 1032}
LARGEST_RATIO_OF_OTHERS = 50_000
LARGEST_SEGMENT = 2**40  # bytes; larger ones would overflow in sums
ALIGNMENT = 16  # writers leave less than these bytes free between two parts of a file
READ_SIZE = 2**24  # bytes in one call
JPEG_COMPRESSIONS = {6, 7, 33007, 34892}


def read_volume(
    path: FilePath, *, colour: bool = False, one_slice: bool = False
) -> tuple[np.ndarray, VoxelSize | None]:
    """Read a TIFF as one volume.

    Parameters
    ----------
    path
        A TIFF or BigTIFF of one grey volume: a page a slice, or one page followed by the other slices' raw
        pixels (as ImageJ writes volumes over 4 GB). Values come back as they are stored: colour maps and
        'white is zero' are not applied.
    colour
        Whether a volume of RGB or RGBA pixels is accepted as well.
    one_slice
        Whether a single 2D image is accepted, as a volume of one slice.

    Returns
    -------
    volume
        Array (z, y, x) of the file's own type, in this machine's byte order, in memory; it may be changed.
        Colours are (z, y, x, 3), or (z, y, x, 4) with alpha.
    voxel_size_nm
        Edges of a voxel, (z, y, x), from ImageJ's, tifffile's or OME's metadata, or None.

    Raises
    ------
    StackError
        If the file is missing, damaged, or not one 3D volume of the kind wanted. Changed pixel values of a file without
        compression leave no trace in it: only a checksum shows them.
    """
    with named_errors(path):
        require_file(path)
        with open(path, "rb", buffering=0) as stream:
            file = TiffFile(stream)
            pages = list(file.directories())
            layout, description = checked_layout(file, pages, colour=colour, one_slice=one_slice)
            return read_layout(file, layout), stated_voxel_size(pages[0], description)


# --- directories to a layout --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the pixels are: `offsets`, `counts` and decoded `sizes` are in bytes, (page, segment).

    Segments are strips of whole rows, or tiles in rows; `is_plain` means strips of the array's own bytes. The
    shape is (z, y, x), with the colours behind or, if each has a plane of its own (`is_planar`), behind z.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    segment_shape: tuple[int, int]
    is_plain: bool
    is_planar: bool
    offsets: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray

    def pixels(self, volume: np.ndarray) -> np.ndarray:
        """View (z, y, x, sample) of an array of this shape."""
        return np.moveaxis(volume, 1, 3) if self.is_planar else volume.reshape(*volume.shape[:3], -1)


def checked_layout(
    file: TiffFile, pages: list[Directory], *, colour: bool = False, one_slice: bool = False
) -> tuple[Layout, Description]:
    """Check all pages against each other, against what the file declares, and against its size.

    Colours are refused unless `colour` accepts them, and a file of one page that doesn't call itself a stack unless
    `one_slice` lets it pass.
    """
    if not pages:
        raise damaged("it has no page")
    first = pages[0]
    for number, page in enumerate(pages, start=1):
        if page.geometry != first.geometry:
            raise StackError(
                f"has pages of different kinds (page {number} isn't like page 1 in size or type), but the slices of"
                " one stack were expected; save the stack alone"
            )
    samples = _samples(first, colour)
    dtype = _pixel_type(first, file.order, samples)
    description = read_description(bytes(first.tags.get(tags.DESCRIPTION, b"")).decode("utf-8", "replace"), samples)
    plane = first.number(tags.LENGTH), first.number(tags.WIDTH)
    if description.plane not in (None, plane):
        raise damaged(f"its slices are {plane} and its own description says {description.plane}")
    layout = _with_following_slices(_layout(pages, plane, dtype, samples), first, description.slices)
    _check_slices(layout.shape[0], description.slices, one_slice)
    _check_segments(file, layout, LARGEST_RATIO.get(first.number(tags.COMPRESSION), LARGEST_RATIO_OF_OTHERS))
    _check_ranges(file, layout, pages, description)
    return layout, description


def _samples(page: Directory, colour: bool) -> int:
    """Samples a pixel; StackError unless the page is grey or, where colours are accepted, RGB or RGBA."""
    samples, is_rgb = page.number(tags.SAMPLES), page.geometry[tags.PHOTOMETRIC] == (RGB,)
    if (samples == 1 and not is_rgb) or (colour and is_rgb and samples in (3, 4)):
        return samples
    expected = "a grey, RGB or RGBA stack" if colour else "a grey stack"
    raise StackError(
        f"is a colour image ({samples} samples a pixel), but {expected} was expected; convert it to 8-bit grey"
    )


def _pixel_type(page: Directory, order: str, samples: int) -> np.dtype:
    """Type of the pixels; StackError if nothing here uses it."""
    if page.number(tags.DEPTH) != 1:
        raise StackError("holds several slices in one page, but a page a slice was expected; save it with Fiji")
    kind = _of_each_sample(page, tags.SAMPLE_FORMAT, samples), _of_each_sample(page, tags.BITS, samples)
    if kind not in DATA_TYPES or (samples > 1 and kind[1] < 8):
        is_complex = kind[0] in (COMPLEX_INTEGER, COMPLEX)
        what = "complex numbers" if is_complex else f"{kind[1]}-bit samples of format {kind[0]}"
        raise StackError(f"holds {what}, but uint8, uint16 or float samples were expected; convert it")
    return np.dtype(DATA_TYPES[kind]).newbyteorder(order)


def _of_each_sample(page: Directory, code: int, samples: int) -> int:
    """Value of a tag that is stated for each sample, and must be the same for all, or once for all."""
    value = page.geometry[code]
    if samples > 1 and isinstance(value, tuple) and value == value[:1] * samples:
        return value[0]
    return page.number(code)


def _layout(pages: list[Directory], plane: tuple[int, int], dtype: np.dtype, samples: int) -> Layout:
    """Layout as the directories state it."""
    first, is_bits = pages[0], dtype.kind == "b"
    is_planar = samples > 1 and first.number(tags.PLANAR_CONFIGURATION) == SEPARATE_PLANES
    planes, together = (samples, 1) if is_planar else (1, samples)
    is_tiled = tags.TILE_OFFSETS in first.tags
    if is_tiled:
        codes = (tags.TILE_OFFSETS, tags.TILE_COUNTS)
        part = first.number(tags.TILE_LENGTH), first.number(tags.TILE_WIDTH)
    else:
        codes = (tags.STRIP_OFFSETS, tags.STRIP_COUNTS)
        part = min(first.number(tags.ROWS_PER_STRIP), plane[0]), plane[1]
    row_bytes = -(-part[1] // 8) if is_bits else part[1] * dtype.itemsize * together
    if part[0] * row_bytes > LARGEST_SEGMENT:
        raise damaged(f"its pixels come in parts of {part[0]:,} x {part[1]:,}")
    rows, columns = -(-plane[0] // part[0]), -(-plane[1] // part[1])  # rounded up
    offsets, counts = (_segment_table(pages, code, planes * rows * columns) for code in codes)
    lengths = np.full(rows, part[0])
    if not is_tiled:
        lengths[-1] = plane[0] - (rows - 1) * part[0]
    sizes = np.broadcast_to(np.tile(np.repeat(lengths * row_bytes, columns), planes), offsets.shape)
    is_raw = first.number(tags.COMPRESSION) == UNCOMPRESSED
    if is_raw:  # some writers count a whole strip for the last, shorter one
        counts = np.minimum(counts, sizes)
    is_plain = is_raw and not is_tiled and not is_bits
    is_plain = is_plain and first.number(tags.PREDICTOR) == first.number(tags.FILL_ORDER) == 1
    colours = (samples,) if samples > 1 else ()
    shape = (len(pages), *colours, *plane) if is_planar else (len(pages), *plane, *colours)
    return Layout(shape, dtype, part, is_plain, is_planar, offsets, counts, sizes)


def _segment_table(pages: list[Directory], code: int, per_page: int) -> np.ndarray:
    """One number for each segment of each page, int64 (page, segment)."""
    rows = [page.tags.get(code, ()) for page in pages]
    if any(not isinstance(row, tuple) or len(row) != per_page for row in rows):
        raise damaged(f"a page doesn't list the {per_page:,} segments that its size needs")
    return np.array(rows, np.int64)


def _with_following_slices(layout: Layout, page: Directory, declared: int | None) -> Layout:
    """Layout of a volume written as one page that all other slices' raw pixels follow; any other as it is."""
    in_one_run = (layout.offsets[0, 1:] == layout.offsets[0, :-1] + layout.sizes[0, :-1]).all()
    if layout.shape[0] > 1 or not declared or not layout.is_plain or not in_one_run:
        return layout
    size = int(layout.sizes.sum())
    stated = sum(page.tags[tags.STRIP_COUNTS])
    if stated not in (size, size * declared):  # there is no second page that would contradict a damaged size
        raise damaged(f"its page needs {size:,} bytes and lists {stated:,}")
    offsets = layout.offsets[0, 0] + size * np.arange(declared)[:, None]
    sizes = np.broadcast_to(size, offsets.shape)
    return replace(layout, shape=(declared, *layout.shape[1:]), offsets=offsets, counts=sizes, sizes=sizes)


def _check_slices(found: int, declared: int | None, one_slice: bool) -> None:
    """Check the number of pages."""
    if declared is not None and found != declared:
        raise damaged(f"it has {found} pages and its own description says {declared}")
    if found == 1 and declared is None and not one_slice:
        raise StackError("is one 2D image, but a stack of slices (z, y, x) was expected; give the whole stack")


def _check_segments(file: TiffFile, layout: Layout, ratio: int) -> None:
    """Check that every segment lies inside the file and can hold the pixels that it stands for."""
    missing = (layout.offsets < 8) | (layout.counts < 1)
    beyond = layout.offsets + layout.counts > file.size
    short = layout.counts < layout.sizes / ratio
    for wrong, what in ((missing, "are missing"), (beyond, "lie beyond its end"), (short, "are too few")):
        if wrong.any():
            raise damaged(f"the pixels of page {int(wrong.any(axis=1).argmax()) + 1} {what}")


def _check_ranges(file: TiffFile, layout: Layout, pages: list[Directory], description: Description) -> None:
    """Check that no two parts of the file overlap, and that no page's worth of bytes is left over."""
    segments = np.stack([layout.offsets.ravel(), layout.counts.ravel()], axis=1)
    ranges = np.concatenate([segments, [page.range for page in pages]])
    ranges = ranges[np.argsort(ranges[:, 0])]
    starts, ends = ranges[:, 0], ranges.sum(axis=1)
    values = np.array(sorted({value for page in pages for value in page.value_ranges}), np.int64).reshape(-1, 2)
    before = np.searchsorted(starts, values.sum(axis=1)) - 1  # the last range that starts before a value ends
    if (ends[:-1] > starts[1:]).any() or (ends[before] > values[:, 0])[before >= 0].any():
        raise damaged("two of its parts overlap")
    left_over = file.size - int(ranges[:, 1].sum() + values[:, 1].sum())
    padding = ALIGNMENT * (len(ranges) + len(values))
    is_silent = description.slices is None or len(pages) == 1
    has_more = tags.SUB_IFDS in pages[0].tags  # smaller copies of the pages, in directories that aren't read here
    if is_silent and not has_more and left_over >= max(padding, layout.counts.sum(axis=1).min()):
        # A chain that was cut loses pages that are still in the file.
        raise damaged(f"it lists {len(pages)} pages, and {left_over:,} more bytes belong to none")


def stated_voxel_size(page: Directory, description: Description) -> VoxelSize | None:
    """Voxel size in nm from the description and the resolution tags."""
    codes = (tags.Y_RESOLUTION, tags.X_RESOLUTION, tags.RESOLUTION_UNIT)
    values = [page.tags.get(code, ()) for code in codes]
    if any(not isinstance(value, tuple) or len(value) != 1 for value in values):
        return description.voxel_size_nm
    (per_y,), (per_x,), (unit,) = values
    return voxel_size(description, (per_y, per_x), unit)


# --- a layout to pixels -------------------------------------------------------------------------------------


def read_layout(file: TiffFile, layout: Layout) -> np.ndarray:
    """Pixels of a layout, or of some of its pages, (z, y, x) or (z, y, x, sample), in this machine's byte order."""
    volume = np.empty(layout.shape, layout.dtype)
    (_read_plain if layout.is_plain else _decode)(file, layout, volume)
    if not volume.dtype.isnative:
        volume = volume.byteswap(inplace=True).view(volume.dtype.newbyteorder("="))
    return volume if volume.ndim == 3 else layout.pixels(volume)


def _read_plain(file: TiffFile, layout: Layout, volume: np.ndarray) -> None:
    """Read uncompressed strips: in order they are the volume's bytes, so neighbours are read in one go."""
    target = memoryview(volume.reshape(-1).view(np.uint8))
    offsets, sizes = layout.offsets.ravel(), layout.sizes.ravel()
    runs = np.flatnonzero(np.r_[True, offsets[1:] != offsets[:-1] + sizes[:-1]])
    lengths = np.add.reduceat(sizes, runs)
    starts = np.cumsum(lengths) - lengths
    pieces = [
        (start + done, offset + done, min(READ_SIZE, length - done))
        for start, offset, length in zip(starts.tolist(), offsets[runs].tolist(), lengths.tolist(), strict=True)
        for done in range(0, length, READ_SIZE)
    ]

    def read_piece(piece: tuple[int, int, int]) -> None:
        position, offset, size = piece
        with open(file.stream.name, "rb", buffering=0) as stream:  # a position of its own for each thread
            stream.seek(offset)
            if stream.readinto(target[position : position + size]) != size:
                raise damaged("it became shorter while it was read")

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # copying is what takes the time
        for _ in pool.map(read_piece, pieces):
            pass


def _decode(file: TiffFile, layout: Layout, volume: np.ndarray) -> None:
    """Decode segments of any other kind into the volume, several pages at a time."""
    file.stream.seek(0)
    with _errors_logged_are_raised(), tifffile.TiffFile(file.stream) as tiff:
        page = tiff.pages.first
        if page.shape != layout.shape[1:] or page.dtype != layout.dtype.newbyteorder("="):
            raise damaged(f"its first page reads as {page.dtype} {page.shape}")
        tables = {"jpegtables": page.jpegtables} if page.compression in JPEG_COMPRESSIONS else {}
        page.init_decode()
        lock = threading.Lock()
        rows, columns = layout.segment_shape
        pixels = layout.pixels(volume)

        def decode_page(z: int) -> None:
            places = zip(layout.offsets[z].tolist(), layout.counts[z].tolist(), strict=True)
            for index, (offset, count) in enumerate(places):
                with lock:
                    data = file.read(offset, count)
                segment, (sample, _, y, x, _), _ = page.decode(data, index, **tables)
                target = pixels[z, y : y + rows, x : x + columns, sample : sample + segment.shape[-1]]
                target[:] = segment[0, : target.shape[0], : target.shape[1]]

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(decode_page, range(layout.shape[0])):
                pass


@contextmanager
def _errors_logged_are_raised() -> Iterator[None]:
    """Raise StackError if tifffile logs an error in this thread; to it, some damage is only worth a line."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append
    thread = threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)
    logger = logging.getLogger("tifffile")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if records:
        raise damaged(records[0].getMessage()[:200])
