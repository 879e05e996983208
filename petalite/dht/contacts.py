"""Who to call and where: a peer id with the addresses it is said to have, and what may be believed of them.

An address told by a peer is believed only if it reaches at least as far as the teller's own: a peer met on
the public Internet cannot make us dial into our private network, a peer on our LAN can name its neighbours.
Knows text and IP ranges; opens no socket.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from weakref import WeakValueDictionary

from petalite.dht.keys import KEY_BYTES, DhtKey
from petalite.errors import BadMessage, InvalidAddress
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

MAX_ADDRESSES = 8  # of one peer, as they travel
MAX_ADDRESS_LENGTH = 256  # characters; through a relay it is ~190
MAX_CONTACT_BYTES = KEY_BYTES + MAX_ADDRESSES * (MAX_ADDRESS_LENGTH + 1)


class Scope(IntEnum):
    """How far an address reaches."""

    LOOPBACK = 0
    PRIVATE = 1  # a local network, link-local included
    GLOBAL = 2


@dataclass(frozen=True, slots=True)
class Place:
    """What an address says about who can reach it and who runs it."""

    scope: Scope
    prefix: bytes  # the network it is in: 2 bytes of an IPv4 address (/16), 6 of an IPv6 address (/48)


def _ipv4_inside(ip: IPv6Address) -> IPv4Address | None:
    # Every IPv4 host owns a /48 of 6to4 space, so these count as the IPv4 address that they are.
    if ip.teredo is not None:
        return ip.teredo[1]
    return ip.ipv4_mapped or ip.sixtofour


@lru_cache(maxsize=4096)
def place_of_host(address: Multiaddr) -> Place | None:
    """The place of wherever a connection comes from."""
    return place_of(address.ip) if address.ip is not None else None


def place_of(ip: IPv4Address | IPv6Address) -> Place:
    """Scope and prefix of an IP address."""
    if isinstance(ip, IPv6Address):
        inner = _ipv4_inside(ip)
        if inner is not None:
            return place_of(inner)
    if ip.is_loopback:
        scope = Scope.LOOPBACK
    elif ip.is_global and not ip.is_multicast:
        scope = Scope.GLOBAL
    else:
        scope = Scope.PRIVATE
    return Place(scope, ip.packed[:2] if isinstance(ip, IPv4Address) else ip.packed[:6])


@lru_cache(maxsize=16384)
def _parse(text: str) -> Multiaddr | None:
    if len(text) > MAX_ADDRESS_LENGTH:
        return None
    try:
        address = Multiaddr.parse(text)
    except InvalidAddress:
        return None
    return address if address.port and address.relay is None else None


@lru_cache(maxsize=16384)
def parse_address(text: str) -> tuple[Multiaddr, Place] | None:
    """The address and its place. None for what does not parse, for a name (what it resolves to is not ours to
    say), and for one through a relay: who serves the DHT is reached directly."""
    address = _parse(text)
    ip = address.ip if address is not None else None
    if address is None or ip is None or ip.is_unspecified:
        return None
    return address, place_of(ip)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Contact:
    """A peer as the DHT passes it around. Equal when the peer and its addresses are."""

    peer_id: PeerId
    addresses: tuple[str, ...]  # multiaddr texts; the one known to work first, at most MAX_ADDRESSES
    node_id: DhtKey = field(init=False, compare=False, repr=False)
    # Of the first address: the one that counts for diversity. None when it has no IP address.
    place: Place | None = field(init=False, compare=False, repr=False)
    # The least of all addresses' scopes; None when any of them is not to be taken at all.
    reach: Scope | None = field(init=False, compare=False, repr=False)
    # As it travels: the 32 bytes of the peer's key, then its addresses, a space between each two.
    encoded: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        places = [_own_place(self.peer_id, text) for text in self.addresses]
        scopes = [place.scope for place in places if place is not None]
        encoded = self.peer_id.public_key + " ".join(self.addresses).encode()
        object.__setattr__(self, "encoded", encoded)
        object.__setattr__(self, "node_id", DhtKey.of_peer(self.peer_id))
        object.__setattr__(self, "place", places[0] if places else None)
        object.__setattr__(self, "reach", min(scopes) if scopes and len(scopes) == len(places) else None)

    @classmethod
    def of(cls, peer_id: PeerId, addresses: Iterable[str]) -> Contact:
        """Equal contacts made here or decoded are one object for as long as anyone holds it: a peer that
        stands in the tables of many nodes of a process is there once."""
        contact = cls(peer_id, tuple(addresses))
        return _in_use.setdefault(contact.encoded, contact)

    @classmethod
    def decode(cls, data: bytes) -> Contact:
        """Raises BadMessage."""
        contact = _in_use.get(data)
        if contact is None:
            try:
                addresses = data[KEY_BYTES:MAX_CONTACT_BYTES].decode("ascii").split(" ")
            except UnicodeDecodeError:
                raise BadMessage("a contact whose addresses are not text") from None
            right = KEY_BYTES < len(data) <= MAX_CONTACT_BYTES and len(addresses) <= MAX_ADDRESSES
            if not right or not all(addresses):
                raise BadMessage(
                    f"a contact of {len(data)} bytes with {len(addresses)} addresses; "
                    f"expected a {KEY_BYTES}-byte key and 1 to {MAX_ADDRESSES} addresses"
                )
            contact = cls(PeerId(data[:KEY_BYTES]), tuple(addresses))
            _in_use[contact.encoded] = contact
        return contact


_in_use: WeakValueDictionary[bytes, Contact] = WeakValueDictionary()


def seen_from(addresses: Iterable[str], seen: Multiaddr | None) -> list[str]:
    """A peer that listens on every interface says so (0.0.0.0),
    and stands for: at the address you see me at."""
    resolved = []
    for text in addresses:
        address = _parse(text)
        if address is not None and address.ip is not None and address.ip.is_unspecified:
            if seen is None or seen.protocol != address.protocol:
                continue
            text = str(replace(address, host=seen.host))
        resolved.append(text)
    return resolved


def believable(contact: Contact, teller: Scope) -> Contact:
    """The contact with those of its addresses that a teller of this scope may name;
    other peers' are dropped too."""
    if contact.reach is not None and contact.reach >= teller:
        return contact
    kept = []
    for text in contact.addresses:
        place = _own_place(contact.peer_id, text)
        if place is not None and place.scope >= teller:
            kept.append(text)
    return Contact.of(contact.peer_id, kept)


def _own_place(peer_id: PeerId, text: str) -> Place | None:
    """The place of an address, unless it names another peer."""
    parsed = parse_address(text)
    return parsed[1] if parsed is not None and parsed[0].peer_id in (None, peer_id) else None
