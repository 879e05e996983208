"""What goes out next: control frames before data, and whose turn it is among the streams.

Data is strict between the classes, in turn within one, and nobody is starved. A turn is frames of about 128
KiB, so turns are as fair in bytes as they are in number. Knows frames, outboxes and credit; knows no
connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from petalite.errors import Flood
from petalite.net import frames
from petalite.net.frames import HEADER_BYTES, MAX_DATA_BYTES, U64, FrameType
from petalite.net.records import MAX_PLAINTEXT_BYTES
from petalite.net.states import FINISHING
from petalite.net.streams import PRIORITIES, Segment, Stream

MAX_PONGS = 8  # unsent
MAX_PROVOKED = 1024  # unsent frames in front of one more that the peer makes us send
MAX_CONTROL = 2048  # frames in one record; they have 20 bytes, but for CLOSE and GOAWAY
STARVED_BYTES = 15 * MAX_DATA_BYTES  # after so many from the classes above, a waiting class gets a turn


class ControlQueue:
    """`waiting` is 0 when no frame waits, and never less than how many do."""

    __slots__ = ("_frames", "_grants", "_pongs", "waiting")

    def __init__(self) -> None:
        self._frames: list[Segment] = []
        self._grants: dict[tuple[FrameType, int], int] = {}  # only the newest limit of each kind and stream
        self._pongs = 0
        self.waiting = 0

    def send(self, frame: bytes) -> None:
        self._frames.append(frame)
        self.waiting += 1

    def recall(self, frame: bytes) -> bool:
        """Take the frame back, if it is the last one."""
        if not self._frames or self._frames[-1] is not frame:
            return False
        self._frames.pop()
        self.waiting -= 1
        return True

    def grant(self, kind: FrameType, stream: int, limit: int) -> None:
        """A new limit, in the place of one that has not gone out."""
        self._grants[kind, stream] = limit
        self.waiting += 1

    def answer(self, kind: FrameType, stream: int, payload: bytes) -> None:
        """What the peer makes us send. Raises Flood when it makes us send too much and reads none of it."""
        self._pongs += kind is FrameType.PONG
        if self._pongs > MAX_PONGS or len(self._frames) >= MAX_PROVOKED:
            raise Flood(f"{len(self._frames)} control frames wait to be read by the peer")
        self.send(frames.encode(kind, stream, payload))

    def take(self) -> list[Segment]:
        """The frames for the next record."""
        for (kind, stream), limit in self._grants.items():
            self.send(frames.encode(kind, stream, U64.pack(limit)))
        self._grants.clear()
        self._pongs = 0
        taken, self._frames = self._frames[:MAX_CONTROL], self._frames[MAX_CONTROL:]
        self.waiting = len(self._frames)
        return taken


class Turns:
    """The streams that have something to send and credit for it, in a queue per class."""

    def __init__(self) -> None:
        self._ready: tuple[deque[Stream], ...] = tuple(deque() for _ in PRIORITIES)
        self._starved = [0] * len(PRIORITIES)
        self.waiting = 0  # streams

    def offer(self, stream: Stream) -> None:
        """Queue the stream if it can send and is not queued."""
        if stream.ready:
            return
        if stream.sent < stream.send_limit if stream.outbox else stream.send is FINISHING:
            stream.ready = True
            self.waiting += 1
            self._ready[stream.priority].append(stream)

    def leave(self, stream: Stream) -> None:
        """No turn for this one until it is offered again."""
        if stream.ready:
            self._ready[stream.priority].remove(stream)
            self.waiting -= 1
            stream.ready = False

    def next(self) -> Stream:
        """Take out whose turn it is: of the highest class that waits, or of one that waited for too long."""
        ready = self._ready
        waiting = [priority for priority in PRIORITIES if ready[priority]]
        chosen = waiting[0]
        for priority in waiting[1:]:
            self._starved[priority] += min(MAX_DATA_BYTES, ready[waiting[0]][0].queued)
            if self._starved[priority] > STARVED_BYTES:
                chosen = priority
                break
        self._starved[chosen] = 0
        stream = ready[chosen].popleft()
        self.waiting -= 1
        stream.ready = False
        return stream


class Batch:
    """The plaintexts of the next records: frames that are copied together, and blocks that are not."""

    def __init__(self, control: list[Segment]) -> None:
        self._records: list[Segment] = []
        self._small, self._bytes = control, sum(map(len, control))  # of one record

    def add(self, header: bytes, segments: Sequence[Segment], size: int) -> None:
        """A frame."""
        if self._bytes + HEADER_BYTES + size > MAX_PLAINTEXT_BYTES:
            self._close_record()
        self._small += header, *segments
        self._bytes += HEADER_BYTES + size

    def add_block(self, header: bytes, block: Segment) -> None:
        """A BLOCK frame, which ends its record, and what it announces, which is the next."""
        self.add(header, (), len(header) - HEADER_BYTES)
        self._close_record()
        self._records.append(block)

    def _close_record(self) -> None:
        self._records.append(b"".join(self._small))
        self._small, self._bytes = [], 0

    def records(self) -> list[Segment]:
        """All of them."""
        if self._small:
            self._close_record()
        return self._records
