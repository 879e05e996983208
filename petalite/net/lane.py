"""A lane: one TCP connection under one `Connection` core, driven by the loop's readers and writers.

On our own non-blocking socket we know what the kernel took: the core chooses its next frames only when there
is room for them, so an urgent frame waits behind at most `TCP_NOTSENT_LOWAT` bytes. Records are sealed from
the sender's memory into a buffer that the host's lanes share, and opened where they were received or straight
into the reader's memory. Knows sockets and records; knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import socket
from time import monotonic
from typing import Protocol

from petalite.errors import ConnectionLost, ErrorCode, PetaliteError, RemoteProtocolError, code_of, from_wire
from petalite.net.connection import Connection, Event
from petalite.net.records import MAX_PLAINTEXT_BYTES, OVERHEAD_BYTES, PREFIX_BYTES, Opener, Sealer
from petalite.net.streams import Stream

RECEIVE_BYTES = 512 * 1024
BATCH_BYTES = 128 * 1024
SEND_BYTES = BATCH_BYTES + 2 * (
    MAX_PLAINTEXT_BYTES + OVERHEAD_BYTES
)  # control frames, and a frame begun late
BATCHES_PER_TURN = 4  # then the loop's other work has its turn
NOTSENT_LOWAT_BYTES = 128 * 1024
USER_TIMEOUT_MS = 20_000
LINGER_S = 1.0  # how long a closed lane waits for the peer to have read why
_KEPT_BUFFERS = 4
_SMALL_LEFTOVER_BYTES = 16 * 1024
_UNHEARD = "the peer closed the connection behind the handshake: another swarm key, or it has no room"
_MIN_BOX_BYTES = OVERHEAD_BYTES - PREFIX_BYTES


class Scratch:
    """Buffers that the lanes of one host share, so that a quiet connection holds none."""

    def __init__(self) -> None:
        self.receive = memoryview(bytearray(RECEIVE_BYTES))
        self._free: list[memoryview] = []

    def borrow(self) -> memoryview:
        """A buffer to seal a batch into; whoever could not send it all keeps it until then."""
        return self._free.pop() if self._free else memoryview(bytearray(SEND_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        if len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)


class LaneOwner(Protocol):
    def lane_events(self, lane: Lane, events: list[tuple[Event, Stream | None]]) -> None:
        """What happened on its streams."""

    def lane_lost(self, lane: Lane, error: PetaliteError) -> None:
        """The lane ended and not by `close`; said once."""


def tune(sock: socket.socket) -> None:
    """Non-blocking, no Nagle, little unsent data in the kernel, BBR where the system permits it."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (
        ("TCP_NOTSENT_LOWAT", NOTSENT_LOWAT_BYTES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
        ("TCP_CONGESTION", b"bbr"),
    ):
        number = getattr(socket, option, None)  # absent on some systems, as the permission may be
        if number is not None:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, number, value)
            except OSError:
                continue


