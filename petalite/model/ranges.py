"""A file of which only some ranges are here: a sparse copy that fills as they are asked for, and resumes.

Beside the copy, `NAME.have` has one byte per chunk: 1 where the chunk is there. Data is on the disk before
its mark, so what a broken download left is kept and the rest is fetched. Knows bytes and HTTP ranges; no
hub.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

from petalite.errors import InvalidCheckpoint

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_RUN_CHUNKS = 64  # of one request
_ATTEMPTS = 6  # in a row that bring nothing
_FIRST_PAUSE_S = 0.2  # doubled after each
_TIMEOUT_S = 30.0  # without a byte
_PIECE_BYTES = 1 << 16

Range = tuple[int, int]  # bytes [start, end)
Fetch = Callable[
    [int, int], Iterator[bytes]
]  # the bytes [start, end) in pieces; may end early or raise OSError


class PartialFile:
    """The copy at `path` of a file of `size` bytes."""

    def __init__(self, path: Path, size: int, *, pause: Callable[[float], object] = time.sleep) -> None:
        self.path = path
        self._size = size
        self._pause = pause
        self._n_chunks = -(-size // CHUNK_BYTES)
        self._marks = path.with_name(path.name + ".have")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._marks.exists() or not path.exists() or path.stat().st_size != size:
                self._marks.write_bytes(bytes(self._n_chunks))
                # Emptied of nothing: another process that began just now may be filling it.
                with path.open("ab") as file:
                    file.truncate(size)
        except OSError as error:
            raise self._unusable(error) from error

    def ensure(self, ranges: Sequence[Range], fetch: Fetch) -> None:
        """Fetch the chunks of the ranges that are missing. Raises InvalidCheckpoint after vain attempts."""
        try:
            runs = list(self._runs(self._missing(ranges)))
            total = sum(end - start for start, end in runs)
            done = 0
            for start, end in runs:
                self._fill(start, end, fetch)
                done += end - start
                logger.info("%s: fetched %d of %d MiB", self.path.name, done >> 20, -(-total >> 20))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"cannot write {self.path}: {error.strerror or error}; what is there is kept for later"
        )

    def _missing(self, ranges: Sequence[Range]) -> list[int]:
        have = self._marks.read_bytes()
        wanted: set[int] = set()
        for start, end in ranges:
            assert 0 <= start <= end
            end = min(end, self._size)  # a reader finds out that the file is too short
            if start < end:
                wanted.update(range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)))
        return sorted(chunk for chunk in wanted if have[chunk : chunk + 1] != b"\1")

    def _runs(self, chunks: Sequence[int]) -> Iterator[Range]:
        """Consecutive chunks as ranges of bytes, each for one request."""
        first = 0
        for place in range(1, len(chunks) + 1):
            ends = place == len(chunks) or chunks[place] != chunks[place - 1] + 1
            if ends or place - first == _RUN_CHUNKS:
                yield chunks[first] * CHUNK_BYTES, min((chunks[place - 1] + 1) * CHUNK_BYTES, self._size)
                first = place

    def _fill(self, start: int, end: int, fetch: Fetch) -> None:
        vain, reason = 0, ""
        while start < end:
            if vain == _ATTEMPTS:
                raise InvalidCheckpoint(f"cannot fetch {self.path.name}: {reason}; start again to go on")
            if vain:
                self._pause(_FIRST_PAUSE_S * 2 ** (vain - 1))
            reached, reason = self._write(start, end, fetch)
            whole = self._mark(start, end, reached)
            vain = 0 if whole > start else vain + 1
            start = whole

    def _write(self, start: int, end: int, fetch: Fetch) -> tuple[int, str]:
        """Write what comes: up to where, and why no further."""
        reached = start
        with self.path.open("r+b", buffering=0) as file:
            file.seek(start)
            reason = "the connection ended early"
            try:
                for piece in fetch(start, end):
                    reached += self._append(file, piece[: end - reached])
                    if reached == end:
                        break
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            os.fsync(file.fileno())
        return reached, reason

    def _append(self, file: FileIO, data: bytes) -> int:
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # which no other connection mends
            raise self._unusable(error) from error
        return len(data)

    def _mark(self, start: int, end: int, reached: int) -> int:
        """Mark the whole chunks before `reached`; where the next one begins."""
        whole = end if reached == end else reached // CHUNK_BYTES * CHUNK_BYTES
        count = -(-(whole - start) // CHUNK_BYTES)
        if count > 0:
            with self._marks.open("r+b", buffering=0) as file:
                file.seek(start // CHUNK_BYTES)
                file.write(b"\1" * count)
        return max(whole, start)


def http_range(url: str, headers: Mapping[str, str], start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of what is at `url`. Raises OSError where the server gives anything else."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{end - 1}"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a token is for who it was meant for
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        given = answer.headers.get("Content-Range", "")
        if answer.status != 206 or not re.match(rf"bytes {start}-{end - 1}/", given):
            raise OSError(f"the server does not give ranges: status {answer.status}, {given or 'no range'}")
        while piece := answer.read(_PIECE_BYTES):
            yield piece
