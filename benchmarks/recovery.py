"""From SIGKILL to the next token: a server in the middle of a chain of three dies, another holds its blocks.

SmolLM2 over real processes on loopback. Beside it, in the same run, the time of one prefill of that history
on that span: what a replacement has to compute, whatever the protocol.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AsyncExitStack

import torch

from benchmarks.driver import hidden_session
from benchmarks.report import Check, Report
from petalite.model.checkpoint import Checkpoint
from petalite.net.loop import new_event_loop
from petalite.node.processes import serve_node
from petalite.node.smollm2 import smollm2_folder
from petalite.swarm.messages import NONE
from petalite.swarm.spans import Span

SPANS = ("0:10", "10:20", "20:30")
MIDDLE = Span(10, 20)
HISTORIES = (128, 1024)  # when the server is killed
STEPS = 10  # of them, taken one by one
ROUNDS = 3


def run() -> Report:
    torch.set_num_threads(1)
    report = Report("recovery", ("history", "what", "value", "unit"))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for history in HISTORIES:
            rounds = [runner.run(_one(history)) for _ in range(ROUNDS)]
            medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            report.results[str(history)] = medians
            for what, (key, unit) in {
                "SIGKILL to the next step's end": ("outage_ms", "ms"),
                "of it, until it was noticed": ("detection_ms", "ms"),
                "one prefill of the history on the span": ("prefill_ms", "ms"),
                "a step before": ("step_ms", "ms"),
                "kept at the client, per token": ("client_bytes", "bytes"),
            }.items():
                report.rows.append((history, what, medians[key], unit))
            bound = 1.3 * medians["prefill_ms"] + medians["detection_ms"] + medians["step_ms"]
            report.checks.append(
                Check(
                    f"{history} tokens: outage, against 1.3 prefills, detection and the step",
                    medians["outage_ms"],
                    "ms",
                    bound,
                )
            )
    return report


async def _one(history: int) -> dict[str, float]:
    model = str(smollm2_folder())
    width = Checkpoint.open(model).config.hidden_size
    async with AsyncExitStack() as stack:
        first = stack.enter_context(serve_node(model, SPANS[0], []))
        await asyncio.to_thread(lambda: first.address)
        others = [serve_node(model, span, [first.address]) for span in (*SPANS[1:], SPANS[1])]
        nodes = {(await asyncio.to_thread(_id, stack.enter_context(node))): node for node in others}
        peers = [str(first.address)]
        prefill_ms = await _prefill_ms(model, peers, history, width)
        async with hidden_session(model, peers, history + 32) as session:
            prefix = history - STEPS
            await session.step(torch.randn(prefix, width), [(0, 0, prefix)], NONE)
            for position in range(prefix, history):
                await session.step(torch.randn(1, width), [(0, position, 1)])
            steps = list(session.trace.steps)[-STEPS:]
            step_ms = statistics.median(timing.total_s for timing in steps) * 1e3
            client_bytes = session.kept_bytes / session.length()
            nodes[session.chain[1].peer].kill()
            began_s = time.perf_counter()
            await session.step(torch.randn(1, width), [(0, history, 1)])
            outage_ms = (time.perf_counter() - began_s) * 1e3
            (recovery,) = session.trace.recoveries
            last_ms = session.trace.steps[-1].total_s * 1e3
    return {
        "outage_ms": outage_ms,
        "detection_ms": max(0.0, outage_ms - recovery.seconds * 1e3 - last_ms),
        "prefill_ms": prefill_ms,
        "step_ms": step_ms,
        "client_bytes": client_bytes,
    }


async def _prefill_ms(model: str, peers: list[str], history: int, width: int) -> float:
    """Of the whole history in one step, through a session of just the middle span."""
    async with hidden_session(model, peers, history + 1, span=MIDDLE) as session:
        times = []
        for _ in range(3):
            began_s = time.perf_counter()
            await session.step(torch.randn(history, width), [(0, 0, history)], NONE)
            times.append((time.perf_counter() - began_s) * 1e3)
    return min(times)


def _id(node: object) -> object:
    return node.peer_id  # type: ignore[attr-defined]
