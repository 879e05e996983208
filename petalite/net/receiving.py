"""What one end of a connection receives: messages that wait for their readers, and the credit that comes of
reading them.

A stream's credit is given when its reader reads. The connection's is given when bytes are read, or while no
more than `allowance_bytes` of them wait: so a few readers who do not read stop their own senders and nobody
else's, and memory has a bound all the same. Knows frames' payloads and the receiving halves of streams; knows
nothing of what is sent.
"""

from __future__ import annotations

from collections.abc import Callable

from petalite.errors import FlowControlViolation, FrameTooLarge, RemoteProtocolError
from petalite.net.credit import Window, Windows
from petalite.net.frames import MAX_DATA_BYTES, MESSAGE_COST, U32, U64, FrameType, encode
from petalite.net.limits import Budget
from petalite.net.scheduling import ControlQueue
from petalite.net.states import FIN_STEP, READABLE, RECEIVING, SENT, Event, Step
from petalite.net.streams import Incoming, Stream

_ALLOWANCE_STEP_BYTES = 1024 * 1024


class Receiver:
    """`over` is called when a stream's other half had ended before; `control` takes the credit we give."""

    def __init__(
        self,
        ours: Windows,
        now: float,
        memory: Budget,
        control: ControlQueue,
        events: list[tuple[Event, Stream | None]],
        over: Callable[[Stream], None],
    ) -> None:
        self.now = now
        self.rtt_s = 0.1
        self.received = self.consumed = 0  # credit that was used, and what of it was read or thrown away
        self.memory = memory  # for what goes beyond the first windows
        self.block: Stream | None = None  # whose bytes the next record is
        self._block_bytes, self._block_ends = 0, False
        self._ours = ours
        self._allowance = 0  # unread bytes for which credit is still given
        self.window = Window(ours.connection_bytes, ours.max_connection_bytes, now, memory.reserve)
        self.first_window = self._stream_window(now)  # of every stream, until it is given more
        self._control, self._events, self._over = control, events, over

    # -- for readers -------------------------------------------------------------------------------

    def take(self, stream: Stream) -> Incoming | None:
        """The next message: its header, what has come of its body, and how long that is; see `expect`."""
        if not stream.inbox:
            return None
        incoming = stream.inbox.popleft()
        self._read(stream, incoming[3] + len(incoming[1]))
        return incoming

    def expect(self, stream: Stream, body: bytearray, target: memoryview) -> None:
        """Have what is missing of the message that was taken put straight into `target`, behind `body`.

        Credit for all of it is given at once: the caller has set its memory aside.
        """
        stream.filled = len(body)
        target[: stream.filled] = body
        stream.target = target
        self._read(stream, 0)

    def stop(self, stream: Stream, code: int) -> None:
        """Read no more: what waits and what still comes is dropped, and the peer is told."""
        if stream.receive is RECEIVING:
            stream.step_receive(Step.STOP)
            self._control.send(encode(FrameType.STOP_SENDING, stream.id, U32.pack(code)))
        self._drop_unread(stream)

    def give_back(self) -> None:
        """Stop allowing for unread bytes while there are none."""
        if self.received == self.consumed:
            self.memory.release(self._allowance)
            self._allowance = 0

    def end(self) -> None:
        """The lane is gone: release all memory, and take no more."""
        self._allowance = 0
        self.memory.close()

    # -- what comes --------------------------------------------------------------------------------

    def message(self, stream: Stream, head: bool, split: int, payload: memoryview, fin: bool) -> None:
        """A MESSAGE, whose header is `split` bytes, or a HEAD; `fin`: the stream's last frame."""
        length = len(payload)
        cost = length if length > MESSAGE_COST else MESSAGE_COST
        self._charge(stream, cost)
        if stream.due or split > length:
            raise RemoteProtocolError(f"a message in a message, or one cut off: {stream!r}")
        if head:
            (stream.due,) = U64.unpack_from(payload)
            incoming: Incoming = bytes(payload[8:]), bytearray(), stream.due, cost
        else:
            body = bytearray(payload[split:])
            incoming = bytes(payload[:split]), body, len(body), cost - len(body)
        if stream.receive is not RECEIVING:
            self._read(stream, cost)
        else:
            stream.inbox.append(incoming)
            if len(stream.inbox) == 1:
                self._events.append((READABLE, stream))
        if fin:
            self.fin(stream)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def announce_block(self, stream: Stream, size: int, fin: bool) -> None:
        """A BLOCK: the next record is so many bytes of the message."""
        if not 0 < size <= MAX_DATA_BYTES:
            raise FrameTooLarge(f"a BLOCK of {size} bytes; it has 1 to {MAX_DATA_BYTES}")
        self._charge(stream, size)
        stream.due -= size
        if stream.due < 0:
            raise RemoteProtocolError(f"{-stream.due} bytes that no message announced on {stream!r}")
        self.block, self._block_bytes, self._block_ends = stream, size, fin

    def target(self, size: int) -> memoryview | None:
        """Where to open the next record, of so many bytes: in its reader's memory; None: anywhere."""
        if self.block is None:
            return None
        if size != self._block_bytes:
            raise RemoteProtocolError(f"a record of {size} bytes behind a BLOCK of {self._block_bytes}")
        target, filled = self.block.target, self.block.filled
        return None if target is None else target[filled : filled + size]

    def block_received(self, plain: memoryview) -> None:
        """The record that was announced is open, in its target if there is one."""
        stream, self.block = self.block, None
        assert stream is not None
        size = len(plain)
        if stream.target is not None:
            stream.filled += size
            if stream.filled == len(stream.target):
                stream.target = None
                self._events.append((READABLE, stream))
            self._read(stream, size)
        elif stream.receive is not RECEIVING:
            self._read(stream, size)
        else:
            if stream.inbox:  # else its reader took the message unfinished, and has no use for the rest
                stream.inbox[-1][1].extend(plain)
            if self.received >= self.window.due_at:
                self._grant_connection()
        if self._block_ends:
            self.fin(stream)

    def reset(self, stream: Stream) -> None:
        """The peer gave up sending."""
        stream.step_receive(Step.RESET)
        self._drop_unread(stream)
        self._events.append((Event.RESET, stream))
        if stream.send >= SENT:
            self._over(stream)

    def fin(self, stream: Stream) -> None:
        """The stream ends here."""
        if stream.due:
            raise RemoteProtocolError(f"{stream!r} ends {stream.due} bytes before its message does")
        stream.step_receive(FIN_STEP)
        if not stream.inbox:
            self._events.append((READABLE, stream))
        if stream.send >= SENT:
            self._over(stream)

    def _drop_unread(self, stream: Stream) -> None:
        stream.inbox.clear()
        stream.target = None
        coming = self._block_bytes if self.block is stream else 0  # which is read when it is here
        self._read(stream, stream.received - stream.consumed - coming)

    # -- credit ------------------------------------------------------------------------------------

    def _charge(self, stream: Stream, cost: int) -> None:
        """Count what came while there was credit; the last frame may overdraw it."""
        if stream.received >= stream.window.limit:
            raise FlowControlViolation(f"{stream!r} went on beyond {stream.window.limit} bytes of credit")
        if self.received >= self.window.limit:
            raise FlowControlViolation(f"all streams went on beyond {self.window.limit} bytes of credit")
        stream.received += cost
        self.received += cost

    def _read(self, stream: Stream, cost: int) -> None:
        """Count so much as read: that is credit for the peer."""
        stream.consumed += cost
        self.consumed += cost
        if stream.receive is RECEIVING:
            read = stream.consumed
            if stream.target is not None:
                read += len(stream.target) - stream.filled
            if read >= stream.window.due_at:
                if stream.window is self.first_window:
                    stream.window = self._stream_window(stream.opened_at)
                limit = stream.window.grant(read, self.now, self.rtt_s)
                self._control.grant(FrameType.MAX_STREAM_DATA, stream.id, limit)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def _grant_connection(self) -> None:
        if self.received - self.consumed > self._allowance:
            more = min(_ALLOWANCE_STEP_BYTES, self._ours.allowance_bytes - self._allowance)
            if more and self.memory.reserve(more):
                self._allowance += more
        read = min(self.received, self.consumed + self._allowance)
        if read >= self.window.due_at:
            self._control.grant(FrameType.MAX_DATA, 0, self.window.grant(read, self.now, self.rtt_s))

    def _stream_window(self, now: float) -> Window:
        return Window(self._ours.stream_bytes, self._ours.max_stream_bytes, now)
