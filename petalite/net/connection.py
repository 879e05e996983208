"""A connection's core: streams of messages over one ordered, secret pipe, with credit, turns and an end.

Sans I/O: takes the plaintext of records and the time, gives events and the plaintext of the next records. It
opens no socket, reads no clock and starts no task, and knows nothing of keys or of what the messages say.

Here are the lives of the connection and its streams, and the frames that rule them; `sender` and `receiver`
have the messages.
"""

from __future__ import annotations

from petalite.errors import ErrorCode, Flood, LocalProtocolError, RemoteProtocolError, StreamLimitExceeded
from petalite.net import frames
from petalite.net.credit import Windows
from petalite.net.frames import HEADER_BYTES, MAX_DATA_BYTES, U32, U64, FrameType, encode
from petalite.net.limits import Budget, TokenBucket
from petalite.net.receiving import Receiver
from petalite.net.sending import FLAGS_SHIFT, HEADER, Sender
from petalite.net.states import CLOSED, OPENED, RECEIVED, SENDING, SENT, STATE_STEPS, TAKING, Event, State
from petalite.net.streams import PRIORITIES, Priority, Stream

_FIN, _OPENING = frames.FIN << FLAGS_SHIFT, frames.OPENING << FLAGS_SHIFT
_NOT_MESSAGE = ~(_FIN | _OPENING | 0xFFFF)  # what a MESSAGE, which is type 0, has none of

MAX_OPENED = 0x7FFF_FFFF  # that one end opens in a connection's life: ids have 32 bits
_GIVEN_UP_PER_S, _GIVEN_UP_BURST = 200.0, 1000.0  # streams that the peer opens and gives up unanswered


