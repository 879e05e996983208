"""Sessions over fakes: whatever dies, at whatever call, the outputs are those of an undisturbed chain."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.client.session import Session, SessionSettings
from petalite.errors import (
    ConnectionLost,
    InvalidArgument,
    MissingBlocks,
    NotFinite,
    SessionGap,
    SessionLimit,
)
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import LAST
from petalite.swarm.spans import Span
from tests.client.fakes import E, FakeHop, FakeSwarm, peer, reference

WHOLE = Span(0, 6)
QUICK = SessionSettings(chunk_tokens=3, recovery_s=5.0, retry_s=0.001)
# Three servers of two blocks, and for each a replacement; the middle one's is two servers.
SPANS = {
    1: Span(0, 2),
    2: Span(2, 4),
    3: Span(4, 6),
    4: Span(0, 2),
    5: Span(2, 3),
    6: Span(3, 4),
    7: Span(4, 6),
}


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (count, E), generator=torch.Generator().manual_seed(seed)).float()


def session_over(swarm: FakeSwarm, *, rows: int = 1, max_length: int = 100) -> Session:
    return Session(swarm, WHOLE, E, max_length=max_length, rows=rows, settings=QUICK)


async def generate(swarm: FakeSwarm) -> torch.Tensor:
    """A prefill of 4, then 3 decode steps, a rollback by 2, then 2 more: the outputs of every step."""
    fed = tokens(9)
    outputs = []
    async with session_over(swarm) as session:
        for position, part in (
            (0, fed[:4]),
            (4, fed[4:5]),
            (5, fed[5:6]),
            (6, fed[6:7]),
            (5, fed[7:8]),
            (6, fed[8:]),
        ):
            outputs.append(await session.step(part, [(0, position, len(part))]))
    assert not swarm.open_hops, "leaving the session frees every hop"
    return torch.cat(outputs)


def expected() -> torch.Tensor:
    fed = tokens(9)
    first, second = fed[:7], torch.cat([fed[:5], fed[7:]])
    return torch.cat([reference(WHOLE, first), reference(WHOLE, second)[5:]])


async def test_without_failures() -> None:
    assert torch.equal(await generate(FakeSwarm({1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)})), expected())


async def calls_without_failures() -> int:
    counted: list[int] = []
    await generate(FakeSwarm(SPANS, dies=lambda number, who: bool(counted.append(number))))
    return len(counted)


async def test_a_death_at_any_single_call_changes_nothing() -> None:
    """Every call of the run, opening, before and after computing, on every hop: exhaustively."""
    for fatal in range(await calls_without_failures()):
        swarm = FakeSwarm(SPANS, dies=lambda number, who, fatal=fatal: number == fatal)
        assert torch.equal(await generate(swarm), expected()), f"death at call {fatal}"
        assert len(swarm.dead) == 1
        assert swarm.failures == list(swarm.dead)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 120), max_size=6), st.permutations(range(1, 13)))
def test_any_number_of_deaths_also_during_replay(fatal: set[int], order: list[int]) -> None:
    """Up to six deaths at arbitrary calls, among servers enough that each block keeps a holder."""
    spans = [Span(0, 3), Span(3, 6), Span(0, 2), Span(2, 4), Span(4, 6), Span(1, 5), Span(0, 6)]
    spans += [Span(0, 6)] * 5
    swarm = FakeSwarm(dict(zip(order, spans, strict=True)), dies=lambda number, who: number in fatal)
    assert torch.equal(asyncio.run(generate(swarm)), expected())


async def test_recovery_is_recorded() -> None:
    swarm = FakeSwarm(SPANS, dies=lambda number, who: number > 20 and who == peer(2))
    async with session_over(swarm) as session:
        for position in range(6):
            await session.step(tokens(1, position), [(0, position, 1)])
        (recovery,) = session.trace.recoveries
        assert recovery.lost == peer(2)
        assert recovery.span == Span(2, 4)
        assert recovery.replacements == (peer(5), peer(6))
        assert [hop.peer for hop in session.chain] == [peer(1), peer(5), peer(6), peer(3)]
        assert len(session.trace.steps[-1]) == 4


async def test_missing_blocks_leaves_the_session_able_to_go_on() -> None:
    """The only holder dies; the step fails naming its blocks; when a new one appears the step succeeds."""
    swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)})
    fed = tokens(6)
    async with session_over(swarm) as session:
        await session.step(fed[:4], [(0, 0, 4)])
        swarm.dead.add(peer(2))
        with pytest.raises(MissingBlocks) as caught:
            await session.step(fed[4:5], [(0, 4, 1)])
        assert caught.value.blocks == (3, 4, 5)
        assert session.length() == 4
        swarm.spans[8] = Span(3, 6)
        outputs = [await session.step(fed[i : i + 1], [(0, i, 1)]) for i in (4, 5)]
    assert torch.equal(torch.cat(outputs), reference(WHOLE, fed)[4:])


async def test_rows_are_packed_and_recovered_together() -> None:
    swarm = FakeSwarm(SPANS)
    a, b = tokens(5, 1), tokens(7, 2)
    async with session_over(swarm, rows=2) as session:
        first = await session.step(torch.cat([a[:3], b[:6]]), [(0, 0, 3), (1, 0, 6)], LAST)
        assert torch.equal(first, torch.stack([reference(WHOLE, a)[2], reference(WHOLE, b)[5]]))
        swarm.dead.update({peer(1), peer(3)})
        second = await session.step(torch.cat([b[6:], a[3:]]), [(1, 6, 1), (0, 3, 2)])
        assert torch.equal(second, torch.cat([reference(WHOLE, b)[6:], reference(WHOLE, a)[3:]]))
        assert session.kept_bytes == 4 * 12 * E * len(session.chain)


async def test_hops_of_other_codecs_get_what_they_want() -> None:
    swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)}, codecs={2: CODECS["bf16"]})
    async with session_over(swarm) as session:
        output = await session.step(tokens(2), [(0, 0, 2)])
    assert output.dtype == torch.bfloat16


async def test_a_server_that_holds_nothing_open_is_left_for_another() -> None:
    """A server dead before the session opens costs a second plan, not the session."""
    swarm = FakeSwarm(SPANS, dead={peer(1), peer(2)})
    assert torch.equal(await generate(swarm), expected())
    assert set(swarm.failures) == {peer(1), peer(2)}


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
async def test_wrong_steps_are_refused_before_anything_is_sent(rows, shape, error) -> None:
    counted: list[int] = []
    swarm = FakeSwarm(SPANS, dies=lambda number, who: bool(counted.append(number)))
    async with session_over(swarm) as session:
        before = len(counted)
        with pytest.raises(error):
            await session.step(torch.zeros(shape), rows)
        assert len(counted) == before


async def test_a_step_that_is_wrong_in_itself_is_not_tried_elsewhere(monkeypatch) -> None:
    async def refuse(self, rows, data, output):
        raise NotFinite("NaN in the hidden states")

    swarm = FakeSwarm(SPANS)
    async with session_over(swarm) as session:
        monkeypatch.setattr(FakeHop, "step", refuse)
        with pytest.raises(NotFinite):
            await session.step(tokens(1), [(0, 0, 1)])
        assert not swarm.failures


async def test_a_hop_that_answers_too_late_is_replaced(monkeypatch) -> None:
    swarm = FakeSwarm(SPANS)
    answer = FakeHop.step

    async def hang(self, rows, data, output):
        if self.hop.peer == peer(2):
            await asyncio.Event().wait()
        return await answer(self, rows, data, output)

    monkeypatch.setattr(FakeHop, "step", hang)
    quick = SessionSettings(step_s=0.01, token_s=0.0)
    async with Session(swarm, WHOLE, E, max_length=9, settings=quick) as session:
        swarm.spans.pop(2)
        output = await session.step(tokens(3), [(0, 0, 3)])
        assert [hop.peer for hop in session.chain] == [peer(1), peer(5), peer(6), peer(3)]
    assert torch.equal(output, reference(WHOLE, tokens(3)))


async def test_opening_gives_up_at_the_deadline() -> None:
    class Stubborn(FakeSwarm):
        async def plan(self, span, *, fresh, timeout_s):
            return await super().plan(span, fresh=False, timeout_s=timeout_s)

    swarm = Stubborn({1: WHOLE}, dead={peer(1)})
    short = SessionSettings(open_s=0.05, retry_s=0.01)
    with pytest.raises((ConnectionLost, Exception), match="dead"):
        async with Session(swarm, WHOLE, E, max_length=9, settings=short):
            pass
    assert 1 < swarm.plans < 20, "attempts are spaced out"


async def test_cancelling_at_any_point_frees_every_hop() -> None:
    """The run is cancelled after n turns of the loop, for every n until it completes."""

    async def yielding_run(swarm: FakeSwarm) -> None:
        await generate(swarm)

    class Yielding(FakeSwarm):
        async def open(self, hop, *, rows, max_length):
            await asyncio.sleep(0)
            opened = await super().open(hop, rows=rows, max_length=max_length)
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                opened.close()
                raise
            return opened

    for turns in itertools.count():
        swarm = Yielding(SPANS, dies=lambda number, who: number == 14)
        task = asyncio.create_task(yielding_run(swarm))
        for _ in range(turns):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.wait([task])
        for _ in range(3):
            await asyncio.sleep(0)  # late openings close themselves on the loop's next turns
        assert not swarm.open_hops, f"cancelled after {turns} turns"
        if finished:
            break
    assert turns > 5
