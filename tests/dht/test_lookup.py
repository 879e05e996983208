"""Driven without a network: a crowd of made-up peers answers at once, or after a set time, or with lies.

The oracle is the truth about the crowd: the peers nearest to a key, by sorting all of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.lookup import Answer, Lookup, LookupSettings, Query
from petalite.dht.routing_table import RoutingTable, TableSettings
from tests.dht.helpers import contact

OWN = contact(100_000).node_id


class Crowd:
    """n peers, each with the table of a long-lived node: up to k random peers of every distance."""

    def __init__(self, n: int, seed: int = 0, first: int = 0) -> None:
        random = Random(seed)
        self.peers = sorted(map(contact, range(first, first + n)), key=lambda peer: peer.node_id)
        ids = [peer.node_id for peer in self.peers]
        self.tables: dict[DhtKey, RoutingTable] = {}
        for own_id in (*ids, OWN):
            table = self.tables[own_id] = RoutingTable(own_id, TableSettings(per_prefix_in_table=10**6))
            for shared in range(24):
                width = 1 << (255 - shared)
                low = (own_id ^ width) // width * width
                members = range(bisect_left(ids, low), bisect_left(ids, low + width))
                for number in random.sample(members, min(20, len(members))):
                    table.add(self.peers[number], 0.0)

    def nearest(self, key: DhtKey, count: int = 20) -> list[Contact]:
        return sorted(self.peers, key=lambda peer: peer.node_id ^ key)[:count]

    def lookup(self, keys: Iterable[DhtKey], **options: int | None) -> Lookup:
        seeds = {key: self.tables[OWN].nearest(key, 20) for key in keys}
        return Lookup(seeds, OWN, LookupSettings(**options), lambda peer: 0.25)  # type: ignore[arg-type]


Behaviour = Callable[[Contact, DhtKey], Answer | None]


def honest(crowd: Crowd, holders: Sequence[Contact] = ()) -> Behaviour:
    held_by = {peer.node_id for peer in holders}

    def answer(peer: Contact, key: DhtKey) -> Answer:
        return Answer(crowd.tables[peer.node_id].nearest(key, 20), peer.node_id in held_by)

    return answer


def drive(lookup: Lookup, behave: Behaviour) -> list[list[Query]]:
    """Answer whatever is in flight all at once; returns the queries of each such round."""
    rounds: list[list[Query]] = []
    while not lookup.done:
        queries = []
        while (query := lookup.next_query(0.0)) is not None:
            queries.append(query)
        assert queries, "neither done nor asking"
        rounds.append(queries)
        for query in queries:
            answers = {key: behave(query.contact, key) for key in query.keys}
            if None in answers.values():
                lookup.failed(query)
            else:
                lookup.answered(query, query.contact, answers)  # type: ignore[arg-type]
    return rounds


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    return Crowd(1000)


def keys(n: int, seed: int = 1) -> list[DhtKey]:
    random = Random(seed)
    return [DhtKey.random(random) for _ in range(n)]


@pytest.mark.parametrize("paths", [1, 4])
def test_it_finds_the_truly_nearest(crowd: Crowd, paths: int):
    for key in keys(20):
        lookup = crowd.lookup([key], paths=paths, per_prefix=None)
        drive(lookup, honest(crowd))
        assert lookup.searches[key].nearest == crowd.nearest(key)


def test_a_thousand_peers_take_few_messages(crowd: Crowd):
    """A plain simulation of Kademlia with k = 20, α = 3 takes 24 messages to all k nearest at this size."""
    counts = []
    for key in keys(50):
        lookup = crowd.lookup([key], paths=1)
        drive(lookup, honest(crowd))
        counts.append(lookup.searches[key].n_queries)
    assert sorted(counts)[25] <= 26


def test_nobody_is_asked_twice_for_a_key_on_whatever_path(crowd: Crowd):
    for key in keys(10):
        rounds = drive(crowd.lookup([key], paths=4), honest(crowd))
        asked = [query.contact.peer_id for queries in rounds for query in queries]
        assert len(asked) == len(set(asked))


def test_early_stop_needs_no_more_than_the_first_holders(crowd: Crowd):
    for key in keys(20):
        lookup = crowd.lookup([key], paths=1, holders=1)
        drive(lookup, honest(crowd, crowd.nearest(key)))
        search = lookup.searches[key]
        assert search.holders
        assert search.n_queries <= 9  # two rounds of three, rarely three
    several = crowd.lookup([key], paths=4, holders=1)
    drive(several, honest(crowd, crowd.nearest(key)))
    assert len(several.searches[key].holders) >= 4


def test_many_keys_share_queries():
    """In a small swarm everybody is near everything: ten keys cost no more calls than one."""
    crowd = Crowd(18)
    together = crowd.lookup(keys(10))
    rounds = drive(together, honest(crowd))
    assert sum(map(len, rounds)) == 18
    for key in keys(10):
        assert together.searches[key].nearest == crowd.nearest(key)


def test_a_query_carries_at_most_sixteen_keys():
    crowd = Crowd(10)
    rounds = drive(crowd.lookup(keys(40)), honest(crowd))
    sizes = [len(query.keys) for queries in rounds for query in queries]
    assert max(sizes) == 16
    assert sum(sizes) == 400


def test_calls_in_flight_are_bounded(crowd: Crowd):
    rounds = drive(crowd.lookup(keys(30), max_in_flight=40), honest(crowd))
    assert max(map(len, rounds)) == 40


def test_alone_it_is_done_at_once():
    lookup = Lookup({OWN: []}, OWN, LookupSettings(), lambda peer: 0.25)
    assert lookup.done
    assert lookup.searches[OWN].absent


def test_our_own_id_in_an_answer_is_ignored(crowd: Crowd):
    key = keys(1)[0]
    lookup = crowd.lookup([key])
    drive(lookup, lambda peer, key: Answer([contact(100_000)]))
    assert OWN not in {peer.node_id for peer in lookup.searches[key].nearest}


def test_an_answer_with_thousands_of_peers_counts_for_k(crowd: Crowd):
    key = keys(1)[0]
    lookup = crowd.lookup([key], paths=1)
    query = lookup.next_query(0.0)
    assert query is not None
    lookup.answered(query, query.contact, {key: Answer([contact(200_000 + n) for n in range(5000)])})
    assert len(lookup.searches[key]._known) <= 40


def test_an_endless_row_of_ever_nearer_peers_ends():
    """A liar that answers every question with somebody nearer, who says the same: bounded work, then done."""
    key = DhtKey(0)
    invented = sorted(map(contact, range(3000)), key=lambda peer: -(peer.node_id ^ key))
    lookup = Lookup({key: invented[:3]}, OWN, LookupSettings(max_queries=160), lambda peer: 0.25)
    position = {peer.node_id: number for number, peer in enumerate(invented)}
    rounds = drive(lookup, lambda peer, _: Answer(invented[position[peer.node_id] + 1 :][:3]))
    assert sum(map(len, rounds)) == 160


def test_peers_that_do_not_exist_are_passed_over(crowd: Crowd):
    """Half of every answer is invented and never answers; the other half still leads there."""
    invented = [contact(300_000 + number) for number in range(4000)]

    def behave(peer: Contact, key: DhtKey) -> Answer | None:
        if peer.node_id not in crowd.tables:
            return None
        false = Random(peer.node_id).sample(invented, 10)
        return Answer([*crowd.tables[peer.node_id].nearest(key, 10), *false])

    for key in keys(10):
        lookup = crowd.lookup([key])
        drive(lookup, behave)
        assert lookup.searches[key].nearest[:5] == crowd.nearest(key)[:5]


def test_who_is_named_at_several_addresses_is_tried_at_each(crowd: Crowd):
    """The first to answer places everybody near the key at
    addresses where nobody is; the others know better."""
    key = keys(1, seed=4)[0]
    near = crowd.nearest(key)
    misplaced = [Contact(peer.peer_id, (f"/ip4/9.9.9.9/tcp/{n + 1}",)) for n, peer in enumerate(near)]
    lookup = crowd.lookup([key])
    first = crowd.tables[OWN].nearest(key, 1)[0]

    def behave(peer: Contact, key: DhtKey) -> Answer | None:
        if peer.addresses[0].startswith("/ip4/9.9.9.9"):
            return None
        if peer.node_id == first.node_id:
            return Answer(misplaced)
        return Answer(crowd.tables[peer.node_id].nearest(key, 20))

    drive(lookup, behave)
    assert lookup.searches[key].nearest[:15] == [peer for peer in near if peer.node_id != OWN][:15]


def test_addresses_of_one_peer_are_tried_only_so_often():
    crowd = Crowd(3)
    key = keys(1)[0]
    asked: list[Contact] = []

    def behave(peer: Contact, key: DhtKey) -> Answer | None:
        asked.append(peer)
        if peer.peer_id == crowd.peers[0].peer_id:
            return None
        moving = [
            Contact(crowd.peers[0].peer_id, (f"/ip4/9.9.{n}.{len(asked)}/tcp/1000000",)) for n in range(20)
        ]
        return Answer(moving)

    drive(crowd.lookup([key]), behave)
    assert len(asked) <= 3 + 4


def elsewhere(peer: Contact) -> Contact:
    return Contact(peer.peer_id, ("/ip4/9.9.9.9/tcp/9",))


def test_an_answer_that_comes_late_counts_though_the_peer_was_to_be_asked_elsewhere():
    """Slow where it was asked, and named at another address, its turn there has not come yet."""
    slow, other, third = contact(1), contact(2), contact(3)
    key = slow.node_id  # so that it is asked first
    lookup = Lookup({key: [slow, other]}, OWN, LookupSettings(paths=1, alpha=1), lambda peer: 0.25)
    first = lookup.next_query(0.0)
    assert first is not None
    assert first.contact is slow
    second = lookup.next_query(0.3)
    assert second is not None
    lookup.answered(second, second.contact, {key: Answer([elsewhere(slow)])})
    lookup.answered(first, first.contact, {key: Answer([third], holds=True)})
    search = lookup.searches[key]
    assert search.holders == [slow]
    last = lookup.next_query(0.3)
    assert last is not None
    assert last.contact is third
    lookup.answered(last, last.contact, {key: Answer([])})
    assert lookup.done
    assert search.n_queries == 3


def test_a_peer_that_answers_at_two_addresses_counts_once():
    """Two holders were wanted, and one is not enough."""
    slow, other, third = contact(1), contact(2), contact(3)
    key = slow.node_id
    settings = LookupSettings(paths=1, alpha=2, holders=2)
    lookup = Lookup({key: [slow, other]}, OWN, settings, lambda peer: 0.25)
    queries = [query for _ in range(2) if (query := lookup.next_query(0.0)) is not None]
    lookup.answered(queries[1], other, {key: Answer([elsewhere(slow), third])})
    again = lookup.next_query(0.3)
    assert again is not None
    assert again.contact == elsewhere(slow)
    for query in (queries[0], again):
        lookup.answered(query, query.contact, {key: Answer([], holds=True)})
    assert [holder.peer_id for holder in lookup.searches[key].holders] == [slow.peer_id]
    assert not lookup.done
    last = lookup.next_query(0.3)
    assert last is not None
    assert last.contact is third


def colluding(crowd: Crowd, share: float, seed: int) -> tuple[Behaviour, set[DhtKey]]:
    """So many of the crowd name only each other, and hold nothing."""
    bad = Random(seed).sample(crowd.peers, round(share * len(crowd.peers)))
    bad_ids = {peer.node_id for peer in bad}

    def nearest_bad(key: DhtKey) -> list[Contact]:
        return sorted(bad, key=lambda peer: peer.node_id ^ key)[:20]

    def behave(peer: Contact, key: DhtKey) -> Answer:
        if peer.node_id in bad_ids:
            return Answer(nearest_bad(key))
        held = peer.node_id in {near.node_id for near in crowd.nearest(key)}
        return Answer(crowd.tables[peer.node_id].nearest(key, 20), held)

    return behave, bad_ids


def test_four_disjoint_paths_withstand_forty_percent_of_colluders(crowd: Crowd):
    """One path is caught when all its first answers are lies, 0.4³ = 6 % of the time; four are not."""
    found = {1: 0, 4: 0}
    for seed, key in enumerate(keys(60, seed=3)):
        behave, _ = colluding(crowd, 0.4, seed)
        for paths in found:
            lookup = crowd.lookup([key], paths=paths)
            drive(lookup, behave)
            found[paths] += bool(lookup.searches[key].holders)
    assert found[4] == 60
    assert found[1] < 60


def test_paths_all_taken_by_liars_are_not_the_last_word(crowd: Crowd):
    """Whoever is asked first lies, and names twenty friends nearer to the key than anybody else; the
    holders are found over the paths that are opened again. Where there is nothing, it ends, with nobody
    asked twice."""
    key = keys(1, seed=11)[0]
    crowd_of_liars = sorted(
        (contact(n) for n in range(500_000, 520_000)), key=lambda peer: peer.node_id ^ key
    )
    friends = crowd_of_liars[:20]
    seeds = crowd.tables[OWN].nearest(key, 20)
    liars = {peer.node_id for peer in (*friends, *seeds[:12])}
    holders = crowd.nearest(key)

    def behave(peer: Contact, key: DhtKey, holders: Sequence[Contact] = holders) -> Answer:
        return Answer(friends) if peer.node_id in liars else honest(crowd, holders)(peer, key)

    found = {}
    for again in (False, True):
        lookup = crowd.lookup([key], again=again, per_prefix=None)
        drive(lookup, behave)
        found[again] = bool(lookup.searches[key].holders)
    assert found == {False: False, True: True}

    nothing = crowd.lookup([key], again=True, per_prefix=None)
    rounds = drive(nothing, lambda peer, key: behave(peer, key, ()))
    asked = [query.contact.peer_id for queries in rounds for query in queries]
    assert len(asked) == len(set(asked))
    assert nothing.searches[key].absent


def test_ids_ground_to_lie_next_to_a_key_fill_their_networks_share_only(crowd: Crowd):
    """200 Sybils nearer to the key than anybody else, in four networks:
    at most eight count among the nearest."""
    key = keys(1, seed=9)[0]
    honest_near = crowd.nearest(key)
    sybils = [contact(400_000 + number, prefix=(99, number % 4)) for number in range(200)]
    place = {peer.node_id: peer for peer in sybils}
    holders = {peer.node_id for peer in honest_near}

    class Near(DhtKey):
        """The key, to which every Sybil is nearer than anybody else."""

    def behave(peer: Contact, _: DhtKey) -> Answer:
        if peer.node_id in place:
            return Answer(sybils[:20])
        return Answer([*sybils[:10], *crowd.tables[peer.node_id].nearest(key, 10)], peer.node_id in holders)

    lookup = crowd.lookup([key])
    search = lookup.searches[key]
    learn = search._learn

    def learn_near(told: Contact, path: object) -> None:
        learn(told, path)  # type: ignore[arg-type]
        candidate = search._known.get(told.node_id)
        if candidate is not None and told.node_id in place:
            candidate.distance >>= 200

    search._learn = learn_near  # type: ignore[method-assign]
    drive(lookup, behave)
    nearest = search.nearest
    assert sum(peer.node_id in place for peer in nearest) <= 8
    assert search.holders


class Clock:
    """Calls answered when their time comes."""

    def __init__(self, lookup: Lookup, behave: Behaviour, delay_s: Callable[[Contact], float]) -> None:
        self.now_s = 0.0
        pending: list[tuple[float, int, Query]] = []
        number = 0
        while True:
            while (query := lookup.next_query(self.now_s)) is not None:
                pending.append((self.now_s + delay_s(query.contact), number, query))
                number += 1
            if lookup.done:
                return
            pending.sort()
            wakeup_s = lookup.wakeup_s
            if wakeup_s is not None and wakeup_s < pending[0][0]:
                self.now_s = wakeup_s
                continue
            self.now_s, _, query = pending.pop(0)
            answers = {key: behave(query.contact, key) for key in query.keys}
            if None in answers.values():
                lookup.failed(query)
            else:
                lookup.answered(query, query.contact, answers)  # type: ignore[arg-type]


def test_dead_peers_cost_a_soft_wait_not_a_timeout(crowd: Crowd):
    """30 % never answer and fail after 3 s; links take 100 ms; nobody waits for them."""
    dead = {peer.node_id for peer in Random(1).sample(crowd.peers, 300)}

    def behave(peer: Contact, key: DhtKey) -> Answer | None:
        return None if peer.node_id in dead else honest(crowd, crowd.nearest(key))(peer, key)

    times = []
    for key in keys(50, seed=5):
        lookup = crowd.lookup([key])
        clock = Clock(lookup, behave, lambda peer: 3.0 if peer.node_id in dead else 0.1)
        times.append(clock.now_s)
        alive = [peer for peer in crowd.nearest(key, 40) if peer.node_id not in dead]
        assert lookup.searches[key].nearest[:10] == alive[:10]
    assert sorted(times)[25] < 1.2
    assert max(times) < 3.0


def test_a_late_answer_still_counts():
    crowd = Crowd(3)
    key = keys(1)[0]
    lookup = crowd.lookup([key])
    clock = Clock(lookup, honest(crowd, crowd.peers), lambda peer: 2.0)
    assert clock.now_s == 2.0
    assert len(lookup.searches[key].holders) >= 2  # most of them; not the last one's


def test_absence_is_believed_of_a_majority_of_paths_only():
    crowd = Crowd(40)
    key = keys(1)[0]
    lookup = crowd.lookup([key])
    drive(lookup, honest(crowd))
    assert lookup.searches[key].absent
    silent = crowd.lookup([key])
    drive(silent, lambda peer, key: None)
    assert not silent.searches[key].absent
    held = crowd.lookup([key])
    drive(held, honest(crowd, crowd.nearest(key, 1)))
    assert not held.searches[key].absent


@given(
    st.integers(1, 60), st.integers(), st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 2]), st.data()
)
@settings(max_examples=60, deadline=None)
def test_it_always_ends_whoever_answers_fails_or_lies(
    n: int, seed: int, paths: int, holders: int | None, data: st.DataObject
):
    crowd = Crowd(n, seed)
    random = Random(data.draw(st.integers()))

    def behave(peer: Contact, key: DhtKey) -> Answer | None:
        fate = random.random()
        if fate < 0.3:
            return None
        if fate < 0.5:
            return Answer([contact(random.randrange(2000)) for _ in range(30)], holds=fate < 0.4)
        table = crowd.tables.get(peer.node_id)
        return Answer(table.nearest(key, 20) if table else [])

    lookup = crowd.lookup(keys(3), paths=paths, holders=holders, max_queries=100)
    rounds = drive(lookup, behave)
    for key, search in lookup.searches.items():
        assert search.n_queries <= 100
        asked = {q.contact.node_id for queries in rounds for q in queries if key in q.keys}
        assert {peer.node_id for peer in search.nearest} <= asked