class Connection:
    """One end. `ours` is what we grant; `theirs` is what the peer said in its handshake that it grants."""

    def __init__(
        self,
        initiator: bool,
        ours: Windows,
        theirs: Windows,
        now: float = 0.0,
        memory: Budget | None = None,
    ) -> None:
        """`memory` is for what goes beyond the first windows."""
        self.state = State.OPEN
        self.peer_left = False  # the peer sent GOAWAY
        self.close_code, self.close_reason = 0, ""
        self.events: list[tuple[Event, Stream | None]] = []  # for the layer above to read and to clear
        self.streams: dict[int, Stream] = {}
        self.sender = Sender(theirs.connection_bytes, self.events, self._over)
        self.receiver = Receiver(ours, now, memory or Budget(), self.sender.control, self.events, self._over)

        self._ours, self._theirs = ours, theirs
        self._parity = int(initiator)  # of the ids of the streams that we open: 1, 3, …, or 2, 4, …
        self._opened = self._peer_opened = 0  # streams, so far
        self._ended = self._peer_ended = 0  # of them, in both directions
        self._given_up = TokenBucket(_GIVEN_UP_PER_S, _GIVEN_UP_BURST, now)
        self._ping: bytes | None = None  # what the PONG must bring back

    # -- the connection's life ---------------------------------------------------------------------

    def goaway(self, code: int, reason: str) -> None:
        """Take no more streams from the peer and open none; those that are open go on."""
        self._step("goaway")
        self.sender.control.send(encode(FrameType.GOAWAY, payload=frames.encode_reason(code, reason)))

    def close(self, code: int, reason: str) -> None:
        """End everything; the peer hears why."""
        if self.state is not CLOSED:
            self.sender.control.send(encode(FrameType.CLOSE, payload=frames.encode_reason(code, reason)))
        self._step("close")

    def _step(self, step: str) -> None:
        after = STATE_STEPS.get((self.state, step))
        if after is None:
            raise LocalProtocolError(f"{step} on a connection that is {self.state.name}")
        self.state = after
        if after is CLOSED:
            self.sender.limit = 0  # control frames may still go out, messages not

    @property
    def pinging(self) -> bool:
        """Whether a PONG is awaited."""
        return self._ping is not None

    def ping(self, now: float) -> None:
        """Ask for a PONG, which measures the round trip, unless one is awaited."""
        if self._ping is None:
            self._ping = U64.pack(int(now * 1e6))
            self.sender.control.send(encode(FrameType.PING, payload=self._ping))

    # -- its streams' lives ------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would succeed now."""
        return self._opened - self._ended < self._theirs.streams and not self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether no stream can ever be opened again: another connection has to take over."""
        return self.state is not TAKING or self.peer_left or self._opened >= MAX_OPENED

    @property
    def used_up(self) -> bool:
        """Whether either end has no ids left for streams; both know it."""
        return max(self._opened, self._peer_opened) >= MAX_OPENED

    def open_stream(self, priority: Priority) -> Stream:
        if not self.can_open:
            raise LocalProtocolError("no stream can be opened now; look at can_open first")
        self._opened += 1
        stream = self._new_stream(2 * self._opened - self._parity, priority)
        self.sender.open(stream)
        return stream

    def _new_stream(self, stream_id: int, priority: Priority) -> Stream:
        receiver, limit = self.receiver, self._theirs.stream_bytes
        stream = Stream(stream_id, priority, limit, receiver.first_window, receiver.now)
        self.streams[stream_id] = stream
        return stream

    def set_priority(self, stream: Stream, priority: Priority) -> None:
        """From the next frame on, here and (if we opened the stream) in the peer's answers."""
        priority = max(priority, stream.highest)
        if stream.priority != priority:
            self.sender.reclass(stream, priority)
            if not self._is_theirs(stream.id) and stream.id in self.streams:
                self.sender.control.send(encode(FrameType.PRIORITY, stream.id, aux=priority))

    def _is_theirs(self, stream_id: int) -> bool:
        return stream_id & 1 != self._parity

    def _over(self, stream: Stream) -> None:
        """Forget the stream, since nothing can come or go any more; some of it may still be unread."""
        del self.streams[stream.id]
        if self._is_theirs(stream.id):
            self._peer_ended += 1
            return
        if self._opened - self._ended == self._theirs.streams:
            self.events.append((Event.ROOM, None))
        self._ended += 1

    # -- frames ------------------------------------------------------------------------------------

    def receive(self, plain: memoryview, now: float) -> None:
        """Take a record's plaintext, which is where `receiver.target` wanted it.

        Raises RemoteProtocolError, after which only `close` makes sense.
        """
        receiver = self.receiver
        receiver.now = now
        if receiver.block is not None:
            receiver.block_received(plain)
            return
        position, end = 0, len(plain)
        if not end:
            raise RemoteProtocolError("an empty record")
        while position < end and self.state is not CLOSED:
            begin = position + HEADER_BYTES
            if begin > end or receiver.block is not None:
                raise RemoteProtocolError("a record ends inside a frame header, or goes on behind a BLOCK")
            head, stream_id, length = HEADER.unpack_from(plain, position)
            position = begin + length
            if head & _NOT_MESSAGE == 0 != stream_id and length <= MAX_DATA_BYTES and position <= end:
                self._on_message(stream_id, head, plain[begin:position])
                continue
            kind = frames.check(head >> 24, head >> FLAGS_SHIFT & 0xFF, head & 0xFFFF, stream_id, length)
            if position > end:
                raise RemoteProtocolError(f"a record ends inside a frame of type {head >> 24:#04x}")
            if kind is not None:
                _HANDLERS[kind](self, stream_id, head, plain[begin:position])

    def _on_message(self, stream_id: int, head: int, payload: memoryview) -> None:
        if head & _OPENING:
            self._on_opening(stream_id, (head & _OPENING) >> FLAGS_SHIFT + 1)
        stream = self._open_half(stream_id)
        if payload:
            self.receiver.message(stream, False, head & 0xFFFF, payload, head & _FIN != 0)
        elif head & 0xFFFF or not head & (_FIN | _OPENING):
            raise RemoteProtocolError(f"a MESSAGE on stream {stream_id} that says nothing, or is cut off")
        elif head & _FIN:
            self.receiver.fin(stream)

    def _on_head(self, stream_id: int, _head: int, payload: memoryview) -> None:
        self.receiver.message(self._open_half(stream_id), True, 0, payload, False)

    def _on_block(self, stream_id: int, head: int, payload: memoryview) -> None:
        (size,) = U32.unpack(payload)
        self.receiver.announce_block(self._open_half(stream_id), size, head & _FIN != 0)

    def _open_half(self, stream_id: int) -> Stream:
        """The stream that a message, or a part of one, has come for."""
        stream = self.streams.get(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(f"a message for stream {stream_id}, which is not open for it")
        return stream

    def _known(self, stream_id: int) -> Stream | None:
        """The stream, or None if it is over. Raises for one that never was."""
        stream = self.streams.get(stream_id)
        opened = self._peer_opened if self._is_theirs(stream_id) else self._opened
        if stream is None and (stream_id + 1) >> 1 > opened:
            raise RemoteProtocolError(f"a frame for stream {stream_id}, which was never opened")
        return stream

    def _on_opening(self, stream_id: int, opening: int) -> None:
        expected = 2 * self._peer_opened + 1 + self._parity
        if stream_id != expected or self.peer_left or opening > len(PRIORITIES):
            raise RemoteProtocolError(
                f"stream {stream_id} is opened with priority {opening - 1}: not {expected}, or behind GOAWAY"
            )
        if self._peer_opened - self._peer_ended >= self._ours.streams:
            raise StreamLimitExceeded(f"more than {self._ours.streams} streams at once")
        self._peer_opened += 1
        stream = self._new_stream(stream_id, PRIORITIES[opening - 1])
        if self.state is TAKING:
            self.events.append((OPENED, stream))
        else:
            self.sender.stopped(stream, ErrorCode.SHUTDOWN)
            self.receiver.stop(stream, ErrorCode.SHUTDOWN)

    def _on_max_stream_data(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is not None:
            self.sender.allow(stream, *U64.unpack(payload))

    def _on_max_data(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.sender.limit = max(self.sender.limit, *U64.unpack(payload))

    def _on_reset_stream(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is None or stream.receive >= RECEIVED:
            raise RemoteProtocolError(f"RESET_STREAM on stream {stream_id}, whose sender had ended it")
        self._count_given_up(stream)
        (stream.reset_code,) = U32.unpack(payload)
        self.receiver.reset(stream)

    def _on_stop_sending(self, stream_id: int, _head: int, payload: memoryview) -> None:
        stream = self._known(stream_id)
        if stream is not None and stream.send < SENT:
            self._count_given_up(stream)
            (stream.stop_code,) = U32.unpack(payload)
            self.events.append((Event.STOPPED, stream))
            self.sender.stopped(stream, ErrorCode.CANCELLED)

    def _count_given_up(self, stream: Stream) -> None:
        # HTTP/2's "rapid reset" (CVE-2023-44487): to open and reset costs the peer nothing, and us a handler.
        if (
            self._is_theirs(stream.id)
            and stream.send is SENDING
            and not self._given_up.take(self.receiver.now)
        ):
            raise Flood(f"streams opened and given up faster than {_GIVEN_UP_PER_S:.0f} a second")

    def _on_priority(self, stream_id: int, head: int, _payload: memoryview) -> None:
        if not self._is_theirs(stream_id):
            raise RemoteProtocolError(f"PRIORITY on stream {stream_id}, which the peer did not open")
        stream = self._known(stream_id)
        if stream is not None:
            self.set_priority(stream, PRIORITIES[head & 0xFFFF])

    def _on_pad(self, _stream_id: int, _head: int, _payload: memoryview) -> None:
        pass

    def _on_ping(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.sender.control.answer(FrameType.PONG, 0, bytes(payload))

    def _on_pong(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        if bytes(payload) == self._ping:
            self._ping = None
            sample_s = self.receiver.now - U64.unpack(payload)[0] / 1e6
            self.receiver.rtt_s += (max(0.0, sample_s) - self.receiver.rtt_s) / 8  # RFC 6298

    def _on_close(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self._step("close")

    def _on_goaway(self, _stream_id: int, _head: int, payload: memoryview) -> None:
        self.close_code, self.close_reason = frames.decode_reason(payload)
        self.peer_left = True
        self.events.append((Event.ROOM, None))


# A frame's handler is named like its type. Of all but MESSAGE what is legal is taken before it is looked for.
_HANDLERS = {kind: getattr(Connection, f"_on_{kind.name.lower()}") for kind in FrameType}
