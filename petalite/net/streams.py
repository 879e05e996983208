"""One stream of a connection: two halves with their legal transitions, what waits to be read and to be sent.

Knows messages as a header and the bytes of its buffers; the connection knows frames, credit and turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeAlias

from petalite.errors import LocalProtocolError
from petalite.net.credit import Window
from petalite.net.frames import FrameType
from petalite.net.states import RECEIVE_STEPS, RECEIVING, SEND_STEPS, SENDING, Step

Segment: TypeAlias = bytes | memoryview
# A header, what has come of the body, how long that is to be, and the credit that the rest of it took.
Incoming: TypeAlias = tuple[bytes, bytearray, int, int]
# Type and aux as they stand in a frame, the payload and its length.
Outgoing: TypeAlias = tuple[int, Sequence[Segment], int]

EMPTY: Outgoing = (FrameType.MESSAGE << 24, (), 0)


class Priority(IntEnum):
    """Strict from first to last; whoever waits below still gets a sixteenth of the bytes."""

    CONTROL = 0
    INTERACTIVE = 1
    NORMAL = 2
    BULK = 3


PRIORITIES, BULK = tuple(Priority), Priority.BULK


class Stream:
    """State only; `Connection` acts on it. `owner` is whatever the layer above hangs on it."""

    # fmt: off
    __slots__ = (
        "consumed", "due", "filled", "highest", "id", "inbox", "opened_at", "opening", "outbox",
        "owner", "priority", "queued", "ready", "receive", "received", "reset_code", "send", "send_limit",
        "sent", "stop_code", "target", "wants_drained", "window",
    )
    # fmt: on

    def __init__(
        self, stream_id: int, priority: Priority, send_limit: int, window: Window, now: float = 0.0
    ) -> None:
        self.id = stream_id
        self.priority = priority
        self.highest = Priority.CONTROL  # the class above which it is not sent, whatever the peer asks for
        self.owner: Any = None

        self.send = SENDING
        self.opening = b""  # the frame that tells the peer of it, if we opened it
        self.outbox: deque[Outgoing] = deque()
        self.queued = self.sent = 0  # bytes in the outbox; credit that was used
        self.send_limit = send_limit  # the peer's credit: while `sent` is below it a frame may be sent
        self.ready = False  # whether it stands in a queue of the scheduler
        self.wants_drained = False  # whether to say so when the outbox is empty
        self.stop_code = self.reset_code = 0  # why the peer stopped reading, or gave up sending

        self.receive = RECEIVING
        self.inbox: deque[Incoming] = deque()  # messages that nobody has taken
        self.due = 0  # bytes of a body that are announced and have not come
        self.target: memoryview | None = None  # where the reader wants all of it
        self.filled = 0  # of the target
        self.received = self.consumed = 0  # credit that was used, and what of it was read or thrown away
        self.window = window  # our credit: `received` may pass its limit by less than a frame
        self.opened_at = now

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

    def next_frame(self, most: int) -> Outgoing:
        """Take the next frame, of at most so many bytes of buffers; if there is none, an empty one."""
        if not self.outbox:
            return EMPTY
        kind, segments, size = frame = self.outbox.popleft()
        if size <= most:
            return frame
        view = memoryview(segments[0])  # buffers' bytes: nothing else is so long
        self.outbox.appendleft((kind, (view[most:],), size - most))
        return kind, (view[:most],), most
