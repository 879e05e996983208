"""What messages are: a msgpack header and raw buffers.

    [0, body, sizes]                        a message
    [1, body, sizes, method, deadline_ms]   the first message of a call; deadline 0: none
    [2, body, sizes, code, text]            the call failed; sizes are empty

A header has less than 64 KiB, 64 buffers, 1,024 entries in a list or map and 16 levels; map keys are text and
occur once; numbers, text, bytes, booleans and null are all there is. Buffers lie one behind the other, each
from a multiple of 16 bytes on. Bytes in, bytes out: knows no method, no stream and no frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import msgpack

from petalite.errors import BadMessage, InvalidArgument
from petalite.net.frames import MAX_HEADER_BYTES

Buffer: TypeAlias = bytes | bytearray | memoryview | Any  # whatever supports the buffer protocol, contiguous
Header: TypeAlias = list[Any]

MAX_BUFFERS = 64
MAX_ENTRIES = 1024
MAX_DEPTH = 16
MAX_METHOD_LENGTH = 64
ALIGNMENT = 16  # of each buffer, from the first one's beginning
MAX_DEADLINE_MS = 2**31
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
_INTEGERS, _TEXT = frozenset((int,)), frozenset((str,))
# Its C buffer is reused, also behind an error; it is only used under the GIL, with no callbacks.
_packer = msgpack.Packer(autoreset=True)

MESSAGE, REQUEST, FAILURE = 0, 1, 2  # a header's first element


@dataclass(slots=True)  # not frozen: that is slower, and there is one for every message
class Message:
    """One RPC message. Buffers are sent from their own memory and received as writable memoryviews."""

    body: Mapping[str, Any] = field(default_factory=dict)  # msgpack's types, text keys
    buffers: Sequence[Buffer] = ()  # at most 64


def encode(header: Header, buffers: Sequence[Buffer]) -> tuple[bytes, Sequence[bytes | memoryview]]:
    """A message's header, packed, and what its buffers are sent as. `header` is complete but for its sizes,
    which are put at index 2."""
    views: list[memoryview] = list(map(_flat, buffers))
    header[2] = list(map(len, views))
    try:
        packed: bytes = _packer.pack(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"a message body cannot be written: {error}") from error
    if len(packed) > MAX_HEADER_BYTES or len(views) > MAX_BUFFERS:
        raise InvalidArgument(
            f"a message has at most {MAX_HEADER_BYTES} bytes of body, found {len(packed)}, and {MAX_BUFFERS} "
            f"buffers, found {len(views)}; put what is large into buffers"
        )
    return packed, _aligned(views) if len(views) > 1 else views


def _aligned(views: list[memoryview]) -> list[bytes | memoryview]:
    """With zeros between them, so that each begins where `split` looks for it."""
    segments: list[bytes | memoryview] = []
    for view in views[:-1]:
        segments += view, bytes(-len(view) % ALIGNMENT)
    return [*segments, views[-1]]


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.ndim == 1 and view.itemsize == 1 and view.contiguous:
        return view
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise InvalidArgument("a message's buffers must be contiguous")
    return view.cast("B")


def decode_header(data: bytes) -> Header:
    """A header whose shape is as stated above. Raises BadMessage."""
    try:
        header: Header = _unpack(data)
        kind, body, sizes = header[0], header[1], header[2]
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError, LookupError) as error:
        raise BadMessage(
            f"a message header is not [kind, body, sizes, …] in valid msgpack: {error}"
        ) from error
    if type(header) is not list or type(kind) is not int or type(body) is not dict or type(sizes) is not list:
        raise BadMessage("a message header begins with a number, a map and a list")
    if sizes and (len(sizes) > MAX_BUFFERS or not _INTEGERS.issuperset(map(type, sizes)) or min(sizes) < 0):
        raise BadMessage(f"a message has at most {MAX_BUFFERS} buffers, of whole sizes")
    _check_depth(body.values(), MAX_DEPTH)
    if kind == REQUEST:
        if tuple(map(type, header[3:5])) != (str, int):
            raise BadMessage("a request goes on with a method's name and a deadline in ms")
        if not 0 < len(header[3]) <= MAX_METHOD_LENGTH or not 0 <= header[4] <= MAX_DEADLINE_MS:
            raise BadMessage(
                f"a method has 1 to {MAX_METHOD_LENGTH} characters, a deadline less than 2^31 ms"
            )
    elif kind != MESSAGE and (kind != FAILURE or tuple(map(type, header[3:5])) != (int, str)):
        raise BadMessage(
            "a header is a message's, a request's, or a failure's, which goes on with a code and text"
        )
    return header


def _check_depth(items: Iterable[Any], depth: int) -> None:
    """Raises BadMessage for what is nested deeper."""
    if _SCALARS.issuperset(map(type, items)):
        return
    if not depth:
        raise BadMessage(f"a message body is nested more than {MAX_DEPTH} levels deep")
    for item in items:
        if type(item) is dict:
            _check_depth(item.values(), depth - 1)
        elif type(item) is list:
            _check_depth(item, depth - 1)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs) or not _TEXT.issuperset(map(type, result)):
        raise BadMessage("a map's keys are text, and occur once")
    return result


def _no_extension(code: int, _data: bytes) -> None:
    raise BadMessage(f"a message body holds an extension of type {code}, which is not a type of messages")


_unpack = partial(
    msgpack.unpackb,
    object_pairs_hook=_unique,
    max_array_len=MAX_ENTRIES,
    max_map_len=MAX_ENTRIES,
    max_ext_len=0,
    ext_hook=_no_extension,
)


def body_bytes(sizes: Sequence[int]) -> int:
    """How many bytes buffers of those sizes take, one behind the other."""
    end = 0
    for size in sizes:
        end += (-end % ALIGNMENT) + size
    return end


def split(sizes: Sequence[int], body: bytearray | memoryview) -> list[memoryview]:
    """The buffers that lie in `body`. Raises BadMessage where it is not of their size."""
    view, buffers, end = memoryview(body), [], 0
    for size in sizes:
        begin = end + (-end % ALIGNMENT)
        end = begin + size
        buffers.append(view[begin:end])
    if end != len(view):
        raise BadMessage(f"buffers of {end} bytes in a message that has {len(view)}")
    return buffers
