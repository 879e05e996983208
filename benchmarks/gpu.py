"""Decode steps on a GPU, replayed as graphs beside the same launched one by one in torch.

Four blocks of Llama 3.1 8B's shape with random weights; rows of 512 tokens. What a step gives is copied to
the CPU, as a server does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import Check, Report
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan, load_span
from tests.helpers.checkpoints import tiny_llama

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
FORMATS = ("none", "int8", "nf4")
ROWS = (1, 4, 16)
CACHED_TOKENS, STEPS, ROUNDS = 512, 50, 5
REACH = 1.0  # replaying is not to be slower


def run() -> Report:
    report = Report("gpu", ("ms per block and step", *(f"{rows} rows" for rows in ROWS)))
    if not torch.cuda.is_available():
        report.rows.append(("no GPU here", *("" for _ in ROWS)))
        return report
    report.results["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(tiny_llama(Path(folder), **SIZES))
        for quant in FORMATS:
            measure(report, checkpoint, quant, torch.device("cuda"))
    return report


def measure(report: Report, checkpoint: Checkpoint, quant: str, device: torch.device) -> None:
    n_blocks = checkpoint.config.n_blocks
    span = load_span(checkpoint, 0, n_blocks, dtype=torch.bfloat16, device=device, quant=quant)
    began_s = time.perf_counter()
    works = span.prepare()
    report.results[f"{quant}: s to record a block"] = (time.perf_counter() - began_s) / n_blocks
    graphs = span.graphs
    samples: dict[tuple[str, int], list[float]] = {
        (kind, rows): [] for kind in ("replayed", "launched") for rows in ROWS
    }
    for _ in range(ROUNDS + 1):  # the first is warming up
        for (kind, rows), taken in samples.items():
            span.graphs = graphs if kind == "replayed" else None
            taken.append(_block_ms(span, rows))
    medians = {key: statistics.median(taken[1:]) for key, taken in samples.items()}
    for kind in ("replayed", "launched"):
        name = f"bfloat16, {quant}, {kind if works or kind == 'launched' else 'NOT replayed'}"
        report.rows.append((name, *(medians[kind, rows] for rows in ROWS)))
        report.results[name] = {rows: medians[kind, rows] for rows in ROWS}
    for rows in ROWS:
        ratio = medians["launched", rows] / medians["replayed", rows] if works else 0.0
        report.checks.append(Check(f"replayed, {quant}, {rows} rows", ratio, "×", REACH, "at least"))


def _block_ms(span: BlockSpan, n_rows: int) -> float:
    """Of one step, as the CPU's clock sees it."""
    cache = span.new_cache()
    numbers = [cache.open_row(CACHED_TOKENS + STEPS) for _ in range(n_rows)]
    prompt = torch.zeros(CACHED_TOKENS, span.config.hidden_size)
    for row in numbers:
        span.forward(prompt, [Segment(row, 0, CACHED_TOKENS)], cache)
    hidden = torch.randn(n_rows, span.config.hidden_size, generator=torch.Generator().manual_seed(0))
    span.forward(hidden, [Segment(row, CACHED_TOKENS, 1) for row in numbers], cache).cpu()
    began_s = time.perf_counter()
    for position in range(CACHED_TOKENS, CACHED_TOKENS + STEPS):
        span.forward(hidden, [Segment(row, position, 1) for row in numbers], cache).cpu()
    return (time.perf_counter() - began_s) / STEPS / (span.end - span.start) * 1e3
