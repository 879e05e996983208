"""Every codec: sizes known beforehand, tokens that can be cut and joined, strange bytes refused; and the
spec.
"""

from __future__ import annotations

import contextlib
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.client.settings import CODECS as PLAIN_WIRES
from petalite.client.settings import WIRES
from petalite.errors import BadTensor, InvalidArgument
from petalite.kernels import dynamic8
from petalite.swarm.codecs import CODECS, SESSION_CODECS, Codec, codec_named, raw_codec, session_codec

ALL = list(CODECS.values())
BOUNDS = {"f32": 0.0, "bf16": 4e-3, "f16": 5e-4, "q8": 0.02}


@pytest.mark.parametrize("codec", ALL, ids=CODECS)
@pytest.mark.parametrize("width", [1, 63, 64, 100, 576])
def test_there_and_back(codec: Codec, width: int) -> None:
    hidden = torch.randn(7, width)
    data = codec.encode(hidden)
    assert len(data) == codec.nbytes(7, width) == 7 * codec.nbytes(1, width)
    back = codec.decode(data, width)
    assert back.shape == (7, width) and back.dtype == codec.dtype
    assert float((back.float() - hidden).norm() / hidden.norm()) <= BOUNDS[codec.name]


@pytest.mark.parametrize("codec", ALL, ids=CODECS)
def test_messages_are_cut_and_joined_between_tokens(codec: Codec) -> None:
    hidden = torch.randn(6, 100)
    whole = bytes(codec.encode(hidden))
    assert whole == b"".join(bytes(codec.encode(part)) for part in hidden.split([1, 3, 2]))
    size = codec.nbytes(1, 100)
    assert torch.equal(codec.decode(whole[2 * size : 5 * size], 100), codec.decode(whole, 100)[2:5])


@pytest.mark.parametrize("codec", ALL, ids=CODECS)
def test_into_given_memory_and_nothing_beyond(codec: Codec) -> None:
    size = codec.nbytes(3, 100)
    memory = bytearray(b"\xaa" * (size + 16))
    hidden = torch.randn(3, 100)
    codec.encode_into(hidden, memoryview(memory)[8:-8])
    assert memory[8:-8] == codec.encode(hidden)
    assert memory[:8] == memory[-8:] == b"\xaa" * 8


@pytest.mark.parametrize("codec", ALL, ids=CODECS)
def test_lengths_that_hold_no_tokens(codec: Codec) -> None:
    for size in (0, 1, codec.nbytes(1, 100) + 1, codec.nbytes(2, 100) - 1):
        with pytest.raises(BadTensor, match=f"found {size} bytes"):
            codec.decode(bytes(size), 100)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=68, max_size=68 * 3), st.integers(1, 200))
def test_any_bytes_decode_or_are_refused(data: bytes, width: int) -> None:
    codec = codec_named("q8")
    try:
        assert codec.decode(data, width).shape[1] == width
    except BadTensor:
        assert len(data) % codec.nbytes(1, width)


def test_names() -> None:
    with pytest.raises(BadTensor, match="known are f32, bf16, f16, q8"):
        codec_named("q9")
    assert [raw_codec(codec.dtype).name for codec in ALL[:3]] == ["f32", "bf16", "f16"]
    with pytest.raises(InvalidArgument):
        raw_codec(torch.float64)


# -- zstd ------------------------------------------------------------------------------------------------

PACKED = [codec for codec in SESSION_CODECS.values() if codec.is_packed]
packed = pytest.mark.parametrize("codec", PACKED, ids=[codec.name for codec in PACKED])


@packed
def test_packed_and_back(codec: Codec) -> None:
    data = codec.encode(torch.randn(40, 576))
    assert data == codec_named(codec.plain).encode(codec.decode(data, 576)) or codec.plain == "q8"
    frame = codec.pack(data)
    assert len(frame) < len(data) * 1.01
    assert bytes(codec.unpack(frame, len(data))) == bytes(data)
    assert bytes(codec.unpack(codec.pack(memoryview(data)), len(data))) == bytes(data)


def test_names_of_what_is_packed() -> None:
    """Sessions know them, training does not: what a peer may have unpacked is bounded by a session's step."""
    assert {codec.name for codec in PACKED} == {f"{name}+zstd" for name in CODECS}
    assert session_codec("q8") is codec_named("q8") and session_codec("q8+zstd").plain == "q8"
    assert set(WIRES) == set(SESSION_CODECS) and set(PLAIN_WIRES) == set(CODECS)
    for find, name in ((codec_named, "q8+zstd"), (session_codec, "q8+lz4")):
        with pytest.raises(BadTensor, match="unknown codec"):
            find(name)


