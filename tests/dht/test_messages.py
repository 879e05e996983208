"""Bounds of messages, by the schema that every message goes through and the encoder that they travel in."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.messages import (
    MAX_PEERS_BYTES,
    MAX_RECORDS_BYTES,
    Find,
    FindAnswer,
    Found,
    Store,
    pack_nearest,
    unpack_nearest,
)
from petalite.errors import BadMessage
from petalite.net.schema import decode, encode
from tests.dht.helpers import contact

MAX_BODY_BYTES = 64 << 10


@given(st.lists(st.lists(st.integers(0, 60), max_size=20, unique=True), min_size=1, max_size=16))
def test_each_key_gets_its_own_contacts_back_in_order(numbers: list[list[int]]):
    nearest = [[contact(number) for number in of_key] for of_key in numbers]
    peers, indices = pack_nearest(nearest)
    assert len(peers) == len({number for of_key in numbers for number in of_key})
    found = [Found(own) for own in indices]
    assert unpack_nearest(peers, found, len(numbers)) == nearest


@given(st.lists(st.binary(max_size=80), max_size=5), st.lists(st.binary(max_size=70), min_size=1, max_size=3))
def test_hostile_answers_are_contacts_or_a_bad_message(peers: list[bytes], indices: list[bytes]):
    try:
        nearest = unpack_nearest(peers, [Found(own) for own in indices], len(indices))
    except BadMessage:
        return
    assert all(isinstance(peer, Contact) for of_key in nearest for peer in of_key)


def test_an_answer_about_other_keys_than_asked_is_bad():
    with pytest.raises(BadMessage, match="about 2 keys to a question about 1"):
        unpack_nearest((), [Found(b""), Found(b"")], 1)


def test_contacts_with_endless_addresses_leave_room_for_records():
    """Every key keeps its nearest, and the whole fits in one message with as many records as may go along."""
    long = [
        Contact(
            contact(n).peer_id,
            tuple(f"/ip6/2606:4700:{n:x}:{m}:ffff:ffff:ffff:ffff/tcp/31330" for m in range(8)),
        )
        for n in range(200)
    ]
    nearest = [long[20 * number : 20 * number + 20] for number in range(10)]
    peers, indices = pack_nearest(nearest)
    assert sum(map(len, peers)) <= MAX_PEERS_BYTES
    assert all(len(own) >= 2 * 4 for own in indices)
    assert unpack_nearest(peers, [Found(own) for own in indices], 10)[3][:4] == nearest[3][:4]
    records = (bytes(MAX_RECORDS_BYTES // 100),) * 100
    answer = FindAnswer(peers, (Found(indices[0], records), *(Found(own) for own in indices[1:])))
    assert len(msgpack.packb(encode(answer))) < MAX_BODY_BYTES


@pytest.mark.parametrize(
    "message",
    [
        Find(()),
        Find((bytes(31),)),
        Find((bytes(32),) * 17),
        Find((bytes(32),), ("/ip4/5.6.7.8/tcp/1",) * 9),
        Find((bytes(32),), ("x" * 257,)),
        Store(()),
        Store((b"x",) * 17),
        Store((bytes(5000),)),
    ],
)
def test_messages_beyond_their_bounds_are_refused(message: Find | Store):
    with pytest.raises(BadMessage):
        decode(type(message), encode(message))


def test_what_a_newer_peer_says_beside_is_ignored():
    body = encode(Find((bytes(32),))) | {"colour": "green"}
    assert decode(Find, body) == Find((bytes(32),))
