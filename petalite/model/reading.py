"""Tensors from files in pieces, read by a thread while what came before is computed with.

Pieces go round a few small buffers, so a process holds some megabytes of what it reads, however large a
block is. Where the system allows it they are read past the page cache, whose pages would be as much new
memory as the weights; elsewhere the kernel is told what will be wanted, so that the disk is at work all the
time. Nothing else is read. Files are read, never mapped: one that is cut off is an error, not a signal that
kills. Knows files; knows no model.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.system import SECTOR, in_large_pages, is_cached, open_direct
from petalite.model.tensorfile import DTYPES, TensorInfo

_PIECE_BYTES = 2 << 20
_PLACED_BYTES = 8 << 20  # of a piece that needs no buffer
_ROWS = 128  # pieces are cut after a multiple of so many rows or, if these are too long, of _FEW_ROWS
_FEW_ROWS = 16
_KNOWN_BYTES = 24 << 20  # how far ahead of what is read is looked
_ANNOUNCEMENT_BYTES = 1 << 20  # of one call; kernels drop what is beyond their limit
_TRIED_BYTES = 32 << 20  # after which a disk is known to be slow
_SLOW_BYTES_S = 200e6
AHEAD = 4  # pieces that are read before they are asked for


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
        """Read by a thread that is `ahead` pieces early, or with 0 when they are asked for. Close it.
        `wanted` is advanced early too, by that thread.
        """
        self._pieces = _pieces(wanted, ahead + 1)
        self._reader = ThreadPoolExecutor(1, "petalite-reader") if ahead else None
        self._ahead = ahead
        self._coming: deque[Future[Piece | None]] = deque()
        self._next: Piece | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *about: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._pieces.close()

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
            if self._reader is None:
                self._next = next(self._pieces, None)
            else:
                while len(self._coming) <= self._ahead:
                    self._coming.append(self._reader.submit(next, self._pieces, None))
                self._next = self._coming.popleft().result()
        return self._next


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


def _pieces(wanted: Iterable[Wanted], n_buffers: int) -> Generator[Piece]:
    """All rows of the tensors in order, round so many buffers. An error is an owner's last piece."""
    buffers = [_Buffer() for _ in range(n_buffers)]
    turns, failed = cycle(buffers), None
    with _Files() as files:
        for cut in _announced(_cut(wanted), files):
            of, first, end = cut
            if of.owner is failed:
                continue  # and uses up no turn: in the other buffers are pieces that wait
            try:
                data = _read(cut, files.file(of.path), next(turns))
            except InvalidCheckpoint as error:
                failed = of.owner
                yield Piece(of, first, torch.empty(0), error)
                continue
            yield Piece(of, first, data.view(DTYPES[of.info.dtype]).view(end - first, *of.info.shape[1:]))


def _announced(cuts: Iterator[Cut], files: _Files) -> Iterator[Cut]:
    """The same, each known for some time before it is read."""
    known: deque[Cut] = deque()
    n_bytes = 0
    for cut in cuts:
        start, stop = _bytes(*cut)
        with suppress(InvalidCheckpoint):  # which reading it will raise
            files.file(cut[0].path).announce(start, stop)
        known.append(cut)
        n_bytes += stop - start
        while n_bytes > _KNOWN_BYTES:
            start, stop = _bytes(*known[0])
            n_bytes -= stop - start
            yield known.popleft()
    yield from known


class _Buffer:
    """Memory for one piece after the other, at an address that direct reads take."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def room(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8; what it held is gone."""
        if len(self._memory) < nbytes:
            self._memory = in_large_pages(max(nbytes, _PIECE_BYTES + SECTOR))
        return self._memory[:nbytes]


def _read(cut: Cut, file: _File, buffer: _Buffer) -> Tensor:
    """Its bytes, which an element of its dtype may begin with. Raises InvalidCheckpoint."""
    of = cut[0]
    start, stop = _bytes(*cut)
    if of.into is not None:
        data = of.into.view(-1).view(torch.uint8)[start - of.info.start : stop - of.info.start]
        file.read(start, data, stop - start)
        return data
    begin = start // SECTOR * SECTOR
    sectors = buffer.room(-(-stop // SECTOR) * SECTOR - begin)
    file.read(begin, sectors, stop - begin)
    data = sectors[start - begin : stop - begin]
    return data.clone() if data.storage_offset() % DTYPES[of.info.dtype].itemsize else data


class _File:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidCheckpoint."""
        self._path = path
        try:
            self._plain = path.open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # so that nothing is read but what is announced
                os.posix_fadvise(self._plain.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        knows = is_cached(self._plain.fileno(), 0, 1) is not None
        self._direct = open_direct(path) if knows else None
        self._direct_bytes, self._direct_s = 0, 0.0

    def close(self) -> None:
        self._plain.close()
        self._close_direct()

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
        self._direct = None

    def announce(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read soon. Errors are left to reading."""
        if self._direct is not None or not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):
            for begin in range(start, stop, _ANNOUNCEMENT_BYTES):
                length = min(_ANNOUNCEMENT_BYTES, stop - begin)
                os.posix_fadvise(self._plain.fileno(), begin, length, os.POSIX_FADV_WILLNEED)

    def read(self, start: int, memory: Tensor, nbytes: int) -> None:
        """The first `nbytes` of `memory` (≥ nbytes,) uint8 with those from `start` on; of the others some may
        change. Raises InvalidCheckpoint.
        """
        view, done = memoryview(memory.numpy()), 0  # type: ignore[arg-type]
        aligned = start % SECTOR == memory.data_ptr() % SECTOR == 0
        try:
            if self._direct is not None and aligned and not self._has(start, start + nbytes):
                done = self._read_directly(self._direct, start, view)
            self._plain.seek(start + done)
            while done < nbytes:
                count = self._plain.readinto(view[done:nbytes])
                if not count:
                    raise InvalidCheckpoint(f"{self._path} is truncated: it ends after byte {start + done}")
                done += count
        except OSError as error:
            raise self._unreadable(error) from error

    def _has(self, start: int, stop: int) -> bool:
        return is_cached(self._plain.fileno(), start, stop) is not False

    def _read_directly(self, descriptor: int, start: int, view: memoryview) -> int:
        """How many bytes came: of whole sectors all, but for those beyond the file's end. None where the file
        system wants more than whole sectors. A disk so slow that new memory does not matter is read so no
        more: it is worth its pages in the cache at the next start.
        """
        began_s, done, most = time.perf_counter(), 0, len(view) // SECTOR * SECTOR
        try:
            while done % SECTOR == 0 and done < most:
                count = os.preadv(descriptor, [view[done:most]], start + done)
                if not count:
                    break
                done += count
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._close_direct()
        self._direct_bytes += done
        self._direct_s += time.perf_counter() - began_s
        if _TRIED_BYTES < self._direct_bytes < _SLOW_BYTES_S * self._direct_s:
            self._close_direct()
        return done

    def _unreadable(self, error: OSError) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"cannot read {self._path}: {error.strerror or error}")


class _Files:
    """Open files, the last few."""

    _MOST = 16

    def __init__(self) -> None:
        self._open: dict[Path, _File] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *about: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def file(self, path: Path) -> _File:
        """Raises InvalidCheckpoint."""
        file = self._open.pop(path, None)
        if file is None:
            file = _File(path)
            if len(self._open) == self._MOST:
                self._open.pop(next(iter(self._open))).close()
        self._open[path] = file
        return file
