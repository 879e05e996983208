"""What servers need before a session opens there is brought first, and may take its time."""

from __future__ import annotations

import asyncio

import pytest
import torch

from petalite.client.adapters import AdapterSource
from petalite.client.session import Session
from petalite.errors import DeadlineExceeded
from petalite.net.identity import PeerId
from petalite.swarm.routing import Hop
from tests.client.fakes import E, FakeSwarm, peer, reference
from tests.client.runs import CHAIN, QUICK, WHOLE, run, tokens


class Slow(FakeSwarm):
    """A LoRA takes a minute to some, and never gets through to others."""

    slow: PeerId | None = None
    stuck: PeerId | None = None

    async def bring(self, hop: Hop, adapter: AdapterSource) -> None:
        if hop.peer == self.stuck:
            await asyncio.sleep(10.0)
            raise DeadlineExceeded("no piece leaves")
        if hop.peer == self.slow:
            await asyncio.sleep(60.0)


class NoPart:
    """A LoRA that changes nothing here; what matters is when it is brought."""

    hosted = None

    def __contains__(self, block: object) -> bool:
        return False

    def part(self, span: object) -> None:
        return None


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_a_slow_upload_delays_a_session_and_does_not_end_it(slow: int) -> None:
    """Longer than a hop has to open, and than one that attaches waits for the next."""

    async def main() -> None:
        swarm = Slow(CHAIN)
        swarm.slow = peer(slow)
        fed = tokens(4)
        async with Session(swarm, WHOLE, E, max_length=9, settings=QUICK, adapter=NoPart()) as session:
            assert asyncio.get_running_loop().time() == pytest.approx(60.0, abs=1.0)
            assert torch.equal(await session.step(fed, [(0, 0, 4)]), reference(WHOLE, fed))
        assert not swarm.failures

    run(main())


def test_where_an_upload_is_stuck_another_server_is_taken() -> None:
    async def main() -> None:
        swarm = Slow(CHAIN | {9: CHAIN[2]})
        [_, second, _] = await swarm.plan(WHOLE, fresh=False, timeout_s=0.0)
        swarm.stuck = second.peer
        fed = tokens(4)
        for _ in range(5):  # equal servers are drawn
            async with Session(swarm, WHOLE, E, max_length=9, settings=QUICK, adapter=NoPart()) as session:
                assert torch.equal(await session.step(fed, [(0, 0, 4)]), reference(WHOLE, fed))
        assert set(swarm.failures) == {second.peer}

    run(main())
