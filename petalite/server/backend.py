"""A span of blocks and its KV cache behind one compute thread.

Every touch of the blocks and the cache happens on that thread, in the order it was asked for, so neither
needs a lock. Room for a session's keys and values is reserved when its rows are opened, against a budget.
Knows no peer and no socket: `petalite.load(peers=None)` runs a whole model through it in one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalite.errors import Busy
from petalite.model.cache import Segment
from petalite.model.compute import ComputeThread
from petalite.model.span import BlockSpan
from petalite.swarm.messages import ALL, NONE


@dataclass(frozen=True, slots=True)
class Timing:
    """What one step cost here, seconds."""

    queue_s: float  # from asking until the thread took it up
    compute_s: float


class Backend:
    """The one owner of `span` and its cache."""

    def __init__(self, span: BlockSpan, *, cache_tokens: int, thread: ComputeThread) -> None:
        """`cache_tokens`: room for so many over the whole span. The thread stays its owner's to close."""
        self.span = span
        self._thread = thread
        self._cache = span.new_cache()
        self._cache_bytes = self._cache.row_bytes(cache_tokens)

    def free_tokens(self) -> int:
        """How many more tokens over the whole span the budget has room for. A reading, not a promise."""
        return max(0, self._cache_bytes - self._cache.reserved_bytes) // self._cache.row_bytes(1)

    async def open_rows(self, count: int, max_length: int, start: int, end: int) -> list[int]:
        """Reserve `count` cache rows over blocks [start, end). Raises Busy where the budget has no room."""
        return await self._thread.run(self._open_rows, count, max_length, start, end)

    async def step(
        self, hidden: torch.Tensor, segments: Sequence[Segment], start: int, end: int
    ) -> tuple[torch.Tensor, Timing]:
        """hidden (T, E) through blocks [start, end) -> (T, E), the caches of the segments' rows extended.

        Raises what `BlockSpan.forward` raises, and then leaves every row as it was.
        """
        asked_s = time.perf_counter()
        return await self._thread.run(self._step, hidden, segments, start, end, asked_s)

    def drop_rows(self, rows: Sequence[int]) -> None:
        """Free them once the thread gets to it; waits for nothing. A closed thread's rows went with it."""
        if rows and not self._thread.closed:
            self._thread.run(self._drop_rows, rows)

    # -- on the compute thread ---------------------------------------------------------------------------

    def _open_rows(self, count: int, max_length: int, start: int, end: int) -> list[int]:
        wanted = count * self._cache.row_bytes(max_length, start, end)
        free = self._cache_bytes - self._cache.reserved_bytes
        if wanted > free:
            raise Busy(
                f"the session needs {wanted >> 20} MiB of cache, {max(free, 0) >> 20} MiB are free; "
                f"try again later, or open it for fewer tokens"
            )
        return [self._cache.open_row(max_length, start, end) for _ in range(count)]

    def _step(
        self, hidden: torch.Tensor, segments: Sequence[Segment], start: int, end: int, asked_s: float
    ) -> tuple[torch.Tensor, Timing]:
        began_s = time.perf_counter()
        output = self.span.forward(hidden, segments, self._cache, start=start, end=end)
        return output, Timing(began_s - asked_s, time.perf_counter() - began_s)

    def _drop_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._cache.drop(row)


def wanted_outputs(output: torch.Tensor, rows: Sequence[tuple[int, ...]], which: str) -> torch.Tensor:
    """output (T, E) of a step over `rows` -> those that `which` (ALL, LAST or NONE) asks for."""
    if which == ALL:
        return output
    if which == NONE:
        return output[:0]
    if len(rows) == 1:
        return output[-1:]
    lengths = torch.tensor([n_tokens for _, _, n_tokens in rows])
    return output[lengths.cumsum(0) - 1]
