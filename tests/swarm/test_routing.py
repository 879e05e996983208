"""Routing: the chain found is the cheapest of all chains, by brute force over every possible chain."""

from __future__ import annotations

import collections
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import MissingBlocks
from petalite.net.identity import PeerId
from petalite.swarm.routing import (
    RELAY_BYTES_PER_S,
    RELAY_S,
    Candidate,
    End,
    Hop,
    Load,
    Said,
    chain_cost,
    find_chain,
    ring_link,
    sample_chain,
    star_link,
)
from petalite.swarm.spans import Span

L = 5


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def cost_of(chain: list[Hop], candidates: list[Candidate], link_s) -> float:
    by_peer = {candidate.peer: candidate for candidate in candidates}
    ends = [None, *(hop.peer for hop in chain), None]
    total = sum(link_s(a, b) for a, b in itertools.pairwise(ends))
    return total + sum(
        by_peer[hop.peer].penalty_s + by_peer[hop.peer].queue_s + by_peer[hop.peer].block_s * len(hop.span)
        for hop in chain
    )


def every_chain(candidates: list[Candidate], span: Span):
    """All assignments of a candidate to each block, folded into hops."""
    choices = [[c for c in candidates if block in c.span] for block in span.blocks]
    for assignment in itertools.product(*choices):
        hops: list[Hop] = []
        for block, candidate in zip(span.blocks, assignment, strict=True):
            if hops and hops[-1].peer == candidate.peer:
                hops[-1] = Hop(candidate.peer, Span(hops[-1].span.start, block + 1))
            else:
                hops.append(Hop(candidate.peer, Span(block, block + 1)))
        yield hops


candidate_lists = st.lists(
    st.tuples(st.integers(0, L - 1), st.integers(1, L), st.floats(0, 2), st.floats(0, 3), st.floats(0, 3)),
    max_size=5,
).map(
    lambda rows: [
        Candidate(peer(i), Span(start, min(start + length, L)), block_s, penalty_s, queue_s)
        for i, (start, length, block_s, penalty_s, queue_s) in enumerate(rows)
    ]
)


@settings(max_examples=150, deadline=None)
@given(candidate_lists, st.integers(0, 2**32))
def test_no_chain_is_cheaper(candidates: list[Candidate], seed: int) -> None:
    span = Span(0, L)

    def link_s(a: PeerId | None, b: PeerId | None) -> float:
        return (hash((seed, a, b)) % 1000) / 300

    try:
        found = find_chain(candidates, span, link_s)
    except MissingBlocks as error:
        held = {block for candidate in candidates for block in candidate.span.blocks}
        assert set(error.blocks) == set(span.blocks) - held != set()
        return
    assert [block for hop in found for block in hop.span.blocks] == list(span.blocks)
    assert all(a.peer != b.peer for a, b in itertools.pairwise(found))
    best = min(cost_of(chain, candidates, link_s) for chain in every_chain(candidates, span))
    assert math.isclose(cost_of(found, candidates, link_s), best, rel_tol=1e-9, abs_tol=1e-9)


def test_the_star_prefers_one_far_server_to_three_near_ones() -> None:
    """Each switch in a star costs a whole round trip to the client."""
    near = [Candidate(peer(i), Span(i * 2, i * 2 + 2), 0.001) for i in range(3)]
    far = Candidate(peer(9), Span(0, 6), 0.001)
    latency = {candidate.peer: 0.010 for candidate in near} | {far.peer: 0.020}
    chain = find_chain([*near, far], Span(0, 6), star_link(lambda one: End(latency[one]), Load(), 0.001))
    assert chain == [Hop(far.peer, Span(0, 6))]


def test_a_penalty_moves_the_chain_but_the_last_holder_is_still_used() -> None:
    a, b = Candidate(peer(1), Span(0, 2), 0.001, penalty_s=1000.0), Candidate(peer(2), Span(0, 2), 0.5)
    link = star_link(lambda _: End(0.01), Load(), 0.0)
    assert find_chain([a, b], Span(0, 2), link)[0].peer == b.peer
    assert find_chain([a], Span(0, 2), link)[0].peer == a.peer


def test_a_sub_span_is_routed_alone() -> None:
    candidates = [Candidate(peer(1), Span(0, 8), 0.1), Candidate(peer(2), Span(4, 12), 0.1)]
    assert find_chain(candidates, Span(9, 11), lambda a, b: 1.0) == [Hop(peer(2), Span(9, 11))]


def test_missing_blocks_says_what_to_start() -> None:
    with pytest.raises(MissingBlocks, match=r"blocks 2:4 and 6:8 .* --blocks 2:4") as caught:
        find_chain(
            [Candidate(peer(1), Span(0, 2), 1), Candidate(peer(2), Span(4, 6), 1)], Span(0, 8), lambda a, b: 0
        )
    assert caught.value.blocks == (2, 3, 6, 7)


@settings(max_examples=100, deadline=None)
@given(candidate_lists, st.integers(0, 2**32))
def test_the_cost_of_a_chain_is_what_the_search_minimizes(candidates: list[Candidate], seed: int) -> None:
    span = Span(0, L)
    link = star_link(lambda one: End(0.1 * (one.public_key[-1] + 1)), Load(), 0.01)
    try:
        chain = find_chain(candidates, span, link)
    except MissingBlocks:
        return
    assert chain_cost(candidates, chain, link) == pytest.approx(cost_of(chain, candidates, link))
    for gone in {hop.peer for hop in chain}:
        assert chain_cost([one for one in candidates if one.peer != gone], chain, link) == math.inf


