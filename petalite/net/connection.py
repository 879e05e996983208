"""A connection's core: streams over one ordered, secret pipe, with credit, turns and an end.

Sans I/O: takes the plaintext of records and the time, gives events and the plaintext of the next records. It
opens no socket, reads no clock and starts no task, and knows nothing of keys or of what the streams carry.

Credit is an absolute offset per stream and one for the connection (RFC 9000 §4). A stream's is given when its
reader reads. The connection's is given when bytes are read, or while no more than `allowance_bytes` of them
wait: so a few readers who do not read stop their own senders and nobody else's, and memory has a bound all
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from types import MappingProxyType

from petalite.errors import (
    ErrorCode,
    Flood,
    FlowControlViolation,
    LocalProtocolError,
    RemoteProtocolError,
    StreamLimitExceeded,
)
from petalite.net import frames
from petalite.net.control import ControlQueue
from petalite.net.credit import Window, Windows
from petalite.net.frames import ALIGNED_BYTES, FIN, HEADER, HEADER_BYTES, MAX_DATA_BYTES, FrameType
from petalite.net.limits import TokenBucket
from petalite.net.records import MAX_PLAINTEXT_BYTES
from petalite.net.scheduling import Turns, gather
from petalite.net.states import (
    READABLE,
    RECEIVED,
    RECEIVING,
    SENDING,
    SENT,
    STATE_STEPS,
    Event,
    Send,
    State,
    Step,
)
from petalite.net.streams import Priority, Stream

# For DATA, which most frames are, type, flags and aux are looked at as one number: nothing in it but FIN.
_FAST_HEADER, _NOT_DATA = Struct(">III"), ~(FIN << 16)

MAX_STREAM_ID = 0xFFFF_FFFF
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
        self.closed = False  # whether that is CLOSED; it is asked for every frame
        self.peer_left = False  # the peer sent GOAWAY
        self.close_code = 0
        self.close_reason = ""
        self.events: list[tuple[Event, Stream | None]] = []
        self.streams: dict[int, Stream] = {}

        self._ours = ours
        self._theirs = theirs
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._last_peer_id = 0
        self._given_up = TokenBucket(_GIVEN_UP_PER_S, _GIVEN_UP_BURST, now)
        self._peer_streams = 0  # opened by the peer so far
        self._peer_streams_over = 0
        self._peer_streams_limit = ours.streams
        self._our_streams = 0
        self._our_streams_limit = theirs.streams

        self._control = ControlQueue()
        self._ping: bytes | None = None  # what the PONG must bring back
        self._turns = Turns()
        self.sent = 0
        self.stalls = 0  # batches cut short because the peer gave no more credit
        self.send_limit = theirs.connection_bytes

        self.received = 0
        self.consumed = 0
        self.reserved = 0  # of memory, beyond the first windows
        self._reserve_bytes = reserve
        self._allowance = 0  # unread bytes for which credit is still given
        self.window = Window(ours.connection_bytes, ours.max_connection_bytes, now, self._reserve)
        self._payload_stream: Stream | None = None  # whose DATA payload is under way
        self._payload_left = 0
        self._payload_flags = 0
        self._payload_chunk: bytearray | None = None

    # -- opening and ending ------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would succeed now."""
        return (
            self.state is State.OPEN
            and not self.peer_left
            and self._our_streams < self._our_streams_limit
            and self._next_id <= MAX_STREAM_ID
        )

    @property
    def exhausted(self) -> bool:
        """Whether no stream can ever be opened again: another connection has to take over."""
        return self.state is not State.OPEN or self.peer_left or self._next_id > MAX_STREAM_ID

    def open_stream(self, priority: Priority) -> Stream:
        if not self.can_open:
            raise LocalProtocolError("no stream can be opened now; look at can_open first")
        stream = self._new_stream(self._next_id, priority)
        self._next_id += 2
        self._our_streams += 1
        self._control.send(FrameType.OPEN, stream.id, aux=priority)
        return stream

    def _new_stream(self, stream_id: int, priority: Priority) -> Stream:
        window = Window(self._ours.stream_bytes, self._ours.max_stream_bytes, self.now)
        stream = Stream(stream_id, priority, self._theirs.stream_bytes, window)
        self.streams[stream_id] = stream
        return stream

    def goaway(self, code: int, reason: str) -> None:
        """Take no more streams from the peer and open none; those that are open go on."""
        self._step("goaway")
        self._control.send(FrameType.GOAWAY, payload=frames.encode_reason(code, reason))

    def close(self, code: int, reason: str) -> None:
        """End everything; the peer hears why."""
        if not self.closed:
            self._control.send(FrameType.CLOSE, payload=frames.encode_reason(code, reason))
        self._step("close")

    def _step(self, step: str) -> None:
        after = STATE_STEPS.get((self.state, step))
        if after is None:
            raise LocalProtocolError(f"{step} on a connection that is {self.state.name}")
        self.state, self.closed = after, after is State.CLOSED

    @property
    def pinging(self) -> bool:
        """Whether a PONG is awaited."""
        return self._ping is not None

    def ping(self, now: float) -> None:
        """Ask for a PONG, which measures the round trip, unless one is awaited."""
        self.now = now
        if self.pinging:
            return
        self._ping = frames.U64.pack(int(now * 1e6))
        self._control.send(FrameType.PING, payload=self._ping)

    # -- writing -----------------------------------------------------------------------------------

    @property
    def wants_write(self) -> bool:
        return self._control.waiting > 0 or self._turns.waiting > 0

    def write(self, stream: Stream, segments: Sequence[bytes | memoryview], fin: bool = False) -> None:
        """Queue bytes, which the caller leaves alone until they are sent; with `fin`, the last ones."""
        if stream.send is not SENDING:
            raise LocalProtocolError(f"write on the sending half of {stream!r}")
        for segment in segments:
            if len(segment):
                stream.outbox.append(segment)
                stream.queued += len(segment)
        if fin:
            stream.step_send(Step.FINISH)
        self._turns.offer(stream)

    def express(self, stream: Stream, segments: Sequence[bytes | memoryview], fin: bool) -> bytes | None:
        """The record of a small message, if nothing else waits and it has credit; None: `write` it."""
        size = sum(map(len, segments))
        if (
            self._turns.waiting
            or self._control.waiting > _EXPRESS_CONTROL
            or stream.send is not SENDING
            or size >= ALIGNED_BYTES
            or stream.sent + size > stream.send_limit
            or self.sent + size > self.send_limit
            or stream.queued
            or self.closed
        ):
            return None
        small = self._control.take() if self._control.waiting else []
        small.append(_FAST_HEADER.pack(FIN << 16 if fin else 0, stream.id, size))
        stream.sent += size
        self.sent += size
        if fin:
            stream.step_send(Step.FINISH)
            stream.step_send(Step.FIN)
            self._forget_if_over(stream)
        return b"".join((*small, *segments))

    def set_priority(self, stream: Stream, priority: Priority) -> None:
        """From the next frame on, here and (if we opened the stream) in the peer's answers."""
        priority = max(priority, stream.highest)
        if stream.priority == priority:
            return
        self._turns.move(stream, priority)
        if stream.id & 1 != self._peer_parity and not stream.over:
            self._control.send(FrameType.PRIORITY, stream.id, aux=priority)

    def reset(self, stream: Stream, code: int) -> None:
        """Give up sending; what was queued is dropped. No effect once the last byte is sent."""
        if stream.send >= SENT:
            return
        self._turns.leave(stream)
        stream.give_up_sending()
        self._control.send(FrameType.RESET_STREAM, stream.id, frames.U32.pack(code))
        self._forget_if_over(stream)

    def next_records(self, max_bytes: int) -> list[bytes | memoryview]:
        """The plaintexts of the next records: all control frames, and data up to about `max_bytes`.

        Chosen only now, so that nothing urgent stands behind what was chosen long ago.
        """
        records: list[bytes | memoryview] = []
        small, left = self._control.take(), max_bytes  # `small` is what the next record of many frames holds
        small_bytes = sum(map(len, small)) if small else 0
        if self._control.waiting or self.closed:
            left = 0
        turns = self._turns
        while left > 0 and turns.waiting and self.sent < self.send_limit:
            stream = turns.next()
            room = min(MAX_DATA_BYTES, stream.send_limit - stream.sent, self.send_limit - self.sent)
            pieces, size = gather(stream.outbox, room)
            if small_bytes + HEADER_BYTES + size > MAX_PLAINTEXT_BYTES and size < ALIGNED_BYTES:
                records.append(b"".join(small))
                small, small_bytes = [], 0
            last = stream.send is Send.FINISHING and not stream.outbox
            small.append(HEADER.pack(FrameType.DATA, FIN if last else 0, 0, stream.id, size))
            if size < ALIGNED_BYTES:
                small += pieces
                small_bytes += HEADER_BYTES + size
            else:
                records.append(b"".join(small))
                records.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
                small, small_bytes = [], 0
            left -= HEADER_BYTES + size
            stream.sent += size
            stream.queued -= size
            self.sent += size
            turns.took(stream)
            if not stream.outbox:
                self._sent_all(stream)
        if small:
            records.append(b"".join(small))
        if turns.waiting and self.sent >= self.send_limit:
            self.stalls += 1
        return records

    def _sent_all(self, stream: Stream) -> None:
        if stream.wants_drained:
            stream.wants_drained = False
            self.events.append((Event.DRAINED, stream))
        if stream.send is Send.FINISHING:
            stream.step_send(Step.FIN)
            self._forget_if_over(stream)

    # -- reading -----------------------------------------------------------------------------------

    def take(self, stream: Stream, size: int) -> bytearray:
        """Read `size` bytes, which are buffered."""
        taken = stream.take(size)
        self._consumed(stream, size)
        return taken

    def expect(self, stream: Stream, target: memoryview) -> bool:
        """Have the next bytes put straight into `target`; whether it is already full.

        Credit for all of it is given at once: the caller has set its memory aside.
        """
        filled = stream.take_into(target)
        if filled < len(target):
            stream.target, stream.filled = target, filled
        self._consumed(stream, filled)
        return filled == len(target)

    def take_whole(self, stream: Stream) -> None:
        """Read all that is buffered, which the caller has in its hands: the stream's one chunk."""
        size, stream.buffered = stream.buffered, 0
        stream.chunks.clear()
        self._consumed(stream, size)

    def stop(self, stream: Stream, code: int) -> None:
        """Read no more: what is buffered and what still comes is dropped, and the peer is told."""
        if stream.receive is RECEIVING:
            stream.step_receive(Step.STOP)
            self._control.send(FrameType.STOP_SENDING, stream.id, frames.U32.pack(code))
        self._consumed(stream, stream.drop_unread())
        self._forget_if_over(stream)

    def _consumed(self, stream: Stream, size: int) -> None:
        stream.consumed += size
        self.consumed += size
        if stream.receive is RECEIVING:
            read = stream.consumed if stream.target is None else stream.consumed + stream.missing
            if read >= stream.window.due_at:
                limit = stream.window.grant(read, self.now, self.rtt_s)
                self._control.grant(FrameType.MAX_STREAM_DATA, stream.id, limit)
        elif stream.receive is RECEIVED:
            self._forget_if_over(stream)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def _grant_connection(self) -> None:
        unread = self.received - self.consumed
        if unread > self._allowance:
            more = min(_ALLOWANCE_STEP_BYTES, self._ours.allowance_bytes - self._allowance)
            if more and self._reserve(more):
                self._allowance += more
        read = min(self.received, self.consumed + self._allowance)
        if read >= self.window.due_at:
            limit = self.window.grant(read, self.now, self.rtt_s)
            self._control.grant(FrameType.MAX_DATA, 0, limit)

    def _reserve(self, size: int) -> bool:
        if not self._reserve_bytes(size):
            return False
        self.reserved += size
        return True

    def give_back(self) -> int:
        """Stop allowing for unread bytes while there are none; how much reserved memory that frees."""
        if self.received > self.consumed:
            return 0
        freed, self._allowance = self._allowance, 0
        self.reserved -= freed
        return freed

    def _forget_if_over(self, stream: Stream) -> None:
        if not stream.over or self.streams.pop(stream.id, None) is None:
            return
        if stream.id & 1 == self._peer_parity:
            self._peer_streams_over += 1
            limit = self._peer_streams_over + self._ours.streams
            if limit - self._peer_streams_limit >= max(1, self._ours.streams >> 2):
                self._peer_streams_limit = limit
                self._control.grant(FrameType.MAX_STREAMS, 0, limit)

    # -- receiving ---------------------------------------------------------------------------------

    def payload_target(self, size: int) -> memoryview | None:
        """Where to open a record of `size` plaintext bytes, if all of it is one stream's payload."""
        stream = self._payload_stream
        if size > self._payload_left or size < ALIGNED_BYTES or stream is None or self.closed:
            return None
        if stream.target is not None:
            filled = stream.filled
            return stream.target[filled : filled + size] if stream.missing >= size else None
        if stream.receive is not RECEIVING:
            return None
        self._payload_chunk = bytearray(size)
        return memoryview(self._payload_chunk)

    def payload_received(self, size: int, now: float) -> None:
        """What `payload_target` gave is filled."""
        self.now = now
        stream = self._payload_stream
        assert stream is not None
        self._payload_left -= size
        if self._payload_chunk is not None:
            stream.chunks.append(self._payload_chunk)
            stream.buffered += size
            self._payload_chunk = None
        else:
            self._filled(stream, size)
        if not self._payload_left:
            self._end_data(stream, self._payload_flags)

    def receive(self, plain: memoryview, now: float) -> None:
        """Take a record's plaintext. Raises RemoteProtocolError, after which only `close` makes sense."""
        self.now = now
        end = len(plain)
        if not end:
            raise RemoteProtocolError("an empty record")
        position = 0
        if self._payload_left:
            position = min(self._payload_left, end)
            self._continue_payload(plain[:position])
        while position < end and not self.closed:
            if end - position < HEADER_BYTES:
                raise RemoteProtocolError("a record ends inside a frame header")
            head, stream_id, length = _FAST_HEADER.unpack_from(plain, position)
            position += HEADER_BYTES
            if not head & _NOT_DATA and stream_id and length <= MAX_DATA_BYTES:
                position += self._on_data(stream_id, head, length, plain[position : position + length])
                continue
            kind, flags, aux = head >> 24, head >> 16 & 0xFF, head & 0xFFFF
            handle = frames.check(kind, flags, aux, stream_id, length)
            if length > end - position:
                raise RemoteProtocolError(f"a record ends inside a frame of type {kind:#04x}")
            if handle:
                _HANDLERS[kind](self, stream_id, aux, plain[position : position + length])
            position += length

    def _on_data(self, stream_id: int, flags: int, length: int, data: memoryview) -> int:
        """A frame of `length` bytes of which this record has `data`; how many bytes that is."""
        stream = self.streams.get(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(f"DATA on stream {stream_id}, which is not open for it")
        stream.received += length
        self.received += length
        if stream.received > stream.window.limit:
            raise FlowControlViolation(
                f"stream {stream_id} sent {stream.received} bytes; its credit was {stream.window.limit}"
            )
        if self.received > self.window.limit:
            raise FlowControlViolation(
                f"{self.received} bytes on all streams; their credit was {self.window.limit}"
            )
        size = len(data)
        if stream.target is None and size and stream.receive is RECEIVING:
            stream.append(data)
        elif size:
            self._take_payload(stream, data)
        if size == length:
            self._end_data(stream, flags)
        else:
            self._payload_stream, self._payload_left, self._payload_flags = stream, length - size, flags
        return size

    def _continue_payload(self, data: memoryview) -> None:
        """The rest, or a part of it, of a payload that began in an earlier record."""
        stream = self._payload_stream
        assert stream is not None
        self._payload_left -= len(data)
        self._take_payload(stream, data)
        if not self._payload_left:
            self._end_data(stream, self._payload_flags)

    def _take_payload(self, stream: Stream, data: memoryview) -> None:
        if stream.receive is not RECEIVING:
            self._consumed(stream, len(data))
            return
        if stream.target is not None:
            size = min(stream.missing, len(data))
            stream.target[stream.filled : stream.filled + size] = data[:size]
            self._filled(stream, size)
            data = data[size:]
        if len(data):
            stream.append(data)

    def _filled(self, stream: Stream, size: int) -> None:
        stream.filled += size
        self._consumed(stream, size)
        if not stream.missing:
            stream.target = None
            self._announce(stream)

    def _end_data(self, stream: Stream, flags: int) -> None:
        self._payload_stream = None
        if flags:
            stream.step_receive(Step.FIN)
            self._announce(stream)
            self._forget_if_over(stream)
        elif stream.buffered >= stream.need and stream.target is None:
            self._announce(stream)
        if self.received >= self.window.due_at:
            self._grant_connection()

    def _announce(self, stream: Stream) -> None:
        if not stream.announced:
            stream.announced = True
            self.events.append((READABLE, stream))

    def _known(self, stream_id: int) -> Stream | None:
        """The stream, or None if it is over. Raises for one that never was."""
        stream = self.streams.get(stream_id)
        if stream is None:
            theirs = stream_id & 1 == self._peer_parity
            if stream_id > self._last_peer_id if theirs else stream_id >= self._next_id:
                raise RemoteProtocolError(f"a frame for stream {stream_id}, which was never opened")
        return stream

    def _on_open(self, stream_id: int, aux: int, _payload: memoryview) -> None:
        expected = self._last_peer_id + 2 if self._last_peer_id else 2 - self._peer_parity
        if stream_id != expected:
            raise RemoteProtocolError(f"OPEN of stream {stream_id}; the next one is {expected}")
        if self.peer_left:
            raise RemoteProtocolError(f"OPEN of stream {stream_id} behind GOAWAY")
        if self._peer_streams >= self._peer_streams_limit:
            raise StreamLimitExceeded(f"more than {self._peer_streams_limit} streams opened")
        self._last_peer_id = stream_id
        self._peer_streams += 1
        stream = self._new_stream(stream_id, Priority(aux))
        if self.state is State.OPEN:
            self.events.append((Event.OPENED, stream))
            return
        self._control.answer(FrameType.RESET_STREAM, stream_id, frames.U32.pack(ErrorCode.SHUTDOWN))
        stream.step_send(Step.RESET)
        self.stop(stream, ErrorCode.SHUTDOWN)

    def _on_max_stream_data(self, stream_id: int, _aux: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        (limit,) = frames.U64.unpack(payload)
        if stream is not None and limit > stream.send_limit:
            stream.send_limit = limit
            self._turns.offer(stream)

    def _on_max_data(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        self.send_limit = max(self.send_limit, frames.U64.unpack(payload)[0])

    def _on_max_streams(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        (limit,) = frames.U32.unpack(payload)
        if limit > self._our_streams_limit:
            self._our_streams_limit = limit
            self.events.append((Event.ROOM, None))

    def _on_reset(self, stream_id: int, _aux: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(
                f"RESET_STREAM on stream {stream_id}, whose sender had already ended it"
            )
        self._count_given_up(stream)
        (stream.reset_code,) = frames.U32.unpack(payload)
        stream.step_receive(Step.RESET)
        self._consumed(stream, stream.drop_unread())
        self.events.append((Event.RESET, stream))
        self._forget_if_over(stream)

    def _on_stop(self, stream_id: int, _aux: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is None or stream.send >= SENT:
            return
        self._count_given_up(stream)
        (stream.stop_code,) = frames.U32.unpack(payload)
        self._turns.leave(stream)
        stream.give_up_sending()
        self._control.answer(FrameType.RESET_STREAM, stream_id, frames.U32.pack(ErrorCode.CANCELLED))
        self.events.append((Event.STOPPED, stream))
        self._forget_if_over(stream)

    def _count_given_up(self, stream: Stream) -> None:
        # HTTP/2's "rapid reset" (CVE-2023-44487): to open and reset costs the peer nothing, and us a handler.
        if (
            stream.id & 1 == self._peer_parity
            and stream.send is Send.OPEN
            and not self._given_up.take(self.now)
        ):
            raise Flood(f"streams opened and given up faster than {_GIVEN_UP_PER_S:.0f} a second")

    def _on_ping(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        self._control.answer(FrameType.PONG, 0, bytes(payload))

    def _on_pong(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        if bytes(payload) != self._ping:
            return
        self._ping = None
        sample_s = self.now - frames.U64.unpack(payload)[0] / 1e6
        self.rtt_s += (max(0.0, sample_s) - self.rtt_s) / 8  # RFC 6298
        self.events.append((Event.PONG, None))

    def _on_close(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self._step("close")
        self.events.append((Event.CLOSED, None))

    def _on_goaway(self, _stream_id: int, _aux: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self.peer_left = True
        self.events.append((Event.GOAWAY, None))

    def _on_priority(self, stream_id: int, aux: int, _payload: memoryview) -> None:
        if stream_id & 1 != self._peer_parity:
            raise RemoteProtocolError(f"PRIORITY on stream {stream_id}, which the peer did not open")
        stream = self._known(stream_id)
        if stream is not None:
            self.set_priority(stream, Priority(aux))

    def _on_pad(self, _stream_id: int, _aux: int, _payload: memoryview) -> None:
        """Nothing."""


_HANDLERS = MappingProxyType(
    {
        FrameType.OPEN: Connection._on_open,
        FrameType.MAX_STREAM_DATA: Connection._on_max_stream_data,
        FrameType.RESET_STREAM: Connection._on_reset,
        FrameType.STOP_SENDING: Connection._on_stop,
        FrameType.MAX_STREAMS: Connection._on_max_streams,
        FrameType.PING: Connection._on_ping,
        FrameType.PONG: Connection._on_pong,
        FrameType.CLOSE: Connection._on_close,
        FrameType.MAX_DATA: Connection._on_max_data,
        FrameType.PAD: Connection._on_pad,
        FrameType.GOAWAY: Connection._on_goaway,
        FrameType.PRIORITY: Connection._on_priority,
    }
)
