"""Peers that lie, forge, flood and pretend, on a simulated network. After each attack the state is asserted:
who is in the table, what is stored, who was dialled, what a reader gets.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from petalite.dht.keys import DhtKey
from petalite.dht.limits import RateSettings
from petalite.dht.messages import FIND, PING, Find, Ping
from petalite.dht.node import MAX_OWNERS, DhtSettings
from petalite.dht.records import MAX_TTL_S
from petalite.dht.storage import Outcome, StorageSettings
from petalite.errors import BadMessage, BadRecord, RateLimited
from petalite.sim.dht import SimSwarm
from petalite.sim.liars import collude

from .hostile import KEY, NAME, NOW, Hostile, simulate, stored, values

# -- records -----------------------------------------------------------------------------------------


def test_forged_and_foreign_records_end_the_call_and_leave_nothing():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        liar, honest = Hostile(swarm, 1), Hostile(swarm, 2, "/ip4/77.7.7.7/tcp/1")
        good = honest.record()
        for bad in (
            replace(liar.record(), signature=bytes(64)),  # forged
            good,  # replayed by another
            replace(good, owner=liar.identity.peer_id),  # under another subkey
            liar.signed(good),  # signed by another than its owner
        ):
            with pytest.raises(BadRecord):
                await liar.offer(victim, bad)
            assert stored(victim) == 0
        assert await honest.offer(victim, good) == [Outcome.STORED]
        # In one call, a good one does not carry a bad one in, nor does the bad one take it out again.
        other = honest.signed(replace(good, name=b"model/1"))
        with pytest.raises(BadRecord):
            await honest.offer(victim, other, replace(good, sequence=2))
        assert stored(victim) == 2
        assert await values(victim.node) == [good.value]

    simulate(test)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"value": b"wrong schema"}, Outcome.REFUSED),
        ({"namespace": "games"}, Outcome.REFUSED),
        ({"ttl_s": MAX_TTL_S + 1}, Outcome.REFUSED),
        ({"ttl_s": 0}, Outcome.REFUSED),
        ({"issued_at": NOW - 3600}, Outcome.REFUSED),  # expired, replayed by its own owner
        ({"issued_at": NOW + 3600}, Outcome.REFUSED),  # of the future
        ({"issued_at": 2**63}, Outcome.REFUSED),
        ({"value": bytes(4096)}, Outcome.STORED),
        ({}, Outcome.STORED),
    ],
)
def test_records_that_break_a_rule_are_refused_one_by_one(changes: dict[str, Any], outcome: Outcome):
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        peer = Hostile(swarm)
        other = peer.signed(replace(peer.record(), name=b"model/1"))
        assert await peer.offer(victim, peer.record(**changes), other) == [outcome, Outcome.STORED]
        assert stored(victim) == 1 + (outcome is Outcome.STORED)

    simulate(test)


def test_oversized_and_broken_records_are_bad_messages():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        peer = Hostile(swarm)
        for data in (
            peer.record(value=bytes(4097)).encode(),
            bytes(100_000),
            b"\1",
            peer.record().encode()[:-1],
        ):
            with pytest.raises((BadRecord, BadMessage)):
                await peer.offer(victim, data)
        assert stored(victim) == 0

    simulate(test)


def test_an_old_sequence_does_not_come_back():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        peer = Hostile(swarm)
        new, old = peer.record(sequence=2, value=b"new"), peer.record(sequence=1, value=b"old")
        assert await peer.offer(victim, new, old) == [Outcome.STORED, Outcome.STALE]
        await asyncio.sleep(61)
        assert await peer.offer(victim, new, old) == [Outcome.STALE, Outcome.STALE]
        assert await values(victim.node) == []

    simulate(test)


def test_a_flood_from_one_owner_fills_its_share_only():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        peer, honest = Hostile(swarm, 1), Hostile(swarm, 2, "/ip4/77.7.7.7/tcp/1")
        for number in range(40):
            names = [b"flood/%d" % (10 * number + n) for n in range(10)]
            with_names = [peer.signed(replace(peer.record(), name=name)) for name in names]
            await peer.offer(victim, *with_names)
        assert stored(victim) == StorageSettings().per_owner_records
        assert await honest.offer(victim, honest.record()) == [Outcome.STORED]

    simulate(test)


def test_a_flood_from_a_thousand_ids_of_one_prefix_leaves_room_for_all():
    limits = StorageSettings()

    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        for number in range(1000):
            peer = Hostile(swarm, number, f"/ip4/66.6.{number // 250}.{number % 250 + 1}/tcp/1")
            await peer.offer(victim, peer.record(ttl_s=MAX_TTL_S))
        assert len(victim.node.storage.get(KEY, 0.0)) == limits.per_key_group_records
        assert len(victim.node.table) == 0
        honest = [Hostile(swarm, 2000 + n, f"/ip4/77.{n}.7.7/tcp/1") for n in range(100)]
        for peer in honest:
            assert await peer.offer(victim, peer.record(value=b"honest")) == [Outcome.STORED]
        assert (await values(victim.node)).count(b"honest") == 100

    simulate(test)


def test_a_record_far_from_the_node_is_not_its_business():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(300)
        far = max(peers, key=lambda peer: peer.contact.node_id ^ KEY)
        peer = Hostile(swarm)
        assert await peer.offer(far, peer.record()) == [Outcome.TOO_FAR]
        assert stored(far) == 0
        assert await peer.offer(swarm.nearest(KEY, 1)[0], peer.record()) == [Outcome.STORED]

    simulate(test)


# -- the table ---------------------------------------------------------------------------------------


def test_a_thousand_ids_of_one_network_do_not_fill_a_table():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        for number in range(1000):
            peer = Hostile(swarm, number, f"/ip4/66.6.{number // 250}.{number % 250 + 1}/tcp/1")
            await peer.call(victim, PING, Ping(peer.contact.addresses))
        await asyncio.sleep(10)
        assert len(victim.node.table) <= 8
        honest = await swarm.add()
        await honest.node.join([victim.address])
        await asyncio.sleep(1)
        assert honest.contact.node_id in victim.node.table

    simulate(test)


def test_who_is_not_where_it_says_does_not_get_in():
    """A caller that claims an empty place, another peer's address,
    or one all over the world while it sits in one."""

    async def test(swarm: SimSwarm) -> None:
        victim, other = await swarm.grow(2)
        await asyncio.sleep(1)
        liar = Hostile(swarm)
        for claimed in ("/ip4/9.9.9.9/tcp/1", other.endpoint.addresses[0], "/ip4/127.0.0.1/tcp/1", "junk"):
            await liar.call(victim, PING, Ping((claimed,)))
            await asyncio.sleep(10)
            assert [entry.contact for entry in victim.node.table] == [other.contact]

    simulate(test)


def test_one_machine_cannot_claim_to_be_in_many_networks():
    """It answers pings, over connections it made itself, but from one address:
    it counts for that one or not at all."""

    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        for number in range(50):
            liar = Hostile(swarm, number, f"/ip4/66.6.6.6/tcp/{number + 1}")
            await liar.call(
                victim, PING, Ping((f"/ip4/{20 + number}.1.1.1/tcp/1", liar.contact.addresses[0]))
            )
        await asyncio.sleep(10)
        assert 0 < len(victim.node.table) <= 8
        assert {entry.contact.addresses[0][:13] for entry in victim.node.table} == {"/ip4/66.6.6.6"}

    simulate(test)


def test_a_server_that_becomes_a_client_leaves_tables():
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        peer = Hostile(swarm)
        await peer.enter(victim)
        await peer.call(victim, PING, Ping())
        assert len(victim.node.table) == 0

    simulate(test)


# -- floods ------------------------------------------------------------------------------------------


def test_one_callers_flood_is_refused_and_others_are_served():
    rates = DhtSettings(rates=RateSettings(per_peer_per_s=10, per_peer_burst=50))

    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        flooder, honest = Hostile(swarm, 1), Hostile(swarm, 2, "/ip4/77.7.7.7/tcp/1")
        question = Find((KEY.digest,))
        refused = 0
        for _ in range(200):
            try:
                await flooder.call(victim, FIND, question)
            except RateLimited:
                refused += 1
        # 200 calls take 20 s at 50 ms each way: the burst and what 20 s allow.
        assert 200 - refused <= 50 + 10 * 20 + 1
        many = Find(tuple(DhtKey(n).digest for n in range(16)))
        with pytest.raises(RateLimited):
            for _ in range(30):
                await flooder.call(victim, FIND, many)
        await honest.call(victim, FIND, question)

    simulate(test, settings=rates)


def test_a_network_of_flooders_shares_one_allowance():
    rates = DhtSettings(rates=RateSettings(per_peer_per_s=0.001, per_peer_burst=50, per_prefix_factor=2))

    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        served = 0
        for number in range(50):
            peer = Hostile(swarm, number, f"/ip4/66.6.6.{number + 1}/tcp/1")
            try:
                await peer.call(victim, FIND, Find(tuple(DhtKey(n).digest for n in range(10))))
                served += 1
            except RateLimited:
                pass
        assert served == 10  # 100 keys for the whole prefix
        other = Hostile(swarm, 99, "/ip4/77.7.7.7/tcp/1")
        await other.call(victim, FIND, Find((KEY.digest,)))

    simulate(test, settings=rates)


# -- collusion ---------------------------------------------------------------------------------------


def test_forty_percent_of_colluders_hide_nothing_from_four_paths():
    """They know each other, name only each other, and say there is nothing;
    the records of honest peers are found."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(150)
        bad = Random(5).sample(peers, 60)
        collude(bad)
        honest = [peer for peer in peers if peer not in bad]
        for peer in honest[:3]:
            await peer.node.announce(*NAME, peer.contact.addresses[0].encode(), 600)
        expected = sorted(peer.contact.addresses[0].encode() for peer in honest[:3])
        for reader in honest[10:40]:
            assert await values(reader.node) == expected

    simulate(test)


# -- many owners -------------------------------------------------------------------------------------


def test_of_very_many_owners_a_read_returns_a_bounded_random_sample():
    async def test(swarm: SimSwarm) -> None:
        (node,) = await swarm.grow(1)
        for number in range(600):
            peer = Hostile(swarm, number, f"/ip4/{20 + number // 200}.{number % 200}.1.1/tcp/1")
            assert await peer.offer(node, peer.record()) == [Outcome.STORED]
        first, second = [(await node.node.find([NAME], timeout_s=5))[NAME] for _ in range(2)]
        assert len(first) == len(second) == MAX_OWNERS
        assert {record.owner for record in first} != {record.owner for record in second}
        reader = await swarm.add(client_mode=True)
        await reader.node.join([node.address])
        told = (await reader.node.find([NAME], timeout_s=5))[NAME]
        assert 100 < len(told) < 300  # as many as one answer has room for

    simulate(test)
