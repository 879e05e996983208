"""Frames: each type's rule, and that nothing but a protocol error comes of any header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import FrameTooLarge, RemoteProtocolError
from petalite.net import frames
from petalite.net.frames import FrameType


def test_header_bytes() -> None:
    """Written out by hand: type, flags, aux, stream, length, big-endian."""
    assert (
        frames.encode(FrameType.MESSAGE, 5, b"ab", flags=frames.FIN, aux=1)
        == bytes.fromhex("000100010000000500000002") + b"ab"
    )
    assert frames.encode(FrameType.PRIORITY, 0x01020304, aux=3) == bytes.fromhex("010000030102030400000000")


@given(*[st.integers(0, 2**bits - 1) for bits in (8, 8, 16, 32, 32)])
def test_any_header_is_handled_skipped_or_refused(
    kind: int, flags: int, aux: int, stream: int, length: int
) -> None:
    try:
        handle = frames.check(kind, flags, aux, stream, length)
    except RemoteProtocolError:
        return
    assert length <= frames.MAX_DATA_BYTES
    assert handle == (kind if kind in set(FrameType) else None)


@pytest.mark.parametrize("kind", FrameType)
def test_each_type_has_a_rule_with_edges(kind: FrameType) -> None:
    stream = 1 if kind.on_stream else 0
    assert frames.check(kind, kind.flags, kind.aux_high, stream, kind.low) is kind
    assert frames.check(kind, 0, 0, stream, kind.high) is kind
    with pytest.raises(FrameTooLarge):
        frames.check(kind, 0, 0, stream, kind.high + 1)
    for flags, aux, other, length in [
        (0x80, 0, stream, kind.low),
        *([(0, kind.aux_high + 1, stream, kind.low)] if kind.aux_high < 0xFFFF else []),
        (0, 0, 1 - stream, kind.low),
        *([(0, 0, stream, kind.low - 1)] if kind.low else []),
    ]:
        with pytest.raises(RemoteProtocolError):
            frames.check(kind, flags, aux, other, length)


def test_unknown_types() -> None:
    """Below 0x40 they are critical; from there on they may be skipped, if they are not too long."""
    with pytest.raises(RemoteProtocolError):
        frames.check(0x3F, 0, 0, 0, 0)
    assert frames.check(0x40, 0xFF, 0xFFFF, 7, frames.MAX_DATA_BYTES) is None
    with pytest.raises(FrameTooLarge):
        frames.check(0x40, 0, 0, 0, frames.MAX_DATA_BYTES + 1)


@given(st.integers(0, 2**32 - 1), st.text())
def test_reasons_are_cut_between_characters(code: int, reason: str) -> None:
    payload = frames.encode_reason(code, reason)
    assert len(payload) <= 4 + frames.MAX_REASON_BYTES
    found = frames.decode_reason(memoryview(payload))
    assert found[0] == code
    assert reason.startswith(found[1])
    assert len(found[1]) == len(reason) or len(found[1].encode()) > frames.MAX_REASON_BYTES - 4
