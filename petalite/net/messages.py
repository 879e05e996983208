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

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
Header: TypeAlias = list[Any]

MAX_HEADER_BYTES = 64 * 1024
MAX_BUFFERS = 64
MAX_ENTRIES = 1024
MAX_DEPTH = 16
MAX_METHOD_LENGTH = 64
ALIGNMENT = 16  # of the first buffer, from the message's start, where it lies in memory as it came
_MAX_DEADLINE_MS = 2**31
_PREFIX = U32.size
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_INTEGERS, _TEXT = frozenset((int,)), frozenset((str,))
# Its C buffer is reused; it is only used under the GIL, with no callbacks.
_packer = msgpack.Packer(autoreset=True)

# A header's first element, and the types of what follows the sizes; what follows that is of a later version.
MESSAGE, REQUEST, FAILURE = 0, 1, 2
_ENDS = MappingProxyType({MESSAGE: (), REQUEST: (str, int), FAILURE: (int, str)})


@dataclass(slots=True)  # not frozen: that is slower, and there is one for every message
class Message:
    """One RPC message. Buffers are sent from their own memory and received as writable memoryviews."""

    body: Mapping[str, Any] = field(default_factory=dict)  # msgpack's types, text keys
    buffers: Sequence[Buffer] = ()  # at most 64


def encode(header: Header, buffers: Sequence[Buffer]) -> list[bytes | memoryview]:
    """The segments of one message. `header` is complete but for its sizes, which are put at index 2."""
    views = [_flat(buffer) for buffer in buffers]
    header[2] = list(map(len, views))
    try:
        packed: bytes = _packer.pack(header)
    except (TypeError, ValueError, OverflowError) as error:
        _packer.reset()
        raise InvalidArgument(f"a message body cannot be written: {error}") from error
    if len(packed) > MAX_HEADER_BYTES or len(views) > MAX_BUFFERS:
        raise InvalidArgument(
            f"a message has at most {MAX_HEADER_BYTES} bytes of body, found {len(packed)}, and {MAX_BUFFERS} "
            f"buffers, found {len(views)}; put what is large into buffers"
        )
    prefix = U32.pack(len(packed))
    if not views:
        return [prefix + packed]
    return [prefix + packed + bytes(-(_PREFIX + len(packed)) % ALIGNMENT), *views]


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.ndim == 1 and view.itemsize == 1 and view.contiguous:
        return view
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise InvalidArgument("a message's buffers must be contiguous")
    return view.cast("B")


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """A header whose shape is as stated above. Raises BadMessage."""
    try:
        header: Header = _unpack(data)
        kind, body, sizes = header[:3]
        end = _ENDS[kind]
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError, KeyError) as error:
        raise BadMessage(
            f"a message header is not [kind, body, sizes, …] in valid msgpack: {error}"
        ) from error
    if type(kind) is not int or type(body) is not dict or type(sizes) is not list:
        raise BadMessage("a message header begins with a number, a map and a list")
    if sizes and (len(sizes) > MAX_BUFFERS or not _INTEGERS.issuperset(map(type, sizes)) or min(sizes) < 0):
        raise BadMessage(f"a message has at most {MAX_BUFFERS} buffers, of whole sizes")
    # A map that claims more entries than it has keys has one twice. The body's claim is in the third byte, as
    # everybody writes it; inner maps are rare. Where that does not settle it, all is read again, more slowly.
    plain = (data[0] & 0xF0, data[1], data[2] ^ 0x80) == (0x90, kind, len(body))
    if _has_maps(body.values(), MAX_DEPTH) or not plain or not _TEXT.issuperset(map(type, body)):
        _unpack_unique(data)
    if end and tuple(map(type, header[3:5])) != end:
        raise BadMessage(f"a message header of kind {kind} goes on with {end}")
    if kind == REQUEST and not (
        0 < len(header[3]) <= MAX_METHOD_LENGTH and 0 <= header[4] <= _MAX_DEADLINE_MS
    ):
        raise BadMessage(f"a method has 1 to {MAX_METHOD_LENGTH} characters, a deadline less than 2^31 ms")
    return header


def _has_maps(items: Iterable[Any], depth: int) -> bool:
    """Whether a map is among them or in them. Raises BadMessage for what is nested too deep."""
    if _SCALARS.issuperset(map(type, items)):
        return False
    if not depth:
        raise BadMessage(f"a message body is nested more than {MAX_DEPTH} levels deep")
    found = False
    for item in items:
        if type(item) is dict:
            found = True
            _has_maps(item.values(), depth - 1)
        elif type(item) is list:
            found |= _has_maps(item, depth - 1)
    return found


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs) or not _TEXT.issuperset(map(type, result)):
        raise BadMessage("a map's keys are text, and occur once")
    return result


def _no_extension(code: int, _data: bytes) -> None:
    raise BadMessage(f"a message body holds an extension of type {code}, which is not a type of messages")


_unpack = partial(
    msgpack.unpackb,
    max_array_len=MAX_ENTRIES,
    max_map_len=MAX_ENTRIES,
    max_ext_len=0,
    ext_hook=_no_extension,
)
_unpack_unique = partial(_unpack, object_pairs_hook=_unique)


def read_messages(
    connection: Connection,
    stream: Stream,
    admit: Callable[[Header], None] = lambda _header: None,
    allocate: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
) -> Generator[tuple[Header, list[memoryview]] | None, None, None]:
    """The stream's messages, each a header and its buffers; None when the next is not whole yet; its end.

    `admit` sees each header before any memory is taken for its buffers, and raises to refuse it. A buffer
    that came in one piece is that piece; what is not here yet comes into memory of its own. Raises
    BadMessage.
    """
    while True:
        while stream.buffered < _PREFIX:
            if stream.receive is Receive.FINISHED and not stream.buffered:
                return
            _check_end(stream)
            stream.need = _PREFIX
            yield None
        view = stream.front(_PREFIX)
        (length,) = U32.unpack_from(view)
        if length > MAX_HEADER_BYTES:
            raise BadMessage(f"a message header claims {length} bytes; the most is {MAX_HEADER_BYTES}")
        end = _PREFIX + length
        if len(view) < end:
            yield from _wait(stream, end)
            view = stream.front(end)
        header, buffers = decode_header(view[_PREFIX:end]), list[memoryview]()
        admit(header)
        if sizes := header[2]:
            end += -end % ALIGNMENT
        if len(view) >= end + sum(sizes):  # the usual small message: its buffers are what came
            for size in sizes:
                buffers.append(view[end : end + size])
                end += size
            stream.drop(end)
        else:
            yield from _wait(stream, end)
            stream.take(end)
            for size in sizes:
                if stream.buffered >= size:
                    buffers.append(stream.take(size))
                    continue
                buffers.append(allocate(size))
                connection.expect(stream, buffers[-1])
                while stream.filled < size:
                    _check_end(stream)
                    yield None
        connection.settle(stream)
        yield header, buffers


def _wait(stream: Stream, size: int) -> Generator[None, None, None]:
    """Until so many bytes are here."""
    while stream.buffered < size:
        _check_end(stream)
        stream.need = size
        yield None


def _check_end(stream: Stream) -> None:
    if stream.receive is Receive.FINISHED:
        raise BadMessage("the stream ended inside a message")
