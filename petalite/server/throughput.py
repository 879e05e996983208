"""How fast this server is, measured: compute with the real kernels on real weights, network with real peers.

What compute costs is kept in the user's cache folder, by model, device, dtype, format of the weights and
threads, so that a restart or a move does not measure it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from petalite.kernels.native import library
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan
from petalite.version import __version__

logger = logging.getLogger(__name__)

WARM_STEPS = 3
TIMED_STEPS = 10
PREFILL_TOKENS = 128
PREFILLS = 3
MEASURED_BLOCKS = 4  # of the span: enough for one block's weights not to stay in the processor's cache


@dataclass(frozen=True, slots=True)
class BlockSpeed:
    """Seconds for one token through one block."""

    decode_s: float  # a step of one token
    prefill_s: float  # a step of many, per token


def measure(span: BlockSpan) -> BlockSpeed:
    """Medians of a few steps over the first blocks of the span."""
    end = min(span.start + MEASURED_BLOCKS, span.end)
    n_blocks = end - span.start
    cache = span.new_cache()
    row = cache.open_row(PREFILL_TOKENS + WARM_STEPS + TIMED_STEPS, span.start, end)
    hidden = torch.zeros(PREFILL_TOKENS, span.config.hidden_size, dtype=span.dtype)

    def step(position: int, n_tokens: int) -> float:
        began_s = time.perf_counter()
        output = span.forward(
            hidden[:n_tokens], [Segment(row, position, n_tokens)], cache, start=span.start, end=end
        )
        output[-1:].cpu()  # waits for a device that works by itself
        return time.perf_counter() - began_s

    prefills = [step(0, PREFILL_TOKENS) for _ in range(1 + PREFILLS)]
    steps = [step(PREFILL_TOKENS + index, 1) for index in range(WARM_STEPS + TIMED_STEPS)]
    return BlockSpeed(
        statistics.median(steps[WARM_STEPS:]) / n_blocks,
        statistics.median(prefills[1:]) / n_blocks / PREFILL_TOKENS,
    )


def speed_key(checkpoint: Checkpoint, span: BlockSpan, quant: str) -> str:
    """What the speed depends on, as a name."""
    device = torch.cuda.get_device_name(span.device) if span.device.type == "cuda" else _processor()
    what = [
        checkpoint.config.canonical_json(),
        quant,
        str(span.dtype),
        f"{span.device.type} {device}",
        torch.get_num_threads(),
        torch.__version__,
        found.instructions if (found := library()) is not None else None,
        __version__,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def measured_once(folder: Path, key: str, measure: Callable[[], BlockSpeed]) -> BlockSpeed:
    """What was measured under this key before, or now. A file that is not as we write it is measured anew."""
    path = folder / f"{key}.json"
    try:
        kept = json.loads(path.read_text())
        speed = BlockSpeed(float(kept["decode_s"]), float(kept["prefill_s"]))
        if 0 < speed.decode_s < 1e3 and 0 < speed.prefill_s < 1e3:
            return speed
    except (OSError, ValueError, KeyError, TypeError):
        pass
    speed = measure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:
            (Path(unfinished) / path.name).write_text(json.dumps(asdict(speed)))
            (Path(unfinished) / path.name).replace(path)
    except OSError as error:
        logger.warning("cannot keep the measured speed: %s", error)
    return speed


def tokens_per_s(
    speed: BlockSpeed, n_blocks: int, token_bytes: int, network_bytes_per_s: float | None
) -> float:
    """What a server adds to each of its blocks: the slower of compute and network.

    A request enters a span anywhere and leaves it at its end, so on average it uses (n + 1) / 2 of n blocks;
    each token comes in once and goes out once, `token_bytes` each.
    """
    computed = 1 / (speed.prefill_s * (n_blocks + 1) / 2)
    return computed if network_bytes_per_s is None else min(computed, network_bytes_per_s / token_bytes)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{os.cpu_count()} {platform.node()}"
