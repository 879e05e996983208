"""Finding a way to a peer: which of its addresses worked, trying several at once, and the handshake there.

The book remembers and backs off; `dial` races (RFC 8305, "Happy Eyeballs") up to the point where a peer has
proved who it is; only the winner will hear who we are, on its lane. Knows addresses, names and sockets;
knows no link.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from aiohappyeyeballs import AddrInfoType, start_connection

from petalite.errors import ConnectionLost, InvalidAddress, PetaliteError, Unreachable
from petalite.net.handshake import Handshake, Secured
from petalite.net.identity import PeerId
from petalite.net.lane import tune
from petalite.net.multiaddr import Multiaddr

T = TypeVar("T")

MAX_PEERS = 4096
MAX_ADDRESSES = 16  # per peer
BACKOFF_S, MAX_BACKOFF_S = 1.0, 300.0  # doubled with each failure, and give or take a half
_HANDSHAKE_READ_BYTES = 16 * 1024
_STAGGER_S = 0.25  # between the starts of two attempts
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


@dataclass(slots=True)
class _Known:
    """What is known of one address."""

    worked_at: float = float("-inf")
    failures: int = 0  # since it last worked
    retry_at: float = float("-inf")


class AddressBook:
    """The addresses of peers, those that worked last first. Whom nobody named for longest is forgotten."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._peers: OrderedDict[PeerId, dict[Multiaddr, _Known]] = OrderedDict()

    def add(self, peer: PeerId, addresses: Iterable[Multiaddr]) -> None:
        """Remember more addresses; where a peer has too many, those that failed most are forgotten."""
        known = self._peers.setdefault(peer, {})
        self._peers.move_to_end(peer)
        for address in addresses:
            if address.port:
                known.setdefault(_place(address), _Known())
        while len(known) > MAX_ADDRESSES:
            del known[self.addresses(peer)[-1]]
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)

    def addresses(self, peer: PeerId) -> list[Multiaddr]:
        """What is known of the peer, the best first."""
        known = self._peers.get(peer, {})
        return sorted(known, key=lambda address: (known[address].failures, -known[address].worked_at))

    def _known(self, peer: PeerId, address: Multiaddr) -> _Known:
        return self._peers.get(peer, {}).get(_place(address)) or _Known()

    def wait_s(self, peer: PeerId, address: Multiaddr) -> float:
        """How long to leave the address alone after its last failure."""
        return max(0.0, self._known(peer, address).retry_at - self._clock())

    def worked(self, peer: PeerId, address: Multiaddr) -> None:
        self.add(peer, [address])
        known = self._known(peer, address)
        known.worked_at, known.failures, known.retry_at = self._clock(), 0, float("-inf")

    def failed(self, peer: PeerId, address: Multiaddr) -> None:
        known = self._known(peer, address)
        wait_s = min(MAX_BACKOFF_S, BACKOFF_S * 2.0 ** min(known.failures, 16)) * random.uniform(0.5, 1.5)
        known.failures += 1
        known.retry_at = self._clock() + wait_s


def _place(address: Multiaddr) -> Multiaddr:
    """Without the peer's id, which the book knows anyhow; behind a relay it is part of the way."""
    return replace(address, peer_id=None) if address.relay is None else address


@dataclass(slots=True)
class Established:
    """A connection whose peer has proved who it is, before there is a lane on it."""

    address: Multiaddr  # where the peer's packets come from
    sock: socket.socket
    handshake: Handshake  # finished
    rtt_s: float
    unsent: bytes = b""  # the initiator's last message, which tells the peer who we are

    @property
    def secured(self) -> Secured:
        assert self.handshake.secured is not None
        return self.handshake.secured

    def close(self) -> None:
        self.sock.close()


async def dial(
    book: AddressBook,
    peer: PeerId,
    new: Callable[[], Handshake],
    attempt_s: float,
    patient: bool = True,
) -> Established:
    """A connection to the peer. `new` makes the initiator's end of a handshake; `patient` leaves addresses
    alone that failed a moment ago. Raises PetaliteError."""
    known = {address: book.wait_s(peer, address) for address in book.addresses(peer)}
    if not known:
        raise Unreachable(f"no address is known of {peer}")
    addresses = [address for address, wait_s in known.items() if not wait_s or not patient]
    if not addresses:
        wait_s = min(known.values())
        raise Unreachable(f"no address of {peer} answered a moment ago; the next try is in {wait_s:.1f} s")
    attempts = [partial(_attempt, book, peer, address, new, attempt_s) for address in addresses]
    result = await race(attempts, Established.close)
    proved, errors = result
    if proved is None:
        if len({type(error) for error in errors}) == 1 and isinstance(errors[0], PetaliteError):
            raise errors[0]  # every address failed in the same way
        both = zip(addresses, errors, strict=False)
        tried = [f"{address}: {error or 'no answer in time'}" for address, error in both]
        raise Unreachable(f"no address of {peer} answers ({'; '.join(tried)})")
    return proved


async def _attempt(
    book: AddressBook, peer: PeerId, address: Multiaddr, new: Callable[[], Handshake], attempt_s: float
) -> Established:
    """Connect there and hear who it is. Raises PetaliteError or OSError."""
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(attempt_s):
            places = await resolve(address)  # several, for a name
            sock = await start_connection(places, happy_eyeballs_delay=_STAGGER_S, interleave=1)
            tune(sock)
            handshake = new()
            rtt_s, unsent = await converse(sock, handshake)
            place = multiaddr_of(sock.getpeername())
            book.worked(peer, address)
            return Established(place, sock, handshake, rtt_s, unsent)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, Exception):
            book.failed(peer, address)
        raise


def multiaddr_of(sockaddr: Any) -> Multiaddr:
    """The address of a socket of either family."""
    host, port = sockaddr[:2]
    return Multiaddr("ip6" if ":" in host else "ip4", host.partition("%")[0], port)


async def resolve(address: Multiaddr) -> Sequence[AddrInfoType]:
    """The socket addresses that a multiaddr stands for. Raises OSError for a name that does not resolve."""
    if address.relay is not None:
        raise InvalidAddress(f"{address} leads through a relay, which this version does not dial")
    family, loop = _FAMILIES.get(address.protocol, socket.AF_UNSPEC), asyncio.get_running_loop()
    return await loop.getaddrinfo(address.host, address.port, family=family, type=socket.SOCK_STREAM)


async def converse(sock: socket.socket, handshake: Handshake) -> tuple[float, bytes]:
    """Exchange messages until it is secured: the round trip in s, and the last message, not yet sent."""
    loop = asyncio.get_running_loop()
    answer, asked_at = handshake.receive(), monotonic()
    while True:
        if answer:
            asked_at = monotonic()
            await loop.sock_sendall(sock, answer)
        data = await loop.sock_recv(sock, _HANDSHAKE_READ_BYTES)
        if not data:
            raise ConnectionLost(
                "the peer closed the connection in the handshake: it is full, or in another (private) swarm"
            )
        answer = handshake.receive(data)
        if handshake.secured is not None:
            return monotonic() - asked_at, answer


async def race(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]], discard: Callable[[T], object]
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
