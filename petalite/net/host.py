"""The host: this process's one place in the swarm's network. Listens, dials, keeps one link per peer, serves
calls.

Everything that runs has an end in `close`: handshakes, handlers and the ticker are tasks of the host. Knows
links, handshakes and addresses; knows nothing of what the calls are about.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from petalite.errors import (
    ConnectionLost,
    ErrorCode,
    InvalidAddress,
    InvalidArgument,
    PetaliteError,
    ShuttingDown,
    Unreachable,
)
from petalite.net import dialing
from petalite.net.connection import Connection, Windows
from petalite.net.dialing import AddressBook
from petalite.net.handshake import Handshake, Hello, Secured
from petalite.net.identity import Identity, PeerId
from petalite.net.lane import Lane, Scratch, tune
from petalite.net.link import Link, Timers
from petalite.net.messages import Buffer, Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Body, Call, Handler, Method, MethodPolicy
from petalite.net.streams import Priority

logger = logging.getLogger(__name__)

T = TypeVar("T")

AGENT = "petalite/0.1"
CONNECT_TIMEOUT_S = 10.0
_BACKLOG = 512
_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a host takes on."""

    handshakes: int = 64  # under way with peers that dialled us
    handshake_s: float = 5.0  # for one, either side
    connections: int = 4096  # that peers dialled


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a host is built with."""

    windows: Windows = field(default_factory=Windows)
    timers: Timers = field(default_factory=Timers)
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class _Dialled:
    """A connection whose peer has proved who it is, and which has not been told who we are."""

    address: Multiaddr
    sock: socket.socket
    handshake: Handshake
    last_message: bytes
    rtt_s: float


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
        self.book = AddressBook(monotonic)
        self._swarm_key = swarm_key
        self._instance = os.urandom(16)
        self._methods: dict[str, Method] = {}
        self._links: dict[PeerId, Link] = {}
        self._all_links: set[Link] = set()
        self._dials: dict[PeerId, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listeners: list[socket.socket] = []
        self._handshakes = 0
        self._scratch = Scratch()
        self._loop: asyncio.AbstractEventLoop
        self._started = False
        self._closed = False

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
            for family, sockaddr in await dialing.resolve(address):
                listener = _listener(family, sockaddr, address)
                self._listeners.append(listener)
                self._loop.add_reader(listener.fileno(), self._accept, listener)
                bound.append(_multiaddr(listener.getsockname()).with_peer(self.peer_id))
        self.addresses += bound
        return bound

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(16):  # then the loop's other work has its turn
            try:
                sock, sockaddr = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._rest_from_accepting(listener, error)
                return
            limits = self.settings.limits
            if self._handshakes >= limits.handshakes or len(self._all_links) >= limits.connections:
                sock.close()
                continue
            self._handshakes += 1
            self._spawn(self._welcome(sock, _multiaddr(sockaddr)))

    def _rest_from_accepting(self, listener: socket.socket, error: OSError) -> None:
        """Out of descriptors or memory: the backlog waits a second, and the loop does not spin."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise error
        logger.warning("cannot accept connections for a second: %s", error.strerror)
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(1.0, self._resume_accepting, listener)

    def _resume_accepting(self, listener: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    async def _welcome(self, sock: socket.socket, address: Multiaddr) -> None:
        """The responder's handshake, and the link that comes of it."""
        handshake = Handshake(self.identity, self._hello(), initiator=False, swarm_key=self._swarm_key)
        try:
            tune(sock)
            async with asyncio.timeout(self.settings.limits.handshake_s):
                rtt_s, _ = await dialing.converse(sock, handshake, b"")
            secured = _secured(handshake)
            self.book.add(secured.peer_id, _claimed(secured.hello, address))
            self._begin(sock, handshake, address, rtt_s, outbound=False)
        except (PetaliteError, OSError) as error:
            logger.debug("handshake with %s failed: %s", address, error or "it took too long")
            sock.close()
        except BaseException:
            sock.close()
            raise
        finally:
            self._handshakes -= 1

    # -- connecting --------------------------------------------------------------------------------

    async def connect(self, peer: PeerId | Multiaddr, *, timeout_s: float = CONNECT_TIMEOUT_S) -> Link:
        """The link to the peer, dialled if there is none. Raises Unreachable, WrongPeer, HandshakeFailed."""
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
        dial = self._dials.get(peer_id)
        if dial is None:
            dial = self._dials[peer_id] = self._spawn(self._dial(peer_id))
            dial.add_done_callback(lambda _: self._dials.pop(peer_id, None))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(dial)
        except TimeoutError as error:
            if isinstance(error, PetaliteError):
                raise
            raise Unreachable(f"{peer_id} did not answer within {timeout_s:.3g} s") from None
        except asyncio.CancelledError:
            if dial.cancelled() and self._closed:
                raise ShuttingDown("this host is closed") from None
            raise

    async def _dial(self, peer_id: PeerId) -> Link:
        addresses = self.book.addresses(peer_id)
        if not addresses:
            raise Unreachable(f"no address is known of {peer_id}")
        attempts: list[Callable[[], Coroutine[Any, Any, _Dialled]]]
        attempts = [partial(self._attempt, peer_id, address) for address in addresses]
        dialled, errors = await dialing.race(attempts, _discard)  # type: ignore[arg-type]
        if dialled is None:
            raise _summary(peer_id, addresses, errors)
        try:
            await self._loop.sock_sendall(dialled.sock, dialled.last_message)
            self.book.worked(peer_id, dialled.address)
            address = _multiaddr(dialled.sock.getpeername())
            link = self._begin(dialled.sock, dialled.handshake, address, dialled.rtt_s, outbound=True)
        except OSError as error:
            dialled.sock.close()
            raise Unreachable(f"{peer_id} went away during the handshake: {error}") from error
        except BaseException:
            dialled.sock.close()
            raise
        return self._links.get(peer_id, link)

    async def _attempt(self, peer_id: PeerId, address: Multiaddr) -> _Dialled:
        """Connect there and hear who it is. Raises PetaliteError or OSError."""
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(self.settings.limits.handshake_s):
                sock = await dialing.connect(address)
                tune(sock)
                handshake = Handshake(
                    self.identity, self._hello(), initiator=True, expected=peer_id, swarm_key=self._swarm_key
                )
                rtt_s, last_message = await dialing.converse(sock, handshake, handshake.start())
                return _Dialled(address, sock, handshake, last_message, rtt_s)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, Exception):
                self.book.failed(peer_id, address)
            raise

    def _begin(
        self, sock: socket.socket, handshake: Handshake, address: Multiaddr, rtt_s: float, outbound: bool
    ) -> Link:
        """The link of a finished handshake, in its place among the others."""
        secured = _secured(handshake)
        connection = Connection(outbound, self.settings.windows, secured.hello.windows(), monotonic())
        connection.rtt_s = rtt_s
        link = Link(
            secured.peer_id,
            secured.hello,
            address,
            outbound,
            self._on_call,
            self._on_lost,
            self.settings.timers,
        )
        lane = Lane(sock, connection, secured.sealer, secured.opener, self._scratch, link)
        self._all_links.add(link)
        self._adopt(link)
        link.start(lane, handshake.leftover)
        return link

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
        self._start()
        deadline = self._loop.time() + timeout_s
        link = await self.connect(peer, timeout_s=min(timeout_s, CONNECT_TIMEOUT_S))
        return link, max(0.0, deadline - self._loop.time())

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

    # -- life --------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed:
            raise ShuttingDown("this host is closed")
        if not self._started:
            self._started = True
            self._loop = asyncio.get_running_loop()
            self._spawn(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = monotonic()
            for link in list(self._all_links):
                link.tick(now)
            self._scratch.pool.trim(now)

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
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

    def _on_call(self, call: Call) -> None:
        call.task = self._spawn(call.serve(self._methods))

    def _on_lost(self, link: Link, error: PetaliteError) -> None:
        logger.debug("%r ended: %s", link, error)
        self._all_links.discard(link)
        if self._links.get(link.peer) is link:
            del self._links[link.peer]

    def _hello(self) -> Hello:
        windows = self.settings.windows
        return Hello(
            self._instance,
            0,
            windows.stream_bytes,
            windows.connection_bytes,
            windows.streams,
            AGENT,
            tuple(str(replace(address, peer_id=None)) for address in self.addresses[:8]),
        )

    async def close(self) -> None:
        """End everything: calls under way fail here and at their peers, who are told."""
        if self._closed:
            return
        self._closed = True
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        links = list(self._all_links)
        for link in links:
            link.close(ErrorCode.SHUTDOWN, "the host is closing")
        await asyncio.gather(*(link.wait_gone() for link in links))


def _listener(family: socket.AddressFamily, sockaddr: Any, address: Multiaddr) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(sockaddr)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidAddress(f"cannot listen on {address}: {error.strerror or error}") from error
    return listener


def _multiaddr(sockaddr: Any) -> Multiaddr:
    """The address of a socket of either family."""
    host, port = sockaddr[:2]
    return Multiaddr("ip6" if ":" in host else "ip4", host.partition("%")[0], port)


def _discard(late: _Dialled) -> None:
    late.sock.close()


def _secured(handshake: Handshake) -> Secured:
    assert handshake.secured is not None
    return handshake.secured


def _claimed(hello: Hello, seen: Multiaddr) -> list[Multiaddr]:
    """Where a peer that dialled us says it listens; an unspecified host stands for the one we see it at."""
    claimed = []
    for text in hello.listen:
        try:
            address = replace(Multiaddr.parse(text), peer_id=None)
        except InvalidAddress:
            continue
        if address.ip is not None and address.ip.is_unspecified:
            if address.protocol != seen.protocol:
                continue
            address = replace(address, host=seen.host)
        claimed.append(address)
    return claimed


def _summary(
    peer_id: PeerId, addresses: Sequence[Multiaddr], errors: Sequence[BaseException]
) -> PetaliteError:
    """One error for all attempts: the peer's own, if every address failed in the same way."""
    kinds = {type(error) for error in errors}
    if len(kinds) == 1 and isinstance(errors[0], PetaliteError):
        return errors[0]
    tried = "; ".join(
        f"{address}: {error or 'no answer in time'}"
        for address, error in zip(addresses, errors, strict=False)
    )
    return Unreachable(f"no address of {peer_id} answers ({tried})")
