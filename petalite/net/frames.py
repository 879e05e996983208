"""Frames: what the records' plaintext is made of. A 12-byte header, then the payload.

    u8 type | u8 flags | u16 aux | u32 stream | u32 length | length bytes          big-endian

Every frame lies whole in one record. A message comes in one MESSAGE, or, when its buffers are large, as a
HEAD and then their bytes, each the whole plaintext of a record that a BLOCK frame announced, so that they are
sealed from their sender's memory and opened into their reader's. Knows shapes and sizes;
knows nothing of streams' states.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from types import MappingProxyType

from petalite.errors import FrameTooLarge, RemoteProtocolError

HEADER = Struct(">BBHII")
HEADER_BYTES = HEADER.size
U32, U64 = Struct(">I"), Struct(">Q")

MAX_DATA_BYTES = 128 * 1024  # in one MESSAGE, or behind one BLOCK
MAX_HEADER_BYTES = 0xFFFF  # of a message: aux holds it
BLOCK_BYTES = 32 * 1024  # buffers of so many bytes are sent in BLOCKs; to copy fewer is faster
MESSAGE_COST = 256  # bytes of credit that a message takes at least: kept unread, it takes as much memory
MAX_REASON_BYTES = 256
FIN = 0x01
OPENING = 0x0E  # three bits: in a stream's first frame 1 + the priority that it asks for, else 0
FIRST_IGNORABLE = 0x40  # a type from here on may be skipped by who does not know it


class FrameType(IntEnum):
    """A number, the least and most payload bytes, whether it names a stream (if not, that field is 0), the
    flags it may carry and the most that aux may be."""

    low: int
    high: int
    on_stream: bool
    flags: int
    aux_high: int

    def __new__(
        cls, number: int, low: int, high: int, on_stream: bool, flags: int = 0, aux_high: int = 0
    ) -> FrameType:
        kind = int.__new__(cls, number)
        kind._value_, kind.low, kind.high = number, low, high
        kind.on_stream, kind.flags, kind.aux_high = on_stream, flags, aux_high
        return kind

    # A header of aux bytes, and its buffers; FIN: the stream's last; empty: only its beginning or end.
    MESSAGE = 0x00, 0, MAX_DATA_BYTES, True, OPENING | FIN, MAX_HEADER_BYTES
    PRIORITY = 0x01, 0, 0, True, 0, 3  # aux: the priority the stream's opener now asks for
    MAX_STREAM_DATA = 0x02, 8, 8, True  # u64: how many bytes of this stream may be sent in all
    RESET_STREAM = 0x03, 4, 4, True  # u32 code: no more bytes will come
    STOP_SENDING = 0x04, 4, 4, True  # u32 code: no more bytes will be read
    PING = 0x05, 8, 8, False  # 8 bytes, to be returned
    PONG = 0x06, 8, 8, False
    CLOSE = 0x07, 4, 4 + MAX_REASON_BYTES, False  # u32 code, text: the connection ends here
    MAX_DATA = 0x08, 8, 8, False  # u64: how many bytes of all streams together may be sent in all
    PAD = 0x09, 0, MAX_DATA_BYTES, False  # nothing
    # u32 code, text: open no more streams; those that are open go on.
    GOAWAY = 0x0A, 4, 4 + MAX_REASON_BYTES, False
    # u64, and a header: of a message whose buffers follow, so many bytes in all.
    HEAD = 0x0B, 8, 8 + MAX_HEADER_BYTES, True
    BLOCK = 0x0C, 4, 4, True, FIN  # u32: the next record is so many of those bytes; FIN: the stream's last


_KINDS = MappingProxyType({int(kind): kind for kind in FrameType})


def encode(kind: FrameType, stream: int = 0, payload: bytes = b"", flags: int = 0, aux: int = 0) -> bytes:
    """A whole frame."""
    return HEADER.pack(kind, flags, aux, stream, len(payload)) + payload


def opening(priority: int) -> int:
    """The flags of a stream's first frame."""
    return (1 + priority) << 1


def encode_reason(code: int, reason: str) -> bytes:
    """The payload of CLOSE or GOAWAY; a text that is too long is cut between characters."""
    return U32.pack(code) + reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()


def decode_reason(payload: memoryview) -> tuple[int, str]:
    """The code and the text of CLOSE or GOAWAY."""
    return U32.unpack_from(payload)[0], str(payload[4:], "utf-8", "replace")


def check(number: int, flags: int, aux: int, stream: int, length: int) -> FrameType | None:
    """The type of the frame, or None where it is to be skipped. Raises what the sender gets to hear."""
    kind = _KINDS.get(number)
    if kind is None and number < FIRST_IGNORABLE:
        raise RemoteProtocolError(f"frame type {number:#04x} is unknown, and below 0x40 may not be skipped")
    if length > (MAX_DATA_BYTES if kind is None else kind.high):
        raise FrameTooLarge(f"a frame of type {number:#04x} claims {length} bytes, more than it may have")
    if kind is not None and (
        length < kind.low or flags & ~kind.flags or aux > kind.aux_high or (stream != 0) is not kind.on_stream
    ):
        raise RemoteProtocolError(
            f"{kind.name} cannot have flags {flags:#x}, aux {aux}, stream {stream}, {length} bytes"
        )
    return kind
