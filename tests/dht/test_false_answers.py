"""What peers answer that lie, forge and pretend: what a reader gets, whom it dials, and whom it believes no
more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.messages import FIND, PING, STORE, Find, FindAnswer, Found, Ping
from petalite.dht.network import Caller
from petalite.errors import PetaliteError
from petalite.net.identity import Identity, PeerId
from petalite.net.schema import encode
from petalite.sim.dht import SimPeer, SimSwarm

from .hostile import NAME, NOW, Hostile, numbers, simulate, stored, values


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
