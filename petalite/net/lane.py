"""A lane: one TCP connection under one `Connection` core, driven by the loop's readers and writers.

On our own non-blocking socket we know what the kernel took: the core chooses its next frames only when there
is room for them, so an urgent frame waits behind at most `TCP_NOTSENT_LOWAT` bytes. Records are sealed from
the sender's memory into a buffer that the host's lanes share, and opened where they were received or straight
into the reader's memory. Knows sockets and records; knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import socket
import sys
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from time import monotonic
from typing import Protocol

from petalite.errors import ConnectionLost, ErrorCode, PetaliteError, RemoteProtocolError, code_of, from_wire
from petalite.net.connection import Connection
from petalite.net.frames import ALIGNED_BYTES
from petalite.net.noise import TAG_BYTES
from petalite.net.records import MAX_PLAINTEXT_BYTES, OVERHEAD_BYTES, PREFIX_BYTES, Opener, Sealer
from petalite.net.states import Event
from petalite.net.streams import Stream

RECEIVE_BYTES = 512 * 1024
BATCH_BYTES = 128 * 1024
SEND_BYTES = BATCH_BYTES + 2 * (
    MAX_PLAINTEXT_BYTES + OVERHEAD_BYTES
)  # control frames, and a frame begun late
BATCHES_PER_TURN = 4  # then the loop's other work has its turn
# Unsent bytes that the kernel may hold: to begin with, and then what the lane sends in so long, within
# bounds. They are what an urgent frame waits behind. Too few, and the socket runs dry between two of our
# turns: BBR then takes the lane for one that has little to say, never leaves its start-up, and fills the
# narrowest queue on the way, whoever else's bytes stand in it. Nothing urgent is sent on a bulk lane.
UNSENT_BYTES, MIN_UNSENT_BYTES, MAX_UNSENT_BYTES = 128 * 1024, 32 * 1024, 1024 * 1024
UNSENT_S, BULK_UNSENT_S = 0.01, 0.05
USER_TIMEOUT_MS = 20_000
TURN_S = 0.005  # how long one lane's records are worked on before the loop's other work has its turn
LINGER_S = 1.0  # how long a closed lane waits for the peer to have read why
POOLED_BYTES = 256 * 1024  # buffers from this size on are pooled,
POOL_BYTES = 128 * 1024 * 1024  # so many bytes in all at most,
POOL_S = 10.0  # and so long after they were last taken
_KEPT_BUFFERS = 4
_SMALL_LEFTOVER_BYTES = 16 * 1024
_UNHEARD = "the peer closed the connection behind the handshake: another swarm key, or it has no room"
_MIN_BOX_BYTES = TAG_BYTES + 1


class Scratch:
    """Buffers that the lanes of one host share, so that a quiet connection holds none."""

    def __init__(self) -> None:
        self.receive = _untouched(RECEIVE_BYTES)
        self.pool = BufferPool()
        self._free: list[memoryview] = []

    def borrow(self) -> memoryview:
        """A buffer to seal a batch into; whoever could not send it all keeps it until then."""
        return self._free.pop() if self._free else _untouched(SEND_BYTES)

    def give_back(self, buffer: memoryview) -> None:
        if len(self._free) < _KEPT_BUFFERS:
            self._free.append(buffer)


def _untouched(size: int) -> memoryview:
    """Memory that costs nothing until it is written to."""
    return memoryview(mmap.mmap(-1, size))


class BufferPool:
    """Memory for large messages, given out again when nobody refers to it any more.

    Fresh pages cost the kernel more than decryption costs us: 16 MiB of them take some 10 ms. What is given
    out may hold old bytes, so it is for those who fill all of it before anybody reads it; what is fresh takes
    up no memory before it is filled.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[mmap.mmap, float]]] = {}
        self._kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """Writable memory of that size; a reference to the view, or to a slice of it, keeps it taken."""
        if size < POOLED_BYTES:
            return memoryview(bytearray(size))
        kept = self._kept.setdefault(size, [])
        for index, (buffer, _) in enumerate(kept):
            if sys.getrefcount(buffer) == 3:  # the list's, the loop's and the question's
                kept[index] = (buffer, monotonic())
                return memoryview(buffer)
        buffer = mmap.mmap(-1, size)
        if self._kept_bytes + size <= POOL_BYTES:
            self._kept_bytes += size
            kept.append((buffer, monotonic()))
        return memoryview(buffer)

    def trim(self, now: float) -> None:
        """Let go of what was not taken for a while."""
        for size, kept in list(self._kept.items()):
            fresh = [(buffer, used_at) for buffer, used_at in kept if now - used_at < POOL_S]
            self._kept_bytes -= size * (len(kept) - len(fresh))
            if fresh:
                self._kept[size] = fresh
            else:
                del self._kept[size]


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
    if not _is_local(sock):
        set_option(sock, "TCP_CONGESTION", b"bbr")


