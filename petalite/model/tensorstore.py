"""A checkpoint's folder that fills as its tensors are asked for: each checked by its manifest, and kept.

`model.safetensors` is laid out for all tensors of the manifest, sparse, and `model.safetensors.have` has one
byte for each piece of each tensor: 1 where the piece came, 2 where its whole tensor was found right, which is
said only once it is on the disk. So what a broken download left is kept and the rest is fetched. Knows files
and digests; where tensors come from is its caller's business.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from petalite.errors import InvalidCheckpoint
from petalite.model.manifest import Manifest
from petalite.model.ranges import Range
from petalite.model.tensorfile import read_header, write_header

PIECE_BYTES = 1 << 19
_MOST_BYTES = 1 << 44  # of a model; with a byte of marks for each piece
_THERE, _RIGHT = 1, 2
_FILE = "model.safetensors"
_HASHED_BYTES = 4 << 20

Fetch = Callable[["TensorStore", Sequence[str]], None]
"""Bring the named tensors into the store; raises what keeps it from that."""


class TensorStore:
    """Implements `checkpoint.Files` over `folder`, which holds config.json and the manifest already."""

    version: str | None = None

    def __init__(self, folder: Path, name: str, manifest: Manifest, fetch: Fetch) -> None:
        """`name` is the model's. Raises InvalidCheckpoint where the disk does not allow it."""
        self.folder = folder
        self.name = name
        self._manifest = manifest
        self._fetch = fetch
        self._path = folder / _FILE
        self._marks_path = folder / f"{_FILE}.have"
        self._lock = threading.Lock()  # fetching and serving others are two threads
        try:
            self._lay_out()
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def _lay_out(self) -> None:
        # Large items first, so that every tensor is aligned in memory.
        entries = sorted(self._manifest.tensors.items(), key=lambda item: (_rank(item[1][0]), item[0]))
        header, size = write_header({name: (dtype, shape) for name, (dtype, shape, _) in entries})
        if size > _MOST_BYTES:
            raise InvalidCheckpoint(
                f"{self.name} has {size} bytes of tensors; {_MOST_BYTES >> 40} TiB may be"
            )
        if not self._path.exists() or self._path.stat().st_size != size or not _begins(self._path, header):
            self._marks_path.unlink(missing_ok=True)
            with self._path.open("wb") as file:
                file.write(header)
                file.truncate(size)
        self._infos = read_header(self._path)
        self._first, count = {}, 0
        for name, info in self._infos.items():
            self._first[name] = count
            count += -(-info.nbytes // PIECE_BYTES)
        marks = self._marks_path.read_bytes() if self._marks_path.exists() else b""
        if len(marks) != count:
            marks = bytes(count)
            self._marks_path.write_bytes(marks)
        self._marks = bytearray(marks)

    # -- as the files of a checkpoint --------------------------------------------------------------------

    def find(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def part(self, name: str, ranges: Sequence[Range]) -> Path | None:
        if name == _FILE:
            wanted = [
                tensor
                for tensor, info in self._infos.items()
                if any(start < info.end and info.start < end for start, end in ranges)
            ]
            missing = [tensor for tensor in wanted if not self.is_here(tensor)]
            if missing:
                self._check_room(missing)
                self._fetch(self, missing)
        return self.find(name)

    def here(self, name: str, start: int, end: int) -> Path | None:
        inside = (tensor for tensor, info in self._infos.items() if start < info.end and info.start < end)
        return self.find(name) if name == _FILE and all(map(self.is_here, inside)) else None

    def _check_room(self, names: Iterable[str]) -> None:
        needed = sum(end - start for name in names for start, end in self.missing(name))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InvalidCheckpoint(
                f"{needed >> 20} MiB of tensors are to be fetched into {self.folder}, where {free >> 20} MiB "
                f"are free; free some or serve fewer --blocks"
            )

    # -- for who fetches ---------------------------------------------------------------------------------

    def is_here(self, name: str) -> bool:
        """Whether the whole tensor is here and right."""
        pieces = self._pieces(name)
        return all(mark == _RIGHT for mark in self._marks[pieces.start : pieces.stop])

    def nbytes(self, name: str) -> int:
        return self._infos[name].nbytes

    def missing(self, name: str) -> list[Range]:
        """The pieces that are not here, as bytes from the tensor's beginning."""
        nbytes, pieces = self._infos[name].nbytes, self._pieces(name)
        return [
            (place * PIECE_BYTES, min((place + 1) * PIECE_BYTES, nbytes))
            for place, mark in enumerate(self._marks[pieces.start : pieces.stop])
            if not mark
        ]

    def write(self, name: str, start: int, data: memoryview | bytes) -> None:
        """A whole piece that begins `start` bytes into the tensor. Raises InvalidCheckpoint where the disk
        does not take it.
        """
        info = self._infos[name]
        assert start % PIECE_BYTES == 0
        assert len(data) == min(PIECE_BYTES, info.nbytes - start)
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(info.start + start)
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._mark(range(first := self._first[name] + start // PIECE_BYTES, first + 1), _THERE)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def check(self, name: str) -> bool:
        """Of a tensor whose pieces are all here, whether it is what the manifest says; if not, it is
        forgotten.
        """
        info, digest = self._infos[name], hashlib.sha256()
        assert not self.missing(name)
        try:
            with self._path.open("rb") as file:
                file.seek(info.start)
                left = info.nbytes
                while left and (data := file.read(min(left, _HASHED_BYTES))):
                    digest.update(data)
                    left -= len(data)
                os.fsync(file.fileno())
            right = digest.hexdigest() == self._manifest.tensors[name][2]
            self._mark(self._pieces(name), _RIGHT if right else 0)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        return right

    def _pieces(self, name: str) -> range:
        first = self._first[name]
        return range(first, first + -(-self._infos[name].nbytes // PIECE_BYTES))

    def _mark(self, pieces: range, mark: int) -> None:
        with self._lock:
            with self._marks_path.open("r+b", buffering=0) as file:
                file.seek(pieces.start)
                file.write(bytes([mark]) * len(pieces))
            self._marks[pieces.start : pieces.stop] = bytes([mark]) * len(pieces)


def _rank(dtype: str) -> int:
    return next((rank for rank, ending in enumerate(("64", "32", "16")) if dtype.endswith(ending)), 3)


def _begins(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _cannot_write(path: Path, error: OSError) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"cannot write {path}: {error.strerror or error}; what is there is kept for later"
    )
