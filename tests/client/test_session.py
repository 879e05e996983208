"""Sessions over servers in memory, under virtual time: whatever dies, falls silent, gets stuck or is cut off,
at whatever message, the outputs are those of an undisturbed chain."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.client.session import Session, StepInput
from petalite.client.settings import Routing, SessionSettings
from petalite.errors import (
    BadMessage,
    InvalidArgument,
    MissingBlocks,
    NotFinite,
    SessionGap,
    SessionLimit,
    Unreachable,
)
from petalite.net.identity import PeerId
from petalite.server.backend import checked_forks
from petalite.sim import loop
from petalite.swarm.messages import LAST, NONE, Step
from petalite.swarm.spans import Span
from tests.client.fakes import CLIENT, E, FakeSwarm, peer, reference
from tests.helpers.memory_net import MemoryCall, MemoryNet

T = TypeVar("T")
WHOLE = Span(0, 6)
QUICK = SessionSettings(chunk_tokens=3, recovery_s=60.0)
CHAIN = {1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)}
# For each of the chain a replacement; the middle one's is two servers.
SPANS = CHAIN | {4: Span(0, 2), 5: Span(2, 3), 6: Span(3, 4), 7: Span(4, 6)}
BOTH = pytest.mark.parametrize("pushing", [True, False], ids=["ring", "star"])


def run(main: Coroutine[Any, Any, T]) -> T:
    random.seed(0)
    return loop.run(main)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (count, E), generator=torch.Generator().manual_seed(seed)).float()


def session_over(swarm: FakeSwarm, *, rows: int = 1, max_length: int = 100) -> Session:
    return Session(swarm, WHOLE, E, max_length=max_length, rows=rows, settings=QUICK)


async def generate(swarm: FakeSwarm) -> torch.Tensor:
    """A prefill of 4 in three steps, 3 decode steps, a rollback by 2, then 2 more; every step's outputs."""
    fed = tokens(9)
    async with session_over(swarm) as session:
        prefill = [StepInput(fed[:2], [(0, 0, 2)]), StepInput(fed[2:3], [(0, 2, 1)])]
        outputs = await session.steps([*prefill, StepInput(fed[3:4], [(0, 3, 1)])])
        for position, part in ((4, 4), (5, 5), (6, 6), (5, 7), (6, 8)):
            outputs.append(await session.step(fed[part : part + 1], [(0, position, 1)]))
    await until_free(swarm)
    return torch.cat(outputs)


async def until_free(swarm: FakeSwarm) -> None:
    """Leaving the session frees every row at every server, within a message's time."""
    for _ in range(100):
        await asyncio.sleep(swarm.net.latency_s)
    assert swarm.open_rows() == 0


def expected() -> torch.Tensor:
    fed = tokens(9)
    first, second = fed[:7], torch.cat([fed[:5], fed[7:]])
    return torch.cat([reference(WHOLE, first), reference(WHOLE, second)[5:]])


def messages_of_a_run(pushing: bool) -> list[tuple[PeerId, PeerId]]:
    sent: list[tuple[PeerId, PeerId]] = []

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        swarm.net.on_message = lambda number, source, target: sent.append((source, target))
        assert torch.equal(await generate(swarm), expected())

    run(main())
    return sent


@BOTH
def test_without_failures(pushing: bool) -> None:
    """In a ring, servers push to each other and the client hears from the last alone."""
    sent = messages_of_a_run(pushing)
    between = sum(CLIENT not in pair for pair in sent)
    assert between > 2 * 8 if pushing else between == 0


@BOTH
def test_a_death_at_any_single_message_changes_nothing(pushing: bool) -> None:
    """Every message of the run, at its sender's end and its receiver's, exhaustively."""
    for fatal, pair in enumerate(messages_of_a_run(pushing)):
        for victim in set(pair) - {CLIENT}:
            run(_with_a_death(pushing, fatal, victim))


async def _with_a_death(pushing: bool, fatal: int, victim: PeerId) -> None:
    swarm = FakeSwarm(SPANS, pushing=pushing)

    def on_message(number: int, source: PeerId, target: PeerId) -> None:
        if number == fatal:
            swarm.net.kill(victim)

    swarm.net.on_message = on_message
    assert torch.equal(await generate(swarm), expected()), f"{victim.short()} dies at message {fatal}"
    assert set(swarm.failures) <= {victim}


