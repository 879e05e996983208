"""Multiaddrs: libp2p's spellings, one canonical text each, and everything else refused."""

from __future__ import annotations

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import InvalidAddress
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

PEER = PeerId(bytes(range(32)))
RELAY = PeerId(bytes(range(1, 33)))

peers = st.one_of(st.none(), st.binary(min_size=32, max_size=32).map(PeerId))
ports = st.integers(0, 65535)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
hosts = st.one_of(
    st.tuples(st.just("ip4"), st.ip_addresses(v=4).map(str)),
    st.tuples(st.just("ip6"), st.ip_addresses(v=6).map(str)),
    st.tuples(st.sampled_from(["dns", "dns4", "dns6"]), names),
)


@given(hosts, ports, peers)
def test_round_trip(host: tuple[str, str], port: int, peer: PeerId | None) -> None:
    address = Multiaddr(*host, port, peer)
    assert Multiaddr.parse(str(address)) == address


@given(hosts, ports, st.binary(min_size=32, max_size=32).map(PeerId))
def test_round_trip_through_a_relay(host: tuple[str, str], port: int, peer: PeerId) -> None:
    address = Multiaddr(*host, port, peer, RELAY)
    assert Multiaddr.parse(str(address)) == address
    assert f"/p2p/{RELAY}/p2p-circuit/p2p/{peer}" in str(address)


@given(st.text(max_size=80))
def test_any_text_parses_or_is_invalid_address(text: str) -> None:
    with contextlib.suppress(InvalidAddress):
        Multiaddr.parse(text)


@given(st.text(alphabet="/ip46dnstcp2-circu.:0123456789aF", max_size=60))
def test_what_parses_is_canonical(text: str) -> None:
    try:
        address = Multiaddr.parse(text)
    except InvalidAddress:
        return
    assert Multiaddr.parse(str(address)) == address


def test_equal_addresses_compare_equal() -> None:
    """One spelling each: RFC 5952 for IPv6, lower case for names, no leading zeros for ports."""
    for first, second in [
        ("/ip6/2001:DB8:0:0::1/tcp/1", "/ip6/2001:db8::1/tcp/1"),
        ("/dns/Example.ORG/tcp/1", "/dns/example.org/tcp/1"),
        ("/ip4/1.2.3.4/tcp/00001", "/ip4/1.2.3.4/tcp/1"),
    ]:
        assert Multiaddr.parse(first) == Multiaddr.parse(second)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.2.3.4:31330",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp",
        "/ip4/1.2.3.4/tcp/",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.4/tcp/1a",
        "/ip4/1.2.3.4/tcp/٣",  # a digit to isdigit, not to us
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3/tcp/1",
        "/ip4/01.2.3.4/tcp/1",
        "/ip4/1.2.3.256/tcp/1",
        "/ip6/1.2.3.4/tcp/1",
        "/ip6/:::/tcp/1",
        "/dns/-a/tcp/1",
        "/dns/a b/tcp/1",
        "/dns//tcp/1",
        "/dns/" + "a" * 254 + "/tcp/1",
        "/ip4/1.2.3.4/tcp/1/p2p",
        "/ip4/1.2.3.4/tcp/1/p2p/12D3Koo",
        "/ip4/1.2.3.4/tcp/1/",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/p2p-circuit",
        f"/ip4/1.2.3.4/tcp/1/p2p-circuit/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/1" + "/x" * 600,
    ],
)
def test_other_text_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(InvalidAddress) as refused:
        Multiaddr.parse(text)
    assert len(str(refused.value)) < 600


def test_parts() -> None:
    address = Multiaddr.parse(f"/ip6/::1/tcp/31330/p2p/{PEER}")
    assert address.ip == ipaddress.ip_address("::1")
    assert address.peer_id == PEER
    assert Multiaddr.parse("/dns/example.org/tcp/1").ip is None
    assert Multiaddr.parse("/ip6/::1/tcp/31330").with_peer(PEER) == address
