"""What a peer may not do to the connection core: every illegal frame, and how much it may make us keep."""

from __future__ import annotations

import pytest

from petalite.errors import (
    Flood,
    FlowControlViolation,
    FrameTooLarge,
    RemoteProtocolError,
    StreamLimitExceeded,
)
from petalite.net import frames
from petalite.net.credit import Windows
from petalite.net.frames import FIN, MAX_DATA_BYTES, U32, U64, FrameType
from petalite.net.scheduling import MAX_PONGS

from .pair import End, open_pair

SMALL = Windows(8192, 20_000, 4, 16_384, 40_000, 10_000)


def message(stream: int, length: int, fin: bool = False) -> bytes:
    """One byte of header, the rest buffers."""
    return frames.encode(FrameType.MESSAGE, stream, bytes(length), FIN if fin else 0, min(length, 1))


def head(stream: int, size: int) -> bytes:
    return frames.encode(FrameType.HEAD, stream, U64.pack(size) + b"head")


def block(stream: int, length: int, fin: bool = False) -> bytes:
    return frames.encode(FrameType.BLOCK, stream, U32.pack(length), FIN if fin else 0)


OPEN_1 = frames.encode(FrameType.MESSAGE, 1, flags=frames.opening(2))


@pytest.mark.parametrize(
    ("record", "error"),
    [
        pytest.param(b"", RemoteProtocolError, id="empty record"),
        pytest.param(b"\0" * 11, RemoteProtocolError, id="half a header"),
        pytest.param(
            frames.encode(FrameType.PING, payload=bytes(8))[:-1], RemoteProtocolError, id="half a frame"
        ),
        pytest.param(bytes([0x20]) + bytes(11), RemoteProtocolError, id="unknown critical type"),
        pytest.param(message(1, 1), RemoteProtocolError, id="MESSAGE on a stream never opened"),
        pytest.param(message(2, 1), RemoteProtocolError, id="MESSAGE on a stream of ours never opened"),
        pytest.param(OPEN_1 + OPEN_1, RemoteProtocolError, id="OPEN twice"),
        pytest.param(
            frames.encode(FrameType.MESSAGE, 3, flags=frames.opening(2)),
            RemoteProtocolError,
            id="OPEN out of order",
        ),
        pytest.param(
            frames.encode(FrameType.MESSAGE, 2, flags=frames.opening(2)),
            RemoteProtocolError,
            id="OPEN of our parity",
        ),
        pytest.param(
            frames.encode(FrameType.MESSAGE, 1, flags=frames.opening(4)),
            RemoteProtocolError,
            id="OPEN of no class",
        ),
        pytest.param(
            OPEN_1 + message(1, 1, fin=True) + message(1, 1), RemoteProtocolError, id="MESSAGE after FIN"
        ),
        pytest.param(OPEN_1 + message(1, 0), RemoteProtocolError, id="an empty MESSAGE"),
        pytest.param(
            OPEN_1 + frames.encode(FrameType.MESSAGE, 1, b"x", aux=2),
            RemoteProtocolError,
            id="a header cut off",
        ),
        pytest.param(
            OPEN_1 + frames.encode(FrameType.MESSAGE, 1, flags=FIN, aux=1),
            RemoteProtocolError,
            id="a header cut off to nothing",
        ),
        pytest.param(OPEN_1 + head(1, 9) + message(1, 1), RemoteProtocolError, id="MESSAGE in a message"),
        pytest.param(OPEN_1 + head(1, 9) + head(1, 9), RemoteProtocolError, id="HEAD in a message"),
        pytest.param(
            OPEN_1 + head(1, 9) + message(1, 0, fin=True), RemoteProtocolError, id="FIN in a message"
        ),
        pytest.param(OPEN_1 + head(1, 9) + block(1, 10), RemoteProtocolError, id="more than HEAD announced"),
        pytest.param(OPEN_1 + block(1, 1), RemoteProtocolError, id="BLOCK without HEAD"),
        pytest.param(
            OPEN_1 + message(1, 1, fin=True) + frames.encode(FrameType.RESET_STREAM, 1, U32.pack(7)),
            RemoteProtocolError,
            id="RESET after FIN",
        ),
        pytest.param(
            OPEN_1 + frames.encode(FrameType.RESET_STREAM, 1, U32.pack(7)) * 2,
            RemoteProtocolError,
            id="RESET twice",
        ),
        pytest.param(
            frames.encode(FrameType.RESET_STREAM, 1, U32.pack(7)),
            RemoteProtocolError,
            id="RESET never opened",
        ),
        pytest.param(
            frames.encode(FrameType.STOP_SENDING, 2, U32.pack(7)), RemoteProtocolError, id="STOP never opened"
        ),
        pytest.param(
            frames.encode(FrameType.MAX_STREAM_DATA, 4, U64.pack(7)),
            RemoteProtocolError,
            id="credit never opened",
        ),
        pytest.param(frames.encode(FrameType.PRIORITY, 2, aux=0), RemoteProtocolError, id="PRIORITY of ours"),
        pytest.param(
            frames.HEADER.pack(0, 0, 0, 1, MAX_DATA_BYTES + 1),
            FrameTooLarge,
            id="frame too long, before its stream",
        ),
        pytest.param(
            OPEN_1 + message(1, MAX_DATA_BYTES + 1), FrameTooLarge, id="frame too long, in its record"
        ),
        pytest.param(
            OPEN_1 + message(1, 8192) + message(1, 1), FlowControlViolation, id="a message past the credit"
        ),
        pytest.param(OPEN_1 + message(1, 1) * 33, FlowControlViolation, id="small messages past the credit"),
        pytest.param(
            b"".join(
                frames.encode(FrameType.MESSAGE, 2 * index + 1, flags=frames.opening(0)) for index in range(5)
            ),
            StreamLimitExceeded,
            id="one stream too many",
        ),
        pytest.param(
            frames.encode(FrameType.PING, payload=bytes(8)) * (MAX_PONGS + 1), Flood, id="ping flood"
        ),
        pytest.param(message(1, 1)[:-1], RemoteProtocolError, id="half a MESSAGE"),
        pytest.param(block(1, 1), RemoteProtocolError, id="BLOCK on a stream never opened"),
        pytest.param(OPEN_1 + block(1, 0), FrameTooLarge, id="BLOCK of nothing"),
        pytest.param(OPEN_1 + block(1, MAX_DATA_BYTES + 1), FrameTooLarge, id="BLOCK too long"),
        pytest.param(OPEN_1 + message(1, 8192) + head(1, 9), FlowControlViolation, id="HEAD past the credit"),
        pytest.param(
            OPEN_1 + head(1, 5) + block(1, 5) + message(1, 1), RemoteProtocolError, id="a frame behind BLOCK"
        ),
    ],
)
def test_illegal_records(record: bytes, error: type[RemoteProtocolError]) -> None:
    """Each ends in its own error, whole and in whatever it was split from; nothing is left half done."""
    end = End(False, SMALL, SMALL)
    with pytest.raises(error) as raised:
        end.take(record)
    assert type(raised.value) is error
    end.core.close(error.code, "refused")
    assert len(b"".join(bytes(record) for record in end.core.sender.next_records(1 << 20))) < 1000