@BOTH
def test_a_server_silent_from_any_message_on_is_replaced(pushing: bool) -> None:
    """It keeps its connections and says nothing; only time tells."""
    for fatal, pair in enumerate(messages_of_a_run(pushing)):
        for victim in set(pair) - {CLIENT}:
            run(_with_silence(pushing, fatal, victim))


async def _with_silence(pushing: bool, fatal: int, victim: PeerId) -> None:
    swarm = FakeSwarm(SPANS, pushing=pushing)

    def on_message(number: int, source: PeerId, target: PeerId) -> None:
        if number == fatal:
            swarm.net.silent.add(victim)

    swarm.net.on_message = on_message
    try:
        output = await generate(swarm)
    except AssertionError:
        assert swarm.open_rows() == len(swarm.backends[victim].rows), "only the silent one has not heard"
    else:
        assert torch.equal(output, expected()), f"{victim.short()} falls silent at message {fatal}"
    assert set(swarm.failures) <= {victim}


def test_a_link_cut_between_servers_is_carried_by_the_client() -> None:
    """At any message between two servers; both live, and nobody else holds their blocks."""
    for fatal, pair in enumerate(messages_of_a_run(pushing=True)):
        if CLIENT not in pair:
            run(_with_a_cut(fatal, pair))


async def _with_a_cut(fatal: int, pair: tuple[PeerId, PeerId]) -> None:
    swarm = FakeSwarm(CHAIN)

    def on_message(number: int, source: PeerId, target: PeerId) -> None:
        if number == fatal:
            swarm.net.cut_link(*pair)

    swarm.net.on_message = on_message
    assert torch.equal(await generate(swarm), expected()), f"{pair} cut at message {fatal}"


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


def test_servers_that_never_reach_each_other() -> None:
    async def main() -> None:
        swarm = FakeSwarm(CHAIN)
        for a, b in itertools.combinations(CHAIN, 2):
            swarm.net.cut_link(peer(a), peer(b))
        assert torch.equal(await generate(swarm), expected())

    run(main())


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.sets(st.integers(0, 150), max_size=6), st.permutations(range(1, 13)), st.randoms())
def test_any_number_of_deaths_also_during_replay(
    pushing: bool, fatal: set[int], order: list[int], chance: random.Random
) -> None:
    """Up to six deaths at arbitrary messages, among servers enough that each block keeps a holder."""
    spans = [Span(0, 3), Span(3, 6), Span(0, 2), Span(2, 4), Span(4, 6), Span(1, 5), Span(0, 6)]
    spans += [Span(0, 6)] * 5

    async def main() -> None:
        swarm = FakeSwarm(dict(zip(order, spans, strict=True)), pushing=pushing)

        def on_message(number: int, source: PeerId, target: PeerId) -> None:
            victims = [end for end in (source, target) if end != CLIENT]
            if number in fatal and victims:
                swarm.net.kill(chance.choice(victims))

        swarm.net.on_message = on_message
        assert torch.equal(await generate(swarm), expected())

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
def test_rows_are_packed_and_recovered_together(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        a, b = tokens(5, 1), tokens(7, 2)
        async with session_over(swarm, rows=2) as session:
            first = await session.step(torch.cat([a[:3], b[:6]]), [(0, 0, 3), (1, 0, 6)], LAST)
            assert torch.equal(first, torch.stack([reference(WHOLE, a)[2], reference(WHOLE, b)[5]]))
            chain = [hop.peer for hop in session.chain]
            swarm.net.kill(chain[0])
            swarm.net.kill(chain[2])
            second = await session.step(torch.cat([b[6:], a[3:]]), [(1, 6, 1), (0, 3, 2)])
            assert torch.equal(second, torch.cat([reference(WHOLE, b)[6:], reference(WHOLE, a)[3:]]))
            at_servers = sum(
                service.kept_bytes for who, service in swarm.services.items() if who in chain[1:2]
            )
            edges = 1 if pushing else len(session.chain)
            assert session.kept_bytes == 4 * 12 * E * edges
            assert at_servers == (4 * 12 * E if pushing else 0)

    run(main())


@BOTH
def test_hops_of_other_codecs_understand_each_other(pushing: bool) -> None:
    async def main() -> torch.Tensor:
        swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)}, pushing=pushing, dtypes={2: torch.bfloat16})
        async with session_over(swarm) as session:
            return await session.step(tokens(2), [(0, 0, 2)])

    assert run(main()).dtype == torch.bfloat16


