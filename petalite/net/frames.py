"""Frames: what the records' plaintext is made of. A 12-byte header, then the payload.

    u8 type | u8 flags | u16 aux | u32 stream | u32 length | length bytes          big-endian

Every frame lies whole in one record. A message comes in one MESSAGE, or, when its buffers are large, as a
HEAD and then their bytes: in DATA, or as the whole plaintext of a record that a BLOCK frame announced, so
that they are sealed from their sender's memory and opened into their reader's. Knows shapes and sizes;
knows nothing of streams' states.
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

MAX_DATA_BYTES = 128 * 1024  # in one MESSAGE, or behind one BLOCK
MAX_HEADER_BYTES = 0xFFFF  # of a message: aux holds it
BLOCK_BYTES = 32 * 1024  # buffers of so many bytes are sent in BLOCKs; to copy fewer is faster
MESSAGE_COST = (
    256  # bytes of credit that a message takes at least: kept unread, it takes about as much memory
)
MAX_REASON_BYTES = 256
FIN = 0x01
FIRST_IGNORABLE = 0x40  # a type from here on may be skipped by who does not know it


class FrameType(IntEnum):
    MESSAGE = 0x00  # a header of aux bytes, and its buffers; FIN: the stream's last; empty: only its end
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
    BLOCK = 0x0C  # u32: the next record is so many of those bytes; FIN: the stream's last
    HEAD = 0x0D  # u64, and a header: of a message whose buffers follow, so many bytes in all


class FrameRule(NamedTuple):
    """What a frame of one type must look like."""

    low: int  # least payload bytes
    high: int  # most payload bytes
    on_stream: bool  # whether it names a stream; if not, that field is 0
    flags: int = 0  # the flags it may carry
    aux_high: int = 0  # the most that aux may be


RULES = MappingProxyType(
    {
        FrameType.MESSAGE: FrameRule(0, MAX_DATA_BYTES, True, flags=FIN, aux_high=MAX_HEADER_BYTES),
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
        FrameType.HEAD: FrameRule(8, 8 + MAX_HEADER_BYTES, True),
    }
)

_IGNORABLE = FrameRule(0, MAX_DATA_BYTES, True)


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
    low, high, on_stream, allowed, aux_high = rule or _IGNORABLE
    if length > high:
        raise FrameTooLarge(f"a frame of type {kind:#04x} claims {length} bytes; the most is {high}")
    if rule is None:
        return False
    if length < low or flags & ~allowed or aux > aux_high or (stream != 0) is not on_stream:
        raise RemoteProtocolError(
            f"{FrameType(kind).name} cannot have flags {flags:#x}, aux {aux}, stream {stream}, {length} bytes"
        )
    return True