class Lane:
    """Owns the socket from the handshake's end on."""

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        sealer: Sealer,
        opener: Opener,
        scratch: Scratch,
        owner: LaneOwner,
    ) -> None:
        self.connection = connection
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()
        self._sealer = sealer
        self._opener = opener
        self._scratch = scratch
        self._owner = owner
        self.last_received = monotonic()  # when a record last came
        self._heard = False  # whether a record ever came
        self.received_bytes = 0
        self.sent_bytes = 0
        self._carry = b""  # half of a record's length
        self._partial: memoryview | None = None  # a record of which a part has come
        self._partial_rest = memoryview(b"")  # its part that has not
        self._buffer: memoryview | None = None  # borrowed, while not all of it is sent
        self._unsent: memoryview | None = None
        self._blocked = False  # a writer is registered
        self._ending = False  # closed or lost: nobody is told anything any more
        self._linger: asyncio.TimerHandle | None = None
        self.gone = asyncio.Event()  # the socket is closed

    def start(self, leftover: bytes) -> None:
        """Begin, with what came behind the handshake."""
        self._loop.add_reader(self._fd, self._on_readable)
        if leftover:
            # Never more than one read's worth; behind it the socket speaks for itself.
            self._scratch.receive[: len(leftover)] = leftover
            self._handle(len(leftover))

    # -- receiving ---------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            size = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")
            return
        if size < 0:
            self._lose("the peer closed the connection")
        elif not self._ending:
            self._handle(size)

    def _receive(self) -> int:
        """Read from the socket: how many bytes stand in the shared buffer; -1 at the end.

        The rest of a record whose front is already here goes to that front, and is not copied again.
        """
        buffer = self._scratch.receive
        if self._partial is not None:
            size: int = self._sock.recvmsg_into([self._partial_rest, buffer])[0]
            if not size:
                return -1
            self.received_bytes += size
            missing = len(self._partial_rest)
            self._partial_rest = self._partial_rest[size:]
            return max(0, size - missing)
        carried = len(self._carry)
        if carried:
            buffer[:carried] = self._carry
        size = self._sock.recv_into(buffer[carried:] if carried else buffer)
        if not size:
            return -1
        self._carry = b""
        self.received_bytes += size
        return size + carried

    def _handle(self, size: int) -> None:
        """Open the records in the front of the shared buffer, and tell what they brought."""
        try:
            self._open_records(size)
        except RemoteProtocolError as error:
            self.connection.close(code_of(error), str(error))
            self._notify()
            self._end(error)
            return
        self._notify()
        if self.connection.state is self.connection.state.CLOSED:
            code, reason = self.connection.close_code, self.connection.close_reason
            self._end(from_wire(code, reason) if code else ConnectionLost(f"the peer closed: {reason}"))
        else:
            self.flush()

    def _open_records(self, size: int) -> None:
        now = monotonic()
        if self._partial is not None:
            if self._partial_rest:
                return
            box, self._partial = self._partial[PREFIX_BYTES:], None
            self._open_record(box, now)
        buffer, position, length = self._scratch.receive, 0, 0
        while size - position >= PREFIX_BYTES:
            length = buffer[position] << 8 | buffer[position + 1]
            if length < _MIN_BOX_BYTES:
                raise RemoteProtocolError(f"a record of {length} bytes is too short for its tag")
            end = position + PREFIX_BYTES + length
            if end > size:
                break
            self._open_record(buffer[position + PREFIX_BYTES : end], now)
            position = end
        rest = size - position
        if rest >= PREFIX_BYTES:
            self._partial = memoryview(bytearray(PREFIX_BYTES + length))
            self._partial[:rest] = buffer[position:size]
            self._partial_rest = self._partial[rest:]
        elif rest:
            self._carry = bytes(buffer[position:size])

    def _open_record(self, box: memoryview, now: float) -> None:
        size = len(box) - (_MIN_BOX_BYTES)
        connection = self.connection
        target = connection.payload_target(size)
        if target is None:
            plain = box[:size]
            self._opener.open(box, plain)
            connection.receive(plain, now)
        else:
            self._opener.open(box, target)
            connection.payload_received(size, now)
        self.last_received = now
        self._heard = True

    def _notify(self) -> None:
        events = self.connection.events
        if events:
            self.connection.events = []
            self._owner.lane_events(self, events)

    # -- sending -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the core wants sent, now if the kernel has room, else as soon as it has."""
        if not self._blocked and self._fd >= 0:
            try:
                self._pump()
            except OSError as error:
                self._lose(f"the connection broke: {error.strerror or error}")

    def _pump(self) -> None:
        for _ in range(BATCHES_PER_TURN):
            records = self.connection.next_records(BATCH_BYTES)
            if not records:
                self._after_pump()
                return
            buffer = self._scratch.borrow()
            end = 0
            for plain in records:
                end += self._sealer.seal(plain, buffer[end:])
            self._buffer, self._unsent = buffer, buffer[:end]
            if not self._send_unsent():
                break
            self._notify()
        else:
            if not self.connection.wants_write:
                self._after_pump()
                return
        if not self._blocked:
            self._blocked = True
            self._loop.add_writer(self._fd, self._on_writable)
        self._notify()

    def _after_pump(self) -> None:
        if self._ending:  # the reason is sent; now the peer may end its side
            self._sock.shutdown(socket.SHUT_WR)

    def _send_unsent(self) -> bool:
        """Whether the kernel took everything."""
        unsent, buffer = self._unsent, self._buffer
        assert unsent is not None
        try:
            sent = self._sock.send(unsent)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self.sent_bytes += sent
        if sent < len(unsent):
            unsent = unsent[sent:]
            if buffer is not None and len(unsent) <= _SMALL_LEFTOVER_BYTES:
                self._unsent, self._buffer = memoryview(bytes(unsent)), None
                self._scratch.give_back(buffer)
            else:
                self._unsent = unsent
            return False
        self._unsent = self._buffer = None
        if buffer is not None:
            self._scratch.give_back(buffer)
        return True

    def _on_writable(self) -> None:
        try:
            if self._unsent is not None and not self._send_unsent():
                return
            self._blocked = False
            self._loop.remove_writer(self._fd)
            self._pump()
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")

    # -- ending ------------------------------------------------------------------------------------

    def close(self, code: ErrorCode, reason: str) -> None:
        """End it from this side; the peer hears why."""
        if not self._ending:
            self.connection.close(code, reason)
            self._linger_then_abort()

    def abort(self) -> None:
        """End it at once."""
        self._ending = True
        if self._linger is not None:
            self._linger.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._sock.close()
            self._fd = -1
            self._unsent = self._buffer = self._partial = None
            self.gone.set()

    def _end(self, error: PetaliteError) -> None:
        """The peer closed, or its bytes broke a rule: say the last word, then tell the owner."""
        if not self._ending:
            self._linger_then_abort()
            self._owner.lane_lost(self, error)

    def _linger_then_abort(self) -> None:
        # To close with unread bytes would send RST, which can overtake the reason and destroy it.
        self._ending = True
        self._linger = self._loop.call_later(LINGER_S, self.abort)
        self.flush()

    def _lose(self, reason: str) -> None:
        told = self._ending
        self.abort()
        if not told:
            self._owner.lane_lost(self, ConnectionLost(reason if self._heard else _UNHEARD))
