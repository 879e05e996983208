"""Cancelled at any await, a session frees what it holds, and a step leaves its session able to go on."""

from __future__ import annotations

import asyncio

import torch

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