@settings(max_examples=100, deadline=None)
@given(candidate_lists, st.randoms(use_true_random=False))
def test_a_sampled_chain_covers_the_span(candidates: list[Candidate], chance: random.Random) -> None:
    span = Span(0, L)
    try:
        chain = sample_chain(candidates, span, chance)
    except MissingBlocks as missing:
        assert all(not any(block in one.span for one in candidates) for block in missing.blocks)
        return
    held = {one.peer: one for one in candidates}
    assert [block for hop in chain for block in hop.span.blocks] == list(span.blocks)
    for hop in chain:
        assert hop.span in held[hop.peer].span
        if held[hop.peer].penalty_s:
            holders = [one for one in candidates if hop.span.start in one.span]
            assert all(one.penalty_s for one in holders)


def test_faster_servers_are_drawn_in_proportion() -> None:
    """Three servers of speeds 1, 2 and 5: the shares of 4,000 draws, within five standard deviations."""
    servers = [Candidate(peer(i), Span(0, L), 1.0 / speed) for i, speed in enumerate((1, 2, 5))]
    chance = random.Random(0)
    drawn = collections.Counter(sample_chain(servers, Span(0, L), chance)[0].peer for _ in range(4000))
    for server, share in zip(servers, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert drawn[server.peer] / 4000 == pytest.approx(share, abs=5 * math.sqrt(share / 4000))


def test_the_ring_believes_what_servers_say_of_their_links_within_reason() -> None:
    """10 and 40 ms from the client: between them lie 30 to 50 ms, whatever they say; unsaid, 40 are taken."""
    away = {peer(1): End(0.010), peer(2): End(0.040)}
    said = {(peer(1), peer(2)): 0.045, (peer(2), peer(1)): 0.001, (peer(1), peer(1)): 9.0}
    link = ring_link(
        away.__getitem__, Load(), 0.001, lambda a, b: Said(said[a, b]) if (a, b) in said else None
    )
    assert link(peer(1), peer(2)) == pytest.approx(0.046)
    assert link(peer(2), peer(1)) == pytest.approx(0.031)
    assert link(peer(1), peer(1)) == pytest.approx(0.021)
    assert ring_link(away.__getitem__, Load(), 0.001)(peer(1), peer(2)) == pytest.approx(0.041)
    assert link(None, peer(2)) == pytest.approx(0.041)
    assert link(peer(2), None) == pytest.approx(0.040)


def test_a_prefill_is_bytes_and_steps_are_trips() -> None:
    """By hand: 10 steps and a prompt of 1,000 tokens of 4 kB at 1 MB/s, 20 ms away."""
    load = Load(10, 1000, 4000)
    assert load.link_s(0.02, 1e6) == pytest.approx(11 * 0.02 + 1010 * 4000 / 1e6)
    assert Load(10, 0, 4000).link_s(0.02, 1e6) == pytest.approx(10 * 0.02 + 10 * 4000 / 1e6)
    assert load.block_s(0.002, 0.0001) == pytest.approx(0.02 + 0.1)


@pytest.mark.parametrize("route", ["ring", "star"])
def test_a_long_prompt_takes_the_wide_link_and_a_step_the_short_one(route: str) -> None:
    near, wide = Candidate(peer(1), Span(0, 2), 0.001), Candidate(peer(2), Span(0, 2), 0.001)
    ends = {near.peer: End(0.005, 1e5), wide.peer: End(0.02, 1e8)}

    def chosen(load: Load) -> PeerId:
        make = ring_link if route == "ring" else star_link
        [hop] = find_chain([near, wide], Span(0, 2), make(ends.__getitem__, load, 0.001))
        return hop.peer

    assert chosen(Load(1, 0, 1000)) == near.peer
    assert chosen(Load(1, 1000, 1000)) == wide.peer


def test_between_servers_the_link_they_measured_counts() -> None:
    """Else the narrower of both ends' usual links."""
    load = Load(0, 100, 1000)
    ends = {peer(1): End(0.0, 1e6), peer(2): End(0.0, 1e5)}
    assert ring_link(ends.__getitem__, load, 0.0)(peer(1), peer(2)) == pytest.approx(1.0)
    said = ring_link(ends.__getitem__, load, 0.0, lambda a, b: Said(0.0, 1e7))
    assert said(peer(1), peer(2)) == pytest.approx(0.01)
    unmeasured = ring_link(ends.__getitem__, load, 0.0, lambda a, b: Said(0.0))
    assert unmeasured(peer(1), peer(2)) == pytest.approx(1.0)


def test_a_relay_costs_its_way_and_its_width() -> None:
    """Where a latency was measured, the relay is in it; its bandwidth is bounded all the same."""
    load = Load(1, 0, 1000)
    narrow_s = 1000 / RELAY_BYTES_PER_S
    ends = {
        peer(1): End(0.01),
        peer(2): End(0.01, relayed=True, measured=False),
        peer(3): End(0.03, relayed=True),
    }
    for make in (ring_link, star_link):
        link = make(ends.__getitem__, load, 0.0)
        assert link(None, peer(1)) == pytest.approx(0.01)
        assert link(None, peer(2)) == pytest.approx(0.01 + RELAY_S + narrow_s)
        assert link(peer(3), None) == pytest.approx(0.03 + narrow_s)
    ring = ring_link(ends.__getitem__, load, 0.0)
    assert ring(peer(1), peer(2)) == pytest.approx(0.01 + RELAY_S + narrow_s)
    assert ring(peer(2), peer(3)) == pytest.approx(0.03 + 2 * RELAY_S + narrow_s)
    said = ring_link(ends.__getitem__, load, 0.0, lambda a, b: Said(0.015))
    assert said(peer(1), peer(2)) == pytest.approx(0.015 + narrow_s)
