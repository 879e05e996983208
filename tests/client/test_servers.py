"""Who is avoided, and for how long; who can do what is wanted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from petalite.client.hops import Wanted
from petalite.client.outlook import LEAVING_S
from petalite.errors import ConnectionLost, MissingBlocks, ShuttingDown
from petalite.sim import loop
from petalite.swarm.bans import BanSettings
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import HostedAdapter
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


def _says(swarm: FakeSwarm, number: int, **changes: Any) -> None:
    """A server's record changes."""
    for index, entry in enumerate(swarm.servers):
        if entry.peer == peer(number):
            swarm.servers[index] = ServerEntry(entry.peer, replace(entry.record, **changes))


def test_training_goes_to_who_takes_it_by_speed() -> None:
    random.seed(0)

    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE, 2: WHOLE, 3: WHOLE, 4: WHOLE})
        _says(swarm, 1, training_tokens=8192, prefill_ms=1.0, block_ms=10.0)
        _says(swarm, 2, training_tokens=8192, prefill_ms=4.0, block_ms=1.0)
        _says(swarm, 3, training_tokens=100)
        wanted = Wanted(training_tokens=128)
        chosen = Counter(
            [(await swarm.plan(WHOLE, fresh=False, timeout_s=0.0, wanted=wanted))[0].peer for _ in range(500)]
        )
        assert chosen.keys() == {peer(1), peer(2)}
        assert 2.5 < chosen[peer(1)] / chosen[peer(2)] < 6.5  # four times as fast at many tokens
        with pytest.raises(MissingBlocks, match="of those that take training calls of 9000 tokens"):
            await swarm.plan(WHOLE, fresh=False, timeout_s=0.0, wanted=Wanted(training_tokens=9000))

    loop.run(main())


def test_a_hosted_adapter_goes_to_who_holds_it() -> None:
    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE, 2: WHOLE})
        digest = bytes(range(32))
        _says(swarm, 2, adapters=(HostedAdapter("tales", digest),))
        for _ in range(20):
            (hop,) = await swarm.plan(WHOLE, fresh=False, timeout_s=0.0, wanted=Wanted(adapter=digest))
            assert hop.peer == peer(2)
        with pytest.raises(MissingBlocks, match="hold the adapter 0000"):
            await swarm.plan(WHOLE, fresh=False, timeout_s=0.0, wanted=Wanted(adapter=bytes(32)))

    loop.run(main())
