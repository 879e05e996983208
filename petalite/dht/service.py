"""What a node does for others: answers pings and finds, and holds their records.

A record is taken from its owner alone, over a connection that proves it is the owner: nobody can replay,
prolong or push another's. And only near its key: a node that is not among the few nearest has no use for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from petalite.dht.contacts import Scope, place_of_host
from petalite.dht.keys import DhtKey
from petalite.dht.limits import RateLimiter, RateSettings
from petalite.dht.messages import (
    FIND,
    MAX_RECORDS_BYTES,
    PING,
    STORE,
    Find,
    FindAnswer,
    Found,
    Ping,
    Store,
    StoreAnswer,
    pack_nearest,
)
from petalite.dht.network import Caller, Clock, Network
from petalite.dht.peers import Peers
from petalite.dht.records import Record, RecordChecker
from petalite.dht.storage import Outcome, Storage
from petalite.errors import BadMessage, BadRecord, ForgedRecord, RateLimited
from petalite.net.schema import decode, encode

_STORE_COST = 4  # in keys looked up
# How many times farther from a key than our k-th neighbour is from us: where the k nearest to any key surely
# end.
_REACH = 4


class Service:
    """The three handlers."""

    def __init__(
        self,
        peers: Peers,
        storage: Storage,
        checker: RecordChecker,
        clock: Clock,
        random: Random,
        rates: RateSettings,
        k: int,
    ) -> None:
        self._peers = peers
        self._storage = storage
        self._checker = checker
        self._clock = clock
        self._random = random
        self._k = k
        factor = rates.per_prefix_factor
        self._of_peer = RateLimiter(rates.per_peer_per_s, rates.per_peer_burst, rates.remembered)
        self._of_prefix = RateLimiter(
            rates.per_peer_per_s * factor, rates.per_peer_burst * factor, rates.remembered
        )

    def serve(self, network: Network) -> None:
        """Answer calls from now on."""
        network.serve(PING, self.ping)
        network.serve(FIND, self.find)
        network.serve(STORE, self.store)

    async def ping(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Say that we are there, and where we serve."""
        request = decode(Ping, body)
        self._admit(caller, 1)
        self._peers.meet(caller, request.addresses)
        return encode(Ping(self._peers.own_addresses))

    async def find(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The nearest peers to each key and, as far as there is room, the records under it."""
        request = decode(Find, body)
        self._admit(caller, len(request.keys))
        self._peers.meet(caller, request.addresses)
        keys = [DhtKey.parse(key) for key in request.keys]
        if len(set(keys)) < len(keys):
            raise BadMessage(f"{len(keys)} keys to find, and not all different")
        held = self._storage.sample(keys, self._clock.time_s(), MAX_RECORDS_BYTES, self._random)
        peers, indices = self._nearest(caller, keys)
        found = [
            Found(own, tuple(record.data for record in held[key]))
            for key, own in zip(keys, indices, strict=True)
        ]
        return encode(FindAnswer(peers, tuple(found)))

    async def store(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hold the caller's records. A forged or foreign one ends the call; others are judged one by one."""
        request = decode(Store, body)
        self._admit(caller, _STORE_COST * len(request.records))
        self._peers.meet(caller, request.addresses)
        records = [Record.decode(data) for data in request.records]
        outcomes = []
        standing: list[tuple[bytes, ...]] = []
        room_bytes = MAX_RECORDS_BYTES
        for data, record in zip(request.records, records, strict=True):
            outcome = self._hold(caller, data, record)
            held = self._storage.standing(record, self._clock.time_s()) if outcome is Outcome.STALE else None
            outcomes.append(outcome.value)
            room_bytes -= len(held.data) if held else 0
            standing.append((held.data,) if held and room_bytes >= 0 else ())
        keys = [record.key for record in records]
        peers, indices = self._nearest(caller, keys) if request.nearest else ((), [b""] * len(keys))
        found = tuple(Found(own, newer) for own, newer in zip(indices, standing, strict=True))
        return encode(StoreAnswer(tuple(outcomes), peers, found))

    # -- inside ------------------------------------------------------------------------------------

    def _admit(self, caller: Caller, cost: int) -> None:
        now_s = self._clock.time_s()
        allowed = self._of_peer.allow(caller.peer_id, cost, now_s)
        prefix = _public_prefix(caller)
        if allowed and prefix is not None:
            allowed = self._of_prefix.allow(prefix, cost, now_s)
        if not allowed:
            raise RateLimited("too many DHT calls from you or your network; slow down")

    def _nearest(self, caller: Caller, keys: list[DhtKey]) -> tuple[tuple[bytes, ...], list[bytes]]:
        caller_id = DhtKey.of_peer(caller.peer_id)
        near = []
        for key in keys:
            contacts = self._peers.nearest(key, self._k + 1)
            near.append([contact for contact in contacts if contact.node_id != caller_id][: self._k])
        return pack_nearest(near)

    def _hold(self, caller: Caller, data: bytes, record: Record) -> Outcome:
        if record.owner != caller.peer_id:
            raise ForgedRecord(
                f"a record of {record.owner}; you are {caller.peer_id} and store your own only"
            )
        reach = self._peers.table.neighbour_distance()
        if reach is not None and self._peers.table.own_id ^ record.key > _REACH * reach:
            return Outcome.TOO_FAR
        now_s, group = self._clock.time_s(), _public_prefix(caller)
        refusal = self._storage.refusal(data, record, now_s, group)
        if refusal is not None:
            return refusal
        try:
            self._checker.check(data, self._clock.unix_s(), from_owner=True)
        except ForgedRecord:
            raise
        except BadRecord:
            return Outcome.REFUSED
        return self._storage.put(data, record, now_s, group)


def _public_prefix(caller: Caller) -> bytes | None:
    """The network that a public caller comes from; private ones are not told apart by it."""
    place = place_of_host(caller.address) if caller.address is not None else None
    return place.prefix if place is not None and place.scope is Scope.GLOBAL else None
