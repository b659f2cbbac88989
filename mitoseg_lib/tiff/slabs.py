"""A TIFF as a volume that is read some slices at a time, by the same strict rules as `read_volume`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from mitoseg_lib.errors import FilePath, damaged, named_errors, require_file
from mitoseg_lib.tiff.directories import TiffFile
from mitoseg_lib.tiff.volume import checked_layout, read_layout, stated_voxel_size


class TiffVolume:
    """One grey volume in a TIFF, whose structure is checked at once and whose pixels are read when asked for.

    Parameters
    ----------
    path
        As in `mitoseg_lib.tiff.read_volume`.
    one_slice
        Let a single 2D image pass, as a volume of one slice.

    Attributes
    ----------
    shape
        (z, y, x).
    dtype
        Of the pixels as they are handed out, in this machine's byte order.
    voxel_size_nm
        Edges of a voxel, (z, y, x), or None.

    Raises
    ------
    StackError
        As `mitoseg_lib.tiff.read_volume` does; `read` raises it for damage inside the pixels, and for a file that has
        another size than when it was opened.
    """

    def __init__(self, path: FilePath, *, one_slice: bool = False) -> None:
        self.path = path
        with self._open() as file:
            pages = list(file.directories())
            self._layout, description = checked_layout(file, pages, one_slice=one_slice)
            self._size = file.size
            self.voxel_size_nm = stated_voxel_size(pages[0], description)
        self.shape = self._layout.shape
        self.dtype = self._layout.dtype.newbyteorder("=")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Slices `start` to `stop` - 1, (z, y, x)."""
        layout = self._layout
        offsets, counts, sizes = (table[start:stop] for table in (layout.offsets, layout.counts, layout.sizes))
        part = replace(layout, shape=(len(offsets), *layout.shape[1:]), offsets=offsets, counts=counts, sizes=sizes)
        with self._open() as file:
            if file.size != self._size:
                raise damaged("its size changed while it was read")
            return read_layout(file, part)

    @contextmanager
    def _open(self) -> Iterator[TiffFile]:
        """Opened anew for each call, so that a volume can be handed to another process."""
        with named_errors(self.path):
            require_file(self.path)
            with open(self.path, "rb", buffering=0) as stream:
                yield TiffFile(stream)
