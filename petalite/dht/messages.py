"""The DHT's three calls, as typed messages: ping, find, store.

Who calls is known from the connection; a caller that serves as well says at which addresses, which makes it a
candidate for the callee's table and nothing more. Contacts and records travel as byte strings with layouts of
their own (`Contact.encode`, `Record.encode`); a peer that is near several of the keys asked for is listed
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from petalite.dht.contacts import MAX_ADDRESS_LENGTH, MAX_ADDRESSES, MAX_CONTACT_BYTES, Contact
from petalite.dht.keys import KEY_BYTES, DhtKey
from petalite.dht.lookup import MAX_KEYS_PER_QUERY
from petalite.dht.records import MAX_RECORD_BYTES
from petalite.errors import BadMessage
from petalite.net.schema import Bounds

PING, FIND, STORE = "dht.ping", "dht.find", "dht.store"

MAX_NEAREST = 32  # contacts in the answer to one key; k is 20
# Of one message, which has 64 KiB in all.
MAX_RECORDS_BYTES = 38 << 10
MAX_PEERS_BYTES = 22 << 10
MAX_RECORDS_PER_STORE = 16

Addresses = Annotated[
    tuple[Annotated[str, Bounds(1, MAX_ADDRESS_LENGTH)], ...],
    Bounds(0, MAX_ADDRESSES),
]
_Key = Annotated[bytes, Bounds(KEY_BYTES, KEY_BYTES)]
_Contact = Annotated[bytes, Bounds(KEY_BYTES + 1, MAX_CONTACT_BYTES)]
_Record = Annotated[bytes, Bounds(1, MAX_RECORD_BYTES)]
_Indices = Annotated[
    tuple[Annotated[int, Bounds(0, MAX_KEYS_PER_QUERY * MAX_NEAREST)], ...], Bounds(0, MAX_NEAREST)
]


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? The answer has the same form."""

    addresses: Addresses = ()  # where the sender serves; none: it is a client


@dataclass(frozen=True, slots=True)
class Find:
    """Whom do you know near these keys, and what do you hold under them?"""

    keys: Annotated[tuple[_Key, ...], Bounds(1, MAX_KEYS_PER_QUERY)]
    addresses: Addresses = ()


@dataclass(frozen=True, slots=True)
class Found:
    """About one key."""

    nearest: _Indices  # into `peers` of the message
    records: tuple[_Record, ...] = ()


@dataclass(frozen=True, slots=True)
class FindAnswer:
    """One `Found` per key, in their order."""

    peers: Annotated[tuple[_Contact, ...], Bounds(0, MAX_KEYS_PER_QUERY * MAX_NEAREST)]
    found: Annotated[tuple[Found, ...], Bounds(1, MAX_KEYS_PER_QUERY)]


@dataclass(frozen=True, slots=True)
class Store:
    """Hold these records of mine."""

    records: Annotated[tuple[_Record, ...], Bounds(1, MAX_RECORDS_PER_STORE)]
    nearest: bool = True  # and whom do you know near their keys?
    addresses: Addresses = ()


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """What became of each record, in their order, and whom the callee knows nearer to its key."""

    outcomes: Annotated[tuple[Annotated[int, Bounds(0, 255)], ...], Bounds(1, MAX_RECORDS_PER_STORE)]
    peers: Annotated[tuple[_Contact, ...], Bounds(0, MAX_RECORDS_PER_STORE * MAX_NEAREST)]
    found: Annotated[
        tuple[Found, ...], Bounds(1, MAX_RECORDS_PER_STORE)
    ]  # `records`: the newer one that stood


def pack_nearest(nearest: Sequence[Sequence[Contact]]) -> tuple[tuple[bytes, ...], list[tuple[int, ...]]]:
    """The contacts near each of several keys, each listed once, and for each key which of them are its own.
    Where they would take more than MAX_PEERS_BYTES, every key keeps its nearest."""
    numbers: dict[DhtKey, int] = {}
    peers: list[bytes] = []
    indices: list[list[int]] = [[] for _ in nearest]
    left = MAX_PEERS_BYTES
    for rank in range(max(map(len, nearest), default=0)):
        for contacts, own in zip(nearest, indices, strict=True):
            if rank >= len(contacts):
                continue
            contact = contacts[rank]
            number = numbers.get(contact.node_id)
            if number is None:
                data = contact.encode()
                left -= len(data)
                if left < 0:
                    return tuple(peers), [tuple(own) for own in indices]
                number = numbers[contact.node_id] = len(peers)
                peers.append(data)
            own.append(number)
    return tuple(peers), [tuple(own) for own in indices]


def unpack_nearest(peers: Sequence[bytes], found: Sequence[Found], n_keys: int) -> list[list[Contact]]:
    """For each key its contacts, in the answer's order. Raises BadMessage when the answer does not fit the
    question."""
    if len(found) != n_keys:
        raise BadMessage(f"an answer about {len(found)} keys to a question about {n_keys}")
    contacts = [Contact.decode(peer) for peer in peers]
    try:
        return [[contacts[number] for number in item.nearest] for item in found]
    except IndexError:
        raise BadMessage(f"an answer that points beyond its {len(contacts)} contacts") from None
