"""Many sessions on one server: what a pass over the weights is shared for.

A random Llama whose weights fit no cache. Clients decode at once, each in a session of its own over real
links; then one decodes while another's prefill of 2,048 tokens runs. And how late the server's event loop is
meanwhile: there the server runs in this process, and its clients in others.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import torch

from benchmarks.driver import hidden_session
from benchmarks.report import Check, Report
from petalite.client.settings import RING
from petalite.net.loop import new_event_loop
from petalite.node.processes import serve_node
from petalite.server.loaded import ComputeSettings
from petalite.server.node import Node
from petalite.server.scheduler import SchedulerSettings
from petalite.server.server import ServerSettings
from petalite.swarm.messages import NONE
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}  # blocks of Llama 3.2 1B's shape, 365 M weights in six
BLOCKS = f"0:{SIZES['num_hidden_layers']}"
FORMATS = {"bf16": ("--dtype", "bfloat16"), "int8": ("--dtype", "bfloat16", "--quant", "int8")}
PARTS = (*FORMATS, "loop")
SESSIONS = (1, 2, 4, 8, 16)
PREFIX = 16
STEPS = 100  # of 40, each session's first two, before passes are shared, would be the 95th percentile
ROUNDS = 3  # of one session, two, four, …, in turns; what is shown are medians
LONG = 2048
TICK_S = 0.001


def run(only: str = "") -> Report:
    torch.set_num_threads(1)
    report = Report("serve", ("format", "sessions", "tokens/s", "of one", "step p50 ms", "step p95 ms"))
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        model = str(tiny_llama(Path(folder) / "model", **SIZES))
        for name, options in FORMATS.items():
            if only in name:
                runner.run(_measure(report, model, name, options))
        if only in "loop":
            runner.run(_measure_loop(report, model))
    return report


async def _measure_loop(report: Report, model: str) -> None:
    """How much later than asked for a timer of the server's loop fires, while it serves."""
    compute = ComputeSettings(dtype="bfloat16", quant="int8", threads=1)
    settings = ServerSettings(Span(0, SIZES["num_hidden_layers"]), compute=compute)
    late_s: list[float] = []
    async with Node(listen=["/ip4/127.0.0.1/tcp/0"]) as node:
        await node.serve(model, settings)
        peers = list(map(str, node.addresses))
        decode = [["steps", {"prefix": PREFIX, "count": 6 * STEPS}]]
        prefill = [["prefill", {"tokens": LONG, "chunk": LONG // 4, "pipelined": True}]]
        driving = [
            asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.driver"),
                json.dumps({"model": model, "peers": peers, "route": RING, "do": do}),
                stdout=asyncio.subprocess.DEVNULL,
            )
            for do in (decode, decode, prefill)
        ]
        ended = asyncio.gather(*[process.wait() for process in await asyncio.gather(*driving)])
        while not ended.done():
            began_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            late_s.append(time.perf_counter() - began_s - TICK_S)
        assert await ended == [0, 0, 0]
    p50, p99, most = statistics.median(late_s), statistics.quantiles(late_s, n=100)[-1], max(late_s)
    report.rows.append(
        ("event loop late, ms", f"p50 {p50 * 1e3:.2f}", f"p99 {p99 * 1e3:.2f}", "", "", most * 1e3)
    )
    report.results["loop"] = {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "most_ms": most * 1e3}
    report.checks.append(Check("event loop late, p99", p99 * 1e3, "ms", 5.0))


async def _measure(report: Report, model: str, name: str, options: tuple[str, ...]) -> None:
    async with AsyncExitStack() as stack:
        node = stack.enter_context(serve_node(model, BLOCKS, [], *options))
        peers = [str(await asyncio.to_thread(lambda: node.address))]
        rounds = [
            {count: _figures(*await _together(model, peers, count)) for count in SESSIONS}
            for _ in range(ROUNDS)
        ]
        for count in SESSIONS:
            tokens_s, p50, p95 = map(statistics.median, zip(*(one[count] for one in rounds), strict=True))
            gain = statistics.median(one[count][0] / one[1][0] for one in rounds)
            report.rows.append((name, count, tokens_s, gain, p50, p95))
            report.results[f"{name} {count}"] = {"tokens_s": tokens_s, "p50_ms": p50, "p95_ms": p95}
            if count == 8:
                slowest = statistics.median(one[count][2] / one[1][1] for one in rounds)
                report.checks.append(Check(f"{name}: 8 sessions against 1", gain, "×", 3.0, "at least"))
                report.checks.append(Check(f"{name}: p95 of 8 against one's step", slowest, "×", 2.5))
        beside = await _beside_a_prefill(model, peers)
        report.rows.append((name, "1, beside a prefill", "", "", *beside))
        report.results[f"{name} beside a prefill"] = {"p50_ms": beside[0], "p95_ms": beside[1]}
        alone_p50 = report.results[f"{name} 1"]["p50_ms"]
        bound = SchedulerSettings().target_s * 1e3 + alone_p50
        report.checks.append(Check(f"{name}: p95 beside a prefill of {LONG}", beside[1], "ms", bound))


def _figures(tokens_s: float, steps: list[float]) -> tuple[float, float, float]:
    return (tokens_s, *_quantiles_ms(steps))


async def _together(model: str, peers: list[str], count: int) -> tuple[float, list[float]]:
    """Tokens/s of all, and every step's seconds."""
    ready, go = asyncio.Semaphore(0), asyncio.Event()

    async def one() -> list[float]:
        async with hidden_session(model, peers, PREFIX + STEPS + 1) as session:
            await session.step(torch.randn(PREFIX, SIZES["hidden_size"]), [(0, 0, PREFIX)], NONE)
            ready.release()
            await go.wait()
            for offset in range(STEPS):
                await session.step(torch.randn(1, SIZES["hidden_size"]), [(0, PREFIX + offset, 1)])
            return [timing.total_s for timing in list(session.trace.steps)[-STEPS:]]

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    for _ in tasks:
        await ready.acquire()
    began_s = time.perf_counter()
    go.set()
    steps = [seconds for task in tasks for seconds in await task]
    return count * STEPS / (time.perf_counter() - began_s), steps


async def _beside_a_prefill(model: str, peers: list[str]) -> tuple[float, float]:
    """p50 and p95 in milliseconds of decode steps while a long prefill goes on."""
    async with (
        hidden_session(model, peers, LONG) as long,
        hidden_session(model, peers, 1024) as short,
    ):
        await short.step(torch.randn(PREFIX, SIZES["hidden_size"]), [(0, 0, PREFIX)], NONE)
        prefill = asyncio.create_task(
            long.step(torch.randn(LONG, SIZES["hidden_size"]), [(0, 0, LONG)], NONE)
        )
        seconds: list[float] = []
        while not prefill.done() and len(seconds) < 1000:
            began_s = time.perf_counter()
            await short.step(torch.randn(1, SIZES["hidden_size"]), [(0, PREFIX + len(seconds), 1)])
            seconds.append(time.perf_counter() - began_s)
        await prefill
    return _quantiles_ms(seconds)


def _quantiles_ms(seconds: list[float]) -> tuple[float, float]:
    """The median and the 95th percentile, in milliseconds."""
    return statistics.median(seconds) * 1e3, statistics.quantiles(seconds, n=20)[-1] * 1e3
