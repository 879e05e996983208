"""The host: this process's one place in the swarm's network. Listens, dials, keeps one link per peer, serves
calls.

Everything that runs has an end in `close`: handshakes, handlers and the ticker are tasks of the host. Knows
links, handshakes and addresses; knows nothing of what the calls are about.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from petalite.errors import (
    Banned,
    ConnectionLost,
    ErrorCode,
    InvalidArgument,
    PetaliteError,
    ShuttingDown,
    Unreachable,
    code_of,
)
from petalite.net import messages
from petalite.net.accepting import Acceptor, claimed_addresses
from petalite.net.connection import Connection
from petalite.net.credit import Windows
from petalite.net.dialing import AddressBook, Established, dial
from petalite.net.handshake import Handshake, Hello
from petalite.net.identity import Identity, PeerId
from petalite.net.journal import Journal
from petalite.net.lane import Lane
from petalite.net.limits import VIOLATION, Budget, Gate, Limits, prefix_of
from petalite.net.link import MAX_LANES, Link, Timers
from petalite.net.messages import MAX_DEADLINE_MS, REQUEST, Buffer, Message
from petalite.net.methods import Handler, Method, MethodPolicy
from petalite.net.multiaddr import Multiaddr
from petalite.net.pool import Scratch
from petalite.net.rpc import Body, Call
from petalite.net.streams import BULK, Priority

logger = logging.getLogger(__name__)

T = TypeVar("T")
Peer: TypeAlias = PeerId | Multiaddr

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
        self, identity: Identity, settings: HostSettings | None = None, *, swarm_key: bytes | None = None
    ) -> None:
        """`swarm_key`: the 32 bytes that every member of a private swarm has, and nobody else."""
        if swarm_key is not None and len(swarm_key) != 32:
            raise InvalidArgument(f"a swarm key has 32 bytes, found {len(swarm_key)}")
        self.identity = identity
        self.settings = settings or HostSettings()
        self.addresses: list[Multiaddr] = []  # where we listen, with our peer id
        self.methods: dict[str, Method] = {}  # that peers may call
        self.book = AddressBook()
        self.journal = Journal()
        self._swarm_key = swarm_key
        self._instance = os.urandom(16)
        self._gate = Gate(self.settings.limits)
        self._links: dict[PeerId, Link] = {}  # for new calls
        self._all_links: set[Link] = set()
        self._lanes: set[Lane] = set()  # whose sockets are open; some only wait for the peer to hear the end
        self._dials: dict[PeerId, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: set[asyncio.Task[None]] = set()  # those that serve calls
        self._scratch = Scratch()
        self._acceptor = Acceptor(self._gate, self.journal, self.spawn, self._handshake, self._welcome)
        self._ended_bytes = [0, 0]  # sent and received on lanes that are gone
        self._loop: asyncio.AbstractEventLoop | None = None  # once there is anything to do
        self._draining = self._closed = False

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
        if method in self.methods:
            raise InvalidArgument(f"{method!r} is already served")
        self.methods[method] = Method(handler, request, policy or MethodPolicy())

    async def listen(self, addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
        """Accept connections at all of them, or at none. Returns the addresses with the actual ports and our
        peer id."""
        self._start()
        bound = [place.with_peer(self.peer_id) for place in await self._acceptor.listen(addresses)]
        self.addresses += bound
        return bound

    # -- connecting --------------------------------------------------------------------------------

    async def connect(self, peer: Peer, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        """The link to the peer, dialled if there is none. Raises Unreachable, WrongPeer, HandshakeFailed.

        Named by its id, a peer that did not answer is left alone for a while that grows; an address is tried.
        """
        peer_id = peer.peer_id if isinstance(peer, Multiaddr) else peer
        if peer_id is None:
            raise InvalidArgument(f"{peer} does not say which peer is expected there: append /p2p/ID")
        if isinstance(peer, Multiaddr):
            self.book.add(peer_id, [peer])
        link = self._usable_link(peer_id)
        if link is not None:
            return link
        if peer_id == self.peer_id:
            raise Unreachable("a host does not dial itself")
        self._start()
        ban_s = self._gate.reputation.ban_s(peer_id, monotonic())
        if ban_s:
            raise Banned(f"{peer_id} broke the protocol; it is not dialled for another {ban_s:.0f} s")
        task = self._dials.get(peer_id)
        if task is None:
            task = self._dials[peer_id] = self.spawn(self._dial(peer_id, patient=isinstance(peer, PeerId)))
            task.add_done_callback(lambda _: self._dials.pop(peer_id, None))
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done():
            raise Unreachable(f"{peer_id} did not answer within {timeout_s:.3g} s")
        if task.cancelled():
            raise ShuttingDown("this host is closed")
        return task.result()

    async def _dial(self, peer_id: PeerId, patient: bool) -> Link:
        established = await self._reach(peer_id, _INTERACTIVE, patient)
        link = self._adopt(established)
        self._attach(link, established)
        return self._links.get(peer_id, link)

    async def open_bulk_lane(self, link: Link) -> None:
        """Dial the link's peer once more, for bulk. Raises PetaliteError or OSError."""
        established = await self._reach(link.peer, _BULK)
        if link.closed or established.secured.hello.instance != link.hello.instance:
            established.sock.close()
            raise ConnectionLost("the peer is not the one that it was")
        self._attach(link, established)

    async def _reach(self, peer_id: PeerId, lane: int, patient: bool = True) -> Established:
        new = partial(self._handshake, peer_id, lane)
        return await dial(self.book, peer_id, new, self.settings.limits.handshake_s, patient)

    def _handshake(self, dialled: PeerId | None = None, lane: int = _INTERACTIVE) -> Handshake:
        """Our end of one: the initiator's, if we dialled."""
        windows = self.settings.windows
        listen = tuple(str(replace(address, peer_id=None)) for address in self.addresses[:8])
        grants = (windows.stream_bytes, windows.connection_bytes, windows.streams)
        hello = Hello(self._instance, lane, *grants, AGENT, listen)
        initiator, key = dialled is not None, self._swarm_key
        return Handshake(self.identity, hello, initiator=initiator, expected=dialled, swarm_key=key)

    # -- links -------------------------------------------------------------------------------------

    def _welcome(self, established: Established) -> None:
        """A peer that dialled us has proved who it is: its link, or why it gets none."""
        peer, hello = established.secured.peer_id, established.secured.hello
        prefix = prefix_of(established.address)
        link = self._link_of_instance(peer, hello.instance) if hello.lane == _BULK else None
        ban_s = self._gate.reputation.ban_s(peer, monotonic())
        code, reason = ErrorCode.OK, ""
        if self._draining:
            code, reason = ErrorCode.SHUTDOWN, "this host is closing"
        elif ban_s:
            code, reason = ErrorCode.BANNED, f"for another {ban_s:.0f} s"
        elif hello.lane == _BULK and (link is None or len(link.lanes) >= MAX_LANES):
            code, reason = ErrorCode.REFUSED, "a lane without a link, or one too many"
        elif not self._gate.enter(prefix):
            code, reason = ErrorCode.RESOURCE_LIMIT, "too many connections"
        if code:
            self.journal.note("link:refused", peer, code, reason=reason)
            refused = Link(self, established, self._gate.memory)
            self._attach(refused, established)
            refused.close(code, reason)
            return
        if link is None:
            self.book.add(peer, claimed_addresses(hello, established.address))
            link = self._adopt(established)
        self._attach(link, established, lambda: self._gate.leave(prefix))

    def _link_of_instance(self, peer: PeerId, instance: bytes) -> Link | None:
        for link in self._all_links:
            if link.peer == peer and link.hello.instance == instance and not link.closed:
                return link
        return None

    def _attach(
        self, link: Link, established: Established, on_gone: Callable[[], None] = lambda: None
    ) -> None:
        """A lane of the link on this connection; `on_gone` is called when its socket is closed."""
        initiator, theirs = established.handshake.initiator, established.secured.hello.windows()
        memory = Budget(parent=link.memory)
        connection = Connection(initiator, self.settings.windows, theirs, monotonic(), memory)
        connection.receiver.rtt_s = established.rtt_s
        lane = Lane(established.sock, connection, established.secured, self._scratch, link)

        def gone() -> None:
            self._lanes.discard(lane)
            self._ended_bytes[0] += connection.sender.sent
            self._ended_bytes[1] += connection.receiver.received
            on_gone()

        lane.on_gone = gone
        self._lanes.add(lane)
        link.attach(lane, established)

    def _adopt(self, established: Established) -> Link:
        """A link to the peer, to use for new calls instead of the one there is, or besides it.

        Both ends decide alike: of two that were dialled at once, the one that the smaller peer id dialled. Of
        two in the same direction the newer, also where the older has no ids left for streams, and what a
        former process of the peer left behind is dead.
        """
        link = Link(self, established, self._gate.memory)
        self._all_links.add(link)
        address, agent = link.remote_address, link.hello.agent
        self.journal.note("link:opened", link.peer, address=address, outbound=link.outbound, agent=agent)
        current = self._links.get(link.peer)
        if current is not None and current.hello.instance != link.hello.instance:
            current.finish(ConnectionLost("the peer was restarted"))
        elif current is not None:
            crossed = current.outbound != link.outbound and not current.lanes[0].connection.used_up
            link.supplanted = crossed and link.outbound is not (self.peer_id < link.peer)
            current.supplanted = not link.supplanted
        if not link.supplanted:
            self._links[link.peer] = link
        return link

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
        peer: Peer,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        priority: Priority = Priority.NORMAL,
    ) -> Message:
        """One request, one answer, dialling included. Raises what the peer raised, as its class."""
        call = await self.open(
            peer, method, body, buffers, timeout_s=timeout_s, priority=priority, finished=True
        )
        try:
            return await call.receive() or Message()
        finally:
            call.end()

    async def open(
        self,
        peer: Peer,
        method: str,
        body: Body = None,
        buffers: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
        priority: Priority = Priority.NORMAL,
        finished: bool = False,
    ) -> Call:
        """A call that goes on: `async with await host.open(…) as call`, or its owner must `end` it.

        On return the request's buffers are the caller's again. `finished`: there is nothing else to send;
        then they are when the answer is here.
        """
        link, began_at = self._usable_link(peer), monotonic()
        if link is None:
            connect_s = CONNECT_TIMEOUT_S if timeout_s is None else min(timeout_s, CONNECT_TIMEOUT_S)
            link = await self.connect(peer, timeout_s=connect_s)
        lane = link.lanes[0]
        if priority is BULK or link.error is not None or not lane.connection.can_open:
            lane = await link.lane_for(priority, _left(timeout_s, began_at))
        timeout_s = _left(timeout_s, began_at)
        deadline_ms = 0 if timeout_s is None else min(max(1, int(timeout_s * 1000)), MAX_DEADLINE_MS)
        header, segments = messages.encode([REQUEST, body or {}, None, method, deadline_ms], buffers)
        call = Call(link, lane, lane.connection.open_stream(priority), method)
        call.set_deadline(timeout_s)
        lane.write(call.stream, header, segments, finished)
        if not finished:
            try:
                await call.sent()
            except BaseException:
                call.end()
                raise
        return call

    def _usable_link(self, peer: Peer) -> Link | None:
        link = self._links.get(peer.peer_id if isinstance(peer, Multiaddr) else peer)  # type: ignore[arg-type]
        return link if link is not None and link.usable else None

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
        sent, received = self._ended_bytes
        cores = [lane.connection for lane in self._lanes]
        values: dict[str, float] = {
            "petalite_net_links": len(self._all_links),
            "petalite_net_lanes": len(cores),
            "petalite_net_calls": sum(link.calls for link in self._all_links),
            "petalite_net_reserved_bytes": self._gate.memory.used,
            "petalite_net_credit_stalls": sum(core.sender.stalls for core in cores),
            "petalite_net_sent_bytes_total": sent + sum(core.sender.sent for core in cores),
            "petalite_net_received_bytes_total": received + sum(core.receiver.received for core in cores),
        }
        for (event, code), count in self.journal.counts.items():
            values[f'petalite_net_events_total{{event="{event}",code="{code}"}}'] = count
        return values

    # -- life --------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed:
            raise ShuttingDown("this host is closed")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self.spawn(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = monotonic()
            for link in list(self._all_links):
                try:
                    link.tick(now)
                except Exception:
                    logger.exception("%r failed", link)
                    link.finish(ConnectionLost("this end of the connection failed"))
            self._scratch.trim(now)

    def handle(self, call: Call) -> None:
        """Serve a peer's call."""
        assert self._loop is not None
        call.task = self._loop.create_task(call.serve())
        self._handlers.add(call.task)
        call.task.add_done_callback(self._handlers.discard)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that ends with the host at the latest."""
        assert self._loop is not None
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
        for link in list(self._all_links):  # before anything is waited for, so that no call begins meanwhile
            link.close(ErrorCode.SHUTDOWN, "the host is closing")
        tasks = [*self._tasks, *self._handlers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(lane.gone.wait() for lane in self._lanes))


def _left(timeout_s: float | None, began_at: float) -> float | None:
    return None if timeout_s is None else max(0.0, began_at + timeout_s - monotonic())
