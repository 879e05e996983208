"""A lane: one TCP connection under one `Connection` core, driven by the loop's readers and writers.

On our own non-blocking socket we know what the kernel took: the core chooses its next frames only when there
is room for them, so an urgent frame waits behind at most `TCP_NOTSENT_LOWAT` bytes. Records are sealed from
the sender's memory into a buffer that the host's lanes share, and opened where they were received or straight
into the reader's memory. Knows sockets and records; knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from time import monotonic
from typing import Protocol

from petalite.errors import ConnectionLost, ErrorCode, PetaliteError, RemoteProtocolError, code_of, from_wire
from petalite.net.connection import Connection
from petalite.net.handshake import Secured
from petalite.net.noise import TAG_BYTES
from petalite.net.pool import RECEIVE_BYTES, Scratch
from petalite.net.records import LENGTH, MAX_PLAINTEXT_BYTES, PREFIX_BYTES
from petalite.net.states import CLOSED, Event
from petalite.net.streams import Segment, Stream

logger = logging.getLogger(__name__)

BATCH_BYTES = 128 * 1024
BATCHES_PER_TURN = 4  # then the loop's other work has its turn
# Unsent bytes that the kernel may hold: to begin with, and then what the lane sends in so long, within
# bounds. They are what an urgent frame waits behind. Too few, and the socket runs dry between two of our
# turns: BBR then takes the lane for one that has little to say, never leaves its start-up, and fills the
# narrowest queue on the way, whoever else's bytes stand in it. Nothing urgent is sent on a bulk lane.
UNSENT_BYTES, MIN_UNSENT_BYTES, MAX_UNSENT_BYTES = 128 * 1024, 32 * 1024, 1024 * 1024
UNSENT_S, BULK_UNSENT_S = 0.01, 0.05
USER_TIMEOUT_MS = 20_000
# What is read at once doubles while its records are worked on in less than a lane's turn, else halves: then
# the loop's other work has its turn, whatever a peer's records are made of.
TURN_S, MIN_READ_BYTES, FIRST_READ_BYTES = 0.005, 4096, 64 * 1024
LINGER_S = 1.0  # how long a closed lane waits for the peer to have read why
_UNHEARD = "the peer closed the connection behind the handshake: another swarm key, or it has no room"


class LaneOwner(Protocol):
    def lane_events(self, lane: Lane, events: list[tuple[Event, Stream | None]]) -> None:
        """What happened on its streams."""

    def lane_lost(self, lane: Lane, error: PetaliteError, guilty: bool) -> None:
        """The lane ended and not by `close`; said once. `guilty`: the peer's bytes broke the protocol."""


