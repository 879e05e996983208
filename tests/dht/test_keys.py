"""Checked against hashlib directly and against XOR on bytes, written out here."""

from __future__ import annotations

import hashlib
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from petalite.dht.keys import DhtKey
from petalite.net.identity import Identity

keys = st.binary(min_size=32, max_size=32)


def leading_equal_bits(a: bytes, b: bytes) -> int:
    """The slow way: bit strings side by side."""
    left, right = ("".join(f"{byte:08b}" for byte in data) for data in (a, b))
    return next((i for i in range(256) if left[i] != right[i]), 256)


def test_a_peers_point_is_the_hash_of_its_key():
    peer_id = Identity.from_seed(bytes(32)).peer_id
    assert DhtKey.of_peer(peer_id).digest == hashlib.sha256(peer_id.public_key).digest()


def test_a_names_point_is_the_hash_of_both_parts():
    expected = hashlib.sha256(b"petalite-dht-key-v1" + b"\0\7servers" + b"model/3").digest()
    assert DhtKey.of("servers", "model/3").digest == expected
    assert DhtKey.of("servers", b"model/3") == DhtKey.of("servers", "model/3")


def test_the_border_between_namespace_and_name_counts():
    assert DhtKey.of("ab", "c") != DhtKey.of("a", "bc")


@given(keys, keys)
def test_shared_bits_are_the_common_prefix(a: bytes, b: bytes):
    assert DhtKey.parse(a).shared_bits(DhtKey.parse(b)) == leading_equal_bits(a, b)


@given(keys, keys)
def test_distance_is_xor_of_the_bytes(a: bytes, b: bytes):
    xor = bytes(x ^ y for x, y in zip(a, b, strict=True))
    assert DhtKey.parse(a) ^ DhtKey.parse(b) == int.from_bytes(xor)


@given(keys, st.integers(0, 255), st.integers())
def test_a_random_key_near_another_shares_exactly_so_many_bits(near: bytes, bits: int, seed: int):
    own = DhtKey.parse(near)
    assert DhtKey.random(Random(seed), own, bits).shared_bits(own) == bits
