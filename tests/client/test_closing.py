"""A session that is left while a step of it is under way."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalite.errors import InvalidArgument
from tests.client.fakes import FakeSwarm, peer
from tests.client.runs import BOTH, SPANS, run, session_over, tokens, until_free


@BOTH
def test_a_step_that_waits_ends_with_its_session(pushing: bool) -> None:
    """Its servers are stuck, and nothing would ever be late any more."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        for backend in swarm.backends.values():
            backend.stuck = True
        async with session_over(swarm) as session:
            step = asyncio.create_task(session.step(tokens(4), [(0, 0, 4)]))
            for _ in range(20):
                await asyncio.sleep(0)
        async with asyncio.timeout(1):
            with pytest.raises(InvalidArgument, match="closed while a step"):
                await step
        assert not swarm.failures

    run(main())


@BOTH
def test_a_step_that_mends_its_chain_ends_with_its_session(pushing: bool) -> None:
    """It is left after any number of turns of the loop since a server died, and nothing stays open."""

    async def main(turns: int) -> bool:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(4), [(0, 0, 4)])
            victim = session.chain[1].peer
            swarm.net.kill(victim)
            step = asyncio.create_task(session.step(tokens(1), [(0, 4, 1)]))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = step.done()
        async with asyncio.timeout(1):
            [outcome] = await asyncio.gather(step, return_exceptions=True)
        # Its answer may have come in the very last turn.
        assert isinstance(outcome, InvalidArgument | torch.Tensor)
        await until_free(swarm)
        assert set(swarm.failures) <= {victim}
        return finished

    turns = 0
    while not run(main(turns)):
        turns += 1
    assert turns > 10


def test_a_session_that_is_left_while_it_waits_for_blocks_opens_nothing() -> None:
    async def main() -> None:
        swarm = FakeSwarm({1: SPANS[1], 2: SPANS[2], 3: SPANS[3]})
        async with session_over(swarm) as session:
            await session.step(tokens(4), [(0, 0, 4)])
            swarm.net.kill(peer(2))
            step = asyncio.create_task(session.step(tokens(1), [(0, 4, 1)]))
            await asyncio.sleep(3)
        swarm.add(4, SPANS[2])
        with pytest.raises(InvalidArgument, match="closed while a step"):
            await step
        await until_free(swarm)

    run(main())
