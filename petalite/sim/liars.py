"""Peers that turn on the swarm: what they say instead of what the protocol would have them say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nsmallest
from typing import Any

from petalite.dht.keys import DhtKey
from petalite.dht.messages import FIND, STORE, Find, FindAnswer, Found, Store, StoreAnswer, pack_nearest
from petalite.dht.network import Caller
from petalite.dht.records import Record
from petalite.dht.storage import Outcome
from petalite.net.schema import decode, encode
from petalite.sim.dht import SimPeer

_TOLD = 20  # contacts in an answer


def collude(peers: Sequence[SimPeer]) -> None:
    """From now on these know each other, name only each other,
    and say that they store and that there is nothing."""

    contacts = [peer.contact for peer in peers]

    def near(keys: Sequence[DhtKey]) -> tuple[tuple[bytes, ...], list[bytes]]:
        return pack_nearest(
            [nsmallest(_TOLD, contacts, key=lambda contact: contact.node_id ^ key) for key in keys]
        )

    async def find(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        told, indices = near([DhtKey.parse(key) for key in decode(Find, body).keys])
        return encode(FindAnswer(told, tuple(Found(own) for own in indices)))

    async def store(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = [Record.decode(data).key for data in decode(Store, body).records]
        told, indices = near(keys)
        outcomes = (Outcome.STORED.value,) * len(keys)
        return encode(StoreAnswer(outcomes, told, tuple(Found(own) for own in indices)))

    for peer in peers:
        peer.endpoint.serve(FIND, find)
        peer.endpoint.serve(STORE, store)
