"""Blocks on a device: where they go, how they are loaded and measured, and what serves them there.

One compute thread loads, measures and runs them. Knows no peer; who may use them is `sessions`' business.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread, use_threads
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.loading import chosen_format
from petalite.model.span import BlockSpan, load_span
from petalite.server.backend import Backend
from petalite.server.memory import (
    MemorySettings,
    available_bytes,
    blocks_that_fit,
    check_fits,
    choose_device,
    served_block_bytes,
)
from petalite.server.throughput import BlockSpeed, measure, measured_once, speed_key
from petalite.swarm.spans import Span

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    dtype: str = AUTO  # to compute in
    quant: str | None = None  # format of the weights; None: none, or what a quantized folder holds
    device: str = AUTO  # cpu, cuda, mps, or the first of cuda, mps and cpu that is there
    threads: int | None = None  # of tensor work; at most, and for None, one for each core
    cache: Path | None = None  # folder that keeps quantized blocks and measured speeds; None: nothing is kept


@dataclass(frozen=True, slots=True)
class LoadedBlocks:
    """Some blocks, measured and ready to serve."""

    backend: Backend
    speed: BlockSpeed


class BlockLoader:
    """Loads spans of one checkpoint. Raises InvalidArgument for settings that this machine cannot serve."""

    def __init__(
        self, checkpoint: Checkpoint, compute: ComputeSettings, memory: MemorySettings, thread: ComputeThread
    ) -> None:
        self._checkpoint = checkpoint
        self._compute = compute
        self._memory = memory
        self._thread = thread
        self.device = choose_device(compute.device)
        self.dtype = compute_dtype(checkpoint, compute.dtype)
        self.quant = chosen_format(checkpoint, compute.quant)
        self._block_bytes = served_block_bytes(checkpoint, self.dtype, self.quant, memory.cache_tokens)

    def fixed_span(self, wanted: Span | None) -> Span | None:
        """The blocks if there is no choice: those asked for, or those of a folder that holds no others."""
        held, n_blocks = self._checkpoint.quantized, self._checkpoint.config.n_blocks
        if wanted is None:
            return None if held is None else Span(held.start, held.end)
        if wanted.end > n_blocks:
            raise InvalidArgument(
                f"blocks {wanted} are outside the model; {self._checkpoint.name} has blocks 0:{n_blocks}"
            )
        check_fits(wanted, self._checkpoint, self._block_bytes, self._memory)
        return wanted

    def length(self) -> int:
        """How many blocks fit."""
        free_bytes = available_bytes(self.device)
        return blocks_that_fit(self._checkpoint, self._block_bytes, self._memory, free_bytes)

    async def load(self, span: Span, progress: Progress | None = None) -> LoadedBlocks:
        """Raises what `load_span` raises."""
        blocks, speed = await self._thread.run(self._load, span, progress)
        backend = Backend(
            blocks,
            cache_tokens=self._memory.cache_tokens,
            thread=self._thread,
            prefill_s=speed.prefill_s * len(span.blocks),
        )
        return LoadedBlocks(backend, speed)

    def bring(self, span: Span) -> None:
        """Have the tensors of these blocks on this machine, where they come from elsewhere. Takes as long as
        that takes. Raises InvalidCheckpoint, or NetworkError where peers do not give them.
        """
        names = self._checkpoint.family.names
        for block in span.blocks:
            self._checkpoint.bring(self._checkpoint.outer + names.block_prefix.format(block=block))

    async def free(self) -> None:
        """After the last reference to some blocks went: their memory, too, where torch keeps it back."""
        await self._thread.run(_collect)

    def _load(self, span: Span, progress: Progress | None) -> tuple[BlockSpan, BlockSpeed]:
        try:
            return self._load_and_measure(span, progress)
        except torch.OutOfMemoryError as error:
            raise InvalidArgument(
                f"blocks {span} of {self._checkpoint.name} do not fit into what {self.device} has free; give "
                f"fewer with --blocks, or take a smaller --quant: {str(error).partition('. ')[0]}"
            ) from error

    def _load_and_measure(self, span: Span, progress: Progress | None) -> tuple[BlockSpan, BlockSpeed]:
        use_threads(self._compute.threads)
        folder = self._compute.cache
        blocks = load_span(
            self._checkpoint,
            span.start,
            span.end,
            dtype=self.dtype,
            device=self.device,
            progress=progress,
            quant=self.quant,
            cache=None if folder is None else folder / "quantized",
        )
        blocks.prepare()
        if folder is None:
            return blocks, measure(blocks)
        key = speed_key(self._checkpoint, blocks, self.quant)
        return blocks, measured_once(folder / "speed", key, partial(measure, blocks))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
