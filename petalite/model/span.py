"""A span: consecutive blocks of a model in memory, and the one forward that serves every use of them.

`BlockSpan.forward` runs a packed step over a KV cache; `forward_stateless` runs whole sequences without one
and can be differentiated. `load_span` makes one from a checkpoint. Knows no session and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import BadTensor, WrongSpan
from petalite.kernels.attention import CausalMasks, alibi_slopes, attend
from petalite.kernels.quantized import NONE
from petalite.kernels.rope import RotationTable
from petalite.model.block import Block
from petalite.model.cache import CacheShape, KVCache, Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.config import ModelConfig
from petalite.model.loading import COMPUTE_DTYPES, Progress, load_blocks

__all__ = ("COMPUTE_DTYPES", "BlockSpan", "Progress", "load_span")


class BlockSpan:
    """The blocks [start, end) of a model."""

    def __init__(
        self,
        config: ModelConfig,
        start: int,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        device: torch.device,
        quant: str = NONE,
        min_tokens: int = 1,
    ) -> None:
        """`quant` is the format that the linears are in. `min_tokens`: shorter steps are padded to it,
        because they would cost as much.
        """
        attention = config.attention
        self.config = config
        self.start = start
        self.end = start + len(blocks)
        self.dtype = dtype
        self.device = device
        self._blocks = blocks
        self.quant = quant
        self._min_tokens = min_tokens
        self._rotations = RotationTable(attention.rope, attention.head_dim, device)
        slopes = alibi_slopes(attention.n_heads) if attention.alibi else None
        self._masks = CausalMasks(attention.n_heads // attention.n_kv_heads, dtype, device, slopes)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(block.nbytes for block in self._blocks)

    def token_bytes(self, start: int | None = None, end: int | None = None) -> int:
        """Bytes of one token in a KV cache over the blocks [start, end), by default the whole span."""
        first, last = self._range(start, end)
        return (last - first) * self._cache_shape().token_bytes

    def new_cache(self) -> KVCache:
        """An empty cache for rows of this span. One serves any number of sessions."""
        return KVCache(self._cache_shape(), self._rotations, self._masks)

    def _cache_shape(self) -> CacheShape:
        attention = self.config.attention
        return CacheShape(
            self.start, self.end, attention.n_kv_heads, attention.head_dim, self.dtype, self.device
        )

    def forward(
        self,
        hidden: Tensor,
        segments: Sequence[Segment],
        cache: KVCache,
        *,
        start: int | None = None,
        end: int | None = None,
    ) -> Tensor:
        """One packed step: hidden states (T, E) of the segments, one after the other → (T, E).

        The rows must have been opened over the same blocks [start, end). Raises what `KVCache.step` raises,
        and BadTensor; the lengths of the rows then stay as they were.
        """
        first, last = self._range(start, end)
        n_tokens = sum(segment.n_tokens for segment in segments)
        self._check(hidden, (n_tokens, self.config.hidden_size))
        fewest = self._min_tokens
        with torch.inference_mode(), cache.step(segments, first, last, min_tokens=fewest) as step:
            hidden = hidden.to(self.device, self.dtype)
            if n_tokens < fewest:
                hidden = torch.cat((hidden, hidden.new_zeros(fewest - n_tokens, hidden.shape[1])))
            for block in self._blocks[first - self.start : last - self.start]:
                hidden = block(hidden, step)
            return hidden[:n_tokens]

    def forward_stateless(
        self, hidden: Tensor, *, start: int | None = None, end: int | None = None
    ) -> Tensor:
        """Whole sequences without a cache: (B, T, E) → (B, T, E), each row causal; differentiable in
        `hidden`.
        """
        first, last = self._range(start, end)
        if hidden.ndim != 3:
            raise BadTensor(
                f"hidden states of shape {tuple(hidden.shape)}; expected (rows, tokens, hidden size)"
            )
        n_rows, n_tokens, _ = hidden.shape
        self._check(hidden, (n_rows, n_tokens, self.config.hidden_size))
        rotation = self._rotations.rows(0, n_tokens).repeat(n_rows, 1, 1)
        step = _UncachedStep(n_rows, rotation, self._masks)
        packed = hidden.to(self.device, self.dtype).reshape(n_rows * n_tokens, -1)
        for block in self._blocks[first - self.start : last - self.start]:
            packed = block(packed, step)
        return packed.view(n_rows, n_tokens, -1)

    def _range(self, start: int | None, end: int | None) -> tuple[int, int]:
        first = self.start if start is None else start
        last = self.end if end is None else end
        if not self.start <= first < last <= self.end:
            raise WrongSpan(f"blocks {first}:{last} are not here; expected part of {self.start}:{self.end}")
        return first, last

    @staticmethod
    def _check(hidden: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(hidden.shape) != shape or 0 in shape or not hidden.is_floating_point():
            raise BadTensor(
                f"hidden states of shape {tuple(hidden.shape)} in {hidden.dtype}; expected {shape}"
            )


@dataclass(frozen=True, slots=True)
class _UncachedStep:
    """Rows of equal length that see only themselves."""

    n_rows: int
    rotation: Tensor
    masks: CausalMasks

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        outputs = []
        for row in heads.chunk(self.n_rows):
            keys, values = row[:, n_heads:].transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
            outputs.append(attend(row[:, :n_heads], keys, values, self.masks, window))
        return torch.cat(outputs)


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    quant: str | None = None,
    cache: Path | None = None,
) -> BlockSpan:
    """Read the blocks [start, end) of a checkpoint, and nothing else of it. `progress` counts blocks.

    `quant` is the format of the linears: `none` (in `dtype`), `int8` or `nf4`; None is `none`, or what a
    quantized folder holds. Under the folder `cache`, quantized blocks are kept for the next start.
    Raises InvalidArgument for blocks or a format that there are not, InvalidCheckpoint for broken or missing
    tensors.
    """
    device = torch.device(device)
    blocks, kernel, quant = load_blocks(
        checkpoint, start, end, dtype=dtype, device=device, quant=quant, cache=cache, progress=progress
    )
    return BlockSpan(
        checkpoint.config,
        start,
        blocks,
        dtype=dtype,
        device=device,
        quant=quant,
        min_tokens=kernel.min_rows,
    )
