"""The host: this process's one place in the swarm's network. Listens, dials, keeps one link per peer, serves
calls.

Everything that runs has an end in `close`: handshakes, handlers and the ticker are tasks of the host. Knows
links, handshakes and addresses; knows nothing of what the calls are about.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from petalite.errors import (
    Banned,
    ConnectionLost,
    ErrorCode,
    InvalidAddress,
    InvalidArgument,
    PetaliteError,
    ShuttingDown,
    Unreachable,
    code_of,
)
from petalite.net.accepting import Acceptor
from petalite.net.connection import Connection
from petalite.net.credit import Windows
from petalite.net.dialing import AddressBook, Dialler, Established
from petalite.net.handshake import Handshake, Hello
from petalite.net.identity import Identity, PeerId
from petalite.net.journal import Journal
from petalite.net.lane import Lane, LaneOwner, Scratch
from petalite.net.limits import VIOLATION, Budget, Gate, Limits, prefix_of
from petalite.net.link import MAX_LANES, Link, Timers
from petalite.net.messages import Buffer, Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Body, Call, Handler, Method, MethodPolicy
from petalite.net.streams import Priority

logger = logging.getLogger(__name__)

T = TypeVar("T")

AGENT = "petalite/0.1"
CONNECT_TIMEOUT_S = 10.0
_TICK_S = 1.0
_INTERACTIVE, _BULK = 0, 1  # lanes, as a Hello names them


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a host is built with."""

    windows: Windows = field(default_factory=Windows)
    timers: Timers = field(default_factory=Timers)
    limits: Limits = field(default_factory=Limits)