def tune(sock: socket.socket) -> None:
    """Non-blocking, no Nagle, little unsent data in the kernel, BBR where the system permits it."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_option(sock, "TCP_NOTSENT_LOWAT", UNSENT_BYTES)
    set_option(sock, "TCP_USER_TIMEOUT", USER_TIMEOUT_MS)
    # To this machine itself nothing is lost, and BBR costs a quarter of the rate.
    if not ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback:
        set_option(sock, "TCP_CONGESTION", b"bbr")


def set_option(sock: socket.socket, name: str, value: int | bytes) -> None:
    """A TCP option, where the system has it and permits it."""
    number = getattr(socket, name, None)
    if number is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


class Lane:
    """Owns the socket from the handshake's end on."""

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        secured: Secured,
        scratch: Scratch,
        owner: LaneOwner,
    ) -> None:
        self.connection = connection
        self.allocate = scratch.take
        self.unsent_s = UNSENT_S
        self.last_received = monotonic()  # when a record last came
        self.ending = False  # closed or lost: nobody is told anything any more
        self.gone = asyncio.Event()  # the socket is closed
        self.on_gone: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._sock, self._fd = sock, sock.fileno()
        self._sealer, self._opener = secured.sealer, secured.opener
        self._scratch, self._owner = scratch, owner
        self._begun = self._pinged_at = self._ticked_at = self.last_received
        self._sent_before = self._waits = 0  # bytes of streams at the last tick; waits for room since then
        self._read_bytes = FIRST_READ_BYTES
        self._partial: memoryview | None = None  # a record, or its length, of which a part has come
        self._rest = memoryview(b"")  # the part of it that has not
        self._unsent: memoryview | None = None  # sealed, and not taken by the kernel
        self._blocked = False  # a writer is registered
        self._linger: asyncio.TimerHandle | None = None

    def start(self, leftover: bytes, unsent: bytes = b"") -> None:
        """Begin, with what came behind the handshake and what is to be sent to its end."""
        self._loop.add_reader(self._fd, self._on_readable)
        if unsent:
            self._unsent = memoryview(unsent)
            self._await_room()
        if leftover:
            # Never more than one read's worth; behind it the socket speaks for itself.
            self._scratch.receive[: len(leftover)] = leftover
            self._work_on(self._scratch.receive[: len(leftover)])

    # -- receiving ---------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        buffer, partial = self._scratch.receive, self._partial
        try:
            if partial is None:
                size = self._sock.recv_into(buffer, self._read_bytes)
            elif len(partial) > PREFIX_BYTES:
                # The rest of a record goes to its front, and is not copied again.
                size = self._sock.recvmsg_into([self._rest, buffer[: self._read_bytes]])[0]
            else:
                size = self._sock.recv_into(self._rest)
        except (BlockingIOError, InterruptedError):
            return
        except Exception as error:
            self._fail(error)
            return
        if not size:
            self._lose("the peer closed the connection")
        elif self.ending:
            return
        elif partial is None:
            self._work_on(buffer[:size])
        elif size < len(self._rest):
            self._rest = self._rest[size:]
        else:
            self._partial, size = None, size - len(self._rest)
            self._work_on(partial, buffer[:size])

    def _work_on(self, *pieces: memoryview) -> None:
        """Open the records in the pieces, and tell what they brought."""
        connection, now = self.connection, monotonic()
        try:
            for data in pieces:
                self._open_records(data, now)
            if monotonic() - now > TURN_S:
                self._read_bytes = max(self._read_bytes >> 1, MIN_READ_BYTES)
            elif len(data) == self._read_bytes:
                self._read_bytes = min(self._read_bytes << 1, RECEIVE_BYTES)
            if connection.events:
                self._notify()
        except RemoteProtocolError as error:
            self._end(error, guilty=True)
            return
        except Exception as error:
            self._fail(error)
            return
        if connection.state is CLOSED:
            code, reason = connection.close_code, connection.close_reason
            self._end(from_wire(code, reason) if code else ConnectionLost(f"the peer closed: {reason}"))
        elif connection.sender.waiting:
            self.flush()

    def _open_records(self, data: memoryview, now: float) -> None:
        connection, opener, position, size = self.connection, self._opener, 0, len(data)
        receiver = connection.receiver
        while (begin := position + PREFIX_BYTES) <= size:
            (length,) = LENGTH.unpack_from(data, position)
            if not TAG_BYTES < length <= MAX_PLAINTEXT_BYTES + TAG_BYTES:
                raise RemoteProtocolError(f"a record cannot have {length} bytes")
            end = begin + length
            if end > size:
                self._keep_partial(data[position:], PREFIX_BYTES + length)
                return
            target = receiver.target(length - TAG_BYTES)
            plain = data[begin : end - TAG_BYTES] if target is None else target
            opener.open(data[begin:end], plain)
            connection.receive(plain, now)
            self.last_received, position = now, end
        if position < size:
            self._keep_partial(data[position:], PREFIX_BYTES)

    def _keep_partial(self, front: memoryview, size: int) -> None:
        self._partial = memoryview(bytearray(size))
        self._partial[: len(front)] = front
        self._rest = self._partial[len(front) :]

    def _notify(self) -> None:
        events = self.connection.events[:]
        self.connection.events.clear()
        self._owner.lane_events(self, events)

    # -- sending -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the core wants sent, now if the kernel has room, else as soon as it has."""
        if not self._blocked and self._fd >= 0:
            try:
                self._pump()
            except Exception as error:
                self._fail(error)

    def write(self, stream: Stream, header: bytes, buffers: Sequence[Segment], fin: bool) -> None:
        """Queue a message and flush. A small one that nothing stands before skips the queue."""
        record = None
        if not self._blocked and self._fd >= 0:
            record = self.connection.sender.express(stream, header, buffers, fin)
        if record is None:
            self.connection.sender.write(stream, header, buffers, fin)
            self.flush()
            return
        try:
            if not self._send(self._sealer.sealed(record)):
                self._await_room()
        except Exception as error:
            self._fail(error)

    def _pump(self) -> None:
        sender = self.connection.sender
        for _ in range(BATCHES_PER_TURN):
            records = sender.next_records(BATCH_BYTES) if sender.waiting else ()
            if not records or not self._transmit(records):
                break
            if self.connection.events:
                self._notify()
        if self._unsent is not None or (records and sender.waiting):
            self._await_room()
            self._notify()
        elif self.ending:  # the reason is sent; now the peer may end its side
            self._sock.shutdown(socket.SHUT_WR)

    def _await_room(self) -> None:
        if not self._blocked:
            self._blocked = True
            self._waits += 1
            self._loop.add_writer(self._fd, self._on_writable)

    def _transmit(self, records: Sequence[Segment]) -> bool:
        """Seal records and send them; whether the kernel took everything."""
        buffer, end = self._scratch.send, 0
        for plain in records:
            end += self._sealer.seal(plain, buffer[end:])
        return self._send(buffer[:end])

    def _send(self, sealed: Segment) -> bool:
        """Whether the kernel took everything; the rest is kept."""
        try:
            sent = self._sock.send(sealed)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent == len(sealed):
            self._unsent = None
            return True
        rest = memoryview(sealed)[sent:]
        self._unsent = rest if sealed is self._unsent else memoryview(bytes(rest))  # the buffer is all lanes'
        return False

    def _on_writable(self) -> None:
        try:
            if self._unsent is not None and not self._send(self._unsent):
                return
            self._blocked = False
            self._loop.remove_writer(self._fd)
            self._pump()
        except Exception as error:
            self._fail(error)

    # -- ending ------------------------------------------------------------------------------------

    def tick(self, now: float, ping_every_s: float, dead_after_s: float) -> None:
        """Ask for a sign of life from time to time; give the peer up if it owes one too long."""
        connection, silent_s = self.connection, now - self.last_received
        self._fit_unsent(now)
        if connection.pinging:
            if silent_s > max(dead_after_s, 8 * connection.receiver.rtt_s):
                self._lose(f"no sign of life for {silent_s:.1f} s", by_peer=False)
        elif now - self._pinged_at >= ping_every_s:
            self._pinged_at = now
            connection.ping(now)
            self.flush()

    def _fit_unsent(self, now: float) -> None:
        """Let the kernel hold what it sends in `unsent_s`, if it was the kernel that held us back."""
        sent, elapsed_s = self.connection.sender.sent - self._sent_before, now - self._ticked_at
        if self._waits > 1 and elapsed_s > 0 and self._fd >= 0:
            unsent = min(max(MIN_UNSENT_BYTES, int(sent / elapsed_s * self.unsent_s)), MAX_UNSENT_BYTES)
            set_option(self._sock, "TCP_NOTSENT_LOWAT", unsent)
        self._sent_before, self._ticked_at, self._waits = self.connection.sender.sent, now, 0

    def close(self, code: ErrorCode, reason: str) -> None:
        """End it from this side; the peer hears why."""
        if not self.ending:
            self.ending = True
            self.connection.close(code, reason)
            # To close with unread bytes would send RST, which can overtake the reason and destroy it.
            self._linger = self._loop.call_later(LINGER_S, self.abort)
            self.flush()

    def abort(self) -> None:
        """End it at once."""
        self.ending = True
        if self._linger is not None:
            self._linger.cancel()
        if self._fd >= 0:
            self.connection.close(ErrorCode.OK, "")  # who waits for a place on it looks for another lane
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._sock.close()
            self._fd = -1
            self._unsent = self._partial = None
            self.gone.set()
            self.on_gone()

    def _end(self, error: PetaliteError, guilty: bool = False) -> None:
        """The peer closed, or its bytes broke a rule: say the last word, then tell the owner."""
        if not self.ending:
            self.close(code_of(error), str(error))
            self._notify()
            self._owner.lane_lost(self, error, guilty)

    def _fail(self, error: Exception) -> None:
        """The socket failed; or something in here did, and what was to be sent or told is lost with it."""
        if isinstance(error, OSError):
            self._lose(f"the connection broke: {error.strerror or error}")
        else:
            logger.error("a lane failed", exc_info=error)
            self._lose("this end of the connection failed", by_peer=False)

    def _lose(self, reason: str, by_peer: bool = True) -> None:
        """It ended without a word."""
        told = self.ending
        self.abort()
        if not told:
            if by_peer and self.last_received == self._begun:
                reason = _UNHEARD
            self._owner.lane_lost(self, ConnectionLost(reason), guilty=False)
