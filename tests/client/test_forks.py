"""Rows that begin as copies of others, over servers in memory."""

from __future__ import annotations

import pytest
import torch

from petalite.errors import BadMessage, InvalidArgument, MissingBlocks, SessionGap
from petalite.net.identity import PeerId
from petalite.server.steps import checked_forks
from petalite.swarm.messages import Step
from petalite.swarm.spans import Span
from tests.client.fakes import CLIENT, FakeSwarm, peer, reference
from tests.client.runs import BOTH, SPANS, WHOLE, run, session_over, tokens, until_free


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
