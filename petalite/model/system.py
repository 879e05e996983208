"""What the system is asked about memory and files that Python has no function for. Where it does not know, it
says so by doing nothing.

Linux's alone are cachestat(2), from 6.5 on, and madvise(2) with MADV_POPULATE_WRITE, from 5.14 on.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_CACHESTAT = 451  # the same number on every architecture that torch runs on
_DONT_NEED, _HUGE_PAGES, _POPULATE_WRITE = 4, 14, 23
SECTOR = 4096  # what direct reads begin and end at, in files and in memory: the least that all disks take
_LARGE_PAGE = 2 << 20  # by far the most frequent size
# Shared is Python's default, and makes of every page a file's.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def mapped(size: tuple[int, ...], dtype: torch.dtype, *, small_pages: bool = False) -> Tensor:
    """Zeros in memory that is mapped for them alone, and the system's again when nobody has them: what
    malloc is given back it may keep, for a whole load. `small_pages`: little of it may be written. Raises
    MemoryError.
    """
    nbytes = torch.Size(size).numel() * dtype.itemsize
    try:
        pages = mmap.mmap(-1, nbytes, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"the system has no {nbytes >> 20} MiB of addresses more") from error
    if small_pages:
        with suppress(AttributeError, OSError):  # not Linux, or a kernel that has no huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # else one token's row would take 2 MiB
    return torch.frombuffer(pages, dtype=dtype).view(size)


def in_large_pages(nbytes: int) -> Tensor:
    """(nbytes,) uint8 that begins a large page, in such as far as it fills them: of small ones direct reads
    are put together part by part, which takes twice the time or more. Raises MemoryError.
    """
    memory = mapped((nbytes + _LARGE_PAGE,), torch.uint8)
    memory = memory[-memory.data_ptr() % _LARGE_PAGE :][:nbytes]
    begin = memory.data_ptr()
    _advise(begin, begin + nbytes // _LARGE_PAGE * _LARGE_PAGE, _HUGE_PAGES)
    return memory


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
    begin, end = _pages(memory)
    while begin < end:  # in steps, between which other threads can ask for memory
        stop = min(end, begin // _LARGE_PAGE * _LARGE_PAGE + _LARGE_PAGE)
        _advise(begin, stop, _POPULATE_WRITE)
        begin = stop


def give_back(memory: Tensor) -> None:
    """Let the system have the whole pages of memory that nobody reads any more; it may be written again."""
    _advise(*_pages(memory), _DONT_NEED)


def _pages(memory: Tensor) -> tuple[int, int]:
    """Where those begin and end that are of nothing else."""
    begin = memory.data_ptr() + -memory.data_ptr() % mmap.PAGESIZE
    return begin, (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE


def _advise(begin: int, end: int, what: int) -> None:
    call = _function("madvise")
    if call is not None and begin < end:
        call(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(what))


@functools.cache
def _function(name: str) -> Callable[..., Any] | None:
    """Of the C library."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def trim() -> None:
    """Let malloc give the system what was freed. glibc keeps up to 64 MiB of it, however long."""
    call = _function("malloc_trim")
    if call is not None:
        call(ctypes.c_size_t(0))


def open_direct(path: os.PathLike[str]) -> int | None:
    """A descriptor whose reads go past the page cache; None where the file's place does not allow it."""
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
