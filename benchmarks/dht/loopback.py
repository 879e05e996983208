"""Thirty-two real nodes on loopback, in four processes; measured in one of them.

`python -m benchmarks.dht.loopback ADDRESS N` is one of the other processes: N nodes that join through
ADDRESS.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.dht.simulated import accept, quantiles
from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.dht.records import RecordChecker
from petalite.net import Host, Identity, Multiaddr
from petalite.net.loop import new_event_loop

PROCESSES, NODES_EACH = 4, 8
_CHECKER = RecordChecker({"servers": accept})  # one for the nodes of a process
LISTEN = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
_KEYS_OF_80_BLOCKS = 10


async def start(stack: AsyncExitStack, bootstrap: list[Multiaddr]) -> tuple[DhtNode, list[Multiaddr]]:
    """One more node, joined."""
    identity = Identity.generate()
    host = await stack.enter_async_context(Host(identity))
    addresses = await host.listen([LISTEN])
    node = DhtNode(identity, HostNetwork(host), rules=_CHECKER.rules, checker=_CHECKER)
    await stack.enter_async_context(node)
    await node.join(bootstrap)
    return node, addresses


def measure(samples: int = 60) -> dict[str, Any]:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_measure(samples))


async def _measure(samples: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        first, addresses = await start(stack, [])
        others = stack.enter_context(other_processes(str(addresses[0])))
        await asyncio.to_thread(lambda: [process.stdout.readline() for process in others])
        before_mib = _rss_mib()
        nodes, start_ms = [first], []
        for _ in range(NODES_EACH - 1):
            before = time.perf_counter()
            node, _ = await start(stack, addresses)
            start_ms.append(1000 * (time.perf_counter() - before))
            nodes.append(node)
        mib_per_node = (_rss_mib() - before_mib) / len(start_ms)
        await asyncio.sleep(2)  # until all have met all

        async def store(i: int) -> None:
            node = nodes[i % len(nodes)]
            assert await node.store(node.sign("servers", f"{i}", b"x" * 200, 120)) >= 20

        async def get(i: int, **options: int) -> None:
            name = ("servers", f"{i % samples}")
            assert len((await nodes[(i + 3) % len(nodes)].find([name], timeout_s=5, **options))[name]) == 1

        async def announce(i: int) -> None:
            entries = {("servers", b"model %d/%d" % (i, n)): b"x" * 200 for n in range(_KEYS_OF_80_BLOCKS)}
            assert (await nodes[i % len(nodes)].announce_all(entries, 120)).n_holders >= 20

        async def read_model(i: int) -> None:
            names = [("servers", b"model %d/%d" % (i % 10, n)) for n in range(_KEYS_OF_80_BLOCKS)]
            found = await nodes[(i + 3) % len(nodes)].find(names, timeout_s=5)
            assert all(len(records) == 1 for records in found.values())

        await _time(store, 3 * NODES_EACH)  # a node's first calls make its connections
        results = {
            "nodes": PROCESSES * NODES_EACH,
            "start_ms": quantiles(start_ms),
            "mib_per_node": mib_per_node,
            "store_ms": await _time(store, samples),
            "get_ms": await _time(lambda i: get(i, holders=1, paths=1), samples),
            "get_newest_ms": await _time(get, samples),
            "announce_80_blocks_ms": await _time(announce, 10),
            "read_80_blocks_ms": await _time(read_model, 30),
        }
        for process in others:
            process.terminate()
        return results


async def _time(work: Callable[[int], Awaitable[None]], samples: int) -> dict[str, float]:
    """Milliseconds each took, and the mean of this process's own computing meanwhile: its part of the calls,
    which other work on the machine does not change."""
    times = []
    cpu_s = time.process_time()
    for i in range(samples):
        before = time.perf_counter()
        await work(i)
        times.append(1000 * (time.perf_counter() - before))
    return quantiles(times) | {"cpu": 1000 * (time.process_time() - cpu_s) / samples}


@contextmanager
def other_processes(address: str) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "benchmarks.dht.others", address, str(NODES_EACH)]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES - 1)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20
