"""Reading while computing: the next block's bytes come from the disk while this one's are packed.

What a thread reads here lands in the kernel's page cache, and the tensors that are mapped from the file find
it there. So a process holds one block's bytes at most, and none is copied twice. Knows files; knows no
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from petalite.errors import InvalidCheckpoint

_PIECE_BYTES = 4 << 20
_READ_AHEAD_BYTES = 16 << 20  # more than a kernel reads beyond what it is asked for

T = TypeVar("T")


def one_ahead(make: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """`make` of every index in order, on a thread that is one index ahead of whoever iterates.

    An exception comes where its result would. Each result belongs to the caller alone.
    """
    with ThreadPoolExecutor(1, "petalite-reader") as reader:
        ahead = [reader.submit(make, index) for index in indices[:1]]
        for place in range(len(indices)):
            result = ahead.pop().result()
            ahead += [reader.submit(make, index) for index in indices[place + 1 : place + 2]]
            yield result
            del result


def read_through(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Have the bytes [start, end) of a file in the page cache, read from its beginning to its end.

    Near the end of a range the kernel is told not to read on by itself. Raises InvalidCheckpoint.
    """
    buffer = memoryview(bytearray(_PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            for start, end in _joined(ranges):
                position = start
                file.seek(start)
                while position < end:
                    _advise(file.fileno(), on=end - position > _PIECE_BYTES + _READ_AHEAD_BYTES)
                    n_read = file.readinto(buffer[: min(end - position, _PIECE_BYTES)])
                    if not n_read:
                        break  # truncated meanwhile; who maps it finds out
                    position += n_read
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error


def _advise(descriptor: int, *, on: bool) -> None:
    """Whether the kernel is to read on by itself, where it takes advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL if on else os.POSIX_FADV_RANDOM)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges in order, those that touch as one."""
    begun: tuple[int, int] | None = None
    for start, end in sorted(ranges):
        if begun is not None and start <= begun[1]:
            begun = begun[0], max(begun[1], end)
        else:
            if begun is not None:
                yield begun
            begun = start, end
    if begun is not None:
        yield begun
