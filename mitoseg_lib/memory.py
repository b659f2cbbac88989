"""Memory that a process keeps for its next slice, instead of getting it anew from the system each time."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

__all__ = ["reuse_memory"]

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


@cache
def reuse_memory() -> bool:
    """Let this process keep freed memory, and tell whether that could be arranged.

    glibc hands arrays of more than 32 MB back to the system as soon as they are freed, and the system fills each new
    one with zeros, page by page. The layers of a network free and take such arrays all the time: on one core, a slice
    of 1536 x 2048 pixels took twice as long because of that. In exchange, the process doesn't become smaller again.

    For processes that predict and do nothing else, before they do. Other C libraries than glibc are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # One arena, since those of other threads than the main one can't hold large arrays.
    wanted = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
    return all([libc.mallopt(option, value) == 1 for option, value in wanted.items()])
