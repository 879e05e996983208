"""What a hop over loopback adds to a decode step.

A tiny random Llama of 8 blocks, float32, one torch thread per process: the time of a step through 1, 2 and 4
servers, less the time of the same blocks called directly in one process. All run in one go, in turns.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import torch

from benchmarks.report import Check, Report
from petalite.client.servers import SwarmServers
from petalite.client.session import Session
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
from petalite.net.identity import Identity
from petalite.net.loop import new_event_loop
from petalite.node.processes import NodeProcess, serve_node
from petalite.swarm.directory import Directory
from petalite.swarm.peer import PeerSettings, SwarmPeer
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama

BLOCKS = 8
HIDDEN = 256
CHAINS = (1, 2, 4)  # servers
ROUNDS = 20
STEPS_PER_ROUND = 50
PREFIX = 16
PETALS_MS = {1: 4.9, 2: 8.1}  # a step through Petals on a machine of this kind


def run() -> Report:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=new_event_loop) as runner:
        sizes = {"num_hidden_layers": BLOCKS, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
        model = tiny_llama(Path(folder), **sizes)
        return runner.run(_measure(str(model)))


async def _measure(model: str) -> Report:
    async with AsyncExitStack() as stack:
        steps = {0: _direct(model)}
        for servers in CHAINS:
            steps[servers] = await _through(model, servers, stack)
        samples: dict[int, list[float]] = {servers: [] for servers in steps}
        hidden = torch.randn(1, HIDDEN)
        position = PREFIX
        for _ in range(ROUNDS):
            for servers, step in steps.items():
                for offset in range(STEPS_PER_ROUND):
                    began_s = time.perf_counter()
                    await step(hidden, position + offset)
                    samples[servers].append((time.perf_counter() - began_s) * 1e3)
            position += STEPS_PER_ROUND
    return _report({servers: statistics.median(times) for servers, times in samples.items()})


Step = Callable[[torch.Tensor, int], Awaitable[object]]


def _direct(model: str) -> Step:
    """The same blocks, called without anything between."""
    span = load_span(Checkpoint.open(model), 0, BLOCKS)
    cache = span.new_cache()
    row = cache.open_row(PREFIX + ROUNDS * STEPS_PER_ROUND)
    span.forward(torch.randn(PREFIX, HIDDEN), [Segment(row, 0, PREFIX)], cache)

    async def step(hidden: torch.Tensor, position: int) -> None:
        span.forward(hidden, [Segment(row, position, 1)], cache)

    return step


async def _through(model: str, servers: int, stack: AsyncExitStack) -> Step:
    """A session over a swarm of so many processes."""
    nodes: list[NodeProcess] = []
    for index in range(servers):
        blocks = f"{index * BLOCKS // servers}:{(index + 1) * BLOCKS // servers}"
        nodes.append(stack.enter_context(serve_node(model, blocks, [node.address for node in nodes[:1]])))
    settings = PeerSettings(bootstrap=(nodes[0].address,))
    await asyncio.gather(*(asyncio.to_thread(lambda node=node: node.address) for node in nodes))
    peer = await stack.enter_async_context(SwarmPeer(Identity.generate(), settings))
    directory = Directory(peer.dht, Checkpoint.open(model).model_id(), Span(0, BLOCKS))
    length = PREFIX + ROUNDS * STEPS_PER_ROUND
    session = Session(SwarmServers(peer.host, directory), Span(0, BLOCKS), HIDDEN, max_length=length)
    await stack.enter_async_context(session)
    await session.step(torch.randn(PREFIX, HIDDEN), [(0, 0, PREFIX)])
    assert len(session.chain) == servers

    async def step(hidden: torch.Tensor, position: int) -> None:
        await session.step(hidden, [(0, position, 1)])

    return step


def _report(medians_ms: dict[int, float]) -> Report:
    report = Report("hop", ("servers", "ms per step", "added", "added per hop", "Petals, whole step"))
    direct_ms = medians_ms.pop(0)
    report.rows.append((0, direct_ms, "", "", ""))
    report.results["direct_ms"] = direct_ms
    for servers, step_ms in medians_ms.items():
        per_hop_ms = (step_ms - direct_ms) / servers
        report.rows.append((servers, step_ms, step_ms - direct_ms, per_hop_ms, PETALS_MS.get(servers, "")))
        report.results[f"servers_{servers}"] = {"step_ms": step_ms, "added_per_hop_ms": per_hop_ms}
        report.checks.append(Check(f"added per hop, {servers} servers", per_hop_ms, "ms", 0.6))
    return report
