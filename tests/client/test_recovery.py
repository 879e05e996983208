"""Servers that die, fall silent, get stuck or are cut off, at whatever message: the outputs are those of an
undisturbed chain."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import ConnectionLost, MissingBlocks, Unreachable
from petalite.net.identity import PeerId
from petalite.swarm.spans import Span
from tests.client.fakes import CLIENT, FakeSwarm, peer, reference
from tests.client.runs import (
    BOTH,
    CHAIN,
    SPANS,
    WHOLE,
    expected,
    generate,
    messages_of_a_run,
    run,
    session_over,
    tokens,
    until_free,
)


@BOTH
def test_a_death_at_any_single_message_changes_nothing(pushing: bool) -> None:
    """Every message of the run, at its sender's end and its receiver's, exhaustively."""

    async def main(fatal: int, victim: PeerId) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        swarm.net.at_message(fatal, swarm.net.kill, victim)
        assert torch.equal(await generate(swarm), expected()), f"{victim.short()} dies at message {fatal}"
        assert set(swarm.failures) <= {victim}

    for fatal, pair in enumerate(messages_of_a_run(pushing)):
        for victim in set(pair) - {CLIENT}:
            run(main(fatal, victim))


@BOTH
def test_a_server_silent_from_any_message_on_is_replaced(pushing: bool) -> None:
    """It keeps its connections and says nothing; only time tells."""

    async def main(fatal: int, victim: PeerId) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        swarm.net.at_message(fatal, swarm.net.silent.add, victim)
        try:
            output = await generate(swarm)
        except AssertionError:
            assert swarm.open_rows() == len(swarm.backends[victim].rows), "only the silent one has not heard"
        else:
            assert torch.equal(output, expected()), f"{victim.short()} falls silent at message {fatal}"
        assert set(swarm.failures) <= {victim}

    for fatal, pair in enumerate(messages_of_a_run(pushing)):
        for victim in set(pair) - {CLIENT}:
            run(main(fatal, victim))


def test_a_link_cut_between_servers_is_carried_by_the_client() -> None:
    """At any message between two servers; both live, and nobody else holds their blocks."""

    async def main(fatal: int, pair: tuple[PeerId, PeerId]) -> None:
        swarm = FakeSwarm(CHAIN)
        swarm.net.at_message(fatal, swarm.net.cut_link, *pair)
        assert torch.equal(await generate(swarm), expected()), f"{pair} cut at message {fatal}"

    for fatal, pair in enumerate(messages_of_a_run(pushing=True)):
        if CLIENT not in pair:
            run(main(fatal, pair))


def test_a_server_may_come_twice_in_a_row() -> None:
    """As it does after its neighbour died: it pushes to itself without a link. Killed then, both hops go."""

    async def main() -> None:
        swarm = FakeSwarm({1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)})
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            swarm.grow(1, Span(0, 4))
            swarm.net.kill(peer(2))
            outputs = [await session.step(fed[4:5], [(0, 4, 1)])]
            assert [hop.peer for hop in session.chain] == [peer(1), peer(1), peer(3)]
            assert len(session.trace.recoveries) == 1
            swarm.add(4, Span(0, 5))
            swarm.net.kill(peer(1))
            outputs.append(await session.step(fed[5:], [(0, 5, 1)]))
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed)[4:])
        await until_free(swarm)

    run(main())


def test_a_replacement_that_its_neighbour_cannot_reach_has_not_failed() -> None:
    async def main() -> None:
        swarm = FakeSwarm(CHAIN | {8: Span(2, 4), 9: Span(2, 4)})
        fed = tokens(5)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            victim = session.chain[1].peer
            for number in (2, 8, 9):
                if peer(number) != victim:
                    swarm.net.cut_link(peer(1), peer(number))
            swarm.net.kill(victim)
            assert torch.equal(await session.step(fed[4:], [(0, 4, 1)]), reference(WHOLE, fed)[4:])
            assert swarm.failures == [victim]

    run(main())


def test_a_suspect_that_answers_has_not_failed_however_long_mending_takes() -> None:
    """Its neighbour cannot reach it; the only other holder of its blocks is dead, which takes another try."""

    async def main() -> None:
        swarm = FakeSwarm({1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)})
        fed = tokens(5)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            swarm.add(4, Span(0, 6))
            swarm.net.kill(peer(4))
            swarm.failed(peer(2), ConnectionLost("so that the other is tried first"))
            swarm.net.cut_link(peer(1), peer(2))
            assert torch.equal(await session.step(fed[4:], [(0, 4, 1)]), reference(WHOLE, fed)[4:])
            assert swarm.failures == [peer(2), peer(4)]

    run(main())


def test_servers_that_never_reach_each_other() -> None:
    async def main() -> None:
        swarm = FakeSwarm(CHAIN)
        for a, b in itertools.combinations(CHAIN, 2):
            swarm.net.cut_link(peer(a), peer(b))
        assert torch.equal(await generate(swarm), expected())

    run(main())


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.sets(st.integers(0, 150), max_size=6),
    st.permutations(range(1, 13)),
    st.integers(0, 2**32),
)
def test_any_number_of_deaths_also_during_replay(
    pushing: bool, fatal: set[int], order: list[int], seed: int
) -> None:
    """Up to six deaths at arbitrary messages, among servers enough that each block keeps a holder."""
    spans = [Span(0, 3), Span(3, 6), Span(0, 2), Span(2, 4), Span(4, 6), Span(1, 5), Span(0, 6)]
    spans += [Span(0, 6)] * 5

    async def main() -> None:
        swarm = FakeSwarm(dict(zip(order, spans, strict=True)), pushing=pushing)
        chance = random.Random(seed)

        def on_message(number: int, source: PeerId, target: PeerId) -> None:
            victims = [end for end in (source, target) if end != CLIENT]
            if number in fatal and victims:
                swarm.net.kill(chance.choice(victims))

        swarm.net.on_message = on_message
        assert torch.equal(await generate(swarm), expected())

    run(main())


@BOTH
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_silent_server_that_dies_while_it_is_asked_how_far_it_is(pushing: bool, hop: int) -> None:
    """The step is late after 30.25 s, and who is to blame is asked until 2 s later."""

    async def main(after_s: float) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(5)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            victim = session.chain[hop].peer
            swarm.net.silent.add(victim)
            asyncio.get_running_loop().call_later(after_s, swarm.net.kill, victim)
            assert torch.equal(await session.step(fed[4:], [(0, 4, 1)]), reference(WHOLE, fed)[4:])
            assert set(swarm.failures) == {victim}

    for after_s in (30.2, 30.3, 31.0, 32.2, 32.3):
        run(main(after_s))


def test_a_suspect_that_dies_while_it_is_asked_whether_it_lives() -> None:
    """Its neighbour says at once that it is gone; it says nothing, and is gone a second later."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS)
        fed = tokens(5)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            before, victim = session.chain[0].peer, session.chain[1].peer
            swarm.net.silent.add(victim)
            swarm.net.cut_link(before, victim)
            asyncio.get_running_loop().call_later(1.0, swarm.net.kill, victim)
            assert torch.equal(await session.step(fed[4:], [(0, 4, 1)]), reference(WHOLE, fed)[4:])
            assert set(swarm.failures) == {victim}

    run(main())


