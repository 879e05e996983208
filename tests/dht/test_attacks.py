"""Peers that lie, forge, flood and pretend, on a simulated network. After each attack the state is asserted:
who is in the table, what is stored, who was dialled, what a reader gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.limits import RateSettings
from petalite.dht.messages import FIND, PING, STORE, Find, FindAnswer, Found, Ping, Store, StoreAnswer
from petalite.dht.network import Caller
from petalite.dht.node import MAX_OWNERS, DhtNode, DhtSettings
from petalite.dht.records import MAX_TTL_S, Record
from petalite.dht.storage import Outcome, StorageSettings
from petalite.errors import BadMessage, BadRecord, PetaliteError, RateLimited
from petalite.net.identity import Identity, PeerId
from petalite.net.schema import decode, encode
from petalite.sim.dht import EPOCH_UNIX_S, SimPeer, SimSwarm
from petalite.sim.liars import collude
from petalite.sim.loop import run
from petalite.sim.network import SimNetwork

NAME = ("servers", b"model/0")
KEY = DhtKey.of(*NAME)
NOW = int(EPOCH_UNIX_S)


def schema(owner: PeerId, name: bytes, value: bytes) -> None:
    if value == b"wrong schema":
        raise BadRecord("a value that is not what servers say")


def simulate(test: Callable[[SimSwarm], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        swarm = SimSwarm(SimNetwork(1), {"servers": schema}, **options)
        try:
            await test(swarm)
        finally:
            await swarm.close()

    run(main())


class Hostile:
    """A peer that can say anything: raw calls out, and whatever answer it likes to calls in."""

    def __init__(self, swarm: SimSwarm, number: int = 0, address: str = "/ip4/66.6.6.6/tcp/1") -> None:
        self.identity = Identity.from_seed(sha256(f"hostile {number}".encode()).digest())
        self.endpoint = swarm.network.endpoint(self.identity.peer_id, address)
        self.contact = Contact(self.identity.peer_id, (address,))
        self.find_answer: Callable[[Caller, Find], Mapping[str, Any]] = self.nothing_to_find
        for method, handler in ((PING, self.ping), (FIND, self.find), (STORE, self.store)):
            self.endpoint.serve(method, handler)

    async def ping(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return encode(Ping(self.contact.addresses))

    async def find(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.find_answer(caller, decode(Find, body))

    async def store(self, caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
        n = len(decode(Store, body).records)
        return encode(StoreAnswer((0,) * n, (), (Found(b""),) * n))

    def nothing_to_find(self, caller: Caller, request: Find) -> Mapping[str, Any]:
        return encode(FindAnswer((), (Found(b""),) * len(request.keys)))

    async def call(self, target: SimPeer, method: str, message: Any) -> Mapping[str, Any]:
        body = message if isinstance(message, dict) else encode(message)
        return await self.endpoint.call(target.contact, method, body, timeout_s=5)

    async def offer(self, target: SimPeer, *records: Record | bytes) -> list[Outcome]:
        data = tuple(item if isinstance(item, bytes) else item.encode() for item in records)
        answer = decode(StoreAnswer, await self.call(target, STORE, Store(data, nearest=False)))
        return [Outcome(number) for number in answer.outcomes]

    async def enter(self, target: SimPeer) -> None:
        """Get into the target's table, as an honest peer would."""
        await self.call(target, PING, Ping(self.contact.addresses))
        await asyncio.sleep(1)
        assert self.contact.node_id in target.node.table

    def record(self, **changes: Any) -> Record:
        fields = {"sequence": 1, "issued_at": NOW, "ttl_s": 60, **changes}
        value = fields.pop("value", b"hello")
        record = Record.sign(self.identity, *NAME, b"", sequence=1, issued_at=NOW, ttl_s=1)
        return self.signed(replace(record, value=value, **fields))

    def signed(self, record: Record) -> Record:
        signature = self.identity.sign(b"petalite-dht-record-v1" + record._signed_part())
        return replace(record, signature=signature)


def numbers(n: int) -> bytes:
    """The first n contacts of an answer, all near the key."""
    return b"".join(number.to_bytes(2) for number in range(n))


def stored(peer: SimPeer) -> int:
    return len(peer.node.storage)


