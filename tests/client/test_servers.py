"""Who is avoided, and for how long; who can do what is wanted."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from petalite.client.hops import Wanted
from petalite.client.outlook import LEAVING_S
from petalite.client.servers import LOOK_S
from petalite.client.session import Session
from petalite.errors import ConnectionLost, MissingBlocks, ShuttingDown, Unreachable
from petalite.sim import loop
from petalite.swarm.bans import BanSettings
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import HostedAdapter
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from tests.client.fakes import E, FakeSwarm, peer, reference
from tests.helpers.memory_net import MemoryNet

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


class Deaf(FakeSwarm):
    """Nobody of the DHT answers for a while, at once or not at all."""

    heard_s = 0.0
    hangs = False

    async def refresh(self, *, timeout_s: float) -> None:
        if asyncio.get_running_loop().time() < self.heard_s:
            await asyncio.sleep(timeout_s if self.hangs else 0.01)
            raise Unreachable("nobody answers")
        await super().refresh(timeout_s=timeout_s)


@pytest.mark.parametrize("hangs", [False, True])
def test_where_the_dht_does_not_answer_what_is_known_serves(hangs: bool) -> None:
    """A step survives its server over one that failed before, within seconds; and a time without any, until
    the DHT tells of another."""

    async def main() -> None:
        swarm = Deaf({1: WHOLE, 2: WHOLE})
        swarm.hangs, swarm.heard_s = hangs, 40.0
        fed = torch.arange(12.0).view(6, 2)
        swarm.failed(peer(2), ConnectionLost("it failed"))
        async with Session(swarm, WHOLE, E, max_length=99) as session:
            outputs = [await session.step(fed[:4], [(0, 0, 4)])]
            swarm.net.kill(peer(1))
            killed_s = asyncio.get_running_loop().time()
            outputs.append(await session.step(fed[4:5], [(0, 4, 1)]))
            # A look, and another where the dead one is tried again: each has failed once.
            assert asyncio.get_running_loop().time() - killed_s < 2 * LOOK_S + 1.0
            swarm.add(3, WHOLE)
            (swarm.servers[:], found) = (swarm.servers[1:2], swarm.servers[2:])
            asyncio.get_running_loop().call_later(35.0, swarm.servers.extend, found)
            swarm.net.kill(peer(2))
            outputs.append(await session.step(fed[5:], [(0, 5, 1)]))
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    loop.run(main())


def test_who_knows_nobody_and_hears_nothing_says_so() -> None:
    async def main() -> None:
        swarm = Deaf({})
        swarm.heard_s = 100.0
        with pytest.raises(Unreachable, match="nobody answers"):
            await swarm.plan(WHOLE, fresh=True, timeout_s=3.0)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0, abs=0.1)

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


def test_a_turn_waits_for_a_look_only_where_that_may_change_something() -> None:
    """Nobody better is known; somebody is, who is gone; somebody, who is there; what is known is old."""

    async def main() -> None:
        spans = {number: Span(number, number + 1) for number in range(4)}
        swarm = FakeSwarm({number + 1: span for number, span in spans.items()}, net=MemoryNet(latency_s=0.2))
        looks = 0
        refresh = swarm.refresh

        async def counted(*, timeout_s: float) -> None:
            nonlocal looks
            looks += 1
            await refresh(timeout_s=timeout_s)

        swarm.refresh = counted  # type: ignore[method-assign]
        chain = await swarm.plan(WHOLE, fresh=False, timeout_s=0.0)
        swarm.age_s = 60.0
        assert not await swarm.is_much_better_than(chain, 9)
        assert looks == 0
        swarm.add(8, WHOLE)
        swarm.net.kill(peer(8))
        assert not await swarm.is_much_better_than(chain, 9)
        assert looks == 1
        swarm.add(9, WHOLE)
        assert await swarm.is_much_better_than(chain, 9)
        assert looks == 2
        swarm.age_s = 600.0
        assert not await swarm.is_much_better_than([Hop(peer(9), WHOLE)], 9)
        assert looks == 3

    loop.run(main())
