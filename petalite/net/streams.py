"""One stream of a connection: two halves with their legal transitions, what waits to be read and to be sent.

Knows bytes and offsets of its own stream; the connection knows frames, credit and turns.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Any

from petalite.errors import LocalProtocolError
from petalite.net.credit import Window
from petalite.net.states import RECEIVE_STEPS, SEND_STEPS, Receive, Send, Step

SMALL_CHUNK_BYTES = 4096  # received pieces below this are gathered: one-byte frames cost no more than bytes
NEVER = 1 << 62  # more bytes than any stream has


class Priority(IntEnum):
    """Strict from first to last; whoever waits below still gets a sixteenth of the bytes."""

    CONTROL = 0
    INTERACTIVE = 1
    NORMAL = 2
    BULK = 3


class Stream:
    """State only; `Connection` acts on it. `owner` is whatever the layer above hangs on it."""

    # fmt: off
    __slots__ = (
        "buffered", "chunks", "consumed", "ended", "filled", "highest", "id", "need", "outbox", "owner",
        "priority", "queued", "ready", "receive", "received", "reset_code", "send", "send_limit", "sent",
        "skip", "stop_code", "taken", "target", "wants_drained", "window",
    )
    # fmt: on

    def __init__(self, stream_id: int, priority: Priority, send_limit: int, window: Window) -> None:
        self.id = stream_id
        self.priority = priority
        self.highest = Priority.CONTROL  # the class above which it is not sent, whatever the peer asks for
        self.owner: Any = None
        self.ended = False  # nothing can come or go any more; some of it may still be unread

        self.send = Send.OPEN
        self.outbox: deque[bytes | memoryview] = deque()
        self.queued = self.sent = 0  # bytes in the outbox; bytes that went out
        self.send_limit = send_limit  # the peer's credit: `sent` may reach this
        self.ready = False  # whether it stands in a queue of the scheduler
        self.wants_drained = False  # whether to say so when the outbox is empty
        self.stop_code = self.reset_code = 0  # why the peer stopped reading, or gave up sending

        self.receive = Receive.OPEN
        self.chunks: deque[bytearray] = deque()
        self.skip = 0  # bytes of the first chunk that are taken
        self.buffered = self.taken = 0  # bytes in the chunks; bytes taken of which the connection knows not
        self.need = 1  # how many buffered bytes are worth an event
        self.target: memoryview | None = None  # where the reader wants the next bytes
        self.filled = 0  # of the target
        self.received = self.consumed = 0  # bytes that came; of them read, or thrown away
        self.window = window  # our credit: `received` may reach its limit

    def __repr__(self) -> str:
        return f"<Stream {self.id} send={self.send.name} receive={self.receive.name}>"

    def step_send(self, step: Step) -> None:
        after = SEND_STEPS.get((self.send, step))
        if after is None:
            raise LocalProtocolError(f"{step.name} on the sending half of {self!r}")
        self.send = after

    def step_receive(self, step: Step) -> None:
        after = RECEIVE_STEPS.get((self.receive, step))
        if after is None:
            raise LocalProtocolError(f"{step.name} on the receiving half of {self!r}")
        self.receive = after

    @property
    def missing(self) -> int:
        """How many bytes of the target are still to come."""
        return len(self.target) - self.filled if self.target is not None else 0

    def append(self, data: memoryview | bytearray) -> None:
        """Keep what came until it is read; a view is copied."""
        chunks = self.chunks
        self.buffered += len(data)
        if chunks and len(chunks[-1]) < SMALL_CHUNK_BYTES:
            try:
                chunks[-1] += data
                return
            except BufferError:  # a part of it is in its reader's hands
                pass
        chunks.append(data if type(data) is bytearray else bytearray(data))

    def front(self, size: int) -> memoryview:
        """The first chunk's rest, which has `size` bytes at least, left where it is: they are buffered."""
        chunks = self.chunks
        while len(chunks[0]) - self.skip < size:
            chunks[0] = chunks.popleft()[self.skip :] + chunks[0]
            self.skip = 0
        return memoryview(chunks[0])[self.skip :] if self.skip else memoryview(chunks[0])

    def drop(self, size: int) -> None:
        """Remove so many bytes of the first chunk."""
        self.buffered -= size
        self.taken += size
        self.skip += size
        if self.skip == len(self.chunks[0]):
            self.chunks.popleft()
            self.skip = 0

    def take(self, size: int) -> memoryview:
        """Remove the next `size` bytes, which are there; not copied where they lie in one piece."""
        if size and len(self.chunks[0]) - self.skip >= size:
            taken = self.front(size)[:size]
            self.drop(size)
        else:
            taken = memoryview(bytearray(size))
            self.take_into(taken)
        return taken

    def take_into(self, target: memoryview) -> int:
        """Move what is buffered into the front of `target`; how many bytes that was."""
        position, end = 0, min(len(target), self.buffered)
        while position < end:
            piece = self.take(min(len(self.chunks[0]) - self.skip, end - position))
            target[position : position + len(piece)] = piece
            position += len(piece)
        return end

    def drop_unread(self) -> None:
        """Throw away what is buffered and the target."""
        self.taken += self.buffered
        self.chunks.clear()
        self.buffered = self.skip = 0
        self.target = None

    def give_up_sending(self) -> None:
        """What was not sent never will be."""
        self.outbox.clear()
        self.queued = 0
        self.step_send(Step.RESET)