@BOTH
def test_recovery_is_recorded_and_the_others_keep_their_caches(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            for position in range(6):
                await session.step(tokens(1, position), [(0, position, 1)])
            before = [hop.peer for hop in session.chain]
            swarm.net.kill(before[1])
            await session.step(tokens(1, 6), [(0, 6, 1)])
            (recovery,) = session.trace.recoveries
            assert recovery.lost == (before[1],)
            assert recovery.span == Span(2, 4)
            assert recovery.replayed_tokens == 6
            after = [hop.peer for hop in session.chain]
            assert after == [before[0], *recovery.replacements, before[2]]
            assert [hop.peer for hop in session.trace.steps[-1].hops] == after

    run(main())


def test_a_session_of_many_recoveries_remembers_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petalite.client.trace.KEPT_RECOVERIES", 3)

    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE})
        async with session_over(swarm) as session:
            for position in range(6):
                await session.step(tokens(1, position), [(0, position, 1)])
                swarm.add(position + 2, WHOLE)
                swarm.net.kill(session.chain[0].peer)
            assert [one.replayed_tokens for one in session.trace.recoveries] == [3, 4, 5]

    run(main())


@BOTH
def test_missing_blocks_leave_the_session_able_to_go_on(pushing: bool) -> None:
    """The only holder dies; the step fails naming its blocks; when a new one appears the step succeeds."""

    async def main() -> None:
        swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)}, pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            swarm.net.kill(peer(2))
            with pytest.raises(MissingBlocks) as caught:
                await session.step(fed[4:5], [(0, 4, 1)])
            assert caught.value.blocks == (3, 4, 5)
            assert session.length() == 4
            swarm.add(8, Span(3, 6))
            outputs = [await session.step(fed[i : i + 1], [(0, i, 1)]) for i in (4, 5)]
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed)[4:])

    run(main())


