"""Reading a GGUF file: its metadata as plain values, and where its tensors lie.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian. Every
length is checked against what is left of the file before anything is taken, and names and types are checked
against the tables below, so a broken file is one sentence. Reads a vocabulary of 50,000 tokens in a tenth
of a second, where the `gguf` package's reader takes several. Knows bytes; what the keys mean is `gguf`'s
business.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalite.errors import InvalidCheckpoint, UnsupportedModel

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's entry."""

    shape: tuple[int, ...]  # outermost first; the file has it the other way round
    type: int  # a ggml type number
    offset: int  # bytes from the beginning of the data


class GgufFile:
    """A mapped file. `metadata` and `tensors` are read at once, `data` when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise InvalidCheckpoint(f"cannot read {path}: {error}") from error
        cursor = _Cursor(self._map, path)
        if cursor.bytes(4) != _MAGIC:
            raise InvalidCheckpoint(f"{path} is no GGUF file")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedModel(
                f"{path} is GGUF version {version}; {' and '.join(map(str, _VERSIONS))} are read"
            )
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: Mapping[str, Any] = dict(cursor.entry() for _ in range(cursor.count(n_keys)))
        self.tensors: Mapping[str, GgufTensor] = dict(cursor.tensor() for _ in range(cursor.count(n_tensors)))
        if len(self.metadata) != n_keys or len(self.tensors) != n_tensors:
            raise InvalidCheckpoint(f"{path} is broken: a name occurs twice")
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise InvalidCheckpoint(f"{path} is broken: alignment {alignment!r}")
        self._data_start = -(-cursor.position // alignment) * alignment

    def data(self, name: str, nbytes: int) -> memoryview:
        """The `nbytes` of a tensor, mapped."""
        start = self._data_start + self.tensors[name].offset
        if start + nbytes > len(self._map):
            raise InvalidCheckpoint(
                f"{self.path} is truncated: tensor {name!r} ends at byte {start + nbytes} of {len(self._map)}"
            )
        return memoryview(self._map)[start : start + nbytes]


class _Cursor:
    """Reads forward, never beyond the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def entry(self) -> tuple[str, Any]:
        return self.text(), self.value(self.scalar("I"))

    def tensor(self) -> tuple[str, GgufTensor]:
        name, n_dimensions = self.text(), self.scalar("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise self._broken(f"tensor {name[:60]!r} of {n_dimensions} dimensions")
        sizes = tuple(self.scalar("Q") for _ in range(n_dimensions))
        if math.prod(sizes) > 1 << 62:
            raise self._broken(f"tensor {name[:60]!r} of shape {sizes}")
        return name, GgufTensor(sizes[::-1], self.scalar("I"), self.scalar("Q"))

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MAX_NESTING:
            inner, count = self.scalar("I"), self.count(self.scalar("Q"))
            if inner in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[inner]}"))
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise self._broken(f"a value of type {kind}")

    def scalar(self, letter: str) -> Any:
        return self._unpack(letter)[0]

    def text(self) -> str:
        try:
            return self.bytes(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken("a text that is not UTF-8") from error

    def bytes(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._data):
            raise self._broken(f"{length} bytes where {len(self._data) - self.position} are left")
        start, self.position = self.position, end
        return self._data[start:end]

    def count(self, count: int) -> int:
        """A number of things to come, each at least a byte."""
        if count > len(self._data) - self.position:
            raise self._broken(f"{count} entries where {len(self._data) - self.position} bytes are left")
        return count

    def _unpack(self, format: str) -> tuple[Any, ...]:
        return struct.unpack("<" + format, self.bytes(struct.calcsize("<" + format)))

    def _broken(self, what: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"{self._path} is truncated or broken: at byte {self.position} it has {what}"
        )
