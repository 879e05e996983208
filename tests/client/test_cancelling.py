"""Cancelled at any await, a session frees what it holds, and a step leaves its session able to go on."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalite.client.session import StepInput
from petalite.net.identity import PeerId
from tests.client.fakes import CLIENT, FakeSwarm, reference
from tests.client.runs import BOTH, SPANS, WHOLE, generate, run, session_over, tokens, until_free


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
@pytest.mark.parametrize("turns_between", [0, 1, 2])
def test_a_prefill_cancelled_as_a_server_dies_is_cancelled(pushing: bool, turns_between: int) -> None:
    """Both after n turns of the loop, or nearly, for every n until the prefill completes."""

    async def main(turns: int) -> bool:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(7)
        async with session_over(swarm) as session:
            await session.step(fed[:1], [(0, 0, 1)])
            parts = [StepInput(fed[i : i + 1], [(0, i, 1)]) for i in range(1, 7)]
            task = asyncio.create_task(session.steps(parts))
            for _ in range(turns):
                await asyncio.sleep(0)
            swarm.net.kill(session.chain[turns % 3].peer)
            for _ in range(turns_between):
                await asyncio.sleep(0)
            is_asked = task.cancel()  # else the prefill is through
            await asyncio.wait([task])
            assert task.cancelled() is is_asked, f"cancelled after {turns} turns"
        await until_free(swarm)
        return not is_asked

    turns = 0
    while not run(main(turns)):
        turns += 1
    assert turns > 10


@BOTH
def test_a_death_in_a_prefill_leaves_nothing_cancelled(pushing: bool) -> None:
    """Else a timeout around it, when it is over, is taken for somebody's cancelling."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            swarm.net.kill(session.chain[1].peer)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(200):
                    await session.steps([StepInput(tokens(1), [(0, i, 1)]) for i in range(6)])
                    await asyncio.sleep(300)

    run(main())
