"""A link: the one logical connection to a peer. Its lanes, its calls, its signs of life.

The interactive lane is the link: they begin and end together. Bulk has a lane of its own, another TCP
connection, opened when it is first needed, so that a decode step never stands behind a prefill's lost packet;
it may end alone. Knows lanes and calls; how a lane comes about (dialling, accepting, handshakes) is the
host's matter.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from petalite.errors import ConnectionLost, DeadlineExceeded, ErrorCode, PetaliteError, ShuttingDown, code_of
from petalite.net.lane import BULK_UNSENT_S, Lane
from petalite.net.limits import Budget, TokenBucket
from petalite.net.rpc import Call
from petalite.net.states import OPENED, Event
from petalite.net.streams import BULK, Priority, Stream

if TYPE_CHECKING:
    from petalite.net.dialing import Established
    from petalite.net.host import Host

MAX_LANES = 4
_BULK_RETRY_S = 60.0  # after a bulk lane could not be opened


@dataclass(frozen=True, slots=True)
class Timers:
    """When a link is asked whether it lives, and when it is given up."""

    ping_every_s: float = 5.0  # which also measures the round trip
    dead_after_s: float = 15.0  # of silence, with a ping unanswered; or 8 round trips, if that is longer
    idle_close_s: float = 600.0  # without a call, the end that dialled closes
    supplanted_s: float = 2.0  # a link that gave way to another is kept so long after its last call


class Link:
    """Created with its handshake done; `attach` hands it its first lane, and perhaps more."""

    def __init__(self, host: Host, established: Established, memory: Budget) -> None:
        """`memory` is the host's, of which the peer may have a part."""
        self.peer, self.hello = established.secured.peer_id, established.secured.hello
        self.remote_address = established.address  # where its packets come from, without its id
        self.outbound = established.handshake.initiator
        self.memory = Budget(host.settings.limits.peer_memory_bytes, memory)  # for what the peer sends
        self.loop = asyncio.get_running_loop()
        self.supplanted = False  # another link to the peer is used for new calls
        self.error: PetaliteError | None = None  # why it ended
        self.rates: dict[str, TokenBucket] = {}  # of the methods that the peer calls
        self.lanes: list[Lane] = []  # the interactive one first
        self._host, self._timers = host, host.settings.timers
        self._changed = asyncio.Event()  # set when there may be room for a stream, or never again
        self._used_at, self._traffic = monotonic(), 0  # bytes of messages, both ways
        self._bulk_dial: asyncio.Task[None] | None = None
        self._bulk_retry_at = 0.0

    def __repr__(self) -> str:
        return f"<Link {'to' if self.outbound else 'from'} {self.peer.short()} at {self.remote_address}>"

    def attach(self, lane: Lane, established: Established) -> None:
        """Use this lane too; the first is the interactive one."""
        if self.lanes:
            lane.unsent_s = BULK_UNSENT_S
        self.lanes.append(lane)
        lane.start(established.handshake.leftover, established.unsent)

    @property
    def closed(self) -> bool:
        return self.error is not None

    @property
    def usable(self) -> bool:
        """Whether new calls may be opened."""
        return self.error is None and not self.lanes[0].connection.exhausted

    @property
    def rtt_s(self) -> float:
        """The smoothed round trip."""
        return self.lanes[0].connection.receiver.rtt_s

    @property
    def calls(self) -> int:
        """How many calls are under way, of either side."""
        return sum(len(lane.connection.streams) for lane in self.lanes)

    # -- calls -------------------------------------------------------------------------------------

    async def lane_for(self, priority: Priority, timeout_s: float | None) -> Lane:
        """Where to open a call of this class, once there is room for it."""
        try:
            async with asyncio.timeout(timeout_s):
                lane = self.lanes[0] if priority is not BULK else await self._bulk_lane()
                while self.error is None and not lane.connection.can_open:
                    if not lane.connection.exhausted:
                        self._changed.clear()
                        await self._changed.wait()
                    elif lane is self.lanes[0]:
                        raise ShuttingDown(f"{self.peer.short()} takes no more calls on this connection")
                    else:
                        lane = self.lanes[0]
        except TimeoutError:
            raise DeadlineExceeded(f"{self.peer.short()} had no room for another call") from None
        if self.error is not None:
            raise self.error
        return lane

    async def _bulk_lane(self) -> Lane:
        """The lane for bulk; the interactive one where there can be no other."""
        if len(self.lanes) == 1 and self._bulk_dial is None and monotonic() >= self._bulk_retry_at:
            self._bulk_dial = self._host.spawn(self._dial_bulk())
        if self._bulk_dial is not None:
            await asyncio.wait([self._bulk_dial])
        return self.lanes[-1]

    async def _dial_bulk(self) -> None:
        try:
            await self._host.open_bulk_lane(self)
        except (PetaliteError, OSError) as error:
            self._bulk_retry_at = monotonic() + _BULK_RETRY_S
            self._host.journal.note("lane:failed", self.peer, reason=str(error))
        finally:
            self._bulk_dial = None

    # -- what lanes tell ---------------------------------------------------------------------------

    def lane_events(self, lane: Lane, events: list[tuple[Event, Stream | None]]) -> None:
        for event, stream in events:
            if stream is None:
                self._changed.set()
            elif event is OPENED:
                self._host.handle(Call(self, lane, stream, methods=self._host.methods))
            elif stream.owner is not None:
                stream.owner.on_event(event)

    def lane_lost(self, lane: Lane, error: PetaliteError, guilty: bool) -> None:
        if guilty or lane is self.lanes[0]:
            self.finish(error, guilty)
        elif self.error is None:
            self.lanes.remove(lane)
            self._fail_calls(lane, error)
            self._host.journal.note("lane:lost", self.peer, code_of(error), reason=str(error))

    def _fail_calls(self, lane: Lane, error: PetaliteError) -> None:
        """A lane is gone, and its calls with it."""
        self._changed.set()
        lane.connection.receiver.end()
        for stream in list(lane.connection.streams.values()):
            if stream.owner is not None:
                stream.owner.lost(error)

    # -- life and end ------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Give up what gives no sign of life, and close what nobody uses."""
        for lane in self.lanes[:]:
            lane.tick(now, self._timers.ping_every_s, self._timers.dead_after_s)
            lane.connection.receiver.give_back()
            for stream in lane.connection.streams.values():
                if stream.owner is not None:
                    stream.owner.watch_deadline()
        traffic = sum(lane.connection.sender.sent + lane.connection.receiver.received for lane in self.lanes)
        if self.error is not None or self.calls or traffic != self._traffic:
            self._used_at, self._traffic = now, traffic
        unused_s = now - self._used_at
        if self.supplanted and unused_s > self._timers.supplanted_s:
            self.close(ErrorCode.SUPPLANTED, "another connection is used instead")
        elif self.outbound and unused_s > self._timers.idle_close_s:
            self.close(ErrorCode.IDLE, f"no call for {unused_s:.0f} s")

    def close(self, code: ErrorCode = ErrorCode.OK, reason: str = "") -> None:
        """End it and say why; calls that are under way fail with ConnectionLost."""
        if self.error is None:
            for lane in self.lanes:
                lane.close(code, reason)
            self.finish(ConnectionLost(f"closed here: {reason or code.name}"))

    def leave(self, reason: str) -> None:
        """Take no more calls; those that are under way go on."""
        for lane in self.lanes:
            if not lane.connection.exhausted:
                lane.connection.goaway(ErrorCode.SHUTDOWN, reason)
                lane.flush()

    def finish(self, error: PetaliteError, guilty: bool = False) -> None:
        """End it; to a peer that would not hear it without a word."""
        if self.error is not None:
            return
        self.error = error
        for lane in self.lanes:
            if not lane.ending:
                lane.abort()
            self._fail_calls(lane, error)
        self._host.on_lost(self, error, guilty)
