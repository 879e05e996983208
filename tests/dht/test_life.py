"""A node's beginning and its end, in whatever order and at whatever moment they are asked for."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from petalite.dht.node import DhtNode, DhtSettings
from petalite.dht.storage import StorageSettings
from petalite.errors import PetaliteError, ShuttingDown
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.sim.dht import SimSwarm, SkewedClock
from tests.dht.test_node import NAME, RULES, simulate, values


def unstarted(swarm: SimSwarm) -> DhtNode:
    identity = Identity.from_seed(bytes(32))
    endpoint = swarm.network.endpoint(identity.peer_id, swarm.public_address())
    return DhtNode(identity, endpoint, rules=RULES, clock=SkewedClock(), random=Random(1))


def others() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


def test_what_is_called_first_starts_it_once():
    """Two calls at once start one node, and closing it leaves nothing."""

    async def test(swarm: SimSwarm) -> None:
        node = unstarted(swarm)
        await asyncio.gather(node.find([NAME], timeout_s=5), node.find([NAME], timeout_s=5))
        await node.close()
        assert others() == set()

    simulate(test)


def test_a_start_that_is_cancelled_leaves_nothing():
    async def test(swarm: SimSwarm) -> None:
        node = unstarted(swarm)
        starting = asyncio.create_task(node.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        await node.close()
        assert others() == set()

    simulate(test)


def test_a_start_that_is_closed_meanwhile_leaves_nothing():
    async def test(swarm: SimSwarm) -> None:
        node = unstarted(swarm)
        starting = asyncio.create_task(node.start())
        await asyncio.sleep(0)
        await node.close()
        await asyncio.wait([starting])
        await asyncio.sleep(0)
        assert others() == set()
        with pytest.raises(ShuttingDown):
            await node.start()

    simulate(test)


def test_who_joins_hears_that_the_node_closed():
    """Also while most addresses wait for their turn to be dialled."""

    async def test(swarm: SimSwarm) -> None:
        node = unstarted(swarm)
        somebody = Identity.generate().peer_id
        nowhere = [Multiaddr.parse(f"/ip4/9.9.9.{n}/tcp/9").with_peer(somebody) for n in range(40)]
        joining = asyncio.create_task(node.join(nowhere))
        await asyncio.sleep(1)
        await node.close()
        async with asyncio.timeout(10):
            with pytest.raises(PetaliteError):
                await joining

    simulate(test)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
def test_who_announces_hears_that_the_node_closed(after_s: float):
    """Or its announcement was made before."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(2)
        announcing = asyncio.create_task(peers[1].node.announce(*NAME, b"here", 60))
        await asyncio.sleep(after_s)
        await peers[1].node.close()
        async with asyncio.timeout(10):
            try:
                await announcing
            except ShuttingDown:
                pass
            else:
                assert await values(peers[0].node) == []

    simulate(test)


def test_a_node_known_to_clients_alone_lets_expired_records_go():
    """It has nobody in its table, and an owner's share of its storage still becomes free again."""

    async def test(swarm: SimSwarm) -> None:
        few = DhtSettings(storage=StorageSettings(per_owner_records=2))
        await swarm.add(settings=few)
        (client,) = await swarm.grow(1, client_mode=True)
        for number in range(4):
            record = client.node.sign("servers", f"model/{number}", b"here", 10)
            assert await client.node.store(record) == 1
            await asyncio.sleep(60)

    simulate(test)
