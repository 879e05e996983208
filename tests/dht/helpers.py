"""Peers with made-up ids and addresses, for tests of the pure cores."""

from __future__ import annotations

from hashlib import sha256

from petalite.dht.contacts import Contact
from petalite.net.identity import PeerId


def contact(number: int, prefix: tuple[int, int] | None = None) -> Contact:
    """The number-th peer; by default each is in a /16 of its own."""
    high, low = prefix or (20 + number // 200 % 80, number % 200)
    address = f"/ip4/{high}.{low}.{number // 250 % 250}.{number % 250 + 1}/tcp/1"
    return Contact(PeerId(sha256(f"peer {number}".encode()).digest()), (address,))
