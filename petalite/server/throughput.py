"""How fast this server's blocks are, measured with the real kernels on the real weights."""

from __future__ import annotations

import statistics
import time

import torch

from petalite.model.cache import Segment
from petalite.model.span import BlockSpan

WARM_STEPS = 3
TIMED_STEPS = 10
PREFIX_TOKENS = 16


def block_seconds(span: BlockSpan) -> float:
    """Seconds for one token through one block, decoding: the median of a few steps over the whole span."""
    cache = span.new_cache()
    row = cache.open_row(PREFIX_TOKENS + WARM_STEPS + TIMED_STEPS)
    hidden = torch.zeros(PREFIX_TOKENS, span.config.hidden_size, dtype=span.dtype)
    span.forward(hidden, [Segment(row, 0, PREFIX_TOKENS)], cache)
    seconds = []
    for step in range(WARM_STEPS + TIMED_STEPS):
        began_s = time.perf_counter()
        span.forward(hidden[:1], [Segment(row, PREFIX_TOKENS + step, 1)], cache)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[WARM_STEPS:]) / (span.end - span.start)
