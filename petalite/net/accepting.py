"""Letting peers in: listening sockets, the gate, and the responder's end of handshakes.

Knows sockets and limits; what becomes of a connection whose handshake is done is the host's matter.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

from petalite.errors import ErrorCode, HandshakeFailed, InvalidAddress, PetaliteError, ShuttingDown
from petalite.net.dialing import Established, converse, multiaddr_of, resolve
from petalite.net.handshake import Handshake, Hello
from petalite.net.journal import Journal
from petalite.net.lane import tune
from petalite.net.limits import BAD_HANDSHAKE, SLOW_HANDSHAKE, Gate, prefix_of
from petalite.net.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

_BACKLOG = 512
_REST_S = 1.0  # when out of descriptors or memory, or the network is down
_POINTS = {HandshakeFailed: BAD_HANDSHAKE, TimeoutError: SLOW_HANDSHAKE}


class Acceptor:
    """Accepts connections and proves who is there. `established` gets those whose handshake is done."""

    def __init__(
        self,
        gate: Gate,
        journal: Journal,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        handshake: Callable[[], Handshake],
        established: Callable[[Established], None],
    ) -> None:
        self._gate, self._journal = gate, journal
        self._spawn, self._handshake, self._established = spawn, handshake, established
        self._tasks: list[asyncio.Task[None]] = []  # one for each listening socket
        self._closed = False

    async def listen(self, addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
        """Accept connections at all of them, or (InvalidAddress) at none; where, with the actual ports."""
        with ExitStack() as opened:
            listeners = []
            for address in addresses:
                try:
                    for family, *_, sockaddr in await resolve(address):
                        listener = socket.create_server(sockaddr, family=family, backlog=_BACKLOG)
                        listeners.append(opened.enter_context(listener))
                except OSError as error:
                    raise InvalidAddress(f"cannot listen on {address}: {error.strerror or error}") from error
            if self._closed:
                raise ShuttingDown("this host is closed")
            opened.pop_all()
        for listener in listeners:
            listener.setblocking(False)
            task = self._spawn(self._accept(listener))
            task.add_done_callback(partial(_close_on_failure, listener))
            self._tasks.append(task)
        return [multiaddr_of(listener.getsockname()) for listener in listeners]

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # the loop's other work has its turn
            try:
                sock, sockaddr = await loop.sock_accept(listener)
                self._knock(sock, multiaddr_of(sockaddr))
            except ConnectionAbortedError:
                pass
            except OSError as error:
                # The backlog waits, and the loop does not spin. What a network raises here is over in time,
                # or was one connection's: accept(2).
                logger.warning("cannot accept connections for %g s: %s", _REST_S, error.strerror or error)
                await asyncio.sleep(_REST_S)

    def _knock(self, sock: socket.socket, address: Multiaddr) -> None:
        """Begin the handshake, or refuse."""
        prefix = prefix_of(address)
        code = self._gate.knock(prefix, monotonic())
        if code is not ErrorCode.OK:
            self._journal.note("handshake:refused", code=code)
            sock.close()
            return
        task = self._spawn(self._welcome(sock, address))
        task.add_done_callback(partial(_close_on_failure, sock))
        evicted = self._gate.begin_handshake(task, prefix)
        if isinstance(evicted, asyncio.Task):
            self._journal.note("handshake:refused", code=ErrorCode.RESOURCE_LIMIT)
            evicted.cancel()
        task.add_done_callback(self._gate.end_handshake)

    async def _welcome(self, sock: socket.socket, address: Multiaddr) -> None:
        """The responder's handshake; who fails it is to blame, by its address."""
        handshake = self._handshake()
        try:
            tune(sock)
            async with asyncio.timeout(self._gate.limits.handshake_s):
                rtt_s, _ = await converse(sock, handshake)
            self._established(Established(address, sock, handshake, rtt_s))
        except (PetaliteError, OSError) as error:
            sock.close()
            reason = str(error) or "it took too long"
            self._journal.note("handshake:failed", code=ErrorCode.PROTOCOL, reason=reason, address=address)
            self._gate.reputation.blame(prefix_of(address), _POINTS.get(type(error), 0.0), monotonic())


def _close_on_failure(sock: socket.socket, task: asyncio.Task[None]) -> None:
    """When the task that has it was cancelled, perhaps before it began, or failed."""
    if task.cancelled() or task.exception() is not None:
        sock.close()


def claimed_addresses(hello: Hello, seen: Multiaddr) -> list[Multiaddr]:
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
    return seen_ip.is_loopback if ip.is_loopback else ip.is_global or not seen_ip.is_global
