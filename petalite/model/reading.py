"""Tensors from files in pieces, read by a thread while what came before is computed with.

Pieces go round a few small buffers, so a process holds some megabytes of what it reads, however large a
block is. The kernel is told what will be wanted, so that the disk is at work all the time and nothing else is
read. Files are read, never mapped: one that is cut off is an error, not a signal that kills.
Knows files; knows no model.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.system import is_cached, open_direct
from petalite.model.tensorfile import DTYPES, TensorInfo

_PIECE_BYTES = 2 << 20
_PLACED_BYTES = 8 << 20  # of a piece that needs no buffer
_ROWS = 128  # pieces are cut after a multiple of so many rows or, if these are too long, of _FEW_ROWS
_FEW_ROWS = 16
_READ_ON_BYTES = 16 << 20  # more than a kernel reads beyond what it is asked for
_KNOWN_BYTES = 24 << 20  # how far ahead is looked
_BEGINNING_BYTES = 2 << 20  # of what comes next that is asked for early
_SECTOR = 4096  # what direct reads begin and end at, and the least that all disks take
_TRIED_BYTES = 32 << 20  # after which a disk is known to be slow
_SLOW_BYTES_S = 200e6  # of one thread
_ANNOUNCEMENT_BYTES = 1 << 20  # of one call; kernels drop what is beyond their limit
AHEAD = 4  # pieces that are read before they are asked for
_READERS = 2  # of so many at a time


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to read."""

    owner: object  # what it is read for
    name: str
    path: Path
    info: TensorInfo
    into: Tensor | None = None  # contiguous, of its dtype and shape: where it goes. Else round some buffers

    @property
    def n_rows(self) -> int:
        return self.info.shape[0] if self.info.shape else 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor, or the error that came instead of them and of the rest of its owner's."""

    of: Wanted
    first: int  # row of the tensor
    rows: Tensor  # (rows, …) in the tensor's dtype; in a buffer, valid until the next piece is asked for
    error: InvalidCheckpoint | None = None

    @property
    def end(self) -> int:
        return self.first + len(self.rows)


class Stream:
    """Pieces as whoever makes something of them asks for them: tensor by tensor, in the order of `wanted`."""

    def __init__(self, wanted: Iterable[Wanted], ahead: int = 0) -> None:
        """Read by threads that are `ahead` pieces early, or with 0 when they are asked for. Close it.
        `wanted` is advanced early too, by one of the threads.
        """
        self._files = _Files()
        self._cuts = _in_time(_cut(wanted), self._files)
        self._buffers = [_Buffer() for _ in range(ahead + 1)]
        self._turn = -1
        self._planner = ThreadPoolExecutor(1, "petalite-reader-plan") if ahead else None
        self._readers = ThreadPoolExecutor(_READERS, "petalite-reader") if ahead else None
        self._coming: deque[Future[Callable[[], Piece] | None]] = deque()
        self._ahead = ahead
        self._next: Piece | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *about: object) -> None:
        for threads in (self._planner, self._readers):
            if threads is not None:
                threads.shutdown(cancel_futures=True)
        self._files.close()

    def peek(self) -> Wanted:
        """The tensor that is next."""
        return self._piece().of

    def rows(self, name: str) -> Iterator[Piece]:
        """All of the next tensor, which must be this one. Raises InvalidCheckpoint, and what `wanted` raises
        where it would have named its next.
        """
        while True:
            piece = self._piece()
            assert piece.of.name == name, f"{piece.of.name} comes before {name}"
            if piece.error is not None:
                raise piece.error
            yield piece
            self._next = None
            if piece.end >= piece.of.n_rows:
                return

    def tensor(self, name: str) -> Tensor:
        """The whole of the next tensor, where it is wanted or in memory of its own."""
        whole: Tensor | None = None
        for piece in self.rows(name):
            if whole is None:
                into = piece.of.into
                whole = torch.empty(piece.of.info.shape, dtype=piece.rows.dtype) if into is None else into
            if piece.of.into is None:
                (whole if whole.ndim else whole.view(1))[piece.first : piece.end].copy_(piece.rows)
        assert whole is not None
        return whole

    def skip(self, owner: object) -> None:
        """What is left of an owner's."""
        while (piece := self._take()) is not None and piece.of.owner is owner:
            self._next = None

    def _piece(self) -> Piece:
        piece = self._take()
        assert piece is not None, "there are no more tensors"
        return piece

    def _take(self) -> Piece | None:
        if self._next is None:
            if self._planner is None:
                get = self._plan()
            else:
                while len(self._coming) <= self._ahead:
                    self._coming.append(self._planner.submit(self._plan))
                get = self._coming.popleft().result()
            self._next = None if get is None else get()
        return self._next

    def _plan(self) -> Callable[[], Piece] | None:
        """The next piece, once it is read. It lies in a buffer that no other of those early has."""
        cut = next(self._cuts, None)
        if cut is None:
            return None
        self._turn = (self._turn + 1) % len(self._buffers)
        read = partial(_read, cut, self._files.file(cut[0].path), self._buffers[self._turn])
        return read if self._readers is None else self._readers.submit(read).result


