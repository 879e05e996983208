"""A swarm of DHT nodes on a simulated network: real nodes, virtual time. They come, go, and can be asked
about.

Each peer has a public address of its own, spread over network prefixes as on the Internet, and a wall clock
that may be wrong.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count
from math import log
from random import Random

from petalite.dht.contacts import Contact
from petalite.dht.keys import KEY_BITS, DhtKey
from petalite.dht.node import DhtNode, DhtSettings
from petalite.dht.records import NamespaceRules, RecordChecker
from petalite.errors import ShuttingDown, Unreachable
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.sim.network import Endpoint, SimNetwork

EPOCH_UNIX_S = 1_750_000_000.0  # when virtual time begins


class SkewedClock:
    """The loop's time, and a wall clock that is off by `skew_s`."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.skew_s = skew_s

    def time_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return EPOCH_UNIX_S + self.time_s() + self.skew_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True, eq=False)
class SimPeer:
    """One node and where it is."""

    node: DhtNode
    endpoint: Endpoint
    contact: Contact

    @property
    def address(self) -> Multiaddr:
        """To join through."""
        return self.endpoint.address.with_peer(self.contact.peer_id)


class SimSwarm:
    """Nodes that share a network, a seed and, to save time, what they know of good signatures."""

    def __init__(
        self,
        network: SimNetwork,
        rules: NamespaceRules,
        *,
        seed: int = 0,
        settings: DhtSettings | None = None,
        skew_s: Callable[[Random], float] | None = None,
    ) -> None:
        self.network = network
        self.random = Random(seed)
        self.peers: list[SimPeer] = []  # those alive
        self._rules = rules
        self._checker = RecordChecker(rules, remembered=100_000)
        self._seed = seed
        self._settings = settings or DhtSettings()
        self._skew_s = skew_s
        self._born = 0

    async def add(
        self,
        *,
        client_mode: bool = False,
        address: str | None = None,
        identity: Identity | None = None,
        settings: DhtSettings | None = None,
    ) -> SimPeer:
        """A started node that has joined nobody yet."""
        self._born += 1
        seed = sha256(f"{self._seed}/{self._born}".encode()).digest()
        identity = identity or Identity.from_seed(seed)
        address = address or self.public_address()
        endpoint = self.network.endpoint(identity.peer_id, address)
        node = DhtNode(
            identity,
            endpoint,
            rules=self._rules,
            settings=settings or self._settings,
            clock=SkewedClock(self._skew_s(self.random) if self._skew_s else 0.0),
            client_mode=client_mode,
            checker=self._checker,
            random=Random(int.from_bytes(seed)),
        )
        await node.start()
        peer = SimPeer(node, endpoint, Contact.of(identity.peer_id, (address,)))
        self.peers.append(peer)
        return peer

    async def grow(self, n: int, *, client_mode: bool = False) -> list[SimPeer]:
        """Nodes that join one after the other, each through a random one that is there."""
        born = []
        for _ in range(n):
            servers = [peer for peer in self.peers if not peer.node.client_mode]
            through = [self.random.choice(servers).address] if servers else []
            peer = await self.add(client_mode=client_mode)
            await peer.node.join(through)
            born.append(peer)
        return born

    async def populate(self, n: int) -> list[SimPeer]:
        """Nodes with the tables of a swarm that has stood for long: random peers in every bucket, last heard
        from and looked for at random times. No message is sent."""
        born = [await self.add() for _ in range(n)]
        now_s, upkeep = asyncio.get_running_loop().time(), self._settings.upkeep
        ring = sorted(self.peers, key=lambda peer: peer.contact.node_id)
        ids = [peer.contact.node_id for peer in ring]
        for peer in born:
            table = peer.node.table
            for index in range(KEY_BITS):
                low, high = _bucket(peer.contact.node_id, index)
                first, last = bisect_left(ids, low), bisect_left(ids, high)
                for number in self.random.sample(range(first, last), min(table.settings.k + 4, last - first)):
                    table.add(ring[number].contact, now_s - self.random.uniform(0.0, upkeep.probe_max_s))
                if _alone(ids, peer.contact.node_id, index):
                    break
            for index in table.stale_buckets(now_s, 0.0):
                target = DhtKey.random(self.random, peer.contact.node_id, index)
                table.refreshed(target, now_s - self.random.uniform(0.0, upkeep.refresh_s))
        return born

    async def kill(self, peers: Iterable[SimPeer]) -> None:
        """They stop without a word, as machines that lose their power."""
        gone = list(peers)
        for peer in gone:
            self.network.remove(peer.endpoint)
        alive = dict.fromkeys(self.peers)
        for peer in gone:
            del alive[peer]
            await peer.node.close(withdraw=False)
        self.peers = list(alive)

    async def churn(
        self,
        median_session_s: float,
        *,
        staying: Iterable[SimPeer] = (),
        joined: Callable[[SimPeer], Awaitable[None]] | None = None,
    ) -> None:
        """For ever: each peer but those staying stops after a random session, and a new one joins in its
        place. Half of all sessions are longer than the median, whatever their age: an exponential
        distribution. `joined` is called for each newcomer once it is part of the swarm."""
        rate = log(2) / median_session_s
        random = Random(self._seed)  # its own, so that what else is done meanwhile changes nobody's fate
        loop = asyncio.get_running_loop()
        stay = set(staying)
        ends = [
            (loop.time() + random.expovariate(rate), n, p) for n, p in enumerate(self.peers) if p not in stay
        ]
        heapify(ends)
        async with asyncio.TaskGroup() as joins:
            for number in count(len(self.peers)):
                end_s, _, peer = heappop(ends)
                await asyncio.sleep(end_s - loop.time())
                await self.kill([peer])
                through = random.choice(self.peers).address
                newcomer = await self.add()
                joins.create_task(_try_to_join(newcomer, through, joined))
                heappush(ends, (loop.time() + random.expovariate(rate), number, newcomer))

    async def close(self) -> None:
        """End every node, without farewells."""
        await self.kill(list(self.peers))

    def nearest(self, key: DhtKey, count: int) -> list[SimPeer]:
        """The truth: the servers alive that are nearest to the key."""
        servers = (peer for peer in self.peers if not peer.node.client_mode)
        return nsmallest(count, servers, key=lambda peer: peer.contact.node_id ^ key)

    def public_address(self) -> str:
        """One that nobody has yet, anywhere on the Internet."""
        parts = [self.random.randrange(20, 100), *(self.random.randrange(1, 255) for _ in range(3))]
        return f"/ip4/{'.'.join(map(str, parts))}/tcp/31330"


async def _try_to_join(
    peer: SimPeer, through: Multiaddr, joined: Callable[[SimPeer], Awaitable[None]] | None
) -> None:
    """Whoever it was to join through may have left; the node itself tries again.
    And it may leave meanwhile."""
    with suppress(Unreachable, ShuttingDown):
        await peer.node.join([through])
        if joined is not None:
            await joined(peer)


def _bucket(own_id: DhtKey, index: int) -> tuple[int, int]:
    """The ids [low, high) that share exactly `index` bits with ours."""
    width = 1 << (KEY_BITS - index - 1)
    low = (own_id ^ width) // width * width
    return low, low + width


def _alone(ids: Sequence[int], own_id: DhtKey, index: int) -> bool:
    """Whether nobody shares more than `index` bits with us."""
    width = 1 << (KEY_BITS - index - 1)
    low = own_id // width * width
    return bisect_left(ids, low + width) - bisect_left(ids, low) <= 1
