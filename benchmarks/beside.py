"""What training calls at one server cost: their rate beside plain autograd over the same blocks, and what a
session that decodes meanwhile feels.

Ten blocks of SmolLM2 in float32 behind a `Trainer`, no sockets; 8 × 128 tokens a call. Everything runs in the
same rounds on the same thread.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import closing

import torch
from torch import Tensor

from benchmarks.report import Check, Report
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.span import BlockSpan, load_span
from petalite.node.smollm2 import smollm2_folder
from petalite.server.adapters import Adapters
from petalite.server.backend import Backend
from petalite.server.training import Trainer
from petalite.server.training_memory import TrainingSettings
from petalite.swarm.spans import Span
from petalite.swarm.training import HIDDEN, SpanInputs

SPAN = Span(0, 10)
ROWS, TOKENS = 8, 128
CACHE_TOKENS = 65536  # what `serve` has by default
ROUNDS = 5
DECODES = 60
BOUND = 0.85  # of plain autograd


def run() -> Report:
    return asyncio.run(_run())


async def _run() -> Report:
    report = Report("beside", ("what", "value"))
    span = load_span(Checkpoint.open(smollm2_folder()), SPAN.start, SPAN.end)
    with closing(ComputeThread()) as thread:
        backend = Backend(span, cache_tokens=CACHE_TOKENS, thread=thread)
        calls = _Calls(span, backend, thread)
        await _rates(report, calls)
        await _beside(report, calls, backend)
    return report


class _Calls:
    """One training call of each kind, and the same by plain autograd; each returns its seconds."""

    def __init__(self, span: BlockSpan, backend: Backend, thread: ComputeThread) -> None:
        self._span, self._thread = span, thread
        self._trainer = Trainer(backend, "benchmark", Adapters(0))
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(ROWS, TOKENS, span.config.hidden_size, generator=generator) / 2
        self._gradient = torch.randn(self.hidden.shape, generator=generator)
        self._inputs = SpanInputs(self.hidden)

    async def forward(self) -> None:
        await self._trainer.forward(SPAN, self._inputs)

    async def plain_forward(self) -> None:
        await self._thread.run(torch.no_grad()(self._span.forward_stateless), self.hidden)

    async def step(self) -> None:
        await self.forward()
        await self._trainer.backward(SPAN, self._inputs, self._gradient, (HIDDEN,))

    async def kept_step(self) -> None:
        outputs = await self._trainer.forward(SPAN, self._inputs, keep=True)
        assert outputs.kept is not None
        await self._trainer.backward(SPAN, None, self._gradient, (HIDDEN,), kept=outputs.kept)

    async def plain_step(self) -> None:
        await self._thread.run(self._autograd)

    def _autograd(self) -> Tensor:
        hidden = self.hidden.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._span.forward_stateless(hidden), hidden, self._gradient)
        return gradient


async def _rates(report: Report, calls: _Calls) -> None:
    kinds = {
        "forward": (calls.forward, calls.plain_forward),
        "forward and backward, kept between": (calls.kept_step, calls.plain_step),
        "forward and backward, nothing kept": (calls.step, calls.plain_step),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for turn in range(ROUNDS + 1):
        for name, pair in kinds.items():
            seconds = []
            for call in pair:
                began_s = time.perf_counter()
                await call()
                seconds.append(time.perf_counter() - began_s)
            if turn:  # the first finds out how large a piece may be
                taken[name].append((seconds[0], seconds[1]))
    for name, pairs in taken.items():
        rate = ROWS * TOKENS / statistics.median(ours for ours, _ in pairs)
        ratio = statistics.median(plain / ours for ours, plain in pairs)
        report.rows += [(f"{name}, tokens/s", rate), (f"{name}, of plain autograd", ratio)]
        report.results[name] = {"tokens_per_s": rate, "ratio": ratio}
        if "nothing" not in name:
            report.checks.append(Check(f"{name}, of plain autograd", ratio, "×", BOUND, "at least"))


async def _beside(report: Report, calls: _Calls, backend: Backend) -> None:
    rows = await backend.open_rows(1, 2 * DECODES, SPAN.start, SPAN.end)

    async def decode(start: int) -> list[float]:
        taken = []
        for position in range(start, start + DECODES):
            began_s = time.perf_counter()
            segment = Segment(rows.numbers[0], position, 1)
            await backend.step(calls.hidden[0, :1], [segment], SPAN.start, SPAN.end)
            taken.append((time.perf_counter() - began_s) * 1e3)
        return taken

    alone = await decode(0)
    training = asyncio.create_task(_again_and_again(calls))
    await asyncio.sleep(0.5)
    beside = await decode(DECODES)
    training.cancel()
    await asyncio.gather(training, return_exceptions=True)
    for name, times in (("alone", alone), ("beside training", beside)):
        p50, worst = statistics.median(times), max(times)
        report.rows += [(f"decode step {name}, median ms", p50), (f"decode step {name}, worst ms", worst)]
        report.results[f"decode {name}"] = {"p50_ms": p50, "worst_ms": worst}
    piece_ms = TrainingSettings().piece_s * 1e3
    bound = max(alone) + 2 * piece_ms  # a piece is measured, not known: one may take twice as long
    report.checks.append(Check("worst decode step beside training", max(beside), "ms", bound))


async def _again_and_again(calls: _Calls) -> None:
    while True:
        await calls.step()
