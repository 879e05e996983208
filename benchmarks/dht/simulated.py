"""Real nodes on a simulated network: what lookups cost, and what colluders, death and churn do to reads."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from petalite.dht.messages import FIND
from petalite.dht.node import DhtSettings
from petalite.dht.upkeep import UpkeepSettings
from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.sim.dht import SimPeer, SimSwarm
from petalite.sim.liars import collude
from petalite.sim.loop import run
from petalite.sim.network import LinkSettings, SimNetwork

LATENCY_S = 0.05  # one way
MEDIAN_SESSION_S = 600.0
TTL_S = 120  # a server record's
_IDLE = DhtSettings(upkeep=UpkeepSettings(tick_s=1e9))  # nodes that do nothing of their own accord


def accept(owner: PeerId, name: bytes, value: bytes) -> None:
    """Any value will do."""


@contextmanager
def few_collections() -> Iterator[None]:
    """Thousands of nodes are no garbage, and looking through
    them again and again would take most of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def simulate(main: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    with few_collections():
        return run(main)


def swarm(settings: DhtSettings | None = None, seed: int = 1) -> SimSwarm:
    network = SimNetwork(seed, LinkSettings(latency_s=LATENCY_S))
    return SimSwarm(network, {"servers": accept}, seed=seed, settings=settings)


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def name_of(peer: SimPeer) -> tuple[str, bytes]:
    """What a peer announces is under a name of its own."""
    return "servers", str(peer.contact.peer_id).encode()


async def announce(peer: SimPeer) -> None:
    await peer.node.announce(*name_of(peer), b"x" * 200, TTL_S)


async def finds(reader: SimPeer, owner: SimPeer, **options: Any) -> bool:
    """Whether a read brings the owner's record."""
    name = name_of(owner)
    try:
        found = await reader.node.find([name], timeout_s=10, **options)
    except PetaliteError:
        return False
    return [record.owner for record in found[name]] == [owner.contact.peer_id]


# -- what a lookup costs -----------------------------------------------------------------------------


def lookups(n: int, reads: int = 300) -> dict[str, Any]:
    """Rounds and messages of reads in a quiet swarm."""

    async def main() -> dict[str, Any]:
        sim = swarm(_IDLE)
        peers = await sim.populate(n)
        results = await lookup_costs(sim, peers, reads)
        await sim.close()
        return results

    return simulate(main())


async def lookup_costs(sim: SimSwarm, peers: list[SimPeer], reads: int) -> dict[str, Any]:
    owners = sim.random.sample(peers, 50)
    await asyncio.gather(*map(announce, owners))
    results = {}
    for label, options in {
        "first holder, 1 path": {"paths": 1, "holders": 1},
        "all k nearest, 1 path": {"paths": 1},
        "all k nearest, 4 paths": {"paths": 4},
    }.items():
        rounds, messages = [], []

        async def read(
            reader: SimPeer, options: dict[str, int], rounds: list[float], messages: list[float]
        ) -> None:
            loop = asyncio.get_running_loop()
            started_s, before = loop.time(), reader.endpoint.calls[FIND]
            assert await finds(reader, sim.random.choice(owners), **options)
            rounds.append(round((loop.time() - started_s) / (2 * LATENCY_S)))
            messages.append(reader.endpoint.calls[FIND] - before)

        readers = sim.random.sample(peers, reads)
        await asyncio.gather(*(read(reader, options, rounds, messages) for reader in readers))
        results[label] = {"rounds": quantiles(rounds), "messages": quantiles(messages)}
    return results


# -- what the swarm withstands -----------------------------------------------------------------------


def collusion(n: int = 1000, share: float = 0.4, trials: int = 500) -> dict[str, Any]:
    """So many peers name only each other and deny every record. Reads by the others, in percent found."""

    async def main() -> dict[str, Any]:
        sim = swarm(_IDLE)
        peers = await sim.populate(n)
        bad = sim.random.sample(peers, round(share * n))
        collude(bad)
        liars = set(bad)
        honest = [peer for peer in peers if peer not in liars]
        owners = sim.random.sample(honest, 100)
        for owner in owners:
            await announce(owner)
        results = {}
        for label, paths in {"1 path": 1, "4 paths": 4, "4 paths, and again": None}.items():
            found = 0
            for _ in range(trials):
                reader, owner = sim.random.choice(honest), sim.random.choice(owners)
                found += await finds(reader, owner, paths=paths)
            results[f"found over {label}"] = 100 * found / trials
        await sim.close()
        return {"trials": trials, **results}

    return simulate(main())


def deaths(n: int = 1000, share: float = 0.3, reads: int = 2000) -> dict[str, Any]:
    """So many die at once, silently; reads of what living owners announced,
    before anybody looks after its table."""

    async def main() -> dict[str, Any]:
        sim = swarm(_IDLE)
        peers = await sim.populate(n)
        owners = sim.random.sample(peers, 100)
        await asyncio.gather(*map(announce, owners))
        await sim.kill(sim.random.sample([p for p in peers if p not in owners], round(share * n)))
        loop = asyncio.get_running_loop()
        times: list[float] = []

        async def read(reader: SimPeer) -> bool:
            started_s = loop.time()
            good = await finds(reader, sim.random.choice(owners))
            times.append(loop.time() - started_s)
            return good

        found = 0
        for _ in range(reads // 500):  # all at once: within seconds, so that nothing has been announced anew
            found += sum(await asyncio.gather(*map(read, sim.random.sample(sim.peers, 500))))
        await sim.close()
        return {"reads": reads, "found": 100 * found / reads, "seconds": quantiles(times)}

    return simulate(main())


@dataclass(slots=True)
class Reads:
    """How reads went whose reader and owner both lived to their end."""

    found: int = 0
    times: list[float] = field(default_factory=list)

    def note(self, good: bool, seconds: float) -> None:
        self.found += good
        self.times.append(seconds)

    @property
    def results(self) -> dict[str, Any]:
        percent = 100 * self.found / len(self.times)
        return {"reads": len(self.times), "found": percent, "seconds": quantiles(self.times)}


async def every_second(work: Callable[[], Coroutine[Any, Any, None]], from_s: float, until_s: float) -> None:
    """Start it every second of that time, from now on, whether
    or not the one before has ended; then wait for all."""
    await asyncio.sleep(from_s)
    async with asyncio.TaskGroup() as group:
        for _ in range(int(until_s - from_s)):
            group.create_task(work())
            await asyncio.sleep(1)


def churn(n: int, minutes: int = 30, owners_share: float = 0.2) -> dict[str, Any]:
    """Peers come and go, owners too; every second somebody reads what a living owner announces."""

    async def main() -> dict[str, Any]:
        sim = swarm()
        loop = asyncio.get_running_loop()
        owners: list[SimPeer] = []

        async def joined(peer: SimPeer) -> None:
            if sim.random.random() < owners_share:
                await announce(peer)
                owners.append(peer)

        peers = await sim.populate(n)
        await asyncio.gather(*map(joined, peers))
        churning = asyncio.create_task(sim.churn(MEDIAN_SESSION_S, joined=joined))
        reads = Reads()

        async def read() -> None:
            owners[:] = [owner for owner in owners if owner.endpoint.up]
            reader, owner = sim.random.choice(sim.peers), sim.random.choice(owners)
            started_s = loop.time()
            good = await finds(reader, owner)
            if reader.endpoint.up and owner.endpoint.up:
                reads.note(good, loop.time() - started_s)

        await every_second(read, MEDIAN_SESSION_S, minutes * 60)
        churning.cancel()
        await asyncio.wait([churning])
        await sim.close()
        return {"nodes": n, **reads.results}

    return simulate(main())


# -- what it costs to be there -----------------------------------------------------------------------


def at_rest(n: int, minutes: int = 10) -> dict[str, Any]:
    """Traffic of nodes that nobody asks anything, and what simulating them takes."""

    async def main() -> dict[str, Any]:
        sim = swarm()
        started_s = time.perf_counter()
        await sim.populate(n)
        populated_s = time.perf_counter() - started_s

        traffic = replace(sim.network.traffic)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(minutes * 60)
        real_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        node_minutes = n * minutes
        rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results = {
            "populate_s": populated_s,
            "real_s": real_s,
            "cpu_s": cpu_s,
            "rss_mib": rss_mib,
            "calls_per_node_minute": (sim.network.traffic.calls - traffic.calls) / node_minutes,
            "bytes_per_node_minute": (sim.network.traffic.bytes - traffic.bytes) / node_minutes,
        }
        await sim.close()
        return results

    return simulate(main())
