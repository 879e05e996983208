"""Peers that say whatever they like, on a simulated network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.messages import FIND, PING, STORE, Find, FindAnswer, Found, Ping, Store, StoreAnswer
from petalite.dht.network import Caller
from petalite.dht.node import DhtNode
from petalite.dht.records import Record
from petalite.dht.storage import Outcome
from petalite.errors import BadRecord
from petalite.net.identity import Identity, PeerId
from petalite.net.schema import decode, encode
from petalite.sim.dht import EPOCH_UNIX_S, SimPeer, SimSwarm
from petalite.sim.loop import run
from petalite.sim.network import SimNetwork

NAME = ("servers", b"model/0")
KEY = DhtKey.of(*NAME)
NOW = int(EPOCH_UNIX_S)


def schema(owner: PeerId, name: bytes, value: bytes) -> None:
    if value == b"wrong schema":
        raise BadRecord("a value that is not what servers say")


def simulate(test: Callable[[SimSwarm], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        swarm = SimSwarm(SimNetwork(1), {"servers": schema}, **options)
        try:
            await test(swarm)
        finally:
            await swarm.close()

    run(main())


class Hostile:
    """A peer that can say anything: raw calls out, and whatever answer it likes to calls in."""

    def __init__(self, swarm: SimSwarm, number: int = 0, address: str = "/ip4/66.6.6.6/tcp/1") -> None:
        self.identity = Identity.from_seed(sha256(f"hostile {number}".encode()).digest())
        self.endpoint = swarm.network.endpoint(self.identity.peer_id, address)
        self.contact = Contact(self.identity.peer_id, (address,))
        self.find_answer: Callable[[Caller, Find], Mapping[str, Any]] = self.nothing_to_find
        for method, handler in ((PING, self.ping), (FIND, self.find), (STORE, self.store)):
            self.endpoint.serve(method, handler)

    async def ping(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return encode(Ping(self.contact.addresses))

    async def find(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.find_answer(caller, decode(Find, body))

    async def store(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        n = len(decode(Store, body).records)
        return encode(StoreAnswer((0,) * n, (), (Found(b""),) * n))

    def nothing_to_find(self, caller: Caller, request: Find) -> Mapping[str, Any]:
        return encode(FindAnswer((), (Found(b""),) * len(request.keys)))

    async def call(self, target: SimPeer, method: str, message: Any) -> Mapping[str, Any]:
        body = message if isinstance(message, dict) else encode(message)
        return await self.endpoint.call(target.contact, method, body, timeout_s=5)

    async def offer(self, target: SimPeer, *records: Record | bytes) -> list[Outcome]:
        data = tuple(item if isinstance(item, bytes) else item.encode() for item in records)
        answer = decode(StoreAnswer, await self.call(target, STORE, Store(data, nearest=False)))
        return [Outcome(number) for number in answer.outcomes]

    async def enter(self, target: SimPeer) -> None:
        """Get into the target's table, as an honest peer would."""
        await self.call(target, PING, Ping(self.contact.addresses))
        await asyncio.sleep(1)
        assert self.contact.node_id in target.node.table

    def record(self, **changes: Any) -> Record:
        fields = {"sequence": 1, "issued_at": NOW, "ttl_s": 60, **changes}
        value = fields.pop("value", b"hello")
        record = Record.sign(self.identity, *NAME, b"", sequence=1, issued_at=NOW, ttl_s=1)
        return self.signed(replace(record, value=value, **fields))

    def signed(self, record: Record) -> Record:
        signature = self.identity.sign(b"petalite-dht-record-v1" + record._signed_part())
        return replace(record, signature=signature)


def numbers(n: int) -> bytes:
    """The first n contacts of an answer, all near the key."""
    return b"".join(number.to_bytes(2) for number in range(n))


def stored(peer: SimPeer) -> int:
    return len(peer.node.storage)


async def values(node: DhtNode) -> list[bytes]:
    found = await node.find([NAME], timeout_s=10)
    return sorted(record.value for record in found[NAME])
