"""Checked against the naive table: all peers in one list, sorted by XOR."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.contacts import Contact, Place, Scope
from petalite.dht.keys import DhtKey
from petalite.dht.routing_table import RoutingTable, TableSettings
from petalite.net.identity import PeerId
from tests.dht.helpers import contact

OWN = DhtKey.of_peer(PeerId(bytes(32)))
PUBLIC = (Place(Scope.GLOBAL, bytes((1, 1))),)
PRIVATE = (Place(Scope.PRIVATE, bytes((10, 0))),)


def full_bucket(table: RoutingTable, start: int = 0) -> list[Contact]:
    """Fill the bucket of peers that share no bit with us;
    returns them, and as many more that find it full."""
    far = [peer for peer in map(contact, range(start, start + 200)) if not OWN.shared_bits(peer.node_id)]
    for peer in far[: table.settings.k]:
        table.add(peer, 0.0)
    return far


@given(st.lists(st.integers(0, 400), max_size=120), st.integers(), st.integers(1, 30))
@settings(max_examples=60)
def test_nearest_is_what_sorting_everybody_gives(numbers: list[int], seed: int, count: int):
    table = RoutingTable(OWN, TableSettings(k=200))
    for number in numbers:
        table.add(contact(number), 0.0)
    target = DhtKey.random(Random(seed))
    everybody = {contact(number).node_id: contact(number) for number in numbers}
    expected = sorted(everybody.values(), key=lambda peer: peer.node_id ^ target)[:count]
    assert table.nearest(target, count) == expected
    assert len(table) == len(everybody)


def test_reliable_nearest_puts_those_that_failed_last():
    table = RoutingTable(OWN)
    peers = [contact(number) for number in range(10)]
    for peer in peers:
        table.add(peer, 0.0)
    by_distance = sorted(peers, key=lambda peer: peer.node_id ^ OWN)
    table.failed(by_distance[0].node_id, 1.0)
    assert table.nearest(OWN, 10, reliable=True) == [*by_distance[1:], by_distance[0]]
    assert table.nearest(OWN, 10) == by_distance


def test_we_are_never_in_our_own_table():
    table = RoutingTable(OWN)
    own = Contact(PeerId(bytes(32)), ("/ip4/5.6.7.8/tcp/1",))
    assert not table.wants(own)
    table.add(own, 0.0)
    assert len(table) == 0


def test_a_full_bucket_keeps_its_old_peers_while_they_answer():
    table = RoutingTable(OWN, TableSettings(k=4))
    far = full_bucket(table)
    newcomer = far[4]
    oldest = table.add(newcomer, 1000.0)
    assert oldest == far[0]  # to be pinged: not heard from for long
    table.seen(far[0].node_id, 1001.0)
    assert newcomer.node_id not in table
    assert [entry.contact for entry in table] == [far[1], far[2], far[3], far[0]]
    assert table.add(far[5], 1002.0) == far[1]  # now the next is the oldest


def test_peers_heard_from_lately_are_not_even_pinged():
    table = RoutingTable(OWN, TableSettings(k=4, fresh_s=120))
    far = full_bucket(table)
    assert table.add(far[4], 100.0) is None
    assert far[4].node_id not in table


def test_a_silent_peer_gives_way_to_the_latest_that_waits():
    table = RoutingTable(OWN, TableSettings(k=4))
    far = full_bucket(table)
    for newcomer in far[4:7]:
        table.add(newcomer, 1000.0)
    table.failed(far[0].node_id, 1001.0)
    assert far[0].node_id not in table
    assert far[6].node_id in table
    assert len(table) == 4


def test_without_a_replacement_a_peer_may_fail_a_few_times():
    table = RoutingTable(OWN, TableSettings(max_failures=3))
    peer = contact(1)
    table.add(peer, 0.0)
    table.failed(peer.node_id, 1.0)
    table.failed(peer.node_id, 2.0)
    assert peer.node_id in table
    table.seen(peer.node_id, 3.0)
    for at_s in (4.0, 5.0):
        table.failed(peer.node_id, at_s)
    assert peer.node_id in table
    table.failed(peer.node_id, 6.0)
    assert peer.node_id not in table


def test_nobody_gives_way_to_those_that_may_not_enter():
    """Those that wait are of one network, and only one of them may have a place: a second peer that misses
    one call keeps its own."""
    table = RoutingTable(OWN, TableSettings(k=3, per_prefix_in_bucket=1), PUBLIC)
    first, second, *_ = full_bucket(table)
    crowd = [peer for n in range(1000, 1040) if not OWN.shared_bits((peer := contact(n, (99, 9))).node_id)]
    for peer in crowd[:3]:
        table.add(peer, 0.0)
    table.failed(first.node_id, 1.0)
    assert len(table) == 3
    table.failed(second.node_id, 1.0)
    assert second.node_id in table
    assert len(table) == 3


def test_those_waiting_are_bounded():
    table = RoutingTable(OWN, TableSettings(k=4))
    far = full_bucket(table)
    for newcomer in far[4:60]:
        table.add(newcomer, 1.0)
    bucket = table._buckets[0]
    assert list(bucket.waiting) == [peer.node_id for peer in far[56:60]]


def test_a_thousand_ids_of_one_network_get_few_places():
    """Table poisoning from one /16: two per bucket, eight in all."""
    table = RoutingTable(OWN, TableSettings(), PUBLIC)
    for number in range(1000):
        table.add(contact(number, prefix=(66, 6)), 0.0)
    assert len(table) == 8
    assert all(len(bucket.entries) <= 2 for bucket in table._buckets.values())
    honest = contact(5000)
    table.add(honest, 0.0)
    assert honest.node_id in table


def test_our_own_network_may_fill_half_of_a_bucket():
    table = RoutingTable(OWN, TableSettings(k=20), PUBLIC)
    for number in range(200):
        table.add(contact(number, prefix=(1, 1)), 0.0)
    assert max(len(bucket.entries) for bucket in table._buckets.values()) == 10


@pytest.mark.parametrize(("places", "kept"), [(PRIVATE, 60), (PUBLIC, 8), ((), 60)])
def test_private_addresses_are_one_network_to_a_public_node_only(places: tuple[Place, ...], kept: int):
    table = RoutingTable(OWN, TableSettings(k=60), places)
    for number in range(60):
        table.add(contact(number, prefix=(10, 0)), 0.0)
    assert len(table) == kept


def test_a_known_peer_cannot_move_into_a_crowded_network():
    table = RoutingTable(OWN, TableSettings(), PUBLIC)
    for number in range(1000):
        table.add(contact(number, prefix=(66, 6)), 0.0)
    peer = contact(5000)
    table.add(peer, 0.0)
    table.add(Contact(peer.peer_id, ("/ip4/66.6.1.1/tcp/1",)), 1.0)
    entry = table.entry(peer.node_id)
    assert entry is not None
    assert entry.contact == peer


def test_a_liar_is_forgotten():
    table = RoutingTable(OWN, TableSettings(k=4))
    far = full_bucket(table)
    table.add(far[4], 1.0)
    table.remove(far[4].node_id)
    table.remove(far[0].node_id)
    table.failed(far[1].node_id, 2.0)
    assert [entry.contact for entry in table] == far[1:4]


def test_stale_buckets_reach_down_to_our_nearest_peer():
    table = RoutingTable(OWN)
    for number in range(50):
        table.add(contact(number), 0.0)
    depth = max(OWN.shared_bits(contact(number).node_id) for number in range(50))
    assert table.stale_buckets(0.0, 60.0) == list(range(depth + 1))
    table.refreshed(DhtKey.random(Random(1), OWN, 2), 10.0)
    assert 2 not in table.stale_buckets(69.0, 60.0)
    assert 2 in table.stale_buckets(70.0, 60.0)


def test_unseen_peers_are_the_silent_and_the_failing():
    table = RoutingTable(OWN)
    quiet, failing, lively = (contact(number) for number in range(3))
    table.add(quiet, 0.0)
    table.add(failing, 90.0)
    table.add(lively, 90.0)
    table.failed(failing.node_id, 95.0)
    assert table.unseen(100.0, 60.0) == [quiet, failing]


def test_the_distance_to_our_neighbours_tells_the_swarms_size():
    table = RoutingTable(OWN, TableSettings(k=20, per_prefix_in_bucket=1000, per_prefix_in_table=1000))
    assert table.neighbour_distance() is None
    ids = sorted(contact(number).node_id ^ OWN for number in range(300))
    for number in range(300):
        table.add(contact(number), 0.0)
    # Shallow buckets keep 20 of 150 and 75; the 20 nearest of all are in the deep ones.
    assert table.neighbour_distance() == ids[19]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "failed", "remove", "seen"]), st.integers(0, 60), st.integers(0, 3)
        ),
        max_size=150,
    )
)
@settings(max_examples=60)
def test_whatever_happens_the_bounds_hold_and_the_accounts_agree(steps: list[tuple[str, int, int]]):
    limits = TableSettings(k=4, per_prefix_in_bucket=2, per_prefix_in_table=5)
    table = RoutingTable(OWN, limits, PUBLIC)
    for now_s, (action, number, prefix) in enumerate(steps):
        peer = Contact(contact(number).peer_id, (f"/ip4/50.{prefix}.1.1/tcp/1",))
        if action == "add":
            table.add(peer, float(now_s))
        elif action == "remove":
            table.remove(peer.node_id)
        else:
            getattr(table, action)(peer.node_id, float(now_s))
        prefixes = Counter(entry.contact.place.prefix for entry in table if entry.contact.place)
        assert table._prefixes == prefixes
        assert max(prefixes.values(), default=0) <= 5
        for bucket in table._buckets.values():
            here = Counter(
                entry.contact.place.prefix for entry in bucket.entries.values() if entry.contact.place
            )
            assert len(bucket.entries) <= 4
            assert max(here.values(), default=0) <= 2
            assert not bucket.entries.keys() & bucket.waiting.keys()