@BOTH
def test_a_codec_that_loses_is_replayed_to_the_bit(pushing: bool) -> None:
    """With q8 on the wire, a session that lost each of its servers once says what an undisturbed one says; as
    long as the chain is cut at the same blocks, since every edge rounds.
    """
    twice = CHAIN | {number + 3: span for number, span in CHAIN.items()}

    async def main(kills: bool) -> torch.Tensor:
        swarm = FakeSwarm(twice, pushing=pushing)
        chain = Session(swarm, WHOLE, E, max_length=99, settings=SessionSettings(wire="q8"))
        async with chain as session:
            outputs = [await session.step(tokens(3), [(0, 0, 3)])]
            for position in range(3, 6):
                if kills:
                    swarm.net.kill(
                        next(hop.peer for hop in session.chain if hop.span.end == 2 * position - 4)
                    )
                outputs.append(await session.step(tokens(1, position), [(0, position, 1)]))
            assert session.kept_bytes == (1 if pushing else len(session.chain)) * 6 * (E + 2)
        return torch.cat(outputs)

    assert torch.equal(run(main(True)), run(main(False)))


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


@BOTH
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_server_that_computes_nonsense_is_replaced(pushing: bool, index: int) -> None:
    """NaN is noticed by whoever it reaches first; who made it and who was fed it are both left alone."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(9)[:4], [(0, 0, 4)])
            liar = session.chain[index].peer
            swarm.backends[liar].lies = True
            output = await session.step(tokens(9)[4:], [(0, 4, 5)])
            assert liar not in [hop.peer for hop in session.chain]
        assert torch.equal(output, reference(WHOLE, tokens(9))[4:])

    run(main())


@BOTH
def test_a_step_that_is_wrong_in_itself_is_not_tried_for_ever(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            with pytest.raises(NotFinite):
                await session.step(tokens(1) * float("nan"), [(0, 0, 1)])
            assert torch.equal(await session.step(tokens(1), [(0, 0, 1)]), reference(WHOLE, tokens(1))), (
                "the session can go on with better input"
            )

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


def test_a_prefill_keeps_every_server_at_work() -> None:
    """Six chunks through three servers, each message on its way for a second: one after another they would
    take 24 seconds over the ring; pipelined, the ring's four and a little for the window."""

    async def main() -> float:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.1))
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            began_s = asyncio.get_running_loop().time()
            inputs = [StepInput(tokens(3), [(0, 3 * i, 3)], NONE) for i in range(6)]
            await session.steps(inputs)
            return asyncio.get_running_loop().time() - began_s

    assert run(main()) < 1.0


def test_a_ring_takes_one_way_of_each_edge() -> None:
    """Three servers, 0.1 s for each message: four edges of the ring, against six of the star."""

    async def main(pushing: bool) -> float:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.1), pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            began_s = asyncio.get_running_loop().time()
            await session.step(tokens(1), [(0, 1, 1)])
            return asyncio.get_running_loop().time() - began_s

    assert run(main(True)) == pytest.approx(0.4)
    assert run(main(False)) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("rows", "shape", "error"),
    [
        ([(0, 0, 2)], (3, E), InvalidArgument),
        ([(0, 0, 2)], (2, E + 1), InvalidArgument),
        ([(1, 0, 2)], (2, E), InvalidArgument),
        ([(0, 0, 0)], (0, E), InvalidArgument),
        ([(0, 1, 2)], (2, E), SessionGap),
        ([(0, -1, 2)], (2, E), SessionGap),
        ([(0, 0, 101)], (101, E), SessionLimit),
    ],
)
def test_wrong_steps_are_refused_before_anything_is_sent(
    rows: list[tuple[int, int, int]], shape: tuple[int, int], error: type[Exception]
) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS)
        async with session_over(swarm) as session:
            for _ in range(10):
                await asyncio.sleep(0)
            before = swarm.net.messages
            with pytest.raises(error):
                await session.step(torch.zeros(shape), rows)
            assert swarm.net.messages == before

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


