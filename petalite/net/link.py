"""A link: the one logical connection to a peer, its lane, its calls, its signs of life.

Knows lanes and calls; how a link comes about (dialling, accepting, handshakes) is the host's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from petalite.errors import ConnectionLost, DeadlineExceeded, ErrorCode, PetaliteError, ShuttingDown
from petalite.net.connection import Event
from petalite.net.handshake import Hello
from petalite.net.identity import PeerId
from petalite.net.lane import Lane
from petalite.net.messages import Buffer, Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Body, Call
from petalite.net.streams import Priority, Stream


@dataclass(frozen=True, slots=True)
class Timers:
    """When a link is asked whether it lives, and when it is given up."""

    ping_every_s: float = 5.0  # which also measures the round trip
    dead_after_s: float = 15.0  # of silence, with a ping unanswered; or 8 round trips, if that is longer
    idle_close_s: float = 600.0  # without a call, the end that dialled closes
    supplanted_s: float = 2.0  # a link that gave way to another is kept so long after its last call


class Link:
    """Created with its handshake done; `start` hands it its lane. `on_call` gets the calls that the peer
    opens, `on_lost` hears of the end, once, whoever brought it about."""

    def __init__(
        self,
        peer: PeerId,
        hello: Hello,
        remote_address: Multiaddr,
        outbound: bool,
        on_call: Callable[[Call], None],
        on_lost: Callable[[Link, PetaliteError], None],
        timers: Timers,
    ) -> None:
        self.peer = peer
        self.hello = hello
        self.remote_address = remote_address  # where its packets come from, without its id
        self.outbound = outbound
        self.loop = asyncio.get_running_loop()
        self.supplanted = False  # another link to the peer is used for new calls
        self.error: PetaliteError | None = None  # why it ended
        self._on_call = on_call
        self._on_lost = on_lost
        self._timers = timers
        self._lane: Lane
        self._room: list[asyncio.Future[None]] = []
        self._pinged_at = monotonic()
        self._pinging = False  # whether a ping is unanswered
        self._last_call = monotonic()

    def __repr__(self) -> str:
        return f"<Link {'to' if self.outbound else 'from'} {self.peer.short()} at {self.remote_address}>"

    def start(self, lane: Lane, leftover: bytes) -> None:
        self._lane = lane
        lane.start(leftover)

    @property
    def closed(self) -> bool:
        return self.error is not None

    @property
    def usable(self) -> bool:
        """Whether new calls may be opened."""
        return self.error is None and not self._lane.connection.exhausted

    @property
    def rtt_s(self) -> float:
        """The smoothed round trip."""
        return self._lane.connection.rtt_s

    @property
    def calls(self) -> int:
        """How many calls are under way, of either side."""
        return len(self._lane.connection.streams)

    # -- calls -------------------------------------------------------------------------------------

    async def open(self, method: str, priority: Priority, timeout_s: float | None) -> Call:
        """A new call, once the peer has room for its stream. Nothing is sent yet but that it opens."""
        connection = self._lane.connection
        while self.error is None and not connection.can_open:
            if connection.exhausted:
                raise ShuttingDown(f"{self.peer.short()} takes no more calls on this connection")
            await self._wait_for_room(timeout_s)
        if self.error is not None:
            raise self.error
        call = Call(self, self._lane, connection.open_stream(priority), method)
        self._last_call = monotonic()
        call.set_deadline(timeout_s)
        return call

    async def call(
        self,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float | None,
        priority: Priority = Priority.NORMAL,
    ) -> Message:
        """One request, one answer."""
        call = await self.open(method, priority, timeout_s)
        try:
            call.begin(body, buffers, fin=True)
            return await call.receive() or Message()
        finally:
            call.end()

    async def _wait_for_room(self, timeout_s: float | None) -> None:
        waiter = self.loop.create_future()
        self._room.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            raise DeadlineExceeded(f"{self.peer.short()} had no room for another call") from None

    # -- what the lane tells -----------------------------------------------------------------------

    def lane_events(self, lane: Lane, events: list[tuple[Event, Stream | None]]) -> None:
        for event, stream in events:
            if stream is None:
                if event is Event.ROOM or event is Event.GOAWAY:
                    self._wake_room()
                elif event is Event.PONG:
                    self._pinging = False
                continue
            if event is Event.OPENED:
                self._last_call = monotonic()
                self._on_call(Call(self, lane, stream))
                continue
            if event is Event.READABLE:
                stream.announced = False
            if stream.owner is not None:
                stream.owner.on_event(event)

    def lane_lost(self, lane: Lane, error: PetaliteError) -> None:
        self._finish(error)

    def _wake_room(self) -> None:
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- life and end ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Ask for a sign of life when it has been silent, and give it up when none comes."""
        if self.error is not None:
            return
        silent_s = now - self._lane.last_received
        if not self._pinging:
            if now - self._pinged_at >= self._timers.ping_every_s:
                self._pinged_at, self._pinging = now, True
                self._lane.connection.ping(now)
                self._lane.flush()
        elif silent_s > max(self._timers.dead_after_s, 8 * self.rtt_s):
            self.abort(ConnectionLost(f"no sign of life for {silent_s:.1f} s"))
            return
        if self.calls:
            self._last_call = now
            return
        unused_s = now - self._last_call
        if self.supplanted and unused_s > self._timers.supplanted_s:
            self.close(ErrorCode.SUPPLANTED, "another connection is used instead")
        elif self.outbound and unused_s > self._timers.idle_close_s:
            self.close(ErrorCode.IDLE, f"no call for {unused_s:.0f} s")

    def close(self, code: ErrorCode = ErrorCode.OK, reason: str = "") -> None:
        """End it and say why; calls that are under way fail with ConnectionLost."""
        if self.error is None:
            self._lane.close(code, reason)
            self._finish(ConnectionLost(f"closed here: {reason or code.name}"))

    def abort(self, error: PetaliteError) -> None:
        """End it without a word: the peer would not hear it."""
        if self.error is None:
            self._lane.abort()
            self._finish(error)

    async def wait_gone(self) -> None:
        """Until the peer has had its chance to read why the link was closed."""
        await self._lane.gone.wait()

    def leave(self, reason: str) -> None:
        """Take no more calls; those that are under way go on."""
        if self.usable:
            self._lane.connection.goaway(ErrorCode.SHUTDOWN, reason)
            self._lane.flush()

    def _finish(self, error: PetaliteError) -> None:
        if self.error is not None:
            return
        self.error = error
        self._wake_room()
        for stream in list(self._lane.connection.streams.values()):
            if stream.owner is not None:
                stream.owner.lost(error)
        self._on_lost(self, error)
