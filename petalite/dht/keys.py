"""Kademlia's one space: where keys and peers are, and how far apart. Knows no peer's address and no value.

Peers and keys share 256 bits. A peer's point is the hash of its public key, so that nobody chooses a place
freely; distance is XOR read as a number (Maymounkov and Mazières, "Kademlia", IPTPS 2002, §2.1).
"""

from __future__ import annotations

from hashlib import sha256
from random import Random

from petalite.net.identity import PeerId

KEY_BITS = 256
KEY_BYTES = KEY_BITS // 8
# A key's preimage starts with this and is never 32 bytes long, so no name's point is a peer's by
# construction.
_DOMAIN = b"petalite-dht-key-v1"


class DhtKey(int):
    """A point of the space: an integer below 2**256, so that XOR, order and hash are the machine's own."""

    __slots__ = ()

    @classmethod
    def of(cls, namespace: str, name: bytes | str) -> DhtKey:
        """Where the records under this name live."""
        space = namespace.encode()
        if isinstance(name, str):
            name = name.encode()
        return cls.parse(sha256(_DOMAIN + len(space).to_bytes(2) + space + name).digest())

    @classmethod
    def of_peer(cls, peer_id: PeerId) -> DhtKey:
        """Where a peer lives."""
        return cls.parse(sha256(peer_id.public_key).digest())

    @classmethod
    def parse(cls, data: bytes) -> DhtKey:
        """From its 32 bytes; the caller has checked that there are as many."""
        return cls(int.from_bytes(data))

    @classmethod
    def random(cls, random: Random, near: DhtKey | None = None, shared_bits: int = 0) -> DhtKey:
        """Any point; with `near`, one that shares exactly `shared_bits` leading bits with it."""
        if near is None:
            return cls(random.getrandbits(KEY_BITS))
        below = KEY_BITS - shared_bits - 1  # the bit that differs, and all beneath it free
        return cls(near ^ (1 << below) ^ (random.getrandbits(below) if below else 0))

    @property
    def digest(self) -> bytes:
        """Its 32 bytes, as it travels."""
        return self.to_bytes(KEY_BYTES)

    def shared_bits(self, other: int) -> int:
        """Length of the common prefix, 0 to 256."""
        return KEY_BITS - (self ^ other).bit_length()

    def __repr__(self) -> str:
        return f"DhtKey({self.digest.hex()[:16]}…)"
