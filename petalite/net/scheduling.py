"""Whose turn it is to send: strict between the classes, in turn within one, and nobody starved.

A turn is one DATA frame of at most 63 KiB, into which a stream's small segments are gathered, so turns are
about as fair in bytes as they are in number. Knows streams' outboxes and credit; knows no connection.
"""

from __future__ import annotations

from collections import deque

from petalite.net.frames import ALIGNED_BYTES, MAX_DATA_BYTES
from petalite.net.states import Send
from petalite.net.streams import Priority, Stream

STARVED_BYTES = 15 * MAX_DATA_BYTES  # after so many from the classes above, a waiting class gets a turn


class Turns:
    """The streams that have something to send and credit for it, in a queue per class."""

    def __init__(self) -> None:
        self._ready: tuple[deque[Stream], ...] = tuple(deque() for _ in Priority)
        self._starved = [0] * len(Priority)
        self.waiting = 0  # streams

    def offer(self, stream: Stream) -> None:
        """Queue the stream if it can send and is not queued."""
        if stream.ready:
            return
        if stream.sent < stream.send_limit if stream.outbox else stream.send is Send.FINISHING:
            stream.ready = True
            self.waiting += 1
            self._ready[stream.priority].append(stream)

    def leave(self, stream: Stream) -> None:
        if stream.ready:
            self._ready[stream.priority].remove(stream)
            self.waiting -= 1
            stream.ready = False

    def move(self, stream: Stream, priority: Priority) -> None:
        """Give the stream another class."""
        self.leave(stream)
        stream.priority = priority
        self.offer(stream)

    def next(self) -> Stream:
        """Whose turn it is: the highest class that waits, or one below it that waited for too long."""
        ready, chosen = self._ready, 0
        while not ready[chosen]:
            chosen += 1
        if len(ready[chosen]) < self.waiting:
            above = chosen
            for priority in range(chosen + 1, len(ready)):
                if ready[priority]:
                    self._starved[priority] += min(MAX_DATA_BYTES, ready[above][0].queued)
                    if self._starved[priority] > STARVED_BYTES:
                        chosen = priority
                        break
            self._starved[chosen] = 0
        return ready[chosen][0]

    def took(self, stream: Stream) -> None:
        """The stream that `next` named has had its turn."""
        self._ready[stream.priority].popleft()
        self.waiting -= 1
        stream.ready = False
        if stream.outbox:
            self.offer(stream)


def gather(outbox: deque[bytes | memoryview], room: int) -> tuple[list[bytes | memoryview], int]:
    """Take the payload of the next frame: a large segment alone, or as many small ones as fit."""
    pieces: list[bytes | memoryview] = []
    size = 0
    while outbox and size < room:
        segment = outbox[0]
        length = len(segment)
        if size and length >= ALIGNED_BYTES:
            break  # it has records of its own
        if length > room - size:
            segment = memoryview(segment)
            outbox[0] = segment[room - size :]
            segment = segment[: room - size]
            length = room - size
        else:
            outbox.popleft()
        pieces.append(segment)
        size += length
        if length >= ALIGNED_BYTES:
            break
    return pieces, size
