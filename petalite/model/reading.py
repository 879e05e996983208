"""Tensors from files in pieces, read by a thread while what came before is computed with.

Pieces go round a few small buffers, so a process holds some megabytes of what it reads, however large a
block is. What will be wanted soon is announced to the kernel, which has the disk at work all the time and
reads nothing else. Files are read, never mapped: one that is cut off is an error, not a signal that kills.
Knows files; knows no model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.tensorfile import DTYPES, TensorInfo

_PIECE_BYTES = 1 << 20
_ROWS = 128  # pieces are cut after a multiple of so many rows or, if these are too long, of _FEW_ROWS
_FEW_ROWS = 16
_ANNOUNCED_BYTES = 16 << 20  # that the disk is asked for beyond what is being read
_ANNOUNCEMENT_BYTES = 1 << 20  # of one call; kernels drop what is beyond their limit
AHEAD = 3  # pieces that a thread reads before they are asked for


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


def pieces(wanted: Iterable[Wanted], n_buffers: int) -> Generator[Piece]:
    """All rows of the tensors in order, in buffers that are used again in turn. `wanted` is advanced early.

    A file that ends early or cannot be read gives a piece with an error, after which come those of another
    owner.
    """
    buffers = [torch.empty(0, dtype=torch.uint8)] * n_buffers
    with _Files() as files:
        failed: object = None
        for count, (of, first, end) in enumerate(_announced(_cut(wanted), files)):
            if of.owner is failed:
                continue
            start, stop = _bytes(of, first, end)
            place = count % len(buffers)
            if of.into is not None:
                data = of.into.view(-1).view(torch.uint8)[start - of.info.start : stop - of.info.start]
            else:
                if len(buffers[place]) < stop - start:
                    buffers[place] = torch.empty(max(stop - start, _PIECE_BYTES), dtype=torch.uint8)
                data = buffers[place][: stop - start]
            try:
                files.read(of.path, start, data)
            except InvalidCheckpoint as error:
                failed = of.owner
                yield Piece(of, first, data, error)
                continue
            yield Piece(of, first, data.view(DTYPES[of.info.dtype]).view(end - first, *of.info.shape[1:]))


class Stream:
    """Pieces as whoever makes something of them asks for them: tensor by tensor, in the order of `wanted`."""

    def __init__(self, wanted: Iterable[Wanted], ahead: int = 0) -> None:
        """Read by a thread that is `ahead` pieces early, or with 0 when they are asked for. Close it."""
        self._pieces = pieces(wanted, ahead + 1)
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

    def owner(self) -> object:
        """Whose tensor is next."""
        return self._piece().of.owner

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
        """The whole of the next tensor, in memory of its own."""
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


def _cut(wanted: Iterable[Wanted]) -> Iterator[tuple[Wanted, int, int]]:
    """Each tensor's rows [first, end) of one piece after the other."""
    for of in wanted:
        row_bytes = max(1, of.info.nbytes // max(1, of.n_rows))
        unit = _ROWS if row_bytes * _ROWS <= _PIECE_BYTES else _FEW_ROWS
        step = max(1, _PIECE_BYTES // (row_bytes * unit)) * unit
        for first in range(0, max(of.n_rows, 1), step):
            yield of, first, min(first + step, of.n_rows)


def _bytes(of: Wanted, first: int, end: int) -> tuple[int, int]:
    """Where rows lie in the file."""
    row_bytes = of.info.nbytes // max(1, of.n_rows)
    return of.info.start + first * row_bytes, of.info.start + end * row_bytes


def _announced(cuts: Iterator[tuple[Wanted, int, int]], files: _Files) -> Iterator[tuple[Wanted, int, int]]:
    """The same, each announced to the kernel early enough."""
    known: deque[tuple[tuple[Wanted, int, int], int]] = deque()
    n_bytes = 0
    for cut in cuts:
        start, stop = _bytes(*cut)
        files.announce(cut[0].path, start, stop)
        known.append((cut, stop - start))
        n_bytes += stop - start
        while n_bytes > _ANNOUNCED_BYTES:
            early, size = known.popleft()
            n_bytes -= size
            yield early
    for early, _ in known:
        yield early


class _Files:
    """Open files, the last few."""

    _MOST = 4

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *about: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def announce(self, path: Path, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read. No error: reading tells it."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            descriptor = self._file(path).fileno()
            for at in range(start, stop, _ANNOUNCEMENT_BYTES):
                length = min(stop - at, _ANNOUNCEMENT_BYTES)
                os.posix_fadvise(descriptor, at, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass

    def read(self, path: Path, start: int, into: Tensor) -> None:
        """Raises InvalidCheckpoint."""
        view = memoryview(into.numpy())  # type: ignore[arg-type]
        done = 0
        try:
            file = self._file(path)
            file.seek(start)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise InvalidCheckpoint(f"{path} is truncated: it ends after byte {start + done}")
                done += count
        except OSError as error:
            raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error

    def _file(self, path: Path) -> FileIO:
        file = self._open.pop(path, None)
        if file is None:
            file = path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):  # nothing but what was announced
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            if len(self._open) == self._MOST:
                self._open.pop(next(iter(self._open))).close()
        self._open[path] = file
        return file