@pytest.mark.parametrize("size", [4999, 5001])
def test_a_record_that_is_not_what_its_block_announced(size: int) -> None:
    end = End(False, SMALL, SMALL)
    end.take(OPEN_1 + head(1, 5000) + block(1, 5000))
    with pytest.raises(RemoteProtocolError, match="BLOCK of 5000"):
        end.take(bytes(size))


def test_a_stream_that_ends_inside_a_message() -> None:
    end = End(False, SMALL, SMALL)
    end.take(OPEN_1 + head(1, 5000) + block(1, 4999, fin=True))
    with pytest.raises(RemoteProtocolError, match="1 bytes before"):
        end.take(bytes(4999))


def test_a_block_past_the_credit() -> None:
    end = End(False, SMALL, SMALL)
    end.take(OPEN_1 + head(1, 9000) + block(1, 8000))
    end.take(bytes(8000))
    with pytest.raises(FlowControlViolation):
        end.take(block(1, 1))


def test_what_comes_for_a_reader_that_left_is_dropped() -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + head(1, 5000))
    stream = end.core.streams[1]
    end.core.receiver.stop(stream, 7)
    end.take(block(1, 5000))
    end.take(bytes(5000))
    end.take(message(1, 600) + head(1, 5000) + block(1, 5000, fin=True))
    end.take(bytes(5000))
    assert not stream.inbox
    assert stream.consumed == stream.received == 2 * 256 + 600 + 10_000