@BOTH
def test_cancelling_at_any_point_frees_every_hop(pushing: bool) -> None:
    """The run, with a death in it, is cancelled after n turns of the loop, for every n until it completes."""

    async def main(turns: int) -> bool:
        swarm = FakeSwarm(SPANS, pushing=pushing)

        def on_message(number: int, source: PeerId, target: PeerId) -> None:
            if number == 30:
                swarm.net.kill(source if source != CLIENT else target)

        swarm.net.on_message = on_message
        task = asyncio.create_task(generate(swarm))
        for _ in range(turns):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.wait([task])
        await until_free(swarm)
        return finished

    turns = 0
    while not run(main(turns)):
        turns += 1
    assert turns > 50


@BOTH
def test_a_cancelled_step_leaves_the_session_able_to_go_on(pushing: bool) -> None:
    """After n turns of the loop, for every n until the step completes."""

    async def main(turns: int) -> bool:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            swarm.net.kill(session.chain[1].peer)
            task = asyncio.create_task(session.step(fed[4:5], [(0, 4, 1)]))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            await asyncio.wait([task])
            output = await session.step(fed[4:], [(0, 4, 2)])
            assert torch.equal(output, reference(WHOLE, fed)[4:]), f"cancelled after {turns} turns"
        return finished

    turns = 0
    while not run(main(turns)):
        turns += 1
    assert turns > 10


@BOTH
def test_a_much_better_chain_is_changed_to_when_the_time_is_good(pushing: bool) -> None:
    """One server of everything appears beside three slow ones; the history goes over by a replay."""

    async def main() -> None:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.2), pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            assert not await session.reconsider()
            swarm.add(9, WHOLE)
            assert await session.reconsider()
            output = await session.step(fed[4:], [(0, 4, 2)])
            assert [hop.peer for hop in session.chain] == [peer(9)]
            assert not swarm.failures
        assert torch.equal(output, reference(WHOLE, fed)[4:])
        await until_free(swarm)

    run(main())


def test_servers_that_are_not_wanted_are_not_used() -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS)
        swarm.outlook.routing = Routing(blocked=frozenset({peer(1), peer(3)}), aim="throughput")
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            assert not {peer(1), peer(3)} & {hop.peer for hop in session.chain}
        swarm.outlook.routing = Routing(allowed=frozenset({peer(1)}))
        with pytest.raises(MissingBlocks):
            async with session_over(swarm):
                pass

    run(main())


async def fork_and_go_on(swarm: FakeSwarm) -> torch.Tensor:
    """Row 0 is prefilled; rows 1 and 2 fork from it; then 2 goes on as 0 and 1, and 0 as itself."""
    fed = tokens(12, seed=5)
    async with session_over(swarm, rows=3) as session:
        await session.step(fed[:3], [(0, 0, 3)])
        outputs = [await session.step(fed[3:6], [(0, 3, 1), (1, 3, 1), (2, 3, 1)], forks=[(0, 1), (0, 2)])]
        outputs.append(await session.step(fed[6:9], [(0, 4, 1), (1, 4, 1), (2, 4, 1)], forks=[(2, 0)]))
        outputs.append(await session.step(fed[9:12], [(1, 5, 1), (2, 5, 1), (0, 4, 1)], forks=[(2, 1)]))
    await until_free(swarm)
    return torch.cat(outputs)


def forked() -> torch.Tensor:
    fed = tokens(12, seed=5)
    a, b, c = (torch.cat([fed[:3], fed[i : i + 1]]) for i in (3, 4, 5))
    first = [a, b, c]
    second = [torch.cat([row, fed[6 + i : 7 + i]]) for i, row in enumerate((c, b, c))]
    third = [
        torch.cat([second[2], fed[9:10]]),
        torch.cat([second[2], fed[10:11]]),
        torch.cat([second[0][:4], fed[11:12]]),
    ]
    return torch.stack([reference(WHOLE, row)[-1] for row in (*first, *second, *third)])


@BOTH
def test_rows_fork_whatever_dies_at_whatever_message(pushing: bool) -> None:
    """The copies are made at every hop, and by every keeper; a step that forks can be repeated."""
    sent: list[tuple[PeerId, PeerId]] = []

    async def main(fatal: int | None = None, victim: PeerId | None = None) -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)

        def on_message(number: int, source: PeerId, target: PeerId) -> None:
            if fatal is None:
                sent.append((source, target))
            elif number == fatal and victim is not None:
                swarm.net.kill(victim)

        swarm.net.on_message = on_message
        assert torch.equal(await fork_and_go_on(swarm), forked()), f"{victim} dies at message {fatal}"

    run(main())
    for fatal, pair in enumerate(list(sent)):
        for victim in set(pair) - {CLIENT}:
            run(main(fatal, victim))


