"""Which blocks a joining server should hold: the weakest contiguous span (arXiv 2312.08361, appendix).

A pure function of the spans that are announced and how fast each says it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from petalite.errors import InvalidArgument
from petalite.swarm.spans import Span


def join_span(held: Iterable[tuple[Span, float]], n_blocks: int, length: int) -> Span:
    """The span of `length` blocks where the swarm is weakest.

    `held` gives each server's span and throughput (tokens/s through one block). Spans are compared by their
    blocks' summed throughputs in ascending order, so the span with the weakest block wins, and among equals
    the one whose next weakest is weaker; ties go to the lowest start.
    """
    if not 0 < length <= n_blocks:
        raise InvalidArgument(f"a span of {length} blocks does not fit a model of {n_blocks}")
    throughput = [0.0] * n_blocks
    for span, tokens_per_s in held:
        for block in range(span.start, min(span.end, n_blocks)):
            throughput[block] += tokens_per_s
    start = min(range(n_blocks - length + 1), key=lambda first: sorted(throughput[first : first + length]))
    return Span(start, start + length)
