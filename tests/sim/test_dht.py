"""The simulated swarm against its own truth: tables as a long-lived swarm's,
sessions as long as asked for."""

from __future__ import annotations

import asyncio

from petalite.dht.keys import DhtKey
from petalite.sim.dht import SimSwarm
from petalite.sim.loop import run
from petalite.sim.network import SimNetwork

RULES = {"servers": lambda owner, name, value: None}


def test_a_populated_swarm_has_the_tables_of_one_that_grew():
    async def main() -> None:
        swarm = SimSwarm(SimNetwork(1), RULES)
        peers = await swarm.populate(200)
        assert swarm.network.traffic.calls == 0
        for peer in peers[:20]:
            own_id = peer.contact.node_id
            # Whom we share the longest prefixes with, all of them; of the far ones, k per bucket.
            truth = sorted((p.contact for p in peers if p is not peer), key=lambda c: c.node_id ^ own_id)
            assert peer.node.table.nearest(own_id, 10) == truth[:10]
            assert sum(own_id.shared_bits(e.contact.node_id) == 0 for e in peer.node.table) == 20
        await swarm.close()

    run(main())


def test_churn_replaces_half_of_the_swarm_in_a_median_session():
    async def main() -> None:
        swarm = SimSwarm(SimNetwork(1), RULES)
        peers = await swarm.populate(100)
        staying = peers[:10]
        churning = asyncio.create_task(swarm.churn(600, staying=staying))
        await asyncio.sleep(600)
        churning.cancel()
        left = [peer for peer in peers if peer in swarm.peers]
        assert 40 <= len(left) - 10 <= 50 + 10
        assert set(staying) <= set(left)
        assert len(swarm.peers) == 100
        await asyncio.sleep(5)
        # The newcomers are part of it.
        key = DhtKey.of("servers", b"x")
        newcomer = next(peer for peer in reversed(swarm.peers) if peer not in peers)
        await newcomer.node.announce("servers", b"x", b"here", 60)
        holding = [
            bool(p.node.storage.get(key, asyncio.get_running_loop().time())) for p in swarm.nearest(key, 5)
        ]
        assert all(holding)
        await swarm.close()

    run(main())
