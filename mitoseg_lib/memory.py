"""Memory that a process keeps for its next slice, instead of getting it anew from the system each time."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

__all__ = ["ENVIRONMENT", "release_memory", "reuse_memory"]

# What glibc is told: by numbers of its malloc.h, or by the environment of a process that is still to be started.
# One arena, since those of other threads than the main one can't hold large arrays.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
OPTIONS = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


@cache
def reuse_memory() -> bool:
    """Let this process keep freed memory, and tell whether that could be arranged.

    glibc hands arrays of more than 32 MB back to the system as soon as they are freed, and the system fills each new
    one with zeros, page by page. The layers of a network free and take such arrays all the time: on one core, a slice
    of 1536 x 2048 pixels took twice as long because of that, and a training step of 16 patches of 256 x 256 half as
    long again. In exchange, the process doesn't become smaller again.

    For processes that predict or train and do nothing else, before they do, and before they start threads: those that
    are there already keep their own arenas. `ENVIRONMENT` does the same for a process that is still to be started, and
    `release_memory` gives back what is free. Other C libraries than glibc are left alone.
    """
    libc = _glibc()
    if libc is None:
        return False
    return all([libc.mallopt(option, value) == 1 for option, value in OPTIONS.items()])


def release_memory() -> None:
    """Hand memory that is free back to the system; nothing where the C library isn't glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