@BOTH
def test_a_fork_that_failed_for_good_leaves_an_empty_row(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)}, pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm, rows=2) as session:
            await session.step(fed[:4], [(0, 0, 2), (1, 0, 2)])
            swarm.net.kill(peer(2))
            with pytest.raises(MissingBlocks):
                await session.step(fed[4:6], [(0, 2, 1), (1, 2, 1)], forks=[(0, 1)])
            assert [session.length(row) for row in (0, 1)] == [2, 0]
            swarm.add(8, Span(3, 6))
            output = await session.step(fed[4:6], [(0, 2, 1), (1, 2, 1)], forks=[(0, 1)])
            rows = [torch.cat([fed[:2], fed[i : i + 1]]) for i in (4, 5)]
            assert torch.equal(output, torch.stack([reference(WHOLE, row)[-1] for row in rows]))

    run(main())


@pytest.mark.parametrize(
    ("rows", "forks"),
    [
        ([(0, 2, 1)], [(0, 1)]),  # nothing goes on in row 1
        ([(1, 2, 1)], [(0, 3)]),
        ([(1, 2, 1)], [(3, 1)]),
        ([(1, 2, 1), (2, 2, 1)], [(0, 1), (1, 2)]),
        ([(1, 2, 1)], [(0, 1), (2, 1)]),
        ([(1, 2, 1)], [(1, 1)]),
    ],
)
def test_wrong_forks_are_refused_here_and_at_servers(
    rows: list[tuple[int, int, int]], forks: list[tuple[int, int]]
) -> None:
    async def main() -> None:
        async with session_over(FakeSwarm(SPANS), rows=3) as session:
            await session.step(tokens(6), [(0, 0, 2), (1, 0, 2), (2, 0, 2)])
            with pytest.raises(InvalidArgument):
                await session.step(tokens(len(rows)), rows, forks=forks)
            with pytest.raises(SessionGap):
                await session.step(tokens(1), [(1, 3, 1)], forks=[(0, 1)])

    run(main())
    with pytest.raises(BadMessage):
        checked_forks(Step(tuple(rows), "f32", 6, forks=tuple(forks)), (10, 11, 12))


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


LIES: dict[str, Callable[[dict[str, Any], list[Any]], tuple[dict[str, Any], list[Any]]]] = {
    "fewer bytes": lambda body, buffers: (body, [buffers[0][:-8]] if buffers else []),
    "no buffer": lambda body, buffers: (body, []),
    "two buffers": lambda body, buffers: (body, buffers * 2),
    "another row": lambda body, buffers: (body | {"rows": [[1, 0, 1]]}, buffers),
    "another step's number": lambda body, buffers: (body | {"number": body["number"] + 1000}, buffers),
    "an unknown codec": lambda body, buffers: (body | {"codec": "q3"}, buffers),
    "one hop too many": lambda body, buffers: (body | {"hops": body["hops"] * 2}, buffers),
    "an unknown kind": lambda body, buffers: (body | {"kind": "gift"}, buffers),
    "no fields": lambda body, buffers: ({"kind": "done"}, buffers),
}


@BOTH
@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_costs_its_server_the_session(
    pushing: bool, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last server lies in every answer, from some step on; another takes its place."""
    send = MemoryCall.send
    liars: set[PeerId] = set()

    async def lying(self: MemoryCall, body: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        if self.owner in liars and body.get("kind") == "done":
            body, buffers = LIES[lie](dict(body), list(buffers))
        await send(self, body, buffers)

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            outputs = [await session.step(tokens(9)[:4], [(0, 0, 4)])]
            liars.add(session.chain[-1].peer)
            outputs += [await session.step(tokens(9)[i : i + 1], [(0, i, 1)]) for i in range(4, 9)]
            assert not liars & {hop.peer for hop in session.chain}
            assert set(swarm.failures) >= liars
        assert torch.equal(torch.cat(outputs), reference(WHOLE, tokens(9)))

    monkeypatch.setattr(MemoryCall, "send", lying)
    run(main())
