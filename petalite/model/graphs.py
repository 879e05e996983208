"""Decode steps on a GPU as graphs: what a block launches for a few tokens, recorded once and replayed.

A graph is of one block and one number of tokens; a step takes the next larger one and replays it for block
after block, so parts of a span need none of their own, and there are at most SHAPES times blocks. All of them
read and write the same buffers: hidden states, rotations, and of each token where its row lies. That is
written before every step and recorded by none, so rows may come, go and move. A token that belongs to no row
has room nowhere (`kernels.triton_attention`). Replays follow each other on one stream and keep nothing but
the hidden states, so all graphs share the memory of what lies between.

Before a graph meets a session's row, it takes steps of scratch rows beside the same block step by step in
torch. Where they differ, or a graph cannot be recorded, the span goes on without graphs, and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from petalite.kernels.attention import CausalMasks
from petalite.kernels.linear import triton_works_on
from petalite.kernels.native import VARIABLE
from petalite.kernels.quantized import NONE
from petalite.kernels.rope import RotationTable
from petalite.model.block import Block
from petalite.model.cache import CacheShape, KVCache, Place, Segment, Step

logger = logging.getLogger(__name__)

SHAPES = (1, 2, 4, 8, 16, 32, 64)  # tokens
MOST_TOKENS = SHAPES[-1]
MOST_TOGETHER = 16  # tokens of a step that has several of a row: each takes the row's keys from memory itself
# Of scratch rows: around the tiles and parts in which keys are taken, and beyond as many of them as there
# are.
CHECKED_LENGTHS = (0, 1, 15, 63, 64, 130, 257, 700, 2100)
_WIDEST_CHECKED = 8192  # tokens of a window that scratch rows exceed
_CHECKED_STEPS = 2  # the second sees what the first one cached
_SMALL = 0.1  # of scratch hidden states, so that what a block adds to them is most of what comes out
_LARGE = 4.0  # of scratch keys, so that few are attended to, and each that is missed shows

Work = Callable[[], None]


class Recorder(Protocol):
    """What makes a graph of launches."""

    def record(self, work: Work) -> Work:
        """Do `work` at least once and record it; what is returned does the same again, on the same memory."""
        ...


class CudaRecorder:
    """CUDA graphs, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()  # compiles, and lets libraries take their workspaces
                # Other threads may go on using the device.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        finally:
            current.wait_stream(self._stream)
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Recorded:
    """An `AttentionStep` that reads on the device what each step is of."""

    rotation: Tensor
    places: Tensor
    slopes: Tensor | None

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        from petalite.kernels.triton_attention import append_and_attend

        return append_and_attend(heads, self.places, block, n_heads, self.slopes, window)


