"""Tensors from files in pieces, read by a thread while what came before is computed with.

Pieces go round a few small buffers, so a process holds some megabytes of what it reads, however large a
block is. The kernel is told what will be wanted, so that the disk is at work all the time and nothing else is
read. Files are read, never mapped: one that is cut off is an error, not a signal that kills.
Knows files; knows no model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.tensorfile import DTYPES, TensorInfo

_PIECE_BYTES = 2 << 20
_PLACED_BYTES = 8 << 20  # of a piece that needs no buffer
_ROWS = 128  # pieces are cut after a multiple of so many rows or, if these are too long, of _FEW_ROWS
_FEW_ROWS = 16
_READ_ON_BYTES = 16 << 20  # more than a kernel reads beyond what it is asked for
_KNOWN_BYTES = 24 << 20  # how far ahead is looked
_BEGINNING_BYTES = 2 << 20  # of what comes next that is asked for early
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
        place = -1
        for of, first, end in _in_time(_cut(wanted), files):
            if of.owner is failed:
                continue  # and uses up no turn: in the other buffers are pieces that wait
            start, stop = _bytes(of, first, end)
            place = (place + 1) % len(buffers)
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
        else:
            runs.append(_Run(cut[0].path, start, stop, start))
        while n_bytes > _KNOWN_BYTES:
            early = next_cut()
            start, stop = _bytes(*early)
            n_bytes -= stop - start
            yield early
    while known:
        yield next_cut()


class _Files:
    """Open files, the last few."""

    _MOST = 16

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}
        self._reads_on: dict[Path, bool] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *about: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def tell(self, runs: Sequence[_Run], start: int, stop: int) -> None:
        """Bytes [start, stop) of the first run will be read now, its others and the other runs' soon. Errors
        are left to reading.

        While a run goes on for long, or to the file's end, the kernel reads on by itself, in pages larger
        than what it is asked for comes in. Else it would read what nobody wants.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError):
            run, file = runs[0], self._file(runs[0].path)
            reads_on = run.end - stop > _READ_ON_BYTES or run.end >= os.fstat(file.fileno()).st_size
            if self._reads_on.get(run.path, True) != reads_on:
                advice = os.POSIX_FADV_NORMAL if reads_on else os.POSIX_FADV_RANDOM
                os.posix_fadvise(file.fileno(), 0, 0, advice)
                self._reads_on[run.path] = reads_on
            if not reads_on:
                run.announced = max(run.announced, start)
                self._announce(run, run.end)
            for other in list(runs)[1:]:
                self._announce(other, other.start + _BEGINNING_BYTES)

    def _announce(self, run: _Run, end: int) -> None:
        while run.announced < min(end, run.end):
            length = min(end, run.end, run.announced + _ANNOUNCEMENT_BYTES) - run.announced
            descriptor = self._file(run.path).fileno()
            os.posix_fadvise(descriptor, run.announced, length, os.POSIX_FADV_WILLNEED)
            run.announced += length

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
            if len(self._open) == self._MOST:
                oldest = next(iter(self._open))
                self._open.pop(oldest).close()
                self._reads_on.pop(oldest, None)
        self._open[path] = file
        return file
