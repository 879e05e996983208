"""Messages on a stream: a msgpack header and raw buffers, and reading them piece by piece.

    u32 header length | msgpack header | zeros up to a multiple of 16 | buffers, back to back
    header: [0, body, sizes]                        a message
            [1, body, sizes, method, deadline_ms]   the first message of a call; deadline 0: none
            [2, body, sizes, code, text]            the call failed; body and sizes are empty

The zeros are there only where buffers follow. A header has at most 64 KiB, 64 buffers, 1,024 entries in a
list or map and 16 levels; map keys are text and occur once; numbers, text, bytes, booleans and null are all
there is. Lengths are checked before memory is taken. Sans I/O: reads from a `Connection` core. Knows no
method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import msgpack

from petalite.errors import BadMessage, InvalidArgument
from petalite.net.connection import Connection
from petalite.net.frames import U32
from petalite.net.states import Receive
from petalite.net.streams import Stream

Buffer: TypeAlias = bytes | bytearray | memoryview | Any  # whatever supports the buffer protocol, contiguous

MAX_HEADER_BYTES = 64 * 1024
MAX_BUFFERS = 64
MAX_ENTRIES = 1024
MAX_DEPTH = 16
MAX_METHOD_LENGTH = 64
ALIGNMENT = (
    16  # of the first buffer, from the message's start: where it lies in memory that is not copied again
)
_MAX_DEADLINE_MS = 2**31
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_INTEGERS, _TEXT = frozenset((int,)), frozenset((str,))
_packer = msgpack.Packer(
    autoreset=True
)  # its C buffer is reused; it is only used under the GIL, with no callbacks


@dataclass(frozen=True, slots=True)
class Message:
    """One RPC message. Buffers are sent from their own memory and received as writable memoryviews."""

    body: Mapping[str, Any] = field(default_factory=dict)  # msgpack's types, text keys
    buffers: Sequence[Buffer] = ()  # at most 64


# A header's first element, and how many elements each kind has at least; more are of a later version.
MESSAGE, REQUEST, FAILURE = 0, 1, 2
_LENGTHS = MappingProxyType({MESSAGE: 3, REQUEST: 5, FAILURE: 5})


class Progress(Enum):
    """What `MessageReader.poll` has when it has no message."""

    PENDING = auto()  # more has to come
    END = auto()  # the peer finished


def encode(header: list[Any], buffers: Sequence[Buffer]) -> list[bytes | memoryview]:
    """The segments of one message. `header` is complete but for its sizes, which are put at index 2."""
    if len(buffers) > MAX_BUFFERS:
        raise InvalidArgument(f"a message has at most {MAX_BUFFERS} buffers, found {len(buffers)}")
    views = [_flat(buffer) for buffer in buffers]
    header[2] = list(map(len, views))
    try:
        packed: bytes = _packer.pack(header)
    except (TypeError, ValueError, OverflowError) as error:
        _packer.reset()
        raise InvalidArgument(f"a message body holds msgpack's types with text keys only: {error}") from error
    if len(packed) > MAX_HEADER_BYTES:
        raise InvalidArgument(
            f"a message body has {len(packed)} bytes, at most {MAX_HEADER_BYTES}; use buffers"
        )
    padding = bytes(-(U32.size + len(packed)) % ALIGNMENT) if views else b""
    return [U32.pack(len(packed)) + packed + padding, *views]


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.ndim == 1 and view.format == "B" and view.contiguous:
        return view
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise InvalidArgument("a message's buffers must be contiguous")
    return view.cast("B")


def decode_header(data: bytes | bytearray | memoryview) -> list[Any]:
    """A header whose shape is as stated above. Raises BadMessage."""
    try:
        header = _unpack(data)
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise BadMessage(f"a message header is not valid msgpack: {error}") from error
    if type(header) is not list or len(header) < 3 or type(header[0]) is not int:
        raise BadMessage("a message header is not a list of kind, body and sizes")
    kind, body, sizes = header[0], header[1], header[2]
    if len(header) < _LENGTHS.get(kind, 1 << 16):
        raise BadMessage(f"a message header of kind {kind} has {len(header)} elements")
    if type(body) is not dict or type(sizes) is not list or len(sizes) > MAX_BUFFERS:
        raise BadMessage(f"a message's body is a map, its sizes a list of at most {MAX_BUFFERS}")
    if sizes and (not _INTEGERS.issuperset(map(type, sizes)) or min(sizes) < 0):
        raise BadMessage("a buffer's size is a whole number, and not negative")
    _check(body.values(), MAX_DEPTH)
    if kind == REQUEST:
        _check_request(header[3], header[4])
    elif kind == FAILURE and (type(header[3]) is not int or type(header[4]) is not str):
        raise BadMessage("a failure has a code and a text")
    return header


def _check_request(method: Any, deadline_ms: Any) -> None:
    if type(method) is not str or not 0 < len(method) <= MAX_METHOD_LENGTH:
        raise BadMessage(f"a method is named by 1 to {MAX_METHOD_LENGTH} characters")
    if type(deadline_ms) is not int or not 0 <= deadline_ms <= _MAX_DEADLINE_MS:
        raise BadMessage("a deadline is a number of milliseconds below 2^31, 0 for none")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadMessage("a map has the same key twice")
    if not _TEXT.issuperset(map(type, result)):
        raise BadMessage("a map's keys are text")
    return result


_unpack = partial(
    msgpack.unpackb,
    max_array_len=MAX_ENTRIES,
    max_map_len=MAX_ENTRIES,
    max_ext_len=0,
    object_pairs_hook=_unique,
)


def _check(items: Iterable[Any], depth: int) -> None:
    if _SCALARS.issuperset(map(type, items)):
        return
    for item in items:
        kind = type(item)
        if kind in _SCALARS:
            continue
        if kind is not dict and kind is not list:
            raise BadMessage(f"a message body holds {kind.__name__}, which is not a type of messages")
        if not depth:
            raise BadMessage(f"a message body is nested more than {MAX_DEPTH} levels deep")
        _check(item.values() if kind is dict else item, depth - 1)


class MessageReader:
    """Reads the messages of one stream, one after another, each buffer into memory of its own."""

    __slots__ = ("_allocate", "_buffers", "_connection", "_header", "_padding", "_sizes", "_stream", "admit")

    def __init__(
        self,
        connection: Connection,
        stream: Stream,
        admit: Callable[[list[Any]], None] | None = None,
        allocate: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
    ) -> None:
        """`admit` sees each header before any memory is taken for its buffers, and raises to refuse it."""
        self._connection = connection
        self._stream = stream
        self._allocate = allocate
        self.admit = admit
        self._header: list[Any] | None = None
        self._sizes: list[int] = []
        self._buffers: list[memoryview] = []
        self._padding = 0  # bytes to be skipped before the first buffer
        stream.need = U32.size

    @property
    def midway(self) -> bool:
        """Whether a header has come whose buffers are not all there."""
        return self._header is not None

    def poll(self) -> tuple[list[Any], list[memoryview]] | Progress:
        """The next header and its buffers, as far as they have come. Raises BadMessage."""
        stream = self._stream
        if self._header is None:
            whole = self._read_header()
            if whole is not None:
                return whole
            if self._header is None:
                return self._pending(at_boundary=not stream.buffered)
        header, sizes, buffers = self._header, self._sizes, self._buffers
        if self._padding:
            if stream.buffered < self._padding:
                stream.need = self._padding
                return self._pending(at_boundary=False)
            self._connection.take(stream, self._padding)
            self._padding = 0
        while stream.target is None and len(buffers) < len(sizes):
            size = sizes[len(buffers)]
            if stream.buffered >= size:
                buffers.append(memoryview(self._connection.take(stream, size)))
                continue
            if stream.receive is not Receive.OPEN:
                break
            target = self._allocate(size)
            buffers.append(target)
            self._connection.expect(stream, target)
        if stream.target is not None or len(buffers) < len(sizes):
            return self._pending(at_boundary=False)
        self._header, self._buffers = None, []
        stream.need = U32.size
        return header, buffers

    def _read_header(self) -> tuple[list[Any], list[memoryview]] | None:
        """Take the next header, if it is here. The usual small message comes in one chunk, which becomes its
        buffers as it is: that message."""
        stream = self._stream
        buffered = stream.buffered
        if buffered < U32.size:
            stream.need = U32.size
            return None
        first = stream.chunks[0]
        (length,) = U32.unpack_from(first if len(first) >= U32.size else stream.peek(U32.size))
        if length > MAX_HEADER_BYTES:
            raise BadMessage(f"a message header claims {length} bytes; the most is {MAX_HEADER_BYTES}")
        end = U32.size + length
        if buffered < end:
            stream.need = end
            return None
        view = memoryview(first)
        header = decode_header(view[U32.size : end] if len(first) >= end else stream.peek(end)[U32.size :])
        if self.admit is not None:
            self.admit(header)
        sizes = header[2]
        padding = -end % ALIGNMENT if sizes else 0
        start = end + padding
        if len(first) != buffered or buffered != start + sum(sizes):
            view.release()
            self._connection.take(stream, end)
            self._header, self._sizes, self._padding = header, sizes, padding
            return None
        buffers = []
        for size in sizes:
            buffers.append(view[start : start + size])
            start += size
        self._connection.take_whole(stream)
        stream.need = U32.size
        return header, buffers

    def _pending(self, at_boundary: bool) -> Progress:
        if self._stream.receive is not Receive.FINISHED:
            return Progress.PENDING
        if at_boundary:
            return Progress.END
        raise BadMessage("the stream ended inside a message")
