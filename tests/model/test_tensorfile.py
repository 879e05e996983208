"""Safetensors files: written by one implementation, read by the other; every rule of the format broken
once.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from petalite.errors import InvalidCheckpoint
from petalite.model.tensorfile import mapped_tensors, read_header, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
}


def file_of(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    with safe_open(path, "pt") as file:
        assert set(header) == set(file.keys())
    for name, tensor in mapped_tensors(path, header):
        assert torch.equal(tensor, TENSORS[name])
        assert header[name].shape == tuple(tensor.shape) and header[name].nbytes == tensor.nbytes
        raw = path.read_bytes()[header[name].start : header[name].end]
        assert raw == bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}, TENSORS.values())
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert list(read_header(path)) == list(TENSORS)  # in the order given


GOOD = {"t": entry()}
BROKEN = {
    "empty file": b"",
    "shorter than its length": b"\x08\0\0",
    "header longer than the file": file_of(GOOD, b"", length=10_000),
    "header of 2^63 bytes": file_of(GOOD, bytes(8), length=1 << 63),
    "no JSON": file_of(b"{not json", bytes(8)),
    "no UTF-8": file_of(b'{"\xff": 1}', bytes(8)),
    "deep JSON": file_of(b"[" * 50_000, bytes(8)),
    "a list": file_of([1], bytes(8)),
    "space before the brace": file_of(b" " + json.dumps(GOOD).encode(), bytes(8)),
    "truncated data": file_of(GOOD, bytes(7)),
    "trailing data": file_of(GOOD, bytes(9)),
    "a hole": file_of({"t": entry(), "u": entry(offsets=(12, 20))}, bytes(20)),
    "an overlap": file_of({"t": entry(), "u": entry(offsets=(4, 12))}, bytes(12)),
    "data before the first": file_of({"t": entry(offsets=(4, 12))}, bytes(12)),
    "shape and size disagree": file_of({"t": entry(shape=(3,))}, bytes(8)),
    "size overflow": file_of({"t": entry(shape=(1 << 62, 1 << 62))}, bytes(8)),
    "negative size": file_of({"t": entry(shape=(-2, -1))}, bytes(8)),
    "fractional size": file_of({"t": entry(shape=(2.0,))}, bytes(8)),
    "size true": file_of({"t": entry(shape=(2, True))}, bytes(8)),
    "backward offsets": file_of({"t": entry(offsets=(8, 0))}, bytes(8)),
    "three offsets": file_of({"t": entry(offsets=(0, 8, 8))}, bytes(8)),
    "unknown dtype": file_of({"t": entry(dtype="F33")}, bytes(8)),
    "dtype of a wrong type": file_of({"t": {**entry(), "dtype": 4}}, bytes(8)),
    "dtype that is a list": file_of({"t": {**entry(), "dtype": ["F32"]}}, bytes(8)),
    "a product of megabytes": file_of({"t": entry(shape=[(1 << 62) + 1] * 200_000)}, bytes(8)),
    "missing shape": file_of({"t": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an entry that is a number": file_of({"t": 4}, bytes(8)),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, **GOOD}, bytes(8)),
    "metadata that is text": file_of({"__metadata__": "a", **GOOD}, bytes(8)),
    "duplicate names": file_of(
        b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "misaligned half": file_of({"t": entry("F4", (3,), (0, 2))}, bytes(2)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_sentence_that_names_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=r"x\.safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# The format's rules as written forbid the second; the first leaves it to chance which entry holds.
ACCEPTED_ELSEWHERE = {"duplicate names", "space before the brace"}


@pytest.mark.parametrize("name", sorted(set(BROKEN) - ACCEPTED_ELSEWHERE))
def test_the_library_refuses_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[name])
    assert not accepted(path)


def accepted(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_is_either_still_good_or_refused(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Bytes flipped, cut or added anywhere: InvalidCheckpoint or a file that the library accepts too."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "mutated.safetensors"
    good = file_of({"t": entry(), "u": entry("U8", (3, 1), (8, 11))}, bytes(range(11)))
    at = data.draw(st.integers(0, len(good)))
    kept = data.draw(st.sampled_from([at, at + 1, at + 4]))
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=4)) + good[kept:])
    try:
        read_header(path)
    except InvalidCheckpoint:
        return
    assert accepted(path)


def test_a_header_beyond_the_formats_limit(tmp_path: Path) -> None:
    """One byte more than 100,000,000, all of it there: the library refuses it too."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)
    with pytest.raises(InvalidCheckpoint, match="a header of 100000001 bytes"):
        read_header(path)
    assert not accepted(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(InvalidCheckpoint, match="cannot read"):
        dict(mapped_tensors(tmp_path / "absent.safetensors", ["t"]))


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(InvalidCheckpoint, match="nosuch"):
        dict(mapped_tensors(tmp_path / "x.safetensors", ["nosuch"]))


def test_writing_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_tensors(path, {}, [])
    assert path.read_bytes() == b"precious"
