"""A connection's core: streams of messages over one ordered, secret pipe, with credit, turns and an end.

Sans I/O: takes the plaintext of records and the time, gives events and the plaintext of the next records. It
opens no socket, reads no clock and starts no task, and knows nothing of keys or of what the messages say.

Credit is an absolute offset per stream and one for the connection (RFC 9000 §4); a frame may be sent while
there is any left, whole. A stream's is given when its reader reads. The connection's is given when bytes are
read, or while no more than `allowance_bytes` of them wait: so a few readers who do not read stop their own
senders and nobody else's, and memory has a bound all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from types import MappingProxyType

from petalite.errors import (
    ErrorCode,
    Flood,
    FlowControlViolation,
    FrameTooLarge,
    LocalProtocolError,
    RemoteProtocolError,
    StreamLimitExceeded,
)
from petalite.net import frames
from petalite.net.credit import Window, Windows
from petalite.net.frames import (
    BLOCK_BYTES,
    FIN,
    HEADER_BYTES,
    MAX_DATA_BYTES,
    MESSAGE_COST,
    U32,
    U64,
    FrameType,
)
from petalite.net.limits import TokenBucket
from petalite.net.scheduling import Batch, ControlQueue, Turns
from petalite.net.states import (
    CLOSED,
    FIN_STEP,
    FINISH,
    FINISHING,
    OPENED,
    READABLE,
    RECEIVED,
    RECEIVING,
    SENDING,
    SENT,
    STATE_STEPS,
    TAKING,
    Event,
    State,
    Step,
)
from petalite.net.streams import PRIORITIES, Incoming, Priority, Segment, Stream

# A frame's header with type, flags and aux as one number, in which a MESSAGE has nothing but FIN and aux.
_HEADER, _FIN, _NOT_MESSAGE = Struct(">III"), FIN << 16, ~(FIN << 16 | 0xFFFF)
_OPEN, _MESSAGE, _HEAD, _BLOCK = (
    kind << 24 for kind in (FrameType.OPEN, FrameType.MESSAGE, FrameType.HEAD, FrameType.BLOCK)
)

MAX_OPENED = 0x7FFF_FFFF  # that one end opens in a connection's life: ids have 32 bits
_FRAME_OVERHEAD_BYTES = 64  # at most: its header, and that of the record which a BLOCK ends, and its own
_EXPRESS_CONTROL = 64  # control frames that fit into a record in front of a small message
_ALLOWANCE_STEP_BYTES = 1024 * 1024
_GIVEN_UP_PER_S, _GIVEN_UP_BURST = 200.0, 1000.0  # streams that the peer opens and gives up unanswered


class Connection:
    """One end. `ours` is what we grant; `theirs` is what the peer said in its handshake that it grants."""

    def __init__(
        self,
        initiator: bool,
        ours: Windows,
        theirs: Windows,
        now: float = 0.0,
        reserve: Callable[[int], bool] = lambda _size: True,
    ) -> None:
        """`reserve` sets memory aside for what goes beyond the first windows, and may refuse it."""
        self.now = now
        self.rtt_s = 0.1
        self.state = State.OPEN
        self.peer_left = False  # the peer sent GOAWAY
        self.close_code, self.close_reason = 0, ""
        self.events: list[tuple[Event, Stream | None]] = []
        self.streams: dict[int, Stream] = {}
        self.block: Stream | None = None  # whose bytes the next record is

        self._ours, self._theirs = ours, theirs
        self._parity = int(initiator)  # of the ids of the streams that we open: 1, 3, …, or 2, 4, …
        self._opened = self._peer_opened = 0  # streams, so far
        self._ended = self._peer_ended = 0  # of them, in both directions
        self._given_up = TokenBucket(_GIVEN_UP_PER_S, _GIVEN_UP_BURST, now)

        self._control = ControlQueue()
        self._turns = Turns()
        self._ping: bytes | None = None  # what the PONG must bring back
        self.sent = 0
        self.stalls = 0  # batches cut short because the peer gave no more credit
        self.send_limit = theirs.connection_bytes

        self.received = self.consumed = 0
        self.reserved = 0  # of memory, beyond the first windows
        self._reserve_memory = reserve
        self._allowance = 0  # unread bytes for which credit is still given
        self.window = Window(ours.connection_bytes, ours.max_connection_bytes, now, self._reserve)
        self._first_window = self._stream_window(now)  # of every stream, until it is given more
        self._block_bytes = self._block_flags = 0
        self._block_chunk: bytearray | None = None  # what it is opened into, if not its reader's memory

    # -- opening and ending ------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would succeed now."""
        return self._opened - self._ended < self._theirs.streams and not self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether no stream can ever be opened again: another connection has to take over."""
        return self.state is not TAKING or self.peer_left or self._opened >= MAX_OPENED

    def open_stream(self, priority: Priority) -> Stream:
        if not self.can_open:
            raise LocalProtocolError("no stream can be opened now; look at can_open first")
        self._opened += 1
        stream = self._new_stream(2 * self._opened - self._parity, priority)
        self._control.send(_HEADER.pack(_OPEN | priority, stream.id, 0))
        return stream

    def _new_stream(self, stream_id: int, priority: Priority) -> Stream:
        limit = self._theirs.stream_bytes
        stream = self.streams[stream_id] = Stream(stream_id, priority, limit, self._first_window, self.now)
        return stream

    def _stream_window(self, now: float) -> Window:
        return Window(self._ours.stream_bytes, self._ours.max_stream_bytes, now)

    def _is_theirs(self, stream_id: int) -> bool:
        return stream_id & 1 != self._parity

    def goaway(self, code: int, reason: str) -> None:
        """Take no more streams from the peer and open none; those that are open go on."""
        self._step("goaway")
        self._control.send(frames.encode(FrameType.GOAWAY, payload=frames.encode_reason(code, reason)))

    def close(self, code: int, reason: str) -> None:
        """End everything; the peer hears why."""
        if self.state is not CLOSED:
            self._control.send(frames.encode(FrameType.CLOSE, payload=frames.encode_reason(code, reason)))
        self._step("close")

    def _step(self, step: str) -> None:
        after = STATE_STEPS.get((self.state, step))
        if after is None:
            raise LocalProtocolError(f"{step} on a connection that is {self.state.name}")
        self.state = after

    @property
    def pinging(self) -> bool:
        """Whether a PONG is awaited."""
        return self._ping is not None

    def ping(self, now: float) -> None:
        """Ask for a PONG, which measures the round trip, unless one is awaited."""
        self.now = now
        if self._ping is None:
            self._ping = U64.pack(int(now * 1e6))
            self._control.send(frames.encode(FrameType.PING, payload=self._ping))

    # -- writing -----------------------------------------------------------------------------------

    @property
    def wants_write(self) -> bool:
        return self._control.waiting > 0 or self._turns.waiting > 0

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

    def finish(self, stream: Stream) -> None:
        """Say that no message follows."""
        stream.step_send(FINISH)
        self._turns.offer(stream)

    def express(self, stream: Stream, header: bytes, buffers: Sequence[Segment], fin: bool) -> bytes | None:
        """The record of a small message, if nothing else waits and it has credit; None: `write` it."""
        size, control = len(header) + sum(map(len, buffers)), self._control
        if (
            size >= BLOCK_BYTES
            or self._turns.waiting
            or stream.outbox
            or stream.send is not SENDING
            or stream.sent >= stream.send_limit
            or self.sent >= self.send_limit
            or control.waiting > _EXPRESS_CONTROL
            or self.state is CLOSED
        ):
            return None
        cost = size if size > MESSAGE_COST else MESSAGE_COST
        stream.sent += cost
        self.sent += cost
        head = _HEADER.pack(_MESSAGE | (_FIN if fin else 0) | len(header), stream.id, size)
        if fin:
            stream.step_send(FINISH)
            self._sent_all(stream)
        if control.waiting:
            return b"".join((*control.take(), head, header, *buffers))
        return b"".join((head, header, *buffers))

    def set_priority(self, stream: Stream, priority: Priority) -> None:
        """From the next frame on, here and (if we opened the stream) in the peer's answers."""
        priority = max(priority, stream.highest)
        if stream.priority == priority:
            return
        self._turns.leave(stream)
        stream.priority = priority
        self._turns.offer(stream)
        if not self._is_theirs(stream.id) and stream.id in self.streams:
            self._control.send(frames.encode(FrameType.PRIORITY, stream.id, aux=priority))

    def reset(self, stream: Stream, code: int) -> None:
        """Give up sending; what was queued is dropped. No effect once the last byte is sent."""
        if stream.send < SENT:
            self._give_up(stream)
            self._control.send(frames.encode(FrameType.RESET_STREAM, stream.id, U32.pack(code)))

    def _give_up(self, stream: Stream) -> None:
        self._turns.leave(stream)
        stream.outbox.clear()
        stream.queued = 0
        stream.step_send(Step.RESET)
        if stream.receive >= RECEIVED:
            self._end(stream)

    def next_records(self, max_bytes: int) -> list[Segment]:
        """The plaintexts of the next records: all control frames, and data up to about `max_bytes`.

        Chosen only now, so that nothing urgent stands behind what was chosen long ago.
        """
        turns, batch = self._turns, Batch(self._control.take())
        left = 0 if self._control.waiting or self.state is CLOSED else max_bytes
        while left > 0 and turns.waiting and self.sent < self.send_limit:
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
                    batch.add_block(_HEADER.pack(kind | flags, stream.id, 4) + U32.pack(size), segments[0])
                else:
                    batch.add(_HEADER.pack(kind | flags, stream.id, size), segments, size)
                if last or turn <= 0 or stream.sent >= stream.send_limit or self.sent >= self.send_limit:
                    break
            left -= MAX_DATA_BYTES - turn
            if stream.outbox:
                turns.offer(stream)
            else:
                self._sent_all(stream)
        if turns.waiting and self.sent >= self.send_limit:
            self.stalls += 1
        return batch.records()

    def _sent_all(self, stream: Stream) -> None:
        if stream.wants_drained:
            stream.wants_drained = False
            self.events.append((Event.DRAINED, stream))
        if stream.send is FINISHING:
            stream.step_send(FIN_STEP)
            if stream.receive >= RECEIVED:
                self._end(stream)

    # -- reading -----------------------------------------------------------------------------------

    def take(self, stream: Stream) -> Incoming | None:
        """The next message: its header, and its buffers, or None and how many bytes of them to `expect`."""
        if not stream.inbox:
            return None
        incoming = stream.inbox.popleft()
        self._read(stream, incoming[3])
        return incoming

    def expect(self, stream: Stream, target: memoryview) -> None:
        """Have the buffers of the message that was taken put straight into `target`, which has their size.

        Credit for all of it is given at once: the caller has set its memory aside.
        """
        stream.filled = stream.take_into(target)
        if stream.filled < len(target):
            stream.target = target
        self._read(stream, stream.filled)

    def stop(self, stream: Stream, code: int) -> None:
        """Read no more: what waits and what still comes is dropped, and the peer is told."""
        if stream.receive is RECEIVING:
            stream.step_receive(Step.STOP)
            self._control.send(frames.encode(FrameType.STOP_SENDING, stream.id, U32.pack(code)))
        self._drop_unread(stream)

    def _drop_unread(self, stream: Stream) -> None:
        stream.inbox.clear()
        stream.chunks.clear()
        stream.target = None
        self._read(stream, stream.received - stream.consumed)

    def _read(self, stream: Stream, cost: int) -> None:
        """Count so much as read: that is credit for the peer."""
        stream.consumed += cost
        self.consumed += cost
        if stream.receive is RECEIVING:
            read = stream.consumed
            if stream.target is not None:
                read += len(stream.target) - stream.filled
            if read >= stream.window.due_at:
                if stream.window is self._first_window:
                    stream.window = self._stream_window(stream.opened_at)
                limit = stream.window.grant(read, self.now, self.rtt_s)
                self._control.grant(FrameType.MAX_STREAM_DATA, stream.id, limit)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def _grant_connection(self) -> None:
        if self.received - self.consumed > self._allowance:
            more = min(_ALLOWANCE_STEP_BYTES, self._ours.allowance_bytes - self._allowance)
            if more and self._reserve(more):
                self._allowance += more
        read = min(self.received, self.consumed + self._allowance)
        if read >= self.window.due_at:
            self._control.grant(FrameType.MAX_DATA, 0, self.window.grant(read, self.now, self.rtt_s))

    def _reserve(self, size: int) -> bool:
        granted = self._reserve_memory(size)
        self.reserved += size * granted
        return granted

    def give_back(self) -> int:
        """Stop allowing for unread bytes while there are none; how much reserved memory that frees."""
        freed = self._allowance if self.received == self.consumed else 0
        self._allowance -= freed
        self.reserved -= freed
        return freed

    def _end(self, stream: Stream) -> None:
        """Forget the stream, since nothing can come or go any more; some of it may still be unread."""
        del self.streams[stream.id]
        if self._is_theirs(stream.id):
            self._peer_ended += 1
            return
        if self._opened - self._ended == self._theirs.streams:
            self.events.append((Event.ROOM, None))
        self._ended += 1

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self, plain: memoryview, now: float) -> None:
        """Take a record's plaintext. Raises RemoteProtocolError, after which only `close` makes sense."""
        self.now = now
        position, end = 0, len(plain)
        if not end:
            raise RemoteProtocolError("an empty record")
        while position < end and self.state is not CLOSED:
            begin = position + HEADER_BYTES
            if begin > end or self.block is not None:
                raise RemoteProtocolError("a record ends inside a frame header, or goes on behind a BLOCK")
            head, stream_id, length = _HEADER.unpack_from(plain, position)
            position = begin + length
            if head & _NOT_MESSAGE == 0 != stream_id and length <= MAX_DATA_BYTES and position <= end:
                self._on_message(stream_id, head, plain[begin:position])
                continue
            kind = head >> 24
            handle = frames.check(kind, head >> 16 & 0xFF, head & 0xFFFF, stream_id, length)
            if position > end:
                raise RemoteProtocolError(f"a record ends inside a frame of type {kind:#04x}")
            if handle:
                _HANDLERS[kind](self, stream_id, head, plain[begin:position])

    def _charge(self, stream_id: int, cost: int) -> Stream:
        """The stream that so much came for, while it had credit; the last frame may overdraw it."""
        stream = self.streams.get(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(f"a message for stream {stream_id}, which is not open for it")
        if stream.received >= stream.window.limit and cost:
            raise FlowControlViolation(
                f"stream {stream_id} went on beyond {stream.window.limit} bytes of credit"
            )
        if self.received >= self.window.limit and cost:
            raise FlowControlViolation(f"all streams went on beyond {self.window.limit} bytes of credit")
        stream.received += cost
        self.received += cost
        return stream

    def _on_message(self, stream_id: int, head: int, payload: memoryview) -> None:
        """A MESSAGE or a HEAD."""
        length, split = len(payload), head & 0xFFFF
        cost = length if length > MESSAGE_COST else MESSAGE_COST if length else 0
        stream = self._charge(stream_id, cost)
        if stream.due or split > length or not (length or head & _FIN):
            raise RemoteProtocolError(f"a message in a message, or one cut off: {stream!r}")
        if head < _HEAD:
            incoming: Incoming = bytes(payload[:split]), bytearray(payload[split:]), 0, cost
        else:
            (stream.due,) = U64.unpack_from(payload)
            incoming = bytes(payload[8:]), None, stream.due, cost
        if stream.receive is not RECEIVING:
            self._read(stream, cost)
        elif length:
            stream.inbox.append(incoming)
            if len(stream.inbox) == 1:
                self.events.append((READABLE, stream))
        if head & _FIN:
            self._on_fin(stream)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def _on_fin(self, stream: Stream) -> None:
        if stream.due:
            raise RemoteProtocolError(f"{stream!r} ends {stream.due} bytes before its message does")
        stream.step_receive(FIN_STEP)
        if not stream.inbox:
            self.events.append((READABLE, stream))
        if stream.send >= SENT:
            self._end(stream)

    def _on_block(self, stream_id: int, head: int, payload: memoryview) -> None:
        (size,) = U32.unpack(payload)
        if not 0 < size <= MAX_DATA_BYTES:
            raise FrameTooLarge(f"a BLOCK of {size} bytes; it has 1 to {MAX_DATA_BYTES}")
        self.block = stream = self._charge(stream_id, size)
        stream.due -= size
        if stream.due < 0:
            raise RemoteProtocolError(f"{-stream.due} bytes that no message announced on {stream!r}")
        self._block_bytes, self._block_flags = size, head

    def block_target(self, size: int) -> memoryview:
        """Where to open the record that `block` announced: its reader's memory, or our own."""
        stream = self.block
        assert stream is not None
        if size != self._block_bytes:
            raise RemoteProtocolError(f"a record of {size} bytes behind a BLOCK of {self._block_bytes}")
        if stream.target is not None:
            return stream.target[stream.filled : stream.filled + size]
        self._block_chunk = bytearray(size)
        return memoryview(self._block_chunk)

    def block_received(self, now: float) -> None:
        """What `block_target` gave is filled."""
        self.now = now
        stream, size, chunk = self.block, self._block_bytes, self._block_chunk
        assert stream is not None
        self.block = self._block_chunk = None
        if chunk is not None and stream.target is not None:  # which came in the meantime
            stream.target[stream.filled : stream.filled + size] = chunk
        if stream.target is not None:
            stream.filled += size
            if stream.filled == len(stream.target):
                stream.target = None
                self.events.append((READABLE, stream))
            self._read(stream, size)
        elif stream.receive is not RECEIVING:
            self._read(stream, size)
        else:
            assert chunk is not None
            stream.append(chunk)
            if self.received >= self.window.due_at:
                self._grant_connection()
        if self._block_flags & _FIN:
            self._on_fin(stream)

    def _known(self, stream_id: int) -> Stream | None:
        """The stream, or None if it is over. Raises for one that never was."""
        stream = self.streams.get(stream_id)
        opened = self._peer_opened if self._is_theirs(stream_id) else self._opened
        if stream is None and (stream_id + 1) >> 1 > opened:
            raise RemoteProtocolError(f"a frame for stream {stream_id}, which was never opened")
        return stream

    def _on_open(self, stream_id: int, head: int, _payload: memoryview) -> None:
        expected = 2 * self._peer_opened + 1 + self._parity
        if stream_id != expected or self.peer_left:
            raise RemoteProtocolError(f"OPEN of stream {stream_id}, not of {expected}, or behind GOAWAY")
        if self._peer_opened - self._peer_ended >= self._ours.streams:
            raise StreamLimitExceeded(f"more than {self._ours.streams} streams at once")
        self._peer_opened += 1
        stream = self._new_stream(stream_id, PRIORITIES[head & 0xFFFF])
        if self.state is TAKING:
            self.events.append((OPENED, stream))
            return
        self._control.answer(FrameType.RESET_STREAM, stream_id, U32.pack(ErrorCode.SHUTDOWN))
        stream.step_send(Step.RESET)
        self.stop(stream, ErrorCode.SHUTDOWN)

    def _on_max_stream_data(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        (limit,) = U64.unpack(payload)
        if stream is not None and limit > stream.send_limit:
            stream.send_limit = limit
            self._turns.offer(stream)

    def _on_max_data(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.send_limit = max(self.send_limit, U64.unpack(payload)[0])

    def _on_reset(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(f"RESET_STREAM on stream {stream_id}, whose sender had ended it")
        self._count_given_up(stream)
        (stream.reset_code,) = U32.unpack(payload)
        stream.step_receive(Step.RESET)
        self._drop_unread(stream)
        self.events.append((Event.RESET, stream))
        if stream.send >= SENT:
            self._end(stream)

    def _on_stop(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is None or stream.send >= SENT:
            return
        self._count_given_up(stream)
        (stream.stop_code,) = U32.unpack(payload)
        self._control.answer(FrameType.RESET_STREAM, stream_id, U32.pack(ErrorCode.CANCELLED))
        self.events.append((Event.STOPPED, stream))
        self._give_up(stream)

    def _count_given_up(self, stream: Stream) -> None:
        # HTTP/2's "rapid reset" (CVE-2023-44487): to open and reset costs the peer nothing, and us a handler.
        if self._is_theirs(stream.id) and stream.send is SENDING and not self._given_up.take(self.now):
            raise Flood(f"streams opened and given up faster than {_GIVEN_UP_PER_S:.0f} a second")

    def _on_ping(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self._control.answer(FrameType.PONG, 0, bytes(payload))

    def _on_pong(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        if bytes(payload) == self._ping:
            self._ping = None
            sample_s = self.now - U64.unpack(payload)[0] / 1e6
            self.rtt_s += (max(0.0, sample_s) - self.rtt_s) / 8  # RFC 6298

    def _on_close(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self._step("close")

    def _on_goaway(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self.peer_left = True
        self.events.append((Event.ROOM, None))

    def _on_priority(self, stream_id: int, head: int, _payload: memoryview) -> None:
        if not self._is_theirs(stream_id):
            raise RemoteProtocolError(f"PRIORITY on stream {stream_id}, which the peer did not open")
        stream = self._known(stream_id)
        if stream is not None:
            self.set_priority(stream, PRIORITIES[head & 0xFFFF])


_HANDLERS = MappingProxyType(
    {
        FrameType.MESSAGE: Connection._on_message,
        FrameType.HEAD: Connection._on_message,
        FrameType.BLOCK: Connection._on_block,
        FrameType.OPEN: Connection._on_open,
        FrameType.MAX_STREAM_DATA: Connection._on_max_stream_data,
        FrameType.RESET_STREAM: Connection._on_reset,
        FrameType.STOP_SENDING: Connection._on_stop,
        FrameType.PING: Connection._on_ping,
        FrameType.PONG: Connection._on_pong,
        FrameType.CLOSE: Connection._on_close,
        FrameType.MAX_DATA: Connection._on_max_data,
        FrameType.PAD: lambda *_: None,
        FrameType.GOAWAY: Connection._on_goaway,
        FrameType.PRIORITY: Connection._on_priority,
    }
)
