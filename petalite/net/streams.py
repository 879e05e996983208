"""One stream of a connection: two halves with their legal transitions, what waits to be read and to be sent.

Knows bytes and offsets of its own stream; the connection knows frames, credit and turns. The tables below are
the whole truth about a stream's life (after RFC 9000 §3); a step that is not in them raises.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Any

from petalite.errors import LocalProtocolError
from petalite.net.credit import Window
from petalite.net.states import RECEIVE_STEPS, RECEIVED, SEND_STEPS, SENT, Receive, Send, Step

SMALL_CHUNK_BYTES = (
    4096  # received pieces below this are gathered, so that one-byte frames cost no more than bytes
)


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
        "announced", "buffered", "chunks", "consumed", "filled", "highest", "id", "need", "outbox", "owner",
        "priority", "queued", "ready", "receive", "received", "reset_code", "send", "send_limit", "sent",
        "stop_code", "target", "wants_drained", "window",
    )
    # fmt: on

    def __init__(self, stream_id: int, priority: Priority, send_limit: int, window: Window) -> None:
        self.id = stream_id
        self.priority = priority
        self.highest = Priority.CONTROL  # the class above which it is not sent, whatever the peer asks for
        self.owner: Any = None

        self.send = Send.OPEN
        self.outbox: deque[bytes | memoryview] = deque()
        self.queued = 0  # bytes in the outbox
        self.sent = 0
        self.send_limit = send_limit  # the peer's credit: `sent` may reach this
        self.ready = False  # whether it stands in a queue of the scheduler
        self.wants_drained = False  # whether to say so when the outbox is empty
        self.stop_code = 0  # why the peer stopped reading

        self.receive = Receive.OPEN
        self.chunks: deque[bytearray] = deque()
        self.buffered = 0  # bytes in the chunks
        self.need = 1  # how many buffered bytes are worth an event
        self.target: memoryview | None = None  # where the reader wants the next bytes
        self.filled = 0  # of the target
        self.received = 0
        self.consumed = 0  # read by the application, or thrown away
        self.window = window  # our credit: `received` may reach its limit
        self.reset_code = 0  # why the peer gave up sending
        self.announced = False  # whether an unhandled event says that there is something to read

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

    @property
    def over(self) -> bool:
        """Whether nothing can come or go any more."""
        return self.send >= SENT and self.receive >= RECEIVED and not self.buffered

    def append(self, data: memoryview) -> None:
        """Keep a copy of what came until it is read."""
        chunks = self.chunks
        if chunks and len(chunks[-1]) < SMALL_CHUNK_BYTES:
            chunks[-1] += data
        else:
            chunks.append(bytearray(data))
        self.buffered += len(data)

    def take(self, size: int) -> bytearray:
        """Remove the next `size` bytes, which are there. A chunk of just that size is not copied."""
        assert size <= self.buffered
        if size and len(self.chunks[0]) == size:
            self.buffered -= size
            return self.chunks.popleft()
        taken = bytearray(size)
        self.take_into(memoryview(taken))
        return taken

    def peek(self, size: int) -> bytearray:
        """The next few bytes, which are there, left where they are."""
        peeked = self.chunks[0][:size]
        if len(peeked) == size:
            return peeked
        peeked.clear()
        for chunk in self.chunks:
            peeked += chunk[: size - len(peeked)]
            if len(peeked) == size:
                break
        return peeked

    def take_into(self, target: memoryview) -> int:
        """Move what is buffered into the front of `target`; how many bytes that was."""
        position, end, chunks = 0, min(len(target), self.buffered), self.chunks
        while position < end:
            head = chunks[0]
            size = min(len(head), end - position)
            target[position : position + size] = memoryview(head)[:size]
            position += size
            if size == len(head):
                chunks.popleft()
            else:
                del head[:size]
        self.buffered -= end
        return end

    def drop_unread(self) -> int:
        """Throw away what is buffered and the target; how many bytes were never consumed."""
        unread = self.buffered
        self.chunks.clear()
        self.buffered = 0
        self.target = None
        return unread

    def give_up_sending(self) -> None:
        """What was not sent never will be."""
        self.outbox.clear()
        self.queued = 0
        self.step_send(Step.RESET)
