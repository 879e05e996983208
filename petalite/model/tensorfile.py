"""Safetensors files: a strict reader of their headers, tensors mapped from them, and a streaming writer.

Format (https://github.com/huggingface/safetensors, "Format"): u64 little-endian header length, a JSON
header, then the tensors' bytes. What the library refuses is refused here with one sentence that names the
file, and so are duplicate names, which it accepts. Mapped tensors cost no memory until they are read. Knows
files; knows no model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from petalite.errors import InvalidCheckpoint

HEADER_LIMIT_BYTES = 100_000_000  # the format's own

# What can be read as a tensor; the others of the format are well-formed files that we cannot compute with.
DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {
    **{name: dtype.itemsize * 8 for name, dtype in DTYPES.items()},
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header."""

    dtype: str  # the format's name for it
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def header_end(path: Path) -> int:
    """Where the header of a file ends, by its first 8 bytes; of no more than these where they cannot be
    right.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    if len(prefix) < 8:
        return size
    length: int = struct.unpack("<Q", prefix)[0]
    return 8 + length if length <= min(HEADER_LIMIT_BYTES, size - 8) else min(8, size)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that the file holds, in the order of their bytes. Raises InvalidCheckpoint."""
    text, data_bytes = _header_text(path)
    return parse_header(text, data_bytes, source=str(path))


def read_file_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The same, and what the header says about the file as a whole. Raises InvalidCheckpoint."""
    text, data_bytes = _header_text(path)
    infos = parse_header(text, data_bytes, source=str(path))
    return infos, json.loads(text).get("__metadata__", {})


def _header_text(path: Path) -> tuple[bytes, int]:
    """And how many bytes follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise InvalidCheckpoint(f"{path} is truncated: {size} bytes hold no safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(HEADER_LIMIT_BYTES, size - 8):
                raise InvalidCheckpoint(
                    f"{path} is truncated or not safetensors: a header of {length} bytes in a file of {size}"
                )
            return file.read(length), size - 8 - length
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error


def parse_header(text: bytes, data_bytes: int, *, source: str) -> dict[str, TensorInfo]:
    """The entries of a header that is followed by `data_bytes` of tensors: no hole, no overlap, no rest."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not a map of strings")
        base = 8 + len(text)
        entries = sorted(
            ((name, _entry(name, entry, base)) for name, entry in header.items()),
            key=lambda item: (item[1].start, item[1].end),
        )
    except (ValueError, RecursionError, AttributeError) as error:
        raise InvalidCheckpoint(f"{source} has a broken safetensors header: {error}") from error
    position = base
    for name, info in entries:
        if info.start != position:
            raise InvalidCheckpoint(
                f"{source} has a broken safetensors header: a hole or overlap before tensor {name!r}"
            )
        position = info.end
    if position != base + data_bytes:
        raise InvalidCheckpoint(
            f"{source} is truncated or has bytes to spare: its header describes {position - base} bytes of "
            f"tensors, found {data_bytes}; fetch the file again"
        )
    return dict(entries)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _entry(name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    if _count(shape) * _BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"tensor {name!r}: {dtype}{shape} does not fill bytes {offsets[0]} to {offsets[1]}")
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _count(shape: Sequence[int]) -> int:
    """How many values. Not `math.prod`: of a header's worth of sizes it makes a number of megabytes, and
    nothing else runs meanwhile.
    """
    count = 1
    for size in shape:
        count *= size
        if count >= 1 << 63:
            raise ValueError(f"a shape of {len(shape)} sizes has more values than any file")
    return count


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in value
    )


def mapped_tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors as views of the mapped file, one after the other. Raises InvalidCheckpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error}") from error


def stored_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU as a file holds them."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def write_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    multiple: int = 8,
) -> tuple[bytes, int]:
    """The beginning of a file of tensors (dtype, as the format spells it, and shape) in this order, a
    `multiple` of bytes long so that they are aligned, and the size of the whole file. Raises
    InvalidCheckpoint for a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        try:
            bits = _count(shape) * _BITS[dtype]
        except (KeyError, ValueError):
            bits = 1
        if bits % 8:
            raise InvalidCheckpoint(f"tensor {name!r} cannot be stored as {dtype}{list(shape[:8])}")
        end = position + bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + position


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
    multiple: int = 8,
) -> None:
    """Write a new file with the tensors in the order of `shapes`, one in memory at a time; the first begins
    at a `multiple` of bytes. Raises OSError.
    """
    names = {name: (_NAMES[dtype], shape) for name, (dtype, shape) in shapes.items()}
    header, _ = write_header(names, metadata, multiple)
    with path.open("xb") as file:
        file.write(header)
        for (name, expected), tensor in zip(shapes.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == expected, name
            file.write(stored_bytes(tensor))
