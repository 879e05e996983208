"""What one end of a connection sends: control frames first, then messages, by class, turn and credit.

Credit is an absolute offset per stream and one for the connection (RFC 9000 §4); a frame may be sent while
there is any left, whole. Knows frames and the sending halves of streams; knows nothing of what comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct

from petalite.errors import LocalProtocolError
from petalite.net import frames
from petalite.net.frames import BLOCK_BYTES, MAX_DATA_BYTES, MESSAGE_COST, U32, U64, FrameType, encode
from petalite.net.scheduling import Batch, ControlQueue, Turns
from petalite.net.states import FIN_STEP, FINISH, FINISHING, RECEIVED, SENDING, SENT, Event, Step
from petalite.net.streams import Priority, Segment, Stream

FLAGS_SHIFT = 16  # a frame's header with type, flags and aux as one number
HEADER = Struct(">III")
_FIN = frames.FIN << FLAGS_SHIFT
_MESSAGE, _HEAD, _BLOCK = (kind << 24 for kind in (FrameType.MESSAGE, FrameType.HEAD, FrameType.BLOCK))
_FRAME_OVERHEAD_BYTES = 64  # at most: its header, and that of the record which a BLOCK ends, and its own
_EXPRESS_CONTROL = 64  # control frames that fit into a record in front of a small message


class Sender:
    """`over` is called when a stream's other half had ended before."""

    def __init__(
        self, limit: int, events: list[tuple[Event, Stream | None]], over: Callable[[Stream], None]
    ) -> None:
        self.control = ControlQueue()
        self.sent = 0  # credit that was used
        self.limit = limit  # what the peer gave
        self.stalls = 0  # batches cut short because it gave no more
        self._turns = Turns()
        self._events, self._over = events, over

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return self.control.waiting > 0 or self._turns.waiting > 0

    def open(self, stream: Stream) -> None:
        """Tell the peer of a new stream: in its first message if that is written next, and is small."""
        stream.opening = encode(FrameType.MESSAGE, stream.id, flags=frames.opening(stream.priority))
        self.control.send(stream.opening)

    def write(
        self, stream: Stream, header: bytes, buffers: Sequence[Segment] = (), fin: bool = False
    ) -> None:
        """Queue a message, whose buffers the caller leaves alone until they are sent; `fin`: the last one."""
        if stream.send is not SENDING:
            raise LocalProtocolError(f"write on the sending half of {stream!r}")
        size = len(header) + sum(map(len, buffers))
        if size - len(header) < BLOCK_BYTES:
            stream.outbox.append((_MESSAGE | len(header), (header, *buffers), size))
        else:
            stream.outbox.append((_HEAD, (U64.pack(size - len(header)), header), U64.size + len(header)))
            stream.outbox.extend((_BLOCK, (buffer,), len(buffer)) for buffer in buffers if len(buffer))
            size += U64.size
        stream.queued += size
        if fin:
            stream.step_send(FINISH)
        self._turns.offer(stream)

    def express(self, stream: Stream, header: bytes, buffers: Sequence[Segment], fin: bool) -> bytes | None:
        """The record of a small message, if nothing else waits and it has credit; None: `write` it.

        What waits on this stream alone has no credit.
        """
        size, control = len(header) + sum(map(len, buffers)), self.control
        if (
            size >= BLOCK_BYTES
            or self._turns.waiting
            or stream.send is not SENDING
            or stream.sent >= stream.send_limit
            or self.sent >= self.limit
            or control.waiting > _EXPRESS_CONTROL
        ):
            return None
        cost = size if size > MESSAGE_COST else MESSAGE_COST
        stream.sent += cost
        self.sent += cost
        head = _MESSAGE | len(header)
        if control.waiting and control.recall(stream.opening):
            head |= frames.opening(stream.priority) << FLAGS_SHIFT
        if fin:
            head |= _FIN
            self._fin(stream)
        frame = HEADER.pack(head, stream.id, size), header, *buffers
        return b"".join((*control.take(), *frame) if control.waiting else frame)

    def finish(self, stream: Stream) -> None:
        """Say that no message follows."""
        stream.step_send(FINISH)
        self._turns.offer(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """Give up sending; what was queued is dropped. No effect once the last byte is sent."""
        if stream.send < SENT:
            self.control.send(encode(FrameType.RESET_STREAM, stream.id, U32.pack(code)))
            self._give_up(stream)

    def stopped(self, stream: Stream, code: int) -> None:
        """The peer made us give up sending: say so."""
        self.control.answer(FrameType.RESET_STREAM, stream.id, U32.pack(code))
        self._give_up(stream)

    def _give_up(self, stream: Stream) -> None:
        self._turns.leave(stream)
        stream.outbox.clear()
        stream.queued = 0
        stream.step_send(Step.RESET)
        if stream.receive >= RECEIVED:
            self._over(stream)

    def reclass(self, stream: Stream, priority: Priority) -> None:
        """Send it in that class from the next frame on."""
        self._turns.leave(stream)
        stream.priority = priority
        self._turns.offer(stream)

    def allow(self, stream: Stream, limit: int) -> None:
        """The peer gave a stream credit."""
        if limit > stream.send_limit:
            stream.send_limit = limit
            self._turns.offer(stream)

    def next_records(self, max_bytes: int) -> list[Segment]:
        """The plaintexts of the next records: all control frames, and messages up to about `max_bytes`.

        Chosen only now, so that nothing urgent stands behind what was chosen long ago.
        """
        turns, batch = self._turns, Batch(self.control.take())
        left = 0 if self.control.waiting else max_bytes
        while left > 0 and turns.waiting and self.sent < self.limit:
            stream, turn = turns.next(), MAX_DATA_BYTES
            while True:  # it was offered, so it has credit for the first
                kind, segments, size = stream.next_frame(MAX_DATA_BYTES)
                stream.queued -= size
                cost = size if kind == _BLOCK or not size else max(size, MESSAGE_COST)
                stream.sent += cost
                self.sent += cost
                turn -= size + _FRAME_OVERHEAD_BYTES
                last = not stream.outbox
                flags = _FIN if last and stream.send is FINISHING else 0
                if kind == _BLOCK:
                    batch.add_block(HEADER.pack(kind | flags, stream.id, 4) + U32.pack(size), segments[0])
                else:
                    batch.add(HEADER.pack(kind | flags, stream.id, size), segments, size)
                if last or turn <= 0 or stream.sent >= stream.send_limit or self.sent >= self.limit:
                    break
            left -= MAX_DATA_BYTES - turn
            if stream.outbox:
                turns.offer(stream)
            else:
                self._sent_all(stream)
        if turns.waiting and self.sent >= self.limit:
            self.stalls += 1
        return batch.records()

    def _sent_all(self, stream: Stream) -> None:
        if stream.wants_drained:
            stream.wants_drained = False
            self._events.append((Event.DRAINED, stream))
        if stream.send is FINISHING:
            self._fin(stream)

    def _fin(self, stream: Stream) -> None:
        stream.step_send(FIN_STEP)
        if stream.receive >= RECEIVED:
            self._over(stream)
