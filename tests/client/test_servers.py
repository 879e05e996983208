"""Who is avoided, and for how long."""

from __future__ import annotations

import asyncio

from petalite.client.outlook import LEAVING_S
from petalite.errors import ConnectionLost, ShuttingDown
from petalite.sim import loop
from petalite.swarm.bans import BanSettings
from petalite.swarm.spans import Span
from tests.client.fakes import FakeSwarm, peer

WHOLE = Span(0, 4)


async def _chosen(swarm: FakeSwarm) -> int:
    (hop,) = await swarm.plan(WHOLE, fresh=False, timeout_s=0.0)
    return next(number for number in (1, 2) if hop.peer == peer(number))


def test_a_server_that_leaves_is_avoided_and_not_counted_as_failing() -> None:
    """Not while records may still tell of what it left; at once where it says that it serves others."""

    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE, 2: WHOLE})
        swarm.failed(peer(1), ShuttingDown("it leaves"))
        assert {await _chosen(swarm) for _ in range(20)} == {2}
        swarm.failed(peer(2), ShuttingDown("it leaves too"))
        assert {await _chosen(swarm) for _ in range(50)} == {1, 2}  # the last ones are still asked
        swarm.grow(1, Span(0, 5))
        assert {await _chosen(swarm) for _ in range(20)} == {1}
        await asyncio.sleep(LEAVING_S)
        swarm.failed(peer(2), ConnectionLost("it failed"))
        assert {await _chosen(swarm) for _ in range(20)} == {1}
        await asyncio.sleep(BanSettings().first_s + 0.1)
        swarm.failed(peer(1), ConnectionLost("it failed"))
        assert {await _chosen(swarm) for _ in range(20)} == {2}  # whose first failure it was

    loop.run(main())
