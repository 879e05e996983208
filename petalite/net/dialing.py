"""Finding a way to a peer: which of its addresses worked, and trying several of them in parallel.

`AddressBook` remembers; `race` tries (RFC 8305, "Happy Eyeballs"); `connect` connects. Knows addresses, names
and sockets; knows no handshake.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, TypeVar

from petalite.errors import HandshakeFailed, InvalidAddress
from petalite.net.handshake import Handshake
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

T = TypeVar("T")

_FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
MAX_PEERS = 4096
MAX_ADDRESSES = 16  # per peer
_HANDSHAKE_READ_BYTES = 16 * 1024
_STAGGER_S = 0.25  # between the starts of two attempts


@dataclass(slots=True)
class _Known:
    """What is known of one address."""

    worked_at: float = float("-inf")
    failures: int = 0  # since it last worked


class AddressBook:
    """The addresses of peers, those that worked last first. Whom nobody named for longest is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._peers: OrderedDict[PeerId, dict[Multiaddr, _Known]] = OrderedDict()

    def add(self, peer: PeerId, addresses: Iterable[Multiaddr]) -> None:
        """Remember more addresses; where a peer has too many, those that failed most are forgotten."""
        known = self._peers.setdefault(peer, {})
        self._peers.move_to_end(peer)
        for address in addresses:
            if address.port:
                known.setdefault(
                    replace(address, peer_id=None) if address.relay is None else address, _Known()
                )
        while len(known) > MAX_ADDRESSES:
            del known[self._order(known)[-1]]
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)

    def addresses(self, peer: PeerId) -> list[Multiaddr]:
        """What is known of the peer, the best first."""
        return self._order(self._peers.get(peer, {}))

    @staticmethod
    def _order(known: dict[Multiaddr, _Known]) -> list[Multiaddr]:
        return sorted(known, key=lambda address: (known[address].failures, -known[address].worked_at))

    def worked(self, peer: PeerId, address: Multiaddr) -> None:
        self.add(peer, [address])
        known = self._peers[peer].get(replace(address, peer_id=None))
        if known is not None:
            known.worked_at, known.failures = self._clock(), 0

    def failed(self, peer: PeerId, address: Multiaddr) -> None:
        known = self._peers.get(peer, {}).get(replace(address, peer_id=None))
        if known is not None:
            known.failures += 1


async def resolve(address: Multiaddr) -> list[tuple[socket.AddressFamily, Any]]:
    """The socket addresses that a multiaddr stands for. Raises OSError for a name that does not resolve."""
    if address.relay is not None:
        raise InvalidAddress(f"{address} leads through a relay, which this version does not dial")
    loop = asyncio.get_running_loop()
    family = _FAMILIES[address.protocol]
    found = await loop.getaddrinfo(address.host, address.port, family=family, type=socket.SOCK_STREAM)
    return [(item[0], item[4]) for item in found]


async def connect(address: Multiaddr) -> socket.socket:
    """A connected non-blocking socket. Raises OSError."""
    error = OSError(f"{address.host} has no address")
    for family, sockaddr in await resolve(address):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, sockaddr)
        except OSError as reason:
            sock.close()
            error = reason
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise error


async def race(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]], discard: Callable[[T], None]
) -> tuple[T | None, list[BaseException]]:
    """The result of the first attempt that succeeds, or None with why each failed.

    Attempts start in the order given, the next one when the one before has failed or after a quarter of a
    second (RFC 8305 §5). `discard` gets results that came too late.
    """
    waiting, errors = deque(attempts), list[BaseException]()
    pending: set[asyncio.Task[T]] = set()
    try:
        while waiting or pending:
            if waiting:
                pending.add(asyncio.create_task(waiting.popleft()()))
            timeout_s = _STAGGER_S if waiting else None
            done, _ = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                pending.discard(task)
                if error is None:
                    return task.result(), errors
                errors.append(error)
        return None, errors
    finally:
        for task in pending:
            task.cancel()
        for late in await asyncio.gather(*pending, return_exceptions=True):
            if not isinstance(late, BaseException):
                discard(late)


async def converse(sock: socket.socket, handshake: Handshake, first: bytes) -> tuple[float, bytes]:
    """Exchange messages until it is secured: the round trip in s, and the last message, not yet sent."""
    loop = asyncio.get_running_loop()
    answer, asked_at = first, monotonic()
    while True:
        if answer:
            asked_at = monotonic()
            await loop.sock_sendall(sock, answer)
        data = await loop.sock_recv(sock, _HANDSHAKE_READ_BYTES)
        if not data:
            raise HandshakeFailed(
                "the peer closed the connection in the handshake: it is full, or in another (private) swarm"
            )
        answer = handshake.receive(data)
        if handshake.secured is not None:
            return monotonic() - asked_at, answer
