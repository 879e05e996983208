"""Frames: what the records' plaintext is made of. A 12-byte header, then the payload.

    u8 type | u8 flags | u16 aux | u32 stream | u32 length | length bytes          big-endian

Every frame lies whole in one record. Bytes of a stream come in DATA, or, when they are many, as the whole
plaintext of a record that a BLOCK frame announced: so they are sealed from their sender's memory and opened
into their reader's. Knows shapes and sizes; knows nothing of streams' states.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from types import MappingProxyType
from typing import NamedTuple

from petalite.errors import FrameTooLarge, RemoteProtocolError

HEADER = Struct(">BBHII")
HEADER_BYTES = HEADER.size
U32, U64 = Struct(">I"), Struct(">Q")

MAX_DATA_BYTES = 128 * 1024  # of a stream, in one DATA frame or one BLOCK
BLOCK_BYTES = 32 * 1024  # bytes this many are sent as a BLOCK; to copy fewer is faster
MAX_REASON_BYTES = 256
FIN = 0x01
FIRST_IGNORABLE = 0x40  # a type from here on may be skipped by who does not know it


class FrameType(IntEnum):
    DATA = 0x00  # stream bytes; FIN: the last of them
    OPEN = 0x01  # a new stream; aux: the priority its opener asks for
    MAX_STREAM_DATA = 0x02  # u64: how many bytes of this stream may be sent in all
    RESET_STREAM = 0x03  # u32 code: no more bytes will come
    STOP_SENDING = 0x04  # u32 code: no more bytes will be read
    PING = 0x05  # 8 bytes, to be returned
    PONG = 0x06
    CLOSE = 0x07  # u32 code, text: the connection ends here
    MAX_DATA = 0x08  # u64: how many bytes of all streams together may be sent in all
    PAD = 0x09  # nothing
    GOAWAY = 0x0A  # u32 code, text: open no more streams; those that are open go on
    PRIORITY = 0x0B  # aux: the priority the stream's opener now asks for
    BLOCK = 0x0C  # u32: the next record is so many stream bytes; FIN: the last of them


class FrameRule(NamedTuple):
    """What a frame of one type must look like."""

    low: int  # least payload bytes
    high: int  # most payload bytes
    on_stream: bool  # whether it names a stream; if not, that field is 0
    flags: int = 0  # the flags it may carry
    aux_high: int = 0  # the most that aux may be


RULES = MappingProxyType(
    {
        FrameType.DATA: FrameRule(0, MAX_DATA_BYTES, True, flags=FIN),
        FrameType.OPEN: FrameRule(0, 0, True, aux_high=3),
        FrameType.MAX_STREAM_DATA: FrameRule(8, 8, True),
        FrameType.RESET_STREAM: FrameRule(4, 4, True),
        FrameType.STOP_SENDING: FrameRule(4, 4, True),
        FrameType.PING: FrameRule(8, 8, False),
        FrameType.PONG: FrameRule(8, 8, False),
        FrameType.CLOSE: FrameRule(4, 4 + MAX_REASON_BYTES, False),
        FrameType.MAX_DATA: FrameRule(8, 8, False),
        FrameType.PAD: FrameRule(0, MAX_DATA_BYTES, False),
        FrameType.GOAWAY: FrameRule(4, 4 + MAX_REASON_BYTES, False),
        FrameType.PRIORITY: FrameRule(0, 0, True, aux_high=3),
        FrameType.BLOCK: FrameRule(4, 4, True, flags=FIN),
    }
)


def encode(kind: FrameType, stream: int = 0, payload: bytes = b"", flags: int = 0, aux: int = 0) -> bytes:
    """A whole frame."""
    return HEADER.pack(kind, flags, aux, stream, len(payload)) + payload


def encode_reason(code: int, reason: str) -> bytes:
    """The payload of CLOSE or GOAWAY; a text that is too long is cut between characters."""
    return U32.pack(code) + reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()


def decode_reason(payload: memoryview) -> tuple[int, str]:
    """The code and the text of CLOSE or GOAWAY."""
    return U32.unpack_from(payload)[0], str(payload[4:], "utf-8", "replace")


def check(kind: int, flags: int, aux: int, stream: int, length: int) -> bool:
    """Whether to handle the frame (true) or skip it (false). Raises what the sender gets to hear."""
    rule = RULES.get(kind)  # type: ignore[call-overload]  # an int finds its IntEnum
    if rule is None and kind < FIRST_IGNORABLE:
        raise RemoteProtocolError(f"frame type {kind:#04x} is unknown, and below 0x40 may not be skipped")
    most = MAX_DATA_BYTES if rule is None else rule.high
    if length > most:
        raise FrameTooLarge(f"a frame of type {kind:#04x} claims {length} bytes; the most is {most}")
    if rule is None:
        return False
    if length < rule.low or flags & ~rule.flags or aux > rule.aux_high or (stream != 0) is not rule.on_stream:
        raise RemoteProtocolError(
            f"{FrameType(kind).name} cannot have flags {flags:#x}, aux {aux}, stream {stream}, {length} bytes"
        )
    return True
