"""Scopes are checked against the registries that Python's ipaddress carries,
by addresses known to be in them."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht import contacts
from petalite.dht.contacts import MAX_ADDRESSES, Contact, Scope, believable, parse_address, seen_from
from petalite.errors import BadMessage
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr

PEER = Identity.from_seed(b"\1" * 32).peer_id
OTHER = Identity.from_seed(b"\2" * 32).peer_id


@pytest.mark.parametrize(
    ("host", "scope"),
    [
        ("/ip4/127.0.0.1", Scope.LOOPBACK),
        ("/ip6/::1", Scope.LOOPBACK),
        ("/ip4/10.1.2.3", Scope.PRIVATE),
        ("/ip4/192.168.1.1", Scope.PRIVATE),
        ("/ip4/169.254.169.254", Scope.PRIVATE),  # where clouds keep their secrets
        ("/ip4/100.64.0.1", Scope.PRIVATE),  # carrier-grade NAT
        ("/ip6/fe80::1", Scope.PRIVATE),
        ("/ip6/fd00::1", Scope.PRIVATE),
        ("/ip4/224.0.0.1", Scope.PRIVATE),  # multicast: nobody to dial
        ("/ip4/8.8.8.8", Scope.GLOBAL),
        ("/ip6/2606:4700::1111", Scope.GLOBAL),
        ("/ip6/::ffff:127.0.0.1", Scope.LOOPBACK),
        ("/ip6/2002:7f00:1::1", Scope.LOOPBACK),  # 6to4 of 127.0.0.1
    ],
)
def test_scope(host: str, scope: Scope):
    parsed = parse_address(f"{host}/tcp/1")
    assert parsed is not None
    assert parsed[1].scope is scope


def test_prefixes_are_16_bits_of_ipv4_and_48_of_ipv6():
    def prefix(text: str) -> bytes:
        parsed = parse_address(text)
        assert parsed is not None
        return parsed[1].prefix

    assert prefix("/ip4/5.6.7.8/tcp/1") == prefix("/ip4/5.6.200.9/tcp/2") == bytes((5, 6))
    assert prefix("/ip6/2606:4700:1:2::3/tcp/1") == prefix("/ip6/2606:4700:1:ffff::/tcp/1")
    assert prefix("/ip6/2606:4700:1::/tcp/1") != prefix("/ip6/2606:4700:2::/tcp/1")
    # A host's 6to4 space does not make it a thousand networks.
    assert prefix("/ip6/2002:506:708::1/tcp/1") == bytes((5, 6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "/dns/example.org/tcp/1",
        "/ip4/0.0.0.0/tcp/1",
        "/ip4/5.6.7.8/tcp/0",
        "/ip4/5.6.7.8/udp/1",
        f"/ip4/5.6.7.8/tcp/1/p2p/{OTHER}/p2p-circuit/p2p/{PEER}",
        "/ip4/5.6.7.8/tcp/1" + "0" * 600,
    ],
)
def test_what_is_no_direct_ip_address_is_not_taken(text: str):
    assert parse_address(text) is None


def test_a_teller_names_only_what_reaches_as_far_as_itself():
    told = Contact(PEER, ("/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/5.6.7.8/tcp/1"))
    assert believable(told, Scope.GLOBAL).addresses == told.addresses[2:]
    assert believable(told, Scope.PRIVATE).addresses == told.addresses[1:]
    assert believable(told, Scope.LOOPBACK) is told


def test_what_does_not_parse_and_what_names_another_peer_is_dropped():
    own, foreign = f"/ip4/5.6.7.8/tcp/1/p2p/{PEER}", f"/ip4/5.6.7.8/tcp/1/p2p/{OTHER}"
    for scope in Scope:
        assert believable(Contact(PEER, (foreign, own, "junk")), scope).addresses == (own,)
        assert believable(Contact(PEER, (foreign, "/dns/a.b/tcp/1")), scope).addresses == ()


def test_an_unspecified_address_stands_for_where_the_peer_is_seen():
    told = ("/ip4/0.0.0.0/tcp/7", "/ip6/::/tcp/7", "/ip4/5.6.7.8/tcp/9")
    seen = Multiaddr.parse("/ip4/9.9.9.9/tcp/50123")
    assert seen_from(told, seen) == ["/ip4/9.9.9.9/tcp/7", "/ip4/5.6.7.8/tcp/9"]
    assert seen_from(told, None) == ["/ip4/5.6.7.8/tcp/9"]


@given(st.lists(st.text("abc/.:0123456789", min_size=1, max_size=20), min_size=1, max_size=MAX_ADDRESSES))
def test_encoding_round_trips(addresses: list[str]):
    contact = Contact(PEER, tuple(addresses))
    assert Contact.decode(contact.encoded) == contact


def test_equal_bytes_are_one_object_while_it_is_in_use_and_forgotten_after():
    data = Contact(PEER, ("/ip4/5.6.7.8/tcp/1",)).encoded
    first = Contact.decode(data)
    assert Contact.decode(bytes(bytearray(data))) is first
    del first
    gc.collect()
    assert data not in contacts._in_use


@given(st.binary(max_size=200))
def test_hostile_bytes_are_a_contact_or_a_bad_message(data: bytes):
    try:
        contact = Contact.decode(data)
    except BadMessage:
        return
    assert contact.encoded == data
    assert 1 <= len(contact.addresses) <= MAX_ADDRESSES
