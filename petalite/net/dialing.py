"""Finding a way to a peer: which of its addresses worked, trying several at once, and the handshake there.

The book remembers and backs off; the dialler races (RFC 8305, "Happy Eyeballs") up to the point where a peer
has proved who it is, and only then tells the winner who we are. Knows addresses, names and sockets; knows no
link.
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
_FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}


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

    def wait_s(self, peer: PeerId, address: Multiaddr) -> float:
        """How long to leave the address alone after its last failure."""
        known = self._peers.get(peer, {}).get(_place(address))
        return 0.0 if known is None else max(0.0, known.retry_at - self._clock())

    def worked(self, peer: PeerId, address: Multiaddr) -> None:
        self.add(peer, [address])
        if (known := self._peers[peer].get(_place(address))) is not None:
            known.worked_at, known.failures, known.retry_at = self._clock(), 0, float("-inf")

    def failed(self, peer: PeerId, address: Multiaddr) -> None:
        if (known := self._peers.get(peer, {}).get(_place(address))) is not None:
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
    last_message: bytes = b""  # the initiator's, which tells the peer who we are and is not yet sent

    @property
    def secured(self) -> Secured:
        assert self.handshake.secured is not None
        return self.handshake.secured


class Dialler:
    """Dials peers at the addresses in the book. `handshake` makes the initiator's end of one."""

    def __init__(self, book: AddressBook, attempt_s: float) -> None:
        self._book = book
        self._attempt_s = attempt_s

    async def dial(
        self, peer: PeerId, handshake: Callable[[], Handshake], *, patient: bool = True
    ) -> Established:
        """A connection to the peer. `patient` leaves addresses alone that failed a moment ago."""
        addresses = self._book.addresses(peer)
        if not addresses:
            raise Unreachable(f"no address is known of {peer}")
        waits_s = [self._book.wait_s(peer, address) for address in addresses]
        if patient:
            due = [address for address, wait_s in zip(addresses, waits_s, strict=True) if not wait_s]
            if not due:
                raise Unreachable(
                    f"no address of {peer} answered a moment ago; the next try is in {min(waits_s):.1f} s"
                )
            addresses = due
        attempts: list[Callable[[], Coroutine[Any, Any, Established]]] = [
            partial(self._attempt, peer, address, handshake) for address in addresses
        ]
        proved, errors = await race(attempts, _discard)  # type: ignore[arg-type]
        if proved is None:
            raise _summary(peer, addresses, errors)
        self._book.worked(peer, proved.address)
        try:
            await asyncio.get_running_loop().sock_sendall(proved.sock, proved.last_message)
            proved.address = multiaddr_of(proved.sock.getpeername())
        except BaseException as error:
            proved.sock.close()
            if isinstance(error, OSError):
                raise Unreachable(f"{peer} went away during the handshake: {error}") from error
            raise
        return proved

    async def _attempt(self, peer: PeerId, address: Multiaddr, new: Callable[[], Handshake]) -> Established:
        """Connect there and hear who it is. Raises PetaliteError or OSError."""
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(self._attempt_s):
                sock = await connect(address)
                tune(sock)
                handshake = new()
                rtt_s, last_message = await converse(sock, handshake, handshake.start())
                return Established(address, sock, handshake, rtt_s, last_message)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, Exception):
                self._book.failed(peer, address)
            raise


def _discard(late: Established) -> None:
    late.sock.close()


def _summary(peer: PeerId, addresses: Sequence[Multiaddr], errors: Sequence[BaseException]) -> PetaliteError:
    """One error for all attempts: the peer's own, if every address failed in the same way."""
    if len({type(error) for error in errors}) == 1 and isinstance(errors[0], PetaliteError):
        return errors[0]
    tried = "; ".join(
        f"{address}: {error or 'no answer in time'}"
        for address, error in zip(addresses, errors, strict=False)
    )
    return Unreachable(f"no address of {peer} answers ({tried})")


def multiaddr_of(sockaddr: Any) -> Multiaddr:
    """The address of a socket of either family."""
    host, port = sockaddr[:2]
    return Multiaddr("ip6" if ":" in host else "ip4", host.partition("%")[0], port)


async def resolve(address: Multiaddr) -> list[tuple[socket.AddressFamily, Any]]:
    """The socket addresses that a multiaddr stands for. Raises OSError for a name that does not resolve."""
    if address.relay is not None:
        raise InvalidAddress(f"{address} leads through a relay, which this version does not dial")
    family = _FAMILIES[address.protocol]
    loop = asyncio.get_running_loop()
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
            raise ConnectionLost(
                "the peer closed the connection in the handshake: it is full, or in another (private) swarm"
            )
        answer = handshake.receive(data)
        if handshake.secured is not None:
            return monotonic() - asked_at, answer


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
