"""The DHT's three calls, as typed messages: ping, find, store.

Who calls is known from the connection; a caller that serves as well says at which addresses, which makes it a
candidate for the callee's table and nothing more. Contacts and records travel as byte strings with layouts of
their own (`Contact.encoded`, `Record.encode`); a peer that is near several of the keys asked for is listed
once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated

from petalite.dht.contacts import MAX_ADDRESS_LENGTH, MAX_ADDRESSES, Contact
from petalite.dht.keys import KEY_BYTES, DhtKey
from petalite.dht.lookup import MAX_KEYS_PER_QUERY
from petalite.dht.records import MAX_RECORD_BYTES
from petalite.errors import BadMessage
from petalite.net.schema import between, length

PING, FIND, STORE = "dht.ping", "dht.find", "dht.store"

MAX_NEAREST = 32  # contacts in the answer to one key; k is 20
# Of one message, which has 64 KiB in all.
MAX_RECORDS_BYTES = 38 << 10
MAX_PEERS_BYTES = 22 << 10
MAX_RECORDS_PER_STORE = 16

Addresses = Annotated[
    tuple[Annotated[str, length(1, MAX_ADDRESS_LENGTH)], ...],
    length(0, MAX_ADDRESSES),
]
_Key = Annotated[bytes, length(KEY_BYTES, KEY_BYTES)]
_Record = Annotated[bytes, length(1, MAX_RECORD_BYTES)]
_Indices = Annotated[bytes, length(0, 2 * MAX_NEAREST)]


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? The answer has the same form."""

    addresses: Addresses = ()  # where the sender serves; none: it is a client


@dataclass(frozen=True, slots=True)
class Find:
    """Whom do you know near these keys, and what do you hold under them?"""

    keys: Annotated[tuple[_Key, ...], length(1, MAX_KEYS_PER_QUERY)]
    addresses: Addresses = ()


@dataclass(frozen=True, slots=True)
class Found:
    """About one key."""

    nearest: _Indices  # two bytes each, into `peers` of the message
    records: tuple[_Record, ...] = ()


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """One `Found` per key, in their order."""

    peers: Annotated[tuple[bytes, ...], length(0, MAX_KEYS_PER_QUERY * MAX_NEAREST)]
    found: Annotated[tuple[Found, ...], length(1, MAX_KEYS_PER_QUERY)]


@dataclass(frozen=True, slots=True)
class Store:
    """Hold these records of mine."""

    records: Annotated[tuple[_Record, ...], length(1, MAX_RECORDS_PER_STORE)]
    nearest: bool = True  # and whom do you know near their keys?
    addresses: Addresses = ()


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """What became of each record, in their order, and whom the callee knows nearer to its key."""

    outcomes: Annotated[tuple[Annotated[int, between(0, 255)], ...], length(1, MAX_RECORDS_PER_STORE)]
    peers: Annotated[tuple[bytes, ...], length(0, MAX_RECORDS_PER_STORE * MAX_NEAREST)]
    found: Annotated[
        tuple[Found, ...], length(1, MAX_RECORDS_PER_STORE)
    ]  # `records`: the newer one that stood


def pack_nearest(nearest: Sequence[Sequence[Contact]]) -> tuple[tuple[bytes, ...], list[bytes]]:
    """The contacts near each of several keys, each listed once, and for each key which of them are its own.
    Where they would take more than MAX_PEERS_BYTES, every key keeps its nearest."""
    if len(nearest) == 1 and sum(len(contact.encoded) for contact in nearest[0]) <= MAX_PEERS_BYTES:
        n = len(nearest[0])
        return tuple([contact.encoded for contact in nearest[0]]), [_INDEX[n].pack(*range(n))]
    numbers: dict[DhtKey, int] = {}
    peers: list[bytes] = []
    indices: list[list[int]] = [[] for _ in nearest]
    left = MAX_PEERS_BYTES
    for rank in zip_longest(*nearest):
        for contact, own in zip(rank, indices, strict=True):
            if contact is None:
                continue
            number = numbers.get(contact.node_id)
            if number is None:
                left -= len(contact.encoded)
                if left < 0:
                    return tuple(peers), [_INDEX[len(own)].pack(*own) for own in indices]
                number = numbers[contact.node_id] = len(peers)
                peers.append(contact.encoded)
            own.append(number)
    return tuple(peers), [_INDEX[len(own)].pack(*own) for own in indices]


def unpack_nearest(peers: Sequence[bytes], found: Sequence[Found], n_keys: int) -> list[list[Contact]]:
    """For each key its contacts, in the answer's order. Raises
    BadMessage when the answer does not fit the question."""
    if len(found) != n_keys:
        raise BadMessage(f"an answer about {len(found)} keys to a question about {n_keys}")
    contacts = [Contact.decode(peer) for peer in peers]
    try:
        return [
            [contacts[number] for number in _INDEX[len(item.nearest) // 2].unpack(item.nearest)]
            for item in found
        ]
    except (IndexError, struct.error):
        raise BadMessage(f"an answer that points beyond its {len(contacts)} contacts") from None


_INDEX = [struct.Struct(f">{n}H") for n in range(MAX_NEAREST + 1)]
