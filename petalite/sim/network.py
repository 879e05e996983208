"""A network that is not there: peers call each other over links with latency, jitter, loss and bandwidth.

Offers each peer what the DHT asks of a network (`petalite.dht.network.Network`), so that the node's own code
runs on it unchanged. Messages are packed and unpacked as on the wire, and counted. Peers can be switched off,
and the network split. Everything random comes from one seed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import msgpack

from petalite.dht.contacts import Contact
from petalite.dht.network import Caller, Handler
from petalite.errors import DeadlineExceeded, PetaliteError, UnknownMethod, WrongPeer, code_of, from_wire
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

_HELLO = "sim.hello"
_RETRANSMIT_S = 0.2  # the least wait until a lost message is sent again; doubled every time (RFC 6298)
_MESSAGE_OVERHEAD_BYTES = 60  # of one message on a real connection: frame, record, TCP and IP headers


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What every link is like, unless the network is given a `latency_s` of its own."""

    latency_s: float = 0.05  # one way
    jitter_s: float = 0.0  # up to so much more, at random
    loss: float = 0.0  # share of messages that get lost and are sent again, as TCP does
    bandwidth_bytes_s: float | None = None  # what one peer can send; None: any amount


@dataclass(slots=True)
class Traffic:
    """What went over the network."""

    calls: int = 0
    messages: int = 0  # calls and answers
    bytes: int = 0  # of both, headers included


