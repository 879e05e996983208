"""Placement: joins take the weakest span, plans lift the weakest block, moves are safe whoever else moves."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import InvalidArgument
from petalite.net.identity import PeerId
from petalite.swarm.placement import (
    Holding,
    Move,
    MoveCost,
    Plan,
    _Arrangement,
    _ceiling,
    before_me,
    bound,
    decide_move,
    join_span,
    joins_before_me,
    keeps_claim,
    plan_moves,
    throughputs,
)
from petalite.swarm.spans import Span, uncovered

FREE = MoveCost(reload_s=0.0)
MINUTE = MoveCost(reload_s=60.0)
Swarm = list[Holding]


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def swarm(*rows: tuple[int, int, float]) -> Swarm:
    return [
        Holding(peer(i), Span(start, end), tokens_per_s) for i, (start, end, tokens_per_s) in enumerate(rows)
    ]


def decide(me: int, held: Swarm, n_blocks: int, cost: MoveCost = MINUTE) -> Span | None:
    return decide_move(peer(me), plan_moves(held, n_blocks), held, cost)


# -- joining -----------------------------------------------------------------------------------------------


def test_an_empty_swarm_is_joined_at_its_beginning() -> None:
    assert join_span([], 30, 8) == Span(0, 8)


def test_the_gap_is_filled() -> None:
    assert join_span(swarm((0, 8, 100), (20, 30, 50)), 30, 12) == Span(8, 20)


def test_the_weakest_stretch_is_strengthened() -> None:
    assert join_span(swarm((0, 10, 100), (10, 20, 10), (20, 30, 50)), 30, 10) == Span(10, 20)


def test_what_is_claimed_or_loading_counts_as_held() -> None:
    """The third is still loading; the first is about to leave 0:10."""
    first, second, third = swarm((0, 10, 50), (0, 10, 50), (20, 30, 50))
    held = [replace(first, claim=Span(10, 20)), second, replace(third, serving=False)]
    assert throughputs(held, 30) == [50.0] * 30


def test_of_two_that_join_at_once_one_gives_way() -> None:
    """Both claim 0:8; the lower id stays with it, the other goes elsewhere. One that loads gives no way."""
    joining = [replace(holding, serving=False, claim=Span(0, 8)) for holding in swarm((0, 8, 9), (0, 8, 9))]
    assert join_span(joins_before_me(peer(0), [joining[0], replace(joining[1], claim=None)]), 16, 8) == Span(
        8, 16
    )
    assert join_span(joins_before_me(peer(0), joining), 16, 8) == Span(0, 8)
    assert join_span(joins_before_me(peer(1), joining), 16, 8) == Span(8, 16)


def swarms(n_blocks: int, most: int = 10) -> st.SearchStrategy[Swarm]:
    row = st.tuples(st.integers(0, n_blocks - 1), st.integers(1, n_blocks), st.floats(1, 100))
    return st.lists(row, min_size=1, max_size=most).map(
        lambda rows: swarm(*((start, min(start + size, n_blocks), speed) for start, size, speed in rows))
    )


@given(swarms(20), st.integers(1, 12))
def test_no_other_start_has_a_weaker_sorted_profile(held: Swarm, length: int) -> None:
    """The paper's rule restated by brute force."""

    def profile(start: int) -> list[float]:
        blocks = range(start, start + length)
        return sorted(sum(other.tokens_per_s for other in held if block in other.span) for block in blocks)

    best = min(profile(start) for start in range(20 - length + 1))
    assert profile(join_span(held, 20, length).start) == pytest.approx(best)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_joins_cover_the_model_before_they_double_it(lengths: list[int]) -> None:
    held: Swarm = []
    for number, length in enumerate(lengths):
        gaps = uncovered(Span(0, 10), [holding.span for holding in held])
        joined = join_span(held, 10, length)
        if gaps:
            assert any(block in gap for gap in gaps for block in joined.blocks)
        held.append(Holding(peer(number), joined, 1.0))


def test_more_blocks_than_the_model_has() -> None:
    with pytest.raises(InvalidArgument, match="12 blocks does not fit a model of 10"):
        join_span([], 10, 12)


# -- moving ------------------------------------------------------------------------------------------------


def test_a_gap_is_filled_by_one_of_those_that_hold_the_same() -> None:
    held = swarm((0, 4, 10), (0, 4, 10), (0, 4, 10), (8, 12, 10))
    plan = plan_moves(held, 12)
    assert [(move.source, move.target) for move in plan.moves] == [(Span(0, 4), Span(4, 8))]
    assert (plan.before, plan.after) == (0, 10)
    assert [decide(me, held, 12) for me in range(4)].count(Span(4, 8)) == 1