async def values(node: DhtNode) -> list[bytes]:
    found = await node.find([NAME], timeout_s=10)
    return sorted(record.value for record in found[NAME])


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


# -- answers -----------------------------------------------------------------------------------------


def swarm_with_a_liar(
    answer: Callable[[Hostile, Find], Mapping[str, Any]],
    check: Callable[[SimSwarm, SimPeer, Hostile], Awaitable[None]],
) -> None:
    """Six honest peers, one of whom announces; a seventh peer in everybody's table answers finds as given."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        liar = Hostile(swarm)
        for peer in peers:
            await liar.enter(peer)
        await peers[0].node.announce(*NAME, b"true", 600)
        liar.find_answer = lambda caller, request: answer(liar, request)
        await check(swarm, peers[5], liar)

    simulate(test)


def test_an_answer_with_thousands_of_peers_discredits_who_gave_it():
    crowd = tuple(
        Contact(PeerId(sha256(b"%d" % n).digest()), (f"/ip4/9.9.9.9/tcp/{n + 1}",)) for n in range(3000)
    )

    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        assert await values(reader.node) == [b"true"]
        assert liar.contact.node_id not in reader.node.table
        assert not {contact.node_id for contact in crowd} & {e.contact.node_id for e in reader.node.table}
        # And it does not get back in by asking.
        await liar.call(reader, PING, Ping(liar.contact.addresses))
        await asyncio.sleep(5)
        assert liar.contact.node_id not in reader.node.table

    def answer(liar: Hostile, request: Find) -> Mapping[str, Any]:
        peers = [contact.encoded for contact in crowd]
        return {"peers": peers, "found": [{"nearest": numbers(3000), "records": []}]}

    swarm_with_a_liar(answer, check)


def test_peers_that_do_not_exist_are_tried_and_not_kept():
    ghosts = tuple(Contact(PeerId(sha256(b"%d" % n).digest()), (f"/ip4/9.{n}.9.9/tcp/1",)) for n in range(20))

    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        assert await values(reader.node) == [b"true"]
        await asyncio.sleep(5)
        assert not {contact.node_id for contact in ghosts} & {e.contact.node_id for e in reader.node.table}

    def answer(liar: Hostile, request: Find) -> Mapping[str, Any]:
        return encode(FindAnswer(tuple(g.encoded for g in ghosts), (Found(numbers(20)),)))

    swarm_with_a_liar(answer, check)


def test_a_public_peer_cannot_send_us_into_our_own_network():
    inside = [
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/10.0.0.1/tcp/80",
        "/ip6/::1/tcp/22",
        "/ip6/fd00::1/tcp/22",
        "/dns/intranet/tcp/80",
    ]
    targets = [Contact(PeerId(sha256(b"%d" % n).digest()), (text,)) for n, text in enumerate(inside)]

    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        dialled: list[Contact] = []
        call = reader.endpoint.call

        async def spy(contact: Contact, *arguments: Any, **options: Any) -> Mapping[str, Any]:
            dialled.append(contact)
            return await call(contact, *arguments, **options)

        reader.endpoint.call = spy  # type: ignore[method-assign]
        assert await values(reader.node) == [b"true"]
        assert dialled
        assert not {contact.peer_id for contact in targets} & {contact.peer_id for contact in dialled}

    def answer(liar: Hostile, request: Find) -> Mapping[str, Any]:
        found = Found(numbers(len(targets)))
        return encode(FindAnswer(tuple(target.encoded for target in targets), (found,)))

    swarm_with_a_liar(answer, check)


def test_our_own_id_in_an_answer_is_not_called():
    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        before = reader.endpoint.calls.total()
        assert await values(reader.node) == [b"true"]
        assert reader.endpoint.calls.total() - before <= 6
        assert reader.contact.node_id not in reader.node.table

    def answer(liar: Hostile, request: Find) -> Mapping[str, Any]:
        assert reader_contact
        return encode(FindAnswer((reader_contact[0].encoded,), (Found(numbers(1)),)))

    reader_contact: list[Contact] = []

    async def check_with_reader(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        reader_contact.append(reader.contact)
        await check(swarm, reader, liar)

    swarm_with_a_liar(answer, check_with_reader)


def test_forged_and_misplaced_records_in_an_answer_discredit_who_gave_it():
    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        assert await values(reader.node) == [b"true"]
        assert liar.contact.node_id not in reader.node.table

    def forged(liar: Hostile, request: Find) -> Mapping[str, Any]:
        record = replace(liar.record(), owner=Identity.from_seed(bytes(32)).peer_id)
        return encode(FindAnswer((), (Found(b"", (record.encode(),)),)))

    def misplaced(liar: Hostile, request: Find) -> Mapping[str, Any]:
        record = liar.signed(replace(liar.record(), name=b"model/9"))
        return encode(FindAnswer((), (Found(b"", (record.encode(),)),)))

    swarm_with_a_liar(forged, check)
    swarm_with_a_liar(misplaced, check)


def test_an_outdated_record_in_an_answer_is_passed_over():
    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        assert await values(reader.node) == [b"true"]
        assert liar.contact.node_id in reader.node.table  # its clock may be wrong; that is no crime

    def answer(liar: Hostile, request: Find) -> Mapping[str, Any]:
        record = liar.record(issued_at=NOW - 7200)
        return encode(FindAnswer((), (Found(b"", (record.encode(),)),)))

    swarm_with_a_liar(answer, check)


def test_naming_honest_peers_at_wrong_addresses_does_not_hide_them():
    """The liar is asked first and says that everybody else is where nobody is."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(60)
        await peers[0].node.announce(*NAME, b"true", 600)
        liars = [Hostile(swarm, number, f"/ip4/66.{number}.6.6/tcp/1") for number in range(10)]
        wrong = [Contact.of(peer.contact.peer_id, ("/ip4/9.9.9.9/tcp/1",)) for peer in peers]

        def answer(caller: Caller, request: Find) -> Mapping[str, Any]:
            key = DhtKey.parse(request.keys[0])
            near = sorted(wrong, key=lambda contact: contact.node_id ^ key)[:20]
            return encode(FindAnswer(tuple(contact.encoded for contact in near), (Found(numbers(20)),)))

        for liar in liars:
            liar.find_answer = answer
        for reader in peers[20:40]:
            for liar in liars:
                reader.node.table.add(liar.contact, 0.0)
            known = {entry.contact.node_id: entry.contact for entry in reader.node.table}
            assert await values(reader.node) == [b"true"]
            # Nor do they lose their places and their good names.
            after = {entry.contact.node_id: entry.contact for entry in reader.node.table}
            assert {node_id: after.get(node_id) for node_id in known} == known

    simulate(test)