Cut = tuple[Wanted, int, int]  # rows [first, end) of a tensor


def _cut(wanted: Iterable[Wanted]) -> Iterator[Cut]:
    """What makes a piece, one after the other."""
    for of in wanted:
        most = _PIECE_BYTES if of.into is None else _PLACED_BYTES
        row_bytes = max(1, of.info.nbytes // max(1, of.n_rows))
        unit = _ROWS if row_bytes * _ROWS <= most else _FEW_ROWS
        step = max(1, most // (row_bytes * unit)) * unit
        for first in range(0, max(of.n_rows, 1), step):
            yield of, first, min(first + step, of.n_rows)


def _bytes(of: Wanted, first: int, end: int) -> tuple[int, int]:
    """Where rows lie in the file."""
    row_bytes = of.info.nbytes // max(1, of.n_rows)
    return of.info.start + first * row_bytes, of.info.start + end * row_bytes


@dataclass(slots=True)
class _Run:
    """Bytes [start, end) of a file that are wanted one after the other, as far as is known."""

    path: Path
    start: int
    end: int
    announced: int  # up to here
    placed: bool  # some of it goes where it is wanted, and so by way of the page cache


def _in_time(cuts: Iterator[Cut], files: _Files) -> Iterator[Cut]:
    """The same; before each is read, the kernel was told what comes after it."""
    known: deque[Cut] = deque()
    runs: deque[_Run] = deque()
    n_bytes = 0

    def next_cut() -> Cut:
        cut = known.popleft()
        start, stop = _bytes(*cut)
        while runs[0].path != cut[0].path or not runs[0].start <= start <= stop <= runs[0].end:
            runs.popleft()
        files.tell(runs, start, stop)
        return cut

    for cut in cuts:
        start, stop = _bytes(*cut)
        known.append(cut)
        n_bytes += stop - start
        if runs and runs[-1].path == cut[0].path and runs[-1].end == start:
            runs[-1].end = stop
            runs[-1].placed |= cut[0].into is not None
        else:
            runs.append(_Run(cut[0].path, start, stop, start, cut[0].into is not None))
        while n_bytes > _KNOWN_BYTES:
            early = next_cut()
            start, stop = _bytes(*early)
            n_bytes -= stop - start
            yield early
    while known:
        yield next_cut()


class _Buffer:
    """Memory for one piece after the other, at an address that direct reads take."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def room(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8; what it held is gone."""
        if len(self._memory) < nbytes:
            memory = torch.empty(_SECTOR + max(nbytes, _PIECE_BYTES) * 5 // 4, dtype=torch.uint8)
            self._memory = memory[-memory.data_ptr() % _SECTOR :]
        return self._memory[:nbytes]


def _read(cut: Cut, file: _File | InvalidCheckpoint, buffer: _Buffer) -> Piece:
    of, first, end = cut
    try:
        if isinstance(file, InvalidCheckpoint):
            raise file
        start, stop = _bytes(*cut)
        if of.into is None:
            data = file.read(start, stop, buffer)
        else:
            data = of.into.view(-1).view(torch.uint8)[start - of.info.start : stop - of.info.start]
            file.fill(start, data)
    except InvalidCheckpoint as error:
        return Piece(of, first, torch.empty(0), error)
    dtype = DTYPES[of.info.dtype]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return Piece(of, first, data.view(dtype).view(end - first, *of.info.shape[1:]))


class _File:
    """An open file; it is closed when nobody has it any more, since pieces of it may be under way."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidCheckpoint."""
        self._path = path
        try:
            self.plain = path.open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error
        finalize(self, self.plain.close)
        self._lock = threading.Lock()  # a file has one position
        self._reads_on = True
        self._direct = open_direct(path)
        if self._direct is not None:
            finalize(self, os.close, self._direct)
        self._refused = False
        self._direct_bytes, self._direct_s = 0, 0.0

    @property
    def is_direct(self) -> bool:
        """Whether it is read past the page cache, but for what is there: its pages would take as much new
        memory as the weights. A disk so slow that this does not matter is worth them at the next start.
        """
        slow = self._direct_bytes > _TRIED_BYTES and self._direct_bytes < _SLOW_BYTES_S * self._direct_s
        return self._direct is not None and not self._refused and not slow

    def read_on(self, on: bool) -> None:
        """Whether the kernel shall read on by itself. Raises OSError."""
        if on != self._reads_on:
            advice = os.POSIX_FADV_NORMAL if on else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self.plain.fileno(), 0, 0, advice)
            self._reads_on = on

    def read(self, start: int, stop: int, buffer: _Buffer) -> Tensor:
        """Bytes [start, stop) in the buffer, on any thread. Raises InvalidCheckpoint."""
        try:
            if self.is_direct and is_cached(self.plain.fileno(), start, stop) is False:
                try:
                    return self._read_directly(start, stop, buffer)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # of a file system that wants more
                        raise
                    self._refused = True
        except OSError as error:
            raise self._unreadable(error) from error
        data = buffer.room(stop - start)
        self.fill(start, data)
        return data

    def fill(self, start: int, data: Tensor) -> None:
        """All of `data` (n,) uint8 with bytes from `start` on, by way of the page cache. Raises
        InvalidCheckpoint.
        """
        view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
        try:
            with self._lock:
                self.plain.seek(start)
                while done < len(view):
                    count = self.plain.readinto(view[done:])
                    if not count:
                        raise self._truncated(start + done)
                    done += count
        except OSError as error:
            raise self._unreadable(error) from error

    def _read_directly(self, start: int, stop: int, buffer: _Buffer) -> Tensor:
        assert self._direct is not None
        began_s, begin = time.perf_counter(), start // _SECTOR * _SECTOR
        data = buffer.room(-(-stop // _SECTOR) * _SECTOR - begin)
        view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
        while begin + done < stop:
            count = os.preadv(self._direct, [view[done:]], begin + done)
            done += count
            if begin + done < stop and (not count or count % _SECTOR):
                raise self._truncated(begin + done)
        self._direct_bytes += done
        self._direct_s += time.perf_counter() - began_s
        return data[start - begin : stop - begin]

    def _unreadable(self, error: OSError) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"cannot read {self._path}: {error.strerror or error}")

    def _truncated(self, end: int) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._path} is truncated: it ends after byte {end}")


class _Files:
    """Open files, the last few. For one thread."""

    _MOST = 16

    def __init__(self) -> None:
        self._open: dict[Path, _File] = {}

    def close(self) -> None:
        """Let go of all."""
        self._open.clear()

    def file(self, path: Path) -> _File | InvalidCheckpoint:
        """Or why there is none."""
        try:
            return self._file(path)
        except InvalidCheckpoint as error:
            return error

    def tell(self, runs: Sequence[_Run], start: int, stop: int) -> None:
        """Bytes [start, stop) of the first run will be read now, its others and the other runs' soon. Errors
        are left to reading.

        While a run goes on for long, or to the file's end, the kernel reads on by itself, in pages larger
        than what it is asked for comes in. Else it would read what nobody wants.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError, InvalidCheckpoint):
            run, file = runs[0], self._file(runs[0].path)
            if run.placed or not file.is_direct:
                reads_on = run.end - stop > _READ_ON_BYTES or run.end >= os.fstat(file.plain.fileno()).st_size
                file.read_on(reads_on)
                if not reads_on:
                    run.announced = max(run.announced, start)
                    self._announce(run, run.end)
            for other in list(runs)[1:]:
                self._announce(other, other.start + _BEGINNING_BYTES)

    def _announce(self, run: _Run, end: int) -> None:
        file = self._file(run.path)
        if file.is_direct and not run.placed:
            return
        while run.announced < min(end, run.end):
            length = min(end, run.end, run.announced + _ANNOUNCEMENT_BYTES) - run.announced
            os.posix_fadvise(file.plain.fileno(), run.announced, length, os.POSIX_FADV_WILLNEED)
            run.announced += length

    def _file(self, path: Path) -> _File:
        file = self._open.pop(path, None)
        if file is None:
            file = _File(path)
            if len(self._open) == self._MOST:
                self._open.pop(next(iter(self._open)))
        self._open[path] = file
        return file