def test_a_balanced_swarm_stays() -> None:
    assert plan_moves(swarm((0, 4, 10), (4, 8, 10), (0, 8, 5)), 8).moves == ()


def test_the_plan_is_the_same_for_all_who_know_the_same() -> None:
    held = swarm((0, 4, 10), (0, 4, 12), (0, 4, 7), (8, 12, 10), (2, 9, 3))
    for seed in range(5):
        assert plan_moves(random.Random(seed).sample(held, len(held)), 12) == plan_moves(held, 12)


UNEVEN = swarm((0, 4, 30), (0, 4, 10), (4, 8, 20))


def test_a_gain_that_does_not_pay_for_the_reload_moves_nobody() -> None:
    """The second of 0:4 is better at 4:8: 30 tokens/s after, 20 before, so 36,000 tokens in an hour."""
    assert decide(1, UNEVEN, 8) == Span(4, 8)
    assert decide(1, swarm((0, 4, 21), (0, 4, 10), (4, 8, 20)), 8, FREE) == Span(4, 8)
    assert decide(1, UNEVEN, 8, MoveCost(60.0, session_tokens=35_000)) == Span(4, 8)
    assert decide(1, UNEVEN, 8, MoveCost(60.0, session_tokens=37_000)) is None


@pytest.mark.parametrize(("reload_s", "target"), [(1700.0, Span(4, 8)), (1900.0, None)])
def test_what_the_swarm_loses_while_the_mover_loads_is_charged(reload_s: float, target: Span | None) -> None:
    """Blocks 0:4 fall from 20 to 10 tokens/s meanwhile, for a gain of 5 tokens/s over an hour."""
    held = swarm((0, 4, 10), (0, 4, 10), (4, 8, 20))
    plan = Plan((Move(peer(1), Span(0, 4), Span(4, 8)),), before=20, after=25, n_blocks=8)
    assert decide_move(peer(1), plan, held, MoveCost(reload_s)) == target


@pytest.mark.parametrize("tokens_per_s", [1e4, 1e9])
def test_one_that_says_it_is_enormous_does_not_keep_the_others_where_they_are(tokens_per_s: float) -> None:
    """It holds one block, which lifts the mean of all blocks and none of the others."""
    held = swarm(*[(0, 4, 10)] * 8, (4, 8, 10), (8, 12, 10))
    expected = plan_moves(held, 12)
    assert expected.after == 30.0
    assert plan_moves([*held, Holding(peer(99), Span(0, 1), tokens_per_s)], 12).after == expected.after


@given(
    st.lists(
        st.tuples(st.integers(0, 13), st.integers(1, 8), st.just(0.0) | st.floats(1e-6, 1e9)), max_size=8
    )
)
@settings(deadline=None)
def test_the_ceiling_is_the_most_that_capped_servers_add_up_to(rows: list[tuple[int, int, float]]) -> None:
    """Of t tokens/s in all 12 blocks, one server can give no more than t in each of its own."""
    held = swarm(*((start, start + length, tokens_per_s) for start, length, tokens_per_s in rows))
    ceiling = _ceiling(held, 12)

    def missing(share: float) -> float:
        aim = share * ceiling
        inside = [(len(range(one.span.start, min(one.span.end, 12))), one.tokens_per_s) for one in held]
        return 12 * aim - sum(length * min(tokens_per_s, aim) for length, tokens_per_s in inside)

    assert missing(0.999) <= 1e-9 * ceiling
    assert ceiling == 0 or missing(1.001) > 0


@pytest.mark.parametrize("change", [{"pinned": True}, {"serving": False}, {"claim": Span(0, 4)}])
def test_pinned_loading_and_already_moving_servers_are_not_moved(change: dict[str, object]) -> None:
    held = [replace(UNEVEN[0], pinned=True), replace(UNEVEN[1], **change), UNEVEN[2]]
    assert plan_moves(held, 8).moves == ()


def test_the_last_to_stay_does_not_move() -> None:
    """Two hold 0:4; one has claimed to leave, so the other may not. Nor if the other is still loading."""
    first, second, third = swarm((0, 4, 10), (0, 4, 10), (4, 8, 10))
    for other in (replace(first, claim=Span(4, 8)), replace(first, serving=False)):
        held = [other, second, replace(third, tokens_per_s=1.0)]
        assert decide(1, held, 8, FREE) is None