class Host:
    """Use it as an async context manager, or call `close`."""

    def __init__(
        self,
        identity: Identity,
        settings: HostSettings | None = None,
        *,
        swarm_key: bytes | None = None,
    ) -> None:
        """`swarm_key`: the 32 bytes that every member of a private swarm has, and nobody else."""
        if swarm_key is not None and len(swarm_key) != 32:
            raise InvalidArgument(f"a swarm key has 32 bytes, found {len(swarm_key)}")
        self.identity = identity
        self.settings = settings or HostSettings()
        self.addresses: list[Multiaddr] = []  # where we listen, with our peer id
        self.book = AddressBook()
        self.journal = Journal()
        self._swarm_key = swarm_key
        self._instance = os.urandom(16)
        self._gate = Gate(self.settings.limits)
        self._methods: dict[str, Method] = {}
        self._links: dict[PeerId, Link] = {}
        self._all_links: set[Link] = set()
        self._lanes: set[Lane] = set()  # whose sockets are open; some only wait for the peer to hear the end
        self._dials: dict[PeerId, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._scratch = Scratch()
        self._dialler = Dialler(self.book, self.settings.limits.handshake_s)
        self._acceptor = Acceptor(
            self._gate, self.journal, self.spawn, lambda: self._handshake(initiator=False), self._welcome
        )
        self._ended_bytes = [0, 0]  # sent and received on lanes that are gone
        self._loop: asyncio.AbstractEventLoop
        self._started = self._draining = self._closed = False

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    # -- serving -----------------------------------------------------------------------------------

    def serve(
        self,
        method: str,
        handler: Handler,
        *,
        request: type | None = None,
        policy: MethodPolicy | None = None,
    ) -> None:
        """Answer calls to `method` with `await handler(call)`; what it returns is the reply.

        With `request`, a frozen dataclass: `await handler(call, request)`, checked at the border. A handler
        that streams uses `call.send` and `call.receive` and returns None. A handler that serves a call whose
        caller gave up is cancelled, or gets the error where it waits for the call.
        """
        if method in self._methods:
            raise InvalidArgument(f"{method!r} is already served")
        self._methods[method] = Method(handler, request, policy or MethodPolicy())

    async def listen(self, addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
        """Accept connections there. Returns the addresses with the actual ports and our peer id."""
        self._start()
        bound: list[Multiaddr] = []
        for address in addresses:
            bound += [place.with_peer(self.peer_id) for place in await self._acceptor.listen(address)]
        self.addresses += bound
        return bound

    # -- connecting --------------------------------------------------------------------------------

    async def connect(self, peer: PeerId | Multiaddr, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        """The link to the peer, dialled if there is none. Raises Unreachable, WrongPeer, HandshakeFailed.

        Named by its id, a peer that did not answer is left alone for a while that grows; an address is tried.
        """
        peer_id = peer.peer_id if isinstance(peer, Multiaddr) else peer
        if peer_id is None:
            raise InvalidArgument(f"{peer} does not say which peer is expected there: append /p2p/ID")
        if isinstance(peer, Multiaddr):
            self.book.add(peer_id, [peer])
        link = self._links.get(peer_id)
        if link is not None and link.usable:
            return link
        if peer_id == self.peer_id:
            raise Unreachable("a host does not dial itself")
        self._start()
        ban_s = self._gate.reputation.ban_s(peer_id, monotonic())
        if ban_s:
            raise Banned(f"{peer_id} broke the protocol; it is not dialled for another {ban_s:.0f} s")
        dial = self._dials.get(peer_id)
        if dial is None:
            dial = self._dials[peer_id] = self.spawn(self._dial(peer_id, patient=isinstance(peer, PeerId)))
            dial.add_done_callback(lambda _: self._dials.pop(peer_id, None))
        await asyncio.wait([dial], timeout=timeout_s)
        if not dial.done():
            raise Unreachable(f"{peer_id} did not answer within {timeout_s:.3g} s")
        if dial.cancelled():
            raise ShuttingDown("this host is closed")
        return dial.result()

    async def _dial(self, peer_id: PeerId, patient: bool) -> Link:
        new = self._handshake_with(peer_id, _INTERACTIVE)
        established = await self._dialler.dial(peer_id, new, patient=patient)
        link = self._begin(established, outbound=True)
        return self._links.get(peer_id, link)

    async def open_bulk_lane(self, link: Link) -> None:
        """Dial the link's peer once more, for bulk. Raises PetaliteError or OSError."""
        established = await self._dialler.dial(link.peer, self._handshake_with(link.peer, _BULK))
        if link.closed or established.secured.hello.instance != link.hello.instance:
            established.sock.close()
            raise ConnectionLost("the peer is not the one that it was")
        link.attach(self._new_lane(established, link, outbound=True), established.handshake.leftover)

    def _handshake_with(self, peer_id: PeerId, lane: int) -> Callable[[], Handshake]:
        return lambda: self._handshake(initiator=True, expected=peer_id, lane=lane)

    def _handshake(
        self, *, initiator: bool, expected: PeerId | None = None, lane: int = _INTERACTIVE
    ) -> Handshake:
        windows = self.settings.windows
        hello = Hello(
            self._instance,
            lane,
            windows.stream_bytes,
            windows.connection_bytes,
            windows.streams,
            AGENT,
            tuple(str(replace(address, peer_id=None)) for address in self.addresses[:8]),
        )
        return Handshake(
            self.identity, hello, initiator=initiator, expected=expected, swarm_key=self._swarm_key
        )

    # -- links -------------------------------------------------------------------------------------

    def _welcome(self, established: Established) -> None:
        """A peer that dialled us has proved who it is: its link, or why it gets none."""
        peer, hello = established.secured.peer_id, established.secured.hello
        assert established.address.ip is not None
        prefix = prefix_of(established.address.ip)
        ban_s = self._gate.reputation.ban_s(peer, monotonic())
        if self._draining:
            return self._refuse(established, ErrorCode.SHUTDOWN, "this host is closing")
        if ban_s:
            return self._refuse(established, ErrorCode.BANNED, f"for another {ban_s:.0f} s")
        link = self._link_of_instance(peer, hello.instance) if hello.lane == _BULK else None
        if hello.lane == _BULK and (link is None or len(link.lanes) >= MAX_LANES):
            return self._refuse(established, ErrorCode.REFUSED, "a lane without a link, or one too many")
        code = self._gate.enter(prefix)
        if code is not ErrorCode.OK:
            return self._refuse(established, code, "too many connections")
        if link is None:
            self.book.add(peer, _claimed(hello, established.address))
            self._begin(established, outbound=False, on_gone=partial(self._gate.leave, prefix))
        else:
            lane = self._new_lane(
                established, link, outbound=False, on_gone=partial(self._gate.leave, prefix)
            )
            link.attach(lane, established.handshake.leftover)
        return None

    def _refuse(self, established: Established, code: ErrorCode, reason: str) -> None:
        """Tell a peer at the end of its handshake that it may not stay."""
        self.journal.note("link:refused", established.secured.peer_id, code, reason=reason)
        lane = self._new_lane(established, _Nobody(), outbound=False)
        lane.start(b"")
        lane.close(code, reason)

    def _link_of_instance(self, peer: PeerId, instance: bytes) -> Link | None:
        for link in self._all_links:
            if link.peer == peer and link.hello.instance == instance and not link.closed:
                return link
        return None

    def _begin(
        self, established: Established, outbound: bool, on_gone: Callable[[], None] | None = None
    ) -> Link:
        """The link of a finished handshake, in its place among the others."""
        secured = established.secured
        memory = Budget(self.settings.limits.peer_memory_bytes, self._gate.memory)
        link = Link(
            self, secured.peer_id, secured.hello, established.address, outbound, self.settings.timers, memory
        )
        lane = self._new_lane(established, link, outbound, on_gone)
        self._all_links.add(link)
        self._adopt(link)
        self.journal.note(
            "link:opened", link.peer, address=link.remote_address, outbound=outbound, rtt_s=established.rtt_s
        )
        link.attach(lane, established.handshake.leftover)
        return link

    def _new_lane(
        self,
        established: Established,
        owner: LaneOwner,
        outbound: bool,
        on_gone: Callable[[], None] | None = None,
    ) -> Lane:
        secured = established.secured
        theirs = secured.hello.windows()
        memory = owner.memory.reserve if isinstance(owner, Link) else _nothing
        connection = Connection(outbound, self.settings.windows, theirs, monotonic(), memory)
        connection.rtt_s = established.rtt_s
        lane = Lane(established.sock, connection, secured.sealer, secured.opener, self._scratch, owner)
        lane.on_gone = partial(self._lane_gone, lane, on_gone)
        self._lanes.add(lane)
        return lane

    def _lane_gone(self, lane: Lane, on_gone: Callable[[], None] | None) -> None:
        self._lanes.discard(lane)
        self._ended_bytes[0] += lane.connection.sent
        self._ended_bytes[1] += lane.connection.received
        if on_gone is not None:
            on_gone()

    def _adopt(self, link: Link) -> None:
        """Use this link for new calls to its peer, or the one there is.

        Both ends decide alike: of two that were dialled at once, the one that the smaller peer id dialled. Of
        two in the same direction the newer, and what a former process of the peer left behind is dead.
        """
        current = self._links.get(link.peer)
        if current is not None:
            if current.hello.instance != link.hello.instance:
                current.abort(ConnectionLost("the peer was restarted"))
            elif current.outbound != link.outbound and link.outbound is not (self.peer_id < link.peer):
                link.supplanted = True
                return
            else:
                current.supplanted = True
        self._links[link.peer] = link

    def on_lost(self, link: Link, error: PetaliteError, guilty: bool) -> None:
        """A link ended."""
        self.journal.note("link:closed", link.peer, code_of(error), reason=str(error), guilty=guilty)
        if guilty:
            self.blame(link.peer, VIOLATION)
        self._all_links.discard(link)
        if self._links.get(link.peer) is link:
            del self._links[link.peer]

    def blame(self, peer: PeerId, points: float) -> None:
        """Count misbehaviour against a peer; at 50 points, which fade, it is banned and its link closed."""
        self._gate.reputation.blame(peer, points, monotonic())
        link = self._links.get(peer)
        if link is not None and self._gate.reputation.ban_s(peer, monotonic()):
            link.close(ErrorCode.BANNED, "too much misbehaviour")

    # -- calling -----------------------------------------------------------------------------------

    async def call(
        self,
        peer: PeerId | Multiaddr,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        priority: Priority = Priority.NORMAL,
    ) -> Message:
        """One request, one answer, dialling included. Raises what the peer raised, as its class."""
        link, left_s = await self._link_for(peer, timeout_s)
        return await link.call(method, body, buffers, timeout_s=left_s, priority=priority)

    @asynccontextmanager
    async def stream(
        self,
        peer: PeerId | Multiaddr,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> AsyncIterator[Call]:
        """A call that goes on: send and receive on it. Left before its end, it is cancelled at the peer."""
        call = await self.open(peer, method, body, buffers, timeout_s=timeout_s, priority=priority)
        try:
            yield call
            await call.finish()
        finally:
            call.end()

    async def open(
        self,
        peer: PeerId | Multiaddr,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> Call:
        """What `stream` is entered for, for a call that outlives a `with`: its owner must `end` it."""
        link, left_s = await self._link_for(peer, timeout_s)
        call = await link.open(method, priority, left_s)
        try:
            call.begin(body, buffers, fin=False)
            await call.begun()
        except BaseException:
            call.end()
            raise
        return call

    async def _link_for(self, peer: PeerId | Multiaddr, timeout_s: float | None) -> tuple[Link, float | None]:
        """A link to open a call on, and what its finding left of the deadline."""
        peer_id = peer.peer_id if isinstance(peer, Multiaddr) else peer
        link = self._links.get(peer_id) if peer_id is not None else None
        if link is not None and link.usable:
            return link, timeout_s
        if timeout_s is None:
            return await self.connect(peer), None
        started_at = monotonic()
        link = await self.connect(peer, timeout_s=min(timeout_s, CONNECT_TIMEOUT_S))
        return link, max(0.0, timeout_s - (monotonic() - started_at))

    def on_call(self, call: Call) -> None:
        """A peer opened a call."""
        call.task = self.spawn(call.serve(self._methods))
        self._handlers.add(call.task)
        call.task.add_done_callback(self._handlers.discard)

    # -- what is known -----------------------------------------------------------------------------

    def rtt_s(self, peer: PeerId) -> float | None:
        """The smoothed round trip to a connected peer."""
        link = self._links.get(peer)
        return None if link is None else link.rtt_s

    def is_connected(self, peer: PeerId) -> bool:
        return peer in self._links

    def peers(self) -> list[PeerId]:
        """Who is connected."""
        return list(self._links)

    def metrics(self) -> dict[str, float]:
        """What to show under /metrics: names, with labels, as Prometheus writes them, and values."""
        lanes = self._lanes
        values: dict[str, float] = {
            "petalite_net_links": len(self._all_links),
            "petalite_net_lanes": len(lanes),
            "petalite_net_calls": sum(link.calls for link in self._all_links),
            "petalite_net_reserved_bytes": self._gate.memory.used,
            "petalite_net_credit_stalls": sum(lane.connection.stalls for lane in lanes),
            "petalite_net_sent_bytes_total": self._ended_bytes[0]
            + sum(lane.connection.sent for lane in lanes),
            "petalite_net_received_bytes_total": self._ended_bytes[1]
            + sum(lane.connection.received for lane in lanes),
        }
        for (event, code), count in self.journal.counts.items():
            values[f'petalite_net_events_total{{event="{event}",code="{code}"}}'] = count
        return values

    # -- life --------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed:
            raise ShuttingDown("this host is closed")
        if not self._started:
            self._started = True
            self._loop = asyncio.get_running_loop()
            self.spawn(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = monotonic()
            for link in list(self._all_links):
                link.tick(now)
            self._scratch.pool.trim(now)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that ends with the host at the latest."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PetaliteError):
            logger.error("a task of the host failed", exc_info=error)

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections and calls, let those that are served end, and close."""
        self._draining = True
        self._acceptor.close()
        for link in list(self._all_links):
            link.leave("this host is closing")
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=timeout_s)
        await self.close()

    async def close(self) -> None:
        """End everything: calls under way fail here and at their peers, who are told."""
        if self._closed:
            return
        self._closed = self._draining = True
        self._acceptor.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in list(self._all_links):
            link.close(ErrorCode.SHUTDOWN, "the host is closing")
        await asyncio.gather(*(lane.gone.wait() for lane in self._lanes))


class _Nobody:
    """Owns the lanes of peers that are refused."""

    def lane_events(self, lane: Lane, events: object) -> None:
        """Nobody cares."""

    def lane_lost(self, lane: Lane, error: PetaliteError, guilty: bool) -> None:
        """Nor any more."""


def _nothing(_size: int) -> bool:
    return False


def _claimed(hello: Hello, seen: Multiaddr) -> list[Multiaddr]:
    """Where a peer that dialled us says it listens; an unspecified host stands for the one we see it at."""
    claimed = []
    for text in hello.listen:
        try:
            address = replace(Multiaddr.parse(text), peer_id=None)
        except InvalidAddress:
            continue
        if address.ip is not None and address.ip.is_unspecified and address.protocol == seen.protocol:
            address = replace(address, host=seen.host)
        if address.host == seen.host or _plausible(address, seen):
            claimed.append(address)
    return claimed


def _plausible(address: Multiaddr, seen: Multiaddr) -> bool:
    """Whether a peer seen at `seen` may send us there: nowhere that only we, or our network, can reach."""
    ip, seen_ip = address.ip, seen.ip
    if ip is None or seen_ip is None or ip.is_multicast or ip.is_link_local or ip.is_unspecified:
        return False
    if ip.is_loopback:
        return seen_ip.is_loopback
    return ip.is_global or not seen_ip.is_global
