"""What the system is asked that Python has no function for. Where it does not know, it says so by doing
nothing.

Both are Linux's: cachestat(2), from 6.5 on, and madvise(2) with MADV_POPULATE_WRITE, from 5.14 on.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

_CACHESTAT = 451  # the same number on every architecture that torch runs on
_POPULATE_WRITE = 23
_STEP_BYTES = 2 << 20


def is_cached(descriptor: int, start: int, end: int) -> bool | None:
    """Whether all pages of a file's bytes [start, end) are in memory; None where the system does not tell."""
    call = _function("syscall")
    if call is None:
        return None
    first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    asked = (ctypes.c_uint64 * 2)(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
    found = (ctypes.c_uint64 * 5)()  # the first counts pages in the cache
    failed = call(ctypes.c_long(_CACHESTAT), ctypes.c_int(descriptor), asked, found, ctypes.c_uint(0))
    return None if failed else found[0] >= last - first


def take_pages(memory: Tensor) -> None:
    """Have the system give whole pages for memory that will be written; what is there stays as it is."""
    call = _function("madvise")
    begin = memory.data_ptr() + -memory.data_ptr() % mmap.PAGESIZE
    end = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    while call is not None and begin < end:  # in steps, between which other threads can ask for memory
        stop = min(end, begin // _STEP_BYTES * _STEP_BYTES + _STEP_BYTES)
        call(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), ctypes.c_int(_POPULATE_WRITE))
        begin = stop


@functools.cache
def _function(name: str) -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def open_direct(path: os.PathLike[str]) -> int | None:
    """A descriptor whose reads go past the page cache; None where the file's place does not allow it."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
