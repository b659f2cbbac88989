"""The directories of a TIFF (one a page: its size, and where its pixels are), read strictly.

Written from the TIFF 6.0 specification and the BigTIFF extension. Only the tags that a stack needs are
decoded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

from mitoseg_lib.errors import StackError, damaged

# Tags by their numbers in the specification (and SGI's ImageDepth).
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
SAMPLES, ROWS_PER_STRIP, PLANAR_CONFIGURATION, PREDICTOR, TILE_WIDTH, TILE_LENGTH = 277, 278, 284, 317, 322, 323
SAMPLE_FORMAT, JPEG_TABLES, DEPTH = 339, 347, 32997
STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS = 273, 279, 324, 325
DESCRIPTION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SUB_IFDS = 270, 282, 283, 296, 330

# What must be the same on every page, with the specification's value for a tag that is not there.
GEOMETRY = {
    **dict.fromkeys((WIDTH, LENGTH, TILE_WIDTH, TILE_LENGTH), (0,)),
    **dict.fromkeys((BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES), (1,)),
    **dict.fromkeys((PREDICTOR, SAMPLE_FORMAT, DEPTH, PLANAR_CONFIGURATION), (1,)),
    **{ROWS_PER_STRIP: (2**32 - 1,), JPEG_TABLES: b""},
}
WANTED = {
    *GEOMETRY,
    *(STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS),
    *(DESCRIPTION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SUB_IFDS),
}

INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # field types, with their codes in `struct`
RATIONAL = 5
SIZES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    3: 2,
    8: 2,
    **dict.fromkeys((4, 9, 11, 13), 4),
}  # 8 bytes: all others


@dataclass(frozen=True)
class Directory:
    """One page's directory (IFD): its tags, and the ranges (start, size) of the file that it takes."""

    geometry: dict[int, bytes | tuple]
    tags: dict[int, bytes | tuple]
    range: tuple[int, int]
    value_ranges: list[tuple[int, int]]

    def number(self, code: int) -> int:
        """Value of a tag of `GEOMETRY` that must be one whole number above 0."""
        value = self.geometry[code]
        if not isinstance(value, tuple) or len(value) != 1 or value[0] < 1:
            raise damaged(f"tag {code} of a page is {str(value)[:20]}")
        return value[0]


class TiffFile:
    """A TIFF open for reading: its size, its byte order, its width of pointers (4 bytes; BigTIFF: 8)."""

    def __init__(self, stream: BinaryIO) -> None:
        """Read the header; StackError if it is no TIFF's."""
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        header = stream.read(16)
        if not header:
            raise StackError("is empty, but a TIFF stack was expected; get the file again")
        if header.lstrip()[:1] == b"<":
            raise StackError("is a web page or XML, but a TIFF stack was expected; get the file itself")
        if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise StackError("isn't a TIFF, but a TIFF stack was expected; convert it, for example with Fiji")
        self.order = "<" if header[:1] == b"I" else ">"
        is_big = b"+" in header[:4]
        self.counter, self.pointer = (f"{self.order}{kind}" for kind in ("QQ" if is_big else "HI"))
        self.pointer_size = struct.calcsize(self.pointer)
        self.entry = f"{self.order}HH{self.pointer[1]}{self.pointer_size}s"
        if is_big and header[4:8] != struct.pack(self.order + "HH", 8, 0):
            raise damaged("its header")
        self.first = self._number(self.pointer, self.read(self.pointer_size, self.pointer_size))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at an offset; StackError where the file has none."""
        if offset + size > self.size:
            raise damaged(f"it has {self.size:,} bytes and refers to byte {offset + size:,}")
        self.stream.seek(offset)
        data = self.stream.read(size)
        if len(data) != size:
            raise damaged("it became shorter while it was read")
        return data

    def directories(self) -> Iterator[Directory]:
        """Every page's directory, in the order of the file's chain; StackError if the chain is broken."""
        offset, seen = self.first, set()
        while offset:
            if offset in seen:
                raise damaged("its list of pages runs in a circle")
            seen.add(offset)
            directory, offset = self._directory(offset)
            yield directory

    def _directory(self, offset: int) -> tuple[Directory, int]:
        """One directory, and the offset of the next (0 after the last)."""
        start = offset + struct.calcsize(self.counter)
        count = self._number(self.counter, self.read(offset, start - offset))
        if not 1 <= count <= 4096:
            raise damaged(f"a page has {count:,} tags")
        table = self.read(start, count * struct.calcsize(self.entry) + self.pointer_size)
        geometry, tags, ranges = dict(GEOMETRY), {}, []
        for code, kind, number, field in struct.iter_unpack(self.entry, table[: -self.pointer_size]):
            size = SIZES.get(kind, 8) * number
            is_inside, at = size <= self.pointer_size, self._number(self.pointer, field)
            if not is_inside:
                ranges.append((min(at, self.size), min(size, self.size)))
            if code in WANTED:
                data = field[:size] if is_inside else self.read(at, size)
                value = (_value_cached if is_inside else _value)(self.order, kind, number, data)
                (geometry if code in GEOMETRY else tags)[code] = value
        following = self._number(self.pointer, table[-self.pointer_size :])
        return Directory(geometry, tags, (offset, start - offset + len(table)), ranges), following

    @staticmethod
    def _number(layout: str, data: bytes) -> int:
        return struct.unpack(layout, data)[0]


def _value(order: str, kind: int, number: int, data: bytes) -> bytes | tuple:
    """A tag's value: whole numbers and rationals as a tuple, anything else as bytes."""
    if kind in INTEGERS:
        values = struct.unpack(f"{order}{number}{INTEGERS[kind]}", data)
        if max(values, default=0) > 2**53:
            raise damaged("a page has a tag with an impossible number")
        return values
    if kind == RATIONAL:
        return tuple(top / bottom if bottom else 0.0 for top, bottom in struct.iter_unpack(f"{order}II", data))
    return data


_value_cached = lru_cache(maxsize=256)(_value)  # the pages of a stack repeat the same short values
