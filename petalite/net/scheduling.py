"""Whose turn it is to send: strict between the classes, in turn within one, and nobody starved.

A turn is one DATA frame of at most 63 KiB, into which a stream's small segments are gathered, so turns are
about as fair in bytes as they are in number. Knows streams' outboxes and credit; knows no connection.
"""

from __future__ import annotations

from collections import deque

from petalite.net.frames import ALIGNED_BYTES, MAX_DATA_BYTES
from petalite.net.streams import Priority, Send, Stream

STARVED_BYTES = 15 * MAX_DATA_BYTES  # after so many from the classes above, a waiting class gets a turn


class Turns:
    """The streams that have something to send and credit for it, in a queue per class."""

    def __init__(self) -> None:
        self._ready: tuple[deque[Stream], ...] = tuple(deque() for _ in Priority)
        self._starved = [0] * len(Priority)

    @property
    def waiting(self) -> bool:
        return any(self._ready)

    def offer(self, stream: Stream) -> None:
        """Queue the stream if it can send and is not queued."""
        if stream.ready:
            return
        if stream.sent < stream.send_limit if stream.outbox else stream.send is Send.FINISHING:
            stream.ready = True
            self._ready[stream.priority].append(stream)

    def leave(self, stream: Stream) -> None:
        if stream.ready:
            self._ready[stream.priority].remove(stream)
            stream.ready = False

    def move(self, stream: Stream, priority: Priority) -> None:
        """Give the stream another class."""
        self.leave(stream)
        stream.priority = priority
        self.offer(stream)

    def next(self) -> Stream | None:
        """Whose turn it is: the highest class that waits, or one below it that waited for too long."""
        chosen: int | None = None
        for priority, queue in enumerate(self._ready):
            if not queue:
                continue
            if chosen is None:
                chosen = priority
                continue
            self._starved[priority] += min(MAX_DATA_BYTES, self._ready[chosen][0].queued)
            if self._starved[priority] > STARVED_BYTES:
                chosen = priority
                break
        if chosen is None:
            return None
        self._starved[chosen] = 0
        return self._ready[chosen][0]

    def took(self, stream: Stream) -> None:
        """The stream that `next` named has had its turn."""
        self._ready[stream.priority].popleft()
        stream.ready = False
        if stream.outbox:
            self.offer(stream)


def gather(outbox: deque[bytes | memoryview], room: int) -> tuple[list[bytes], int]:
    """Small segments from the front, or a small piece of a large one that has no more room than that."""
    pieces: list[bytes] = []
    size = 0
    while outbox and size < room:
        segment = outbox[0]
        if len(segment) > room - size:
            if size and len(segment) >= ALIGNED_BYTES:
                break  # it may find room for records of its own in its next turn
            segment = memoryview(segment)
            outbox[0] = segment[room - size :]
            segment = segment[: room - size]
        elif size and len(segment) >= ALIGNED_BYTES:
            break
        else:
            outbox.popleft()
        pieces.append(bytes(segment))
        size += len(segment)
    return pieces, size
