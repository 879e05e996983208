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

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_id", DhtKey.of_peer(self.peer_id))

    @property
    def place(self) -> Place | None:
        """Of the first address: the one that counts for diversity. None when it has no IP address."""
        parsed = parse_address(self.addresses[0]) if self.addresses else None
        return parsed[1] if parsed else None

    def encode(self) -> bytes:
        """As it travels: the 32 bytes of the peer's key, then its addresses, a space between each two."""
        return self.peer_id.public_key + " ".join(self.addresses).encode()

    @classmethod
    def decode(cls, data: bytes) -> Contact:
        """Raises BadMessage. Equal bytes give the same object for as long as anyone holds it: a peer that
        stands in the tables of many nodes of a process is there once."""
        contact = _in_use.get(data)
        if contact is None:
            try:
                addresses = data[KEY_BYTES:].decode("ascii").split(" ")
            except UnicodeDecodeError:
                raise BadMessage("a contact whose addresses are not text") from None
            if len(data) < KEY_BYTES or not 0 < len(addresses) <= MAX_ADDRESSES or not all(addresses):
                raise BadMessage(
                    f"a contact of {len(data)} bytes with {len(addresses)} addresses; "
                    f"expected a {KEY_BYTES}-byte key and 1 to {MAX_ADDRESSES} addresses"
                )
            contact = _in_use[data] = cls(PeerId(data[:KEY_BYTES]), tuple(addresses))
        return contact


_in_use: WeakValueDictionary[bytes, Contact] = WeakValueDictionary()


def seen_from(addresses: Iterable[str], seen: Multiaddr | None) -> list[str]:
    """A peer that listens on every interface says so (0.0.0.0), and stands for: at the address you see me
    at."""
    resolved = []
    for text in addresses:
        address = _parse(text)
        if address is not None and address.ip is not None and address.ip.is_unspecified:
            if seen is None or seen.protocol != address.protocol:
                continue
            text = str(replace(address, host=seen.host))
        resolved.append(text)
    return resolved


def believable(peer_id: PeerId, addresses: Iterable[str], teller: Scope) -> tuple[str, ...]:
    """Those of a peer's claimed addresses that a teller of this scope may name; other peers' are dropped
    too."""
    kept = []
    for text in addresses:
        parsed = parse_address(text)
        if parsed is None or parsed[1].scope < teller:
            continue
        if parsed[0].peer_id is None or parsed[0].peer_id == peer_id:
            kept.append(text)
    return tuple(kept)
