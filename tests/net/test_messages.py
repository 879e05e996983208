"""Messages: round trips however the bytes are cut, and headers that lie, each with the limit it hits."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import BadMessage, InvalidArgument
from petalite.net import messages
from petalite.net.credit import Windows
from petalite.net.messages import body_bytes, decode_header, encode, split
from petalite.net.streams import Priority

from .pair import Pair, read_all

bodies = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False)
        | st.text(max_size=9)
        | st.binary(max_size=9),
        lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=3), child, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
buffer_lists = st.lists(st.integers(0, 20_000).map(lambda size: bytes([size % 256]) * size), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    sent=st.lists(st.tuples(bodies, buffer_lists), max_size=4),
    window=st.sampled_from([4096, 10_000, 1 << 20]),
    eager=st.booleans(),
)
def test_round_trip(sent: list[tuple[dict[str, Any], list[bytes]]], window: int, eager: bool) -> None:
    """Through two cores with windows smaller and larger than a message, read as it comes or at the end."""
    pair = Pair(*[Windows(window, 1 << 20, 4)] * 2)
    writer = pair.ends[0].core
    stream = writer.open_stream(Priority.NORMAL)
    pair.drive()
    theirs = pair.ends[1].core.streams[stream.id]
    for body, buffers in sent:
        writer.sender.write(stream, *encode([0, body, None], buffers))
    writer.sender.finish(stream)
    if not eager:
        pair.drive()
    for _ in range(1000):
        if len(received := read_all(pair.ends[1], theirs)) == len(sent):
            break
        pair.drive()
    found = []
    for packed, raw in received:
        header = decode_header(packed)
        buffers = split(header[2], bytearray(raw))
        assert all(not view.readonly for view in buffers)
        found.append((header[1], [bytes(view) for view in buffers]))
    assert found == [(body, list(buffers)) for body, buffers in sent]


def test_a_message_by_hand() -> None:
    """Spelled out from the msgpack specification: a request with buffers of two bytes and of one."""
    header, segments = encode([1, {"n": 7}, None, "echo", 250], [b"hi", b"!"])
    assert header == bytes.fromhex("950181a16e07920201a46563686fccfa")
    assert b"".join(segments) == b"hi" + bytes(14) + b"!"


@pytest.mark.parametrize("sizes", [[0], [1], [16], [0, 1, 15, 16, 17, 0]])
def test_buffers_are_found_where_they_were_put(sizes: list[int]) -> None:
    """Each from a multiple of 16 on."""
    buffers = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    body = bytearray(b"".join(encode([0, {}, None], buffers)[1]))
    assert len(body) == body_bytes(sizes)
    found = split(sizes, body)
    assert [bytes(view) for view in found] == buffers


@pytest.mark.parametrize(("sizes", "size"), [([], 1), ([3], 2), ([3], 4), ([1, 1], 2), ([2**60], 5)])
def test_sizes_that_lie(sizes: list[int], size: int) -> None:
    with pytest.raises(BadMessage, match="buffers of"):
        split(sizes, bytearray(size))


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="never used byte"),
        pytest.param(msgpack.packb([0, {}, []]) + b"\0", id="trailing byte"),
        pytest.param(msgpack.packb([0, {}, []])[:-1], id="cut"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="array32 claiming 2^32-1"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map32 claiming 2^32-1"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="str32 claiming 2^32-1"),
        pytest.param(b"\x91" * 65000 + b"\xc0", id="depth bomb"),
        pytest.param(msgpack.packb([0, {"a": [0] * 1025}, []]), id="too many entries"),
        pytest.param(msgpack.packb({}), id="no list"),
        pytest.param(msgpack.packb([0, {}]), id="too short"),
        pytest.param(msgpack.packb([3, {}, []]), id="unknown kind"),
        pytest.param(msgpack.packb([True, {}, []]), id="kind is a bool"),
        pytest.param(msgpack.packb(["0", {}, []]), id="kind is text"),
        pytest.param(msgpack.packb([0, [], []]), id="body is no map"),
        pytest.param(msgpack.packb([0, {}, {}]), id="sizes are no list"),
        pytest.param(msgpack.packb([0, {}, [0] * 65]), id="too many buffers"),
        pytest.param(msgpack.packb([0, {}, [-1]]), id="negative size"),
        pytest.param(msgpack.packb([0, {}, [1.0]]), id="size is a float"),
        pytest.param(msgpack.packb([0, {}, [True]]), id="size is a bool"),
        pytest.param(b"\x93\x00\x82\xa1a\x01\xa1a\x02\x90", id="duplicate key"),
        pytest.param(b"\x93\x00\x81\x01\x02\x90", id="key is a number"),
        pytest.param(b"\x93\x00\x81\xc4\x01a\x02\x90", id="key is bytes"),
        pytest.param(b"\x93\x00\x81\xa1\xff\x02\x90", id="key is not UTF-8"),
        pytest.param(b"\x93\x00\x81\xa1a\xa1\xff\x90", id="text is not UTF-8"),
        pytest.param(b"\x93\x00\x81\xa1a\xd4\x05x\x90", id="ext type"),
        pytest.param(b"\x93\x00\x81\xa1a\xd6\xff\0\0\0\0\x90", id="timestamp"),
        pytest.param(msgpack.packb([1, {}, []]), id="request without method"),
        pytest.param(msgpack.packb([1, {}, [], "", 0]), id="empty method"),
        pytest.param(msgpack.packb([1, {}, [], "m" * 10_000, 0]), id="method of 10,000 characters"),
        pytest.param(msgpack.packb([1, {}, [], b"m", 0]), id="method is bytes"),
        pytest.param(msgpack.packb([1, {}, [], "m", -1]), id="negative deadline"),
        pytest.param(msgpack.packb([1, {}, [], "m", float("nan")]), id="deadline is NaN"),
        pytest.param(msgpack.packb([1, {}, [], "m", float("inf")]), id="deadline is infinite"),
        pytest.param(msgpack.packb([1, {}, [], "m", 2**40]), id="deadline beyond the calendar"),
        pytest.param(msgpack.packb([2, {}, [], "x", "text"]), id="failure without a code"),
    ],
)
def test_headers_that_lie(header: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_header(header)


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"a": value}


def test_nesting_has_a_limit() -> None:
    decode_header(msgpack.packb([0, nested(messages.MAX_DEPTH), []]))
    with pytest.raises(BadMessage, match="levels"):
        decode_header(msgpack.packb([0, nested(messages.MAX_DEPTH + 1), []]))


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\x90" * 65000, id="65,000 empty lists"),
        pytest.param(b"\xdc\x04\x00" * 21000, id="lists of 1,024 inside each other"),
        pytest.param(b"\xdc\xff\xff" * 21000, id="lists of 65,535 inside each other"),
        pytest.param(b"\x93\x00\x81\xa1a\xdc\x04\x00" + b"\xdc\x04\x00" * 20 + b"\x80" * 60000, id="maps"),
    ],
)
def test_a_header_bomb_takes_little_memory(bomb: bytes) -> None:
    """The bound: ten megabytes for the largest header there is, and all of it freed."""
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            decode_header(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_bad(data: bytes) -> None:
    try:
        header = decode_header(data)
    except BadMessage:
        return
    assert header[0] in (0, 1, 2)


@given(st.binary(max_size=60), st.integers(0, 3), st.integers(0, 255))
def test_any_damage_to_a_header_is_a_header_or_bad(data: bytes, position: int, value: int) -> None:
    packed = bytearray(msgpack.packb([1, {"a": data, "b": [1, 2.5, None]}, [5, 6], "method", 1000]))
    for index in range(position, len(packed), 7):
        packed[index] = value
        try:
            header = decode_header(packed)
        except BadMessage:
            continue
        assert header[0] in (0, 1, 2) and type(header[1]) is dict and type(header[2]) is list


@pytest.mark.parametrize(
    ("body", "buffers"),
    [
        ({"a": object()}, []),
        ({"a": 2**64}, []),
        ({"a": "x" * 70_000}, []),
        ({}, [b""] * 65),
        ({}, [memoryview(bytearray(8))[::2]]),
    ],
)
def test_what_cannot_travel_is_our_own_mistake(body: Any, buffers: list[Any]) -> None:
    with pytest.raises(InvalidArgument):
        encode([0, body, None], buffers)
    assert encode([0, {"after": 1}, None], [])[0] == msgpack.packb([0, {"after": 1}, []])


def test_buffers_of_any_shape_travel_as_bytes() -> None:
    grid = memoryview(bytearray(range(24))).cast("B", (2, 3, 4))
    floats = memoryview(bytearray(16)).cast("f")
    segments = encode([0, {}, None], [grid, floats])[1]
    assert [len(segment) for segment in segments] == [24, 8, 16]
    assert isinstance(segments[0], memoryview)
    assert segments[0].obj is grid.obj