def test_planes_help_floats() -> None:
    """Exponents together; gaussian float32 loses a tenth of its bytes, and less where they stand apart."""
    data = codec_named("f32").encode(torch.randn(64, 576, generator=torch.Generator().manual_seed(0)))
    smaller = len(session_codec("f32+zstd").pack(data))
    assert smaller < 0.91 * len(data)
    assert smaller < 0.98 * len(zstandard.compress(bytes(data), 1))


@packed
def test_frames_that_lie(codec: Codec) -> None:
    data = codec.encode(torch.zeros(64, 576))
    frame = bytes(codec.pack(data))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(data))
    for bad in (frame[:-1], frame + b"x", b"", b"no frame", bomb, nameless):
        with pytest.raises(BadTensor):
            codec.unpack(bad, len(data))
    for size in (0, len(data) - 1, len(data) + 1):
        with pytest.raises(BadTensor):
            codec.unpack(frame, size)


def test_a_bomb_takes_no_memory() -> None:
    """A frame that says it holds a gigabyte, and one that lies about it, where two tokens are expected."""
    codec = session_codec("f32+zstd")
    whole = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    lying = zstandard.ZstdCompressor().compress(bytes(4608))
    fields = zstandard.get_frame_parameters(lying)
    assert fields.content_size == 4608
    tracemalloc.start()
    for frame in (whole, lying[: len(lying) - 4] + whole[-64:]):
        with pytest.raises(BadTensor):
            codec.unpack(frame, 4608)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_unpack_or_are_refused(data: bytes) -> None:
    for frame in (data, zstandard.compress(data)[:4] + data):
        with contextlib.suppress(BadTensor):
            assert len(session_codec("bf16+zstd").unpack(frame, 64)) == 64


# -- the specification -----------------------------------------------------------------------------------


def spec() -> str:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    return text[text.index("### q8") :]


def test_the_example_of_the_specification_holds() -> None:
    """A token of 66 values: i/65 - 0.5 times 3."""
    example = re.search(r"```text\n(.*?)```", spec(), re.S)
    assert example is not None
    expected = bytes.fromhex("".join(example[1].split()))
    hidden = torch.tensor([[3.0 * (i / 65 - 0.5) for i in range(66)]])
    assert bytes(codec_named("q8").encode(hidden)) == expected
    assert len(expected) == 66 + 2 * 2


def test_the_levels_of_the_specification_hold() -> None:
    """Its table of decades, recomputed."""
    rows = re.findall(r"^\| (\d) \| (\d+) \| ([\d.e+-]+) \| ([\d.e+-]+) \|$", spec(), re.M)
    assert len(rows) == 7
    positive = [level for level in dynamic8.levels() if level > 0]
    for row, count, low, high in rows:
        first = (1 << int(row)) - 1
        decade = positive[first : first + int(count)]
        assert len(decade) == 1 << int(row)
        assert float(low) == pytest.approx(decade[0], rel=1e-5)
        assert float(high) == pytest.approx(decade[-1], rel=1e-5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [64, 4096])
def test_what_is_no_number_is_seen_on_the_wire(name: str, bad: float, width: int) -> None:
    """As torch sees it after decoding; sums of the largest numbers do not look like infinity."""
    codec = codec_named(name)
    hidden = torch.full((2, width), torch.finfo(codec.dtype).max if name != "q8" else 1e4).to(codec.dtype)
    assert codec.is_finite(memoryview(codec.encode(hidden)), width)
    hidden[1, width // 2] = bad
    wire = memoryview(codec.encode(hidden))
    assert codec.is_finite(wire, width) == bool(torch.isfinite(codec.decode(wire, width)).all())


def test_encoding_copies_whatever_the_layout() -> None:
    """A view with strides, a slice at an offset, and what stands in memory as it travels."""
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    for hidden in (whole, whole[1:3], whole.t(), whole[:, 1:4]):
        wire = codec_named("f32").encode(hidden)
        assert bytes(wire) == hidden.contiguous().numpy().tobytes()
        wire[0] ^= 1
        assert torch.equal(whole, torch.arange(24, dtype=torch.float32).view(4, 6))
