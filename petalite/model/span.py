"""A span: consecutive blocks of a model in memory, and the one forward that serves every use of them.

`BlockSpan.forward` runs a packed step over a KV cache; `forward_stateless` runs whole sequences without one
and can be differentiated. `load_span` makes one from a checkpoint. Knows no session and no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.errors import BadTensor, WrongSpan
from petalite.kernels.attention import CausalMasks, alibi_slopes, attend_rows
from petalite.kernels.native import library
from petalite.kernels.native.span import NativeSpan, SpanShape
from petalite.kernels.quantized import NONE
from petalite.kernels.rope import RotationTable
from petalite.model.block import Block
from petalite.model.cache import CacheShape, KVCache, Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.config import ModelConfig
from petalite.model.graphs import MOST_TOGETHER, MOST_TOKENS, CudaRecorder, DecodeGraphs, Recorder, works_for
from petalite.model.loading import COMPUTE_DTYPES, Progress, load_blocks
from petalite.model.lora import Adapter, Pair, stack, with_lora

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
        self._slopes = alibi_slopes(attention.n_heads) if attention.alibi else None
        self._masks = CausalMasks(attention.n_heads // attention.n_kv_heads, dtype, device, self._slopes)
        self._native = _native_span(config, blocks, dtype, device)
        self.graphs = self._decode_graphs(CudaRecorder(device)) if works_for(blocks, device, dtype) else None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def block_kind(self) -> type[Block]:
        return type(self._blocks[0])

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Record what decode steps replay on a GPU; else the first steps that need it wait for it. Whether
        they do.
        """
        return self.graphs is not None and self.graphs.make_all()

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
        adapted: Sequence[Block] | None = None,
    ) -> Tensor:
        """One packed step: hidden states (T, E) of the segments, one after the other → (T, E).

        `adapted` are blocks to compute with instead, as `adapted_blocks` makes them of a LoRA.
        The rows must have been opened over the same blocks [start, end). Raises what `KVCache.step` raises,
        and BadTensor; the lengths of the rows then stay as they were.
        """
        first, last = self._range(start, end)
        n_tokens = sum(segment.n_tokens for segment in segments)
        self._check(hidden, (n_tokens, self.config.hidden_size))
        if self._native is not None and adapted is None:
            with cache.step(segments, first, last) as step:
                rotations, places = step.native()
                given = hidden.detach() if hidden.requires_grad else hidden
                blocks = first - self.start, last - self.start
                return self._native.step(given, *blocks, places, rotations)
        fewest = self._min_tokens
        with torch.inference_mode(), cache.step(segments, first, last, min_tokens=fewest) as step:
            most = MOST_TOKENS if n_tokens == len(segments) else MOST_TOGETHER
            if self.graphs is not None and adapted is None and n_tokens <= most:
                blocks = first - self.start, last - self.start
                if (result := self.graphs.step(hidden, *blocks, step.places())) is not None:
                    return result
            hidden = hidden.to(self.device, self.dtype)
            if n_tokens < fewest:
                hidden = torch.cat((hidden, hidden.new_zeros(fewest - n_tokens, hidden.shape[1])))
            for block in (adapted or self._blocks)[first - self.start : last - self.start]:
                hidden = block(hidden, step)
            return hidden[:n_tokens]

    def adapted_blocks(self, adapter: Adapter) -> list[Block]:
        """All blocks with a LoRA added to their linears, to compute with and not to train."""
        changed = []
        for block in self._blocks:
            pairs = self.factors(block.index, adapter)
            cast = {name: (a.to(self.dtype), b.to(self.dtype)) for name, (a, b) in pairs.items()}
            changed.append(with_lora(block, cast))
        return changed

    def factors(self, block: int, adapter: Adapter) -> dict[str, Pair]:
        """Of each linear of a block that the adapter changes: A and scale · B, as `lora.stack` has them."""
        return stack(self.block_kind, self.config, block, adapter, self.device)

    def forward_stateless(
        self,
        hidden: Tensor,
        *,
        start: int | None = None,
        end: int | None = None,
        prompts: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Whole sequences without a cache: (B, T, E) → (B, T, E), each row causal.

        Deep prompts (blocks, P, E) are added to the first P tokens of what enters each block (P-tuning v2,
        arXiv 2110.07602). Differentiable in `hidden`, `prompts` and the adapter's tensors. Raises BadTensor,
        WrongSpan.
        """
        first, last = self._range(start, end)
        self.check_sequences(hidden, prompts, last - first)
        hidden = hidden.to(self.device, self.dtype)
        for index in range(first, last):
            prompt = None if prompts is None else prompts[index - first]
            factors = {} if adapter is None else self.factors(index, adapter)
            hidden = self.block_stateless(index, hidden, prompt, factors)
        return hidden

    def block_stateless(
        self, index: int, hidden: Tensor, prompt: Tensor | None = None, factors: Mapping[str, Pair] = {}
    ) -> Tensor:
        """One block of `forward_stateless`: hidden (B, T, E) in the span's dtype, prompt (P, E)."""
        n_rows, n_tokens, _ = hidden.shape
        if prompt is not None:
            hidden = hidden + pad(prompt.to(self.device, self.dtype), (0, 0, 0, n_tokens - len(prompt)))
        block = with_lora(self._blocks[index - self.start], factors)
        rotation = self._rotations.rows(0, n_tokens).repeat(n_rows, 1, 1)
        step = _UncachedStep(n_rows, rotation, self._masks)
        return block(hidden.reshape(n_rows * n_tokens, -1), step).view(hidden.shape)

    def check_sequences(self, hidden: Tensor, prompts: Tensor | None, n_blocks: int) -> None:
        """Raises BadTensor unless hidden is (B, T, E) and prompts are (n_blocks, P, E), P at most T."""
        n_rows, n_tokens = hidden.shape[:2] if hidden.ndim == 3 else (0, 0)
        self._check(hidden, (n_rows, n_tokens, self.config.hidden_size))
        if prompts is not None:
            n_prompts = prompts.shape[1] if prompts.ndim == 3 else 0
            shape = (n_blocks, min(n_prompts, n_tokens), self.config.hidden_size)
            self._check(prompts, shape, "deep prompts")

    def _decode_graphs(self, recorder: Recorder) -> DecodeGraphs:
        return DecodeGraphs(
            self._blocks,
            self._cache_shape(),
            self.config.hidden_size,
            self._rotations,
            self._masks,
            recorder,
            quant=self.quant,
            slopes=self._slopes,
            windows=self.config.windows,
        )

    def _range(self, start: int | None, end: int | None) -> tuple[int, int]:
        first = self.start if start is None else start
        last = self.end if end is None else end
        if not self.start <= first < last <= self.end:
            raise WrongSpan(f"blocks {first}:{last} are not here; expected part of {self.start}:{self.end}")
        return first, last

    @staticmethod
    def _check(tensor: Tensor, shape: tuple[int, ...], what: str = "hidden states") -> None:
        if tuple(tensor.shape) != shape or 0 in shape or not tensor.is_floating_point():
            raise BadTensor(f"{what} of shape {tuple(tensor.shape)} in {tensor.dtype}; expected {shape}")


def _native_span(
    config: ModelConfig, blocks: Sequence[Block], dtype: torch.dtype, device: torch.device
) -> NativeSpan | None:
    """The same blocks for one native call a step; None where there is no such thing for them."""
    found = library() if device.type == "cpu" else None
    if found is None:
        return None
    weights = [weights for block in blocks if (weights := block.native()) is not None]
    attention = config.attention
    shape = SpanShape(
        hidden_size=config.hidden_size,
        inner_size=config.inner_size,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        eps=config.norm_eps,
        gated=not attention.alibi,
        residual_after_norm=config.residual_after_norm,
        slopes=alibi_slopes(attention.n_heads) if attention.alibi else None,
    )
    if len(weights) < len(blocks) or not NativeSpan.takes(shape, weights):
        return None
    return NativeSpan(found, shape, weights, dtype)


@dataclass(frozen=True, slots=True)
class _UncachedStep:
    """Rows of equal length that see only themselves."""

    n_rows: int
    rotation: Tensor
    masks: CausalMasks

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        return attend_rows(heads, self.n_rows, n_heads, self.masks, window)


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
