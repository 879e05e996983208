"""A client whose event loop stood still, as that of a stopped process does, blames no server for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from tests.client.fakes import FakeSwarm, reference
from tests.client.runs import BOTH, SPANS, WHOLE, run, session_over, tokens
from tests.helpers.memory_net import MemoryNet


def stand_still(seconds: float) -> None:
    """The clock goes on, and nothing else."""
    loop: Any = asyncio.get_running_loop()
    loop._virtual.now_s += seconds


@BOTH
def test_an_answer_that_came_meanwhile_is_in_time(pushing: bool) -> None:
    """It lies there to be read when the deadline is found to be over."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, net=MemoryNet(latency_s=0.1), pushing=pushing)
        fed = tokens(9)
        async with session_over(swarm) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            for position in range(4, 9):
                asyncio.get_running_loop().call_later(0.05, stand_still, 100.0)
                outputs.append(await session.step(fed[position : position + 1], [(0, position, 1)]))
            assert not swarm.failures and not session.trace.recoveries
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    run(main())


@BOTH
@pytest.mark.parametrize("hop", [0, 2])
def test_who_is_stuck_is_replaced_all_the_same(pushing: bool, hop: int) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, net=MemoryNet(latency_s=0.1), pushing=pushing)
        fed = tokens(5)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            stuck = session.chain[hop].peer
            swarm.backends[stuck].stuck = True
            for after_s in (0.05, 101.0, 101.5, 102.5):
                asyncio.get_running_loop().call_later(after_s, stand_still, 100.0)
            assert torch.equal(await session.step(fed[4:], [(0, 4, 1)]), reference(WHOLE, fed)[4:])
            assert swarm.failures == [stuck]

    run(main())