class DecodeGraphs:
    """Of one span's blocks. Belongs to the thread that computes."""

    def __init__(
        self,
        blocks: Sequence[Block],
        shape: CacheShape,
        hidden_size: int,
        rotations: RotationTable,
        masks: CausalMasks,
        recorder: Recorder,
        *,
        quant: str = NONE,
        slopes: Tensor | None = None,
        windows: Sequence[int | None] = (),
    ) -> None:
        """`quant` is the linears' format, `slopes` are ALiBi's, `windows` the model's, by block."""
        self._blocks = blocks
        self._shape = shape
        self._rotations, self._masks = rotations, masks
        self._recorder = recorder
        self._slopes = None if slopes is None else slopes.to(shape.device)
        self._windows = windows
        self._bound = disagreement(shape.dtype, quant)
        self._graphs: dict[tuple[int, int], Work] = {}  # by place among the blocks, and tokens
        self._given_up = False
        self._hidden = torch.zeros(MOST_TOKENS, hidden_size, dtype=shape.dtype, device=shape.device)
        self._places = torch.zeros(3, MOST_TOKENS, dtype=torch.int64, device=shape.device)
        self._rotation = rotations.rows(0, MOST_TOKENS).clone()

    def make_all(self) -> bool:
        """All that there can be, so that no step has to wait for one. Whether they work."""
        return all(self._has(index, n_tokens) for index in range(len(self._blocks)) for n_tokens in SHAPES)

    def step(self, hidden: Tensor, first: int, last: int, places: Sequence[Place]) -> Tensor | None:
        """hidden (T, E) of the tokens at `places` through the blocks [first, last), counted from the first
        one here → (T, E), the rows appended to. None, and nothing done, where there are no graphs for it.
        """
        n_tokens = next((shape for shape in SHAPES if shape >= len(places)), None)
        if n_tokens is None or not all(self._has(index, n_tokens) for index in range(first, last)):
            return None
        self._put(hidden, places)
        for index in range(first, last):
            self._graphs[index, n_tokens]()
        return self._hidden[: len(places)].clone()

    def _has(self, index: int, n_tokens: int) -> bool:
        """Whether there is this graph, at the latest now."""
        return (index, n_tokens) in self._graphs or (not self._given_up and self._make(index, n_tokens))

    def _put(self, hidden: Tensor, places: Sequence[Place]) -> None:
        """What the next replays are of. These copies are over when they return, whatever memory they are
        from.
        """
        filled = [*places, *[(0, 0, 0)] * (MOST_TOKENS - len(places))]
        self._places.copy_(torch.tensor(list(zip(*filled, strict=True))))
        self._hidden[: len(places)].copy_(hidden)
        self._hidden[len(places) :].zero_()
        table = self._rotations.up_to(max(position for *_, position in places) + 1)
        self._rotation.copy_(table.index_select(0, self._places[2]))

    def _make(self, index: int, n_tokens: int) -> bool:
        """Whether that went well."""
        block = self._blocks[index]
        hidden = self._hidden[:n_tokens]
        step = _Recorded(self._rotation[:n_tokens], self._places[:, :n_tokens], self._slopes)

        def work() -> None:
            hidden.copy_(block(hidden, step))

        try:
            self._places.zero_()  # recording does the work, for no row
            replay = self._recorder.record(work)
            wrong = self._differs(block, n_tokens, replay)
        except Exception as error:  # whatever a compiler, a driver or a lack of memory makes of it
            wrong = (str(error).splitlines() or [type(error).__name__])[0]
        if wrong is None:
            self._graphs[index, n_tokens] = replay
            return True
        device = self._shape.device
        logger.warning("decode steps on %s run without graphs, more slowly: %s", device, wrong)
        self._given_up = True
        self._graphs.clear()
        return False

    # -- before a graph is used --------------------------------------------------------------------------

    def _differs(self, block: Block, n_tokens: int, replay: Work) -> str | None:
        """How a graph of `n_tokens` differs from its block in torch, over scratch rows; None if it does not.

        Of several tokens, one belongs to no row.
        """
        cache = KVCache(
            replace(self._shape, start=block.index, end=block.index + 1), self._rotations, self._masks
        )
        generator = torch.Generator(self._shape.device).manual_seed(0)
        lengths, n_rows = self._lengths(block), max(1, n_tokens - 1)
        for begin in range(0, len(lengths), n_rows):
            some = lengths[begin : begin + n_rows]
            rows = [self._scratch_row(cache, length, generator) for length in some]
            copies = [cache.fork(row) for row in rows]
            for ends in ([length + step for length in some] for step in range(_CHECKED_STEPS)):
                hidden = self._hidden.new_empty(len(some), self._hidden.shape[1])
                hidden.normal_(0.0, _SMALL, generator=generator)
                with _one_each(cache, block, copies, ends) as step:
                    self._put(hidden, step.places())
                    given = self._hidden[:n_tokens].clone()
                    replay()
                found = self._hidden[: len(some)].float()
                # As many tokens, so that both multiply with the same kernels.
                with _one_each(cache, block, rows, ends, min_tokens=n_tokens) as step:
                    expected = block(given, step)[: len(some)].float()
                off = (found - expected).abs().amax(1) / expected.abs().amax(1)
                if not float(off.max()) < self._bound:
                    return f"{n_tokens} tokens through block {block.index} are off by {float(off.max()):.1e}"
            for row in (*rows, *copies):
                cache.drop(row)
        return None

    def _lengths(self, block: Block) -> list[int]:
        window = self._windows[block.index] if self._windows else None
        edges = () if window is None or window > _WIDEST_CHECKED else (window - 1, window + 1)
        return sorted({*CHECKED_LENGTHS, *edges})

    @staticmethod
    def _scratch_row(cache: KVCache, length: int, generator: torch.Generator) -> int:
        row = cache.open_row(length + _CHECKED_STEPS)
        cache.fill(row, length, _LARGE, generator)
        return row


def _one_each(
    cache: KVCache, block: Block, rows: Sequence[int], positions: Sequence[int], min_tokens: int = 1
) -> AbstractContextManager[Step]:
    """A step of one token of each row."""
    segments = [Segment(row, position, 1) for row, position in zip(rows, positions, strict=True)]
    return cache.step(segments, block.index, block.index + 1, min_tokens=min_tokens)


def disagreement(dtype: torch.dtype, quant: str) -> float:
    """What a graph may differ by from torch, by a token's largest value: attention's rounding. Quantized
    linears take inputs in digits, of which some then fall otherwise: 0.02, the smaller the more inputs.
    """
    return max(8 * torch.finfo(dtype).eps, 2e-3 if quant == NONE else 5e-2)


def works_for(blocks: Sequence[Block], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode steps of these blocks can be graphs here, and nobody forces torch's kernels."""
    static = all(block.is_static for block in blocks)
    return static and os.environ.get(VARIABLE) != "torch" and triton_works_on(device, dtype)