class SimNetwork:
    """The medium. `endpoint` gives a peer its end of it."""

    def __init__(
        self,
        seed: int,
        link: LinkSettings = LinkSettings(),
        latency_s: Callable[[Endpoint, Endpoint], float] | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.link = link
        self._latency_s = latency_s
        self._random = Random(seed)
        self._at: dict[str, Endpoint] = {}
        self._by_peer: dict[PeerId, Endpoint] = {}
        self._sides: Mapping[PeerId, int] = {}

    def endpoint(self, peer_id: PeerId, address: str) -> Endpoint:
        """A new peer at an address; one that was there is gone."""
        endpoint = Endpoint(self, peer_id, Multiaddr.parse(address))
        self._at[address] = self._by_peer[peer_id] = endpoint
        return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """It is gone for good: from now on there is silence at its address."""
        endpoint.down()
        if self._by_peer.get(endpoint.peer_id) is endpoint:
            del self._by_peer[endpoint.peer_id]
        if self._at.get(endpoint.addresses[0]) is endpoint:
            del self._at[endpoint.addresses[0]]

    def split(self, sides: Mapping[PeerId, int]) -> None:
        """From now on messages pass only between peers on the same side;
        peers not named are on side 0. `{}` heals it."""
        self._sides = sides

    def reach(self, contact: Contact) -> Endpoint | None:
        """The peer, if one of the contact's addresses is its own."""
        endpoint = self._by_peer.get(contact.peer_id)
        return endpoint if endpoint is not None and endpoint.addresses[0] in contact.addresses else None

    def at(self, address: Multiaddr) -> Endpoint | None:
        """Who is there."""
        return self._at.get(str(replace(address, peer_id=None)))

    def peer(self, peer_id: PeerId) -> Endpoint | None:
        return self._by_peer.get(peer_id)

    def transit_s(self, source: Endpoint, target: Endpoint, nbytes: int) -> float | None:
        """How long a message sent now takes; None: it never arrives."""
        nbytes += _MESSAGE_OVERHEAD_BYTES
        self.traffic.messages += 1
        self.traffic.bytes += nbytes
        sides = self._sides
        if sides and sides.get(source.peer_id, 0) != sides.get(target.peer_id, 0):
            return None
        link = self.link
        delay_s = link.latency_s if self._latency_s is None else self._latency_s(source, target)
        again_s = max(_RETRANSMIT_S, 4 * delay_s)
        if link.jitter_s:
            delay_s += self._random.uniform(0.0, link.jitter_s)
        while link.loss and self._random.random() < link.loss:
            delay_s += again_s
            again_s *= 2
        return delay_s + source.queue_s(nbytes, link.bandwidth_bytes_s)


class Endpoint:
    """One peer's end: the `Network` that its node talks to."""

    def __init__(self, network: SimNetwork, peer_id: PeerId, address: Multiaddr) -> None:
        self.address = address
        self.calls: Counter[str] = Counter()  # made from here, by method
        self.up = True
        self._network = network
        self._peer_id = peer_id
        self._texts = (str(address),)
        self._handlers: dict[str, Handler] = {}
        self._free_s = 0.0  # when the uplink has sent what it was given
        self._answering: set[asyncio.Task[None]] = set()

    # -- petalite.dht.network.Network ----------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._texts

    def serve(self, method: str, handler: Handler) -> None:
        self._handlers[method] = handler

    async def call(
        self, contact: Contact, method: str, body: Mapping[str, Any], *, timeout_s: float
    ) -> Mapping[str, Any]:
        return await self._exchange(self._network.reach(contact), method, body, timeout_s)

    async def dial(self, address: Multiaddr, *, timeout_s: float) -> PeerId:
        target = self._network.at(address)
        await self._exchange(target, _HELLO, {}, timeout_s)
        assert target is not None, "nobody answered"
        if address.peer_id not in (None, target.peer_id):
            raise WrongPeer(f"{target.peer_id} answered at {address}")
        return target.peer_id

    def remote_address(self, peer_id: PeerId) -> Multiaddr | None:
        endpoint = self._network.peer(peer_id)
        return endpoint.address if endpoint is not None else None

    def rtt_s(self, peer_id: PeerId) -> float | None:
        return None

    # -- the medium's side ---------------------------------------------------------------------------

    def down(self) -> None:
        """Silent from now on, as a machine that lost its power."""
        self.up = False

    def queue_s(self, nbytes: int, bandwidth_bytes_s: float | None) -> float:
        """How long a message waits for the uplink, and is on it."""
        if bandwidth_bytes_s is None:
            return 0.0
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now_s) + nbytes / bandwidth_bytes_s
        return self._free_s - now_s

    async def _exchange(
        self, target: Endpoint | None, method: str, body: Mapping[str, Any], timeout_s: float
    ) -> Mapping[str, Any]:
        """A call and its answer; with nobody as the target, and from a peer that is down, silence."""
        self.calls[method] += 1
        self._network.traffic.calls += 1
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes] = loop.create_future()
        data = msgpack.packb(body)
        delay_s = self._network.transit_s(self, target, len(data)) if target is not None and self.up else None
        if target is not None and delay_s is not None:
            loop.call_later(delay_s, target._receive, self, method, data, answered)
        expiry = loop.call_later(timeout_s, _expire, answered, timeout_s)
        try:
            answer = msgpack.unpackb(await answered)
        finally:
            expiry.cancel()
        if "error" in answer:
            raise from_wire(*answer["error"])
        result: Mapping[str, Any] = answer["body"]
        return result

    def _receive(self, source: Endpoint, method: str, data: bytes, answered: asyncio.Future[bytes]) -> None:
        if self.up:
            task = asyncio.get_running_loop().create_task(self._answer(source, method, data, answered))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(
        self, source: Endpoint, method: str, data: bytes, answered: asyncio.Future[bytes]
    ) -> None:
        answer: dict[str, Any] = {"body": {}}
        try:
            if method != _HELLO:
                handler = self._handlers.get(method)
                if handler is None:
                    raise UnknownMethod(f"{method} is not served here")
                body = msgpack.unpackb(data)
                answer = {"body": await handler(Caller(source.peer_id, source.address), body)}
        except PetaliteError as error:
            answer = {"error": [int(code_of(error)), str(error)]}
        except Exception as error:
            # A bug in a handler surfaces where the call was made, and not as silence.
            if not answered.done():
                answered.set_exception(error)
            return
        packed = msgpack.packb(answer)
        delay_s = self._network.transit_s(self, source, len(packed)) if self.up else None
        if delay_s is not None:
            asyncio.get_running_loop().call_later(delay_s, _deliver, answered, packed)


def _deliver(answered: asyncio.Future[bytes], packed: bytes) -> None:
    if not answered.done():
        answered.set_result(packed)


def _expire(answered: asyncio.Future[bytes], timeout_s: float) -> None:
    if not answered.done():
        answered.set_exception(DeadlineExceeded(f"no answer within {timeout_s:g} s"))