@pytest.mark.parametrize("outcomes", [[], [0, 0], [200], [1, 2, 3, 4, 5]])
def test_odd_answers_to_an_announcement_neither_break_nor_count(outcomes: list[int]):
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(4)
        liar = Hostile(swarm)

        async def store(caller: Caller, body: Mapping[str, Any]) -> Mapping[str, Any]:
            return {"outcomes": outcomes, "peers": [], "found": [{"nearest": b"", "records": []}]}

        liar.endpoint.serve(STORE, store)
        for peer in peers:
            await liar.enter(peer)
        announcement = await peers[0].node.announce(*NAME, b"true", 60)
        assert announcement.n_holders == 3
        await asyncio.sleep(120)
        assert announcement.n_holders == 3
        assert await values(peers[1].node) == [b"true"]

    simulate(test)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.binary(max_size=40) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["peers", "found", "nearest", "records"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["peers", "found", "addresses", "outcomes"]), json_like, max_size=4))
@settings(max_examples=40, deadline=None)
def test_whatever_a_liar_answers_readers_get_the_truth(body: dict[str, Any]):
    async def check(swarm: SimSwarm, reader: SimPeer, liar: Hostile) -> None:
        assert await values(reader.node) == [b"true"]

    swarm_with_a_liar(lambda liar, request: body, check)


@given(st.sampled_from([PING, FIND, STORE]), json_like)
@settings(max_examples=80, deadline=None)
def test_whatever_a_caller_sends_it_gets_an_answer_or_a_petalite_error(method: str, junk: Any):
    async def test(swarm: SimSwarm) -> None:
        (victim,) = await swarm.grow(1)
        body = {"keys": junk, "addresses": junk, "records": junk}
        with suppress(PetaliteError):
            await Hostile(swarm).call(victim, method, body)
        assert (stored(victim), len(victim.node.table)) == (0, 0)

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