def set_option(sock: socket.socket, name: str, value: int | bytes) -> None:
    """A TCP option, where the system has it and permits it."""
    number = getattr(socket, name, None)
    if number is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def _is_local(sock: socket.socket) -> bool:
    """Whether the other end is this machine: nothing is lost there, and BBR costs a quarter of the rate."""
    return ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback


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
        self.allocate = scratch.pool.take
        self.unsent_s = UNSENT_S
        self.last_received = monotonic()  # when a record last came
        self._begun = self.last_received
        self._pinged_at = self._ticked_at = self.last_received
        self._sent_before = 0  # bytes of streams, at the tick before
        self._waits = 0  # for room in the kernel, since then
        self._carry = b""  # half of a record's length
        self._partial: memoryview | None = None  # a record of which a part has come
        self._partial_rest = memoryview(b"")  # its part that has not
        self._aside: memoryview | None = None  # received and not yet worked on
        self._buffer: memoryview | None = None  # borrowed, while not all of it is sent
        self._unsent: memoryview | None = None
        self._blocked = False  # a writer is registered
        self._ending = False  # closed or lost: nobody is told anything any more
        self._linger: asyncio.TimerHandle | None = None
        self.gone = asyncio.Event()  # the socket is closed
        self.on_gone: Callable[[], None] | None = None

    def start(self, leftover: bytes) -> None:
        """Begin, with what came behind the handshake."""
        self._loop.add_reader(self._fd, self._on_readable)
        if leftover:
            # Never more than one read's worth; behind it the socket speaks for itself.
            self._scratch.receive[: len(leftover)] = leftover
            self._work_on(self._scratch.receive[: len(leftover)])

    # -- receiving ---------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            if self._partial is None and not self._carry:
                size = self._sock.recv_into(self._scratch.receive) or -1
            else:
                size = self._receive_on()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")
            return
        if size < 0:
            self._lose("the peer closed the connection")
        elif not self._ending:
            if self._partial is None:
                self._work_on(self._scratch.receive[:size])
            elif not self._partial_rest:
                whole, self._partial = self._partial, None
                self._work_on(whole, self._scratch.receive[:size])

    def _receive_on(self) -> int:
        """Read on where a record was cut: how many bytes stand in the shared buffer; -1 at the end.

        The rest of a record whose front is already here goes to that front, and is not copied again.
        """
        buffer = self._scratch.receive
        if self._partial is not None:
            size: int = self._sock.recvmsg_into([self._partial_rest, buffer])[0]
            missing = len(self._partial_rest)
            self._partial_rest = self._partial_rest[size:]
            return max(0, size - missing) if size else -1
        carried = len(self._carry)
        buffer[:carried] = self._carry
        size = self._sock.recv_into(buffer[carried:])
        self._carry = b""
        return size + carried if size else -1

    def _resume(self) -> None:
        """Go on with what was set aside, before anything more is read."""
        aside, self._aside = self._aside, None
        if aside is not None and not self._ending:
            self._work_on(aside)
            if self._aside is None and not self._ending:
                self._loop.add_reader(self._fd, self._on_readable)

    def _work_on(self, *pieces: memoryview) -> None:
        """Open the records in the pieces, and tell what they brought."""
        connection = self.connection
        try:
            for data in pieces:
                self._open_records(data)
        except RemoteProtocolError as error:
            connection.close(code_of(error), str(error))
            self._notify()
            self._end(error, guilty=True)
            return
        self._notify()
        if connection.closed:
            code, reason = connection.close_code, connection.close_reason
            self._end(from_wire(code, reason) if code else ConnectionLost(f"the peer closed: {reason}"))
        elif connection.wants_write:
            self.flush()

    def _open_records(self, data: memoryview) -> None:
        connection, opener = self.connection, self._opener
        now, position, length, size = monotonic(), 0, 0, len(data)
        while size - position >= PREFIX_BYTES:
            begin = position + PREFIX_BYTES
            length = data[position] << 8 | data[position + 1]
            if length < _MIN_BOX_BYTES:
                raise RemoteProtocolError(f"a record of {length} bytes is too short for its tag")
            end = begin + length
            if end > size:
                break
            plain_bytes = length - TAG_BYTES
            target = connection.payload_target(plain_bytes) if plain_bytes >= ALIGNED_BYTES else None
            if target is None:
                plain = data[begin : end - TAG_BYTES]
                opener.open(data[begin:end], plain)
                connection.receive(plain, now)
            else:
                opener.open(data[begin:end], target)
                connection.payload_received(plain_bytes, now)
            self.last_received, position = now, end
            if position < size and monotonic() - now > TURN_S:
                self._aside = memoryview(bytearray(data[position:]))
                self._loop.remove_reader(self._fd)
                self._loop.call_soon(self._resume)
                return
        rest = size - position
        if rest >= PREFIX_BYTES:
            self._partial = memoryview(bytearray(PREFIX_BYTES + length))
            self._partial[:rest] = data[position:]
            self._partial_rest = self._partial[rest:]
        elif rest:
            self._carry = bytes(data[position:])

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

    def write(self, stream: Stream, segments: list[bytes | memoryview], fin: bool) -> None:
        """Queue bytes and flush. A small message that nothing stands before skips the queue."""
        record = None if self._blocked or self._fd < 0 else self.connection.express(stream, segments, fin)
        if record is None:
            self.connection.write(stream, segments, fin)
            self.flush()
            return
        try:
            buffer = self._scratch.borrow()
            if not self._send(buffer[: self._sealer.seal(record, buffer)], buffer):
                self._await_room()
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")

    def _pump(self) -> None:
        connection = self.connection
        for _ in range(BATCHES_PER_TURN):
            records = connection.next_records(BATCH_BYTES) if connection.wants_write else ()
            if not records or not self._transmit(records):
                break
            if connection.events:
                self._notify()
        if self._unsent is not None or (records and connection.wants_write):
            self._await_room()
            self._notify()
        elif self._ending:  # the reason is sent; now the peer may end its side
            self._sock.shutdown(socket.SHUT_WR)

    def _await_room(self) -> None:
        if not self._blocked:
            self._blocked = True
            self._waits += 1
            self._loop.add_writer(self._fd, self._on_writable)

    def _transmit(self, records: Iterable[bytes | memoryview]) -> bool:
        """Seal records and send them; whether the kernel took everything."""
        buffer, end = self._scratch.borrow(), 0
        for plain in records:
            end += self._sealer.seal(plain, buffer[end:])
        return self._send(buffer[:end], buffer)

    def _send(self, unsent: memoryview, buffer: memoryview | None) -> bool:
        """Whether the kernel took everything. `buffer` is what was borrowed; it is kept until then."""
        try:
            sent = self._sock.send(unsent)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent == len(unsent):
            self._unsent = self._buffer = None
            if buffer is not None:
                self._scratch.give_back(buffer)
            return True
        self._unsent, self._buffer = unsent[sent:], buffer
        if buffer is not None and len(unsent) - sent <= _SMALL_LEFTOVER_BYTES:
            self._unsent, self._buffer = memoryview(bytes(self._unsent)), None
            self._scratch.give_back(buffer)
        return False

    def _on_writable(self) -> None:
        try:
            if self._unsent is not None and not self._send(self._unsent, self._buffer):
                return
            self._blocked = False
            self._loop.remove_writer(self._fd)
            self._pump()
        except OSError as error:
            self._lose(f"the connection broke: {error.strerror or error}")

    # -- ending ------------------------------------------------------------------------------------

    def tick(self, now: float, ping_every_s: float, dead_after_s: float) -> str | None:
        """Ask for a sign of life from time to time; why to give the peer up, if it owes one too long."""
        connection, silent_s = self.connection, now - self.last_received
        self._fit_unsent(now)
        if connection.pinging:
            if silent_s > max(dead_after_s, 8 * connection.rtt_s):
                return f"no sign of life for {silent_s:.1f} s"
        elif now - self._pinged_at >= ping_every_s:
            self._pinged_at = now
            connection.ping(now)
            self.flush()
        return None

    def _fit_unsent(self, now: float) -> None:
        """Let the kernel hold what it sends in `unsent_s`, if it was the kernel that held us back."""
        sent, elapsed_s = self.connection.sent - self._sent_before, now - self._ticked_at
        if self._waits > 1 and elapsed_s > 0 and self._fd >= 0:
            unsent = min(max(MIN_UNSENT_BYTES, int(sent / elapsed_s * self.unsent_s)), MAX_UNSENT_BYTES)
            set_option(self._sock, "TCP_NOTSENT_LOWAT", unsent)
        self._sent_before, self._ticked_at, self._waits = self.connection.sent, now, 0

    @property
    def ending(self) -> bool:
        return self._ending

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
            if self.on_gone is not None:
                self.on_gone()

    def _end(self, error: PetaliteError, guilty: bool = False) -> None:
        """The peer closed, or its bytes broke a rule: say the last word, then tell the owner."""
        if not self._ending:
            self._linger_then_abort()
            self._owner.lane_lost(self, error, guilty)

    def _linger_then_abort(self) -> None:
        # To close with unread bytes would send RST, which can overtake the reason and destroy it.
        self._ending = True
        self._linger = self._loop.call_later(LINGER_S, self.abort)
        self.flush()

    def _lose(self, reason: str) -> None:
        told = self._ending
        self.abort()
        if not told:
            heard = self.last_received != self._begun
            self._owner.lane_lost(self, ConnectionLost(reason if heard else _UNHEARD), guilty=False)