def test_the_connections_credit_holds_for_all_streams_together() -> None:
    windows = Windows(8192, 10_000, 4, 8192, 10_000, 0)
    end = End(False, windows, windows)
    end.take(
        OPEN_1
        + frames.encode(FrameType.MESSAGE, 3, flags=frames.opening(0))
        + message(1, 8192)
        + message(3, 10_000 - 8192)
    )
    with pytest.raises(FlowControlViolation, match="all streams"):
        end.take(message(3, 1))


def test_credit_never_shrinks_and_repeats_are_harmless() -> None:
    pair, ours, _ = open_pair(SMALL)
    core = pair.ends[0].core
    for limit in (2**64 - 1, 5, 0):
        core.receive(memoryview(frames.encode(FrameType.MAX_STREAM_DATA, ours.id, U64.pack(limit))), 0.0)
        core.receive(memoryview(frames.encode(FrameType.MAX_DATA, payload=U64.pack(limit))), 0.0)
    assert ours.send_limit == core.sender.limit == 2**64 - 1


def test_a_peer_that_provokes_answers_and_reads_none_is_a_flood() -> None:
    """rust-yamux CVE-2024-32984: an unbounded queue of control frames."""
    windows = Windows(streams=65536)
    end = End(False, windows, windows)
    with pytest.raises(Flood):
        for index in range(5000):
            stream = 2 * index + 1
            end.take(
                frames.encode(FrameType.MESSAGE, stream, flags=frames.opening(0))
                + frames.encode(FrameType.STOP_SENDING, stream, U32.pack(7))
            )


def test_one_byte_blocks_cost_no_more_than_their_bytes() -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + head(1, 1 << 40))
    for _ in range(20_000):
        end.take(block(1, 1))
        end.take(b"x")
    stream = end.core.streams[1]
    assert stream.inbox[0][1] == b"x" * 20_000
    assert len(stream.inbox) == 1


def test_a_huge_first_frame_on_a_new_stream_is_refused_before_anything_is_kept() -> None:
    """rust-yamux CVE-2026-32314: an oversized frame that opens a stream."""
    end = End(False, SMALL, SMALL)
    with pytest.raises(FrameTooLarge):
        end.take(OPEN_1 + head(1, 1 << 40) + block(1, MAX_DATA_BYTES + 1))
    assert not end.core.streams[1].inbox[0][1]
    assert end.core.receiver.block is None


def test_frames_for_streams_that_are_over_are_ignored_where_they_may_cross() -> None:
    pair, ours, theirs = open_pair()
    pair.ends[0].core.sender.finish(ours)
    pair.ends[1].core.sender.finish(theirs)
    pair.drive()
    assert not pair.ends[1].core.streams
    for frame in (
        frames.encode(FrameType.STOP_SENDING, 1, U32.pack(7)),
        frames.encode(FrameType.MAX_STREAM_DATA, 1, U64.pack(7)),
        frames.encode(FrameType.PRIORITY, 1),
    ):
        pair.ends[1].take(frame)
    with pytest.raises(RemoteProtocolError):
        pair.ends[1].take(message(1, 1))


def test_ignorable_types_are_skipped() -> None:
    end = End(False, SMALL, SMALL)
    end.take(
        frames.HEADER.pack(0x7F, 9, 9, 9, 5) + b"grease"[:5] + frames.encode(FrameType.PAD, payload=bytes(50))
    )
    assert not end.events