def test_of_two_that_claimed_the_same_at_once_one_gives_way() -> None:
    """Each of two looked before the other's claim was to be seen."""
    held = swarm((0, 4, 10), (0, 4, 10), (0, 4, 10), (8, 12, 10))
    claimed = [replace(holding, claim=Span(4, 8)) for holding in held[:2]] + held[2:]
    assert keeps_claim(peer(0), claimed, 12, MINUTE)
    assert not keeps_claim(peer(1), claimed, 12, MINUTE)
    assert [holding.claim for holding in before_me(peer(1), claimed)] == [Span(4, 8), None, None]


@settings(max_examples=60, deadline=None)
@given(swarms(12), st.floats(0.1, 2.0), st.data())
def test_the_best_place_of_one_server_is_that_of_all_places_tried(
    held: Swarm, share: float, data: st.DataObject
) -> None:
    """Against the definition: the sum over blocks of the squares of what is missing to the aim, before and
    after, for each place that leaves no block to nobody.
    """
    aim = share * bound(held, 12)
    index = data.draw(st.integers(0, len(held) - 1))
    mover = held[index]

    def missing(moved_to: int) -> float:
        target = Span(moved_to, moved_to + len(mover.span))
        load = throughputs([*held[:index], replace(mover, span=target), *held[index + 1 :]], 12)
        return sum((aim - tokens_per_s) ** 2 for tokens_per_s in load if tokens_per_s < aim)

    holders = [sum(block in holding.span for holding in held) for block in range(12)]
    sole = {block for block in mover.span.blocks if holders[block] == 1}
    allowed = [
        start for start in range(13 - len(mover.span)) if sole <= set(range(start, start + len(mover.span)))
    ]
    arranged = _Arrangement(held, 12, aim)
    [gain], start = arranged.gains([index]), arranged.best_start(index)
    assert arranged.gains()[index] == gain
    now = missing(mover.span.start)
    assert start in allowed
    assert gain == pytest.approx(max(now - missing(place) for place in allowed), abs=1e-6 * (1 + now))
    assert now - missing(start) == pytest.approx(gain, abs=1e-6 * (1 + now))


@settings(max_examples=60, deadline=None)
@given(swarms(12))
def test_plans_uncover_nothing_and_keep_their_word(held: Swarm) -> None:
    """What the plan says of before and after is so, and a block that has a holder keeps one."""
    plan = plan_moves(held, 12)
    assert plan.before == pytest.approx(min(throughputs(held, 12)))
    targets = {move.peer: move.target for move in plan.moves}
    after = [replace(holding, span=targets.get(holding.peer, holding.span)) for holding in held]
    assert plan.after == pytest.approx(min(throughputs(after, 12)))
    assert plan.after > plan.before or not plan.moves
    assert plan.after <= bound(held, 12) + 1e-6
    before = {block for holding in held for block in holding.span.blocks}
    assert before <= {block for holding in after for block in holding.span.blocks}


@settings(max_examples=60, deadline=None)
@given(swarms(12, most=8), st.randoms(use_true_random=False))
def test_no_block_is_ever_left_to_nobody(held: Swarm, rng: random.Random) -> None:
    """Servers look, claim, confirm, unload and finish loading in any order, some on the same old news; a
    block that had a holder has one throughout. What is decided is seen by all before anybody confirms.
    """
    covered = {block for holding in held for block in holding.span.blocks}
    state = {holding.peer: holding for holding in held}
    for _ in range(12):
        news = list(state.values())
        for mover in rng.sample(news, min(len(news), 3)):  # all of them look at the same time
            if (target := decide_move(mover.peer, plan_moves(news, 12), news, FREE)) is not None:
                state[mover.peer] = replace(mover, claim=target)
        claimed = [holding for holding in state.values() if holding.claim is not None]
        seen = list(state.values())
        for holding in claimed:
            if keeps_claim(holding.peer, seen, 12, FREE):
                assert holding.claim is not None
                state[holding.peer] = Holding(
                    holding.peer, holding.claim, holding.tokens_per_s, serving=False
                )
            else:
                state[holding.peer] = replace(holding, claim=None)
        served = {block for other in state.values() if other.serving for block in other.span.blocks}
        assert covered <= served
        for holding in list(state.values()):
            if not holding.serving and rng.random() < 0.7:
                state[holding.peer] = replace(holding, serving=True)
        covered |= served