@BOTH
def test_a_server_that_computes_no_more_is_replaced(pushing: bool) -> None:
    """It still says where it is when asked, which is how it is found out."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(9)[:4], [(0, 0, 4)])
            stuck = session.chain[1].peer
            swarm.backends[stuck].stuck = True
            output = await session.step(tokens(9)[4:], [(0, 4, 5)])
            assert stuck not in [hop.peer for hop in session.chain]
            assert swarm.failures == [stuck]
        assert torch.equal(output, reference(WHOLE, tokens(9))[4:])

    run(main())


@pytest.mark.parametrize(("pushing", "hop"), [(True, 0), (True, 1), (True, 2), (False, 0), (False, 2)])
def test_what_a_replaced_server_says_at_last_is_not_heard(pushing: bool, hop: int) -> None:
    """Stuck, given up, and then it computes all the same; its session is over, and what it sends is lost."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(9)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            late = session.chain[hop].peer
            swarm.backends[late].stuck = True
            outputs.append(await session.step(fed[4:6], [(0, 4, 2)]))
            swarm.backends[late].stuck = False
            outputs += [await session.step(fed[i : i + 1], [(0, i, 1)]) for i in range(6, 9)]
            assert late not in [hop.peer for hop in session.chain]
            assert swarm.failures == [late]
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))
        await until_free(swarm)

    run(main())


@pytest.mark.parametrize("edge", [0, 1])
def test_a_link_that_carries_no_tensors_is_carried_by_the_client(edge: int) -> None:
    """Between two servers, which answer every question at once; neither is to blame, and nobody else holds
    their blocks."""

    async def main() -> None:
        swarm = FakeSwarm(CHAIN)
        fed = tokens(9)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            pair = [hop.peer for hop in session.chain[edge : edge + 2]]
            swarm.net.swallowing.add(frozenset(pair))
            outputs += [await session.step(fed[i : i + 1], [(0, i, 1)]) for i in range(4, 9)]
            assert [hop.peer for hop in session.chain] == [peer(number) for number in CHAIN]
            assert not swarm.failures
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    run(main())


@BOTH
def test_a_server_that_is_slow_for_tensors_alone_is_replaced(pushing: bool) -> None:
    """No tensor passes between it and anybody; it opens sessions and says how far it is at once."""

    async def main(hop: int) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(9)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            slow = session.chain[hop].peer
            swarm.net.swallowing |= {frozenset((slow, other)) for other in (CLIENT, *swarm.backends)}
            outputs += [await session.step(fed[i : i + 1], [(0, i, 1)]) for i in range(4, 9)]
            assert slow not in [hop.peer for hop in session.chain]
            assert set(swarm.failures) <= {slow}
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    for hop in range(3):
        run(main(hop))


@BOTH
def test_the_holders_of_a_block_leave_one_by_one(pushing: bool) -> None:
    """Five of them, one before each step, in three ways; when the last is gone the step names the blocks, and
    goes through once another has come."""
    holders = {number: Span(2, 4) for number in range(10, 15)}

    async def main() -> None:
        swarm = FakeSwarm({1: Span(0, 2), 3: Span(4, 6)} | holders, pushing=pushing)
        fed = tokens(12)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            for position in range(4, 8):
                gone = session.chain[1].peer
                match position:
                    case 4:
                        swarm.net.kill(gone)
                    case 5:
                        swarm.net.silent.add(gone)
                    case _:
                        swarm.backends[gone].stuck = True
                outputs.append(await session.step(fed[position : position + 1], [(0, position, 1)]))
                assert session.chain[1].peer != gone
                swarm.servers[:] = [entry for entry in swarm.servers if entry.peer != gone]
            swarm.net.kill(session.chain[1].peer)
            with pytest.raises(MissingBlocks) as caught:
                await session.step(fed[8:9], [(0, 8, 1)])
            assert caught.value.blocks == (2, 3)
            swarm.add(20, Span(1, 5))
            outputs.append(await session.step(fed[8:], [(0, 8, 4)]))
            assert len(session.trace.recoveries) == 5
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    run(main())


@BOTH
def test_a_server_that_holds_nothing_open_is_left_for_another(pushing: bool) -> None:
    """A server dead before the session opens costs a second plan, not the session."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        for number in (1, 2):
            swarm.net.kill(peer(number))
        assert torch.equal(await generate(swarm), expected())
        assert set(swarm.failures) <= {peer(1), peer(2)}

    run(main())


def test_opening_gives_up_at_the_deadline() -> None:
    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE})
        swarm.net.cut_link(CLIENT, peer(1))
        with pytest.raises(Unreachable):
            async with session_over(swarm):
                pass
        assert 2 < len(swarm.failures) < 50, "attempts are spaced out"

    run(main())


@pytest.mark.parametrize(("pushing", "hop"), [(True, 0), (True, 1), (True, 2), (False, 1)])
def test_forty_steps_with_a_death_at_each_of_them(pushing: bool, hop: int) -> None:
    """A prefill and 40 decode steps; for every step, the server of this hop is killed just before it."""
    fed = tokens(44)
    whole = reference(WHOLE, fed)

    async def main(fatal: int) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            for position in range(4, 44):
                if position - 4 == fatal:
                    swarm.net.kill(session.chain[hop].peer)
                outputs.append(await session.step(fed[position : position + 1], [(0, position, 1)]))
        assert torch.equal(torch.cat(outputs), whole), f"killed at step {fatal}"

    for fatal in range(40):
        run(main(fatal))
