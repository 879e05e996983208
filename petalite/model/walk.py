"""Whole sequences through a span and back, in pieces: forward, and the gradients of what went in.

A piece is some rows through one block; between two of them whoever computes may do something else. So each
of a walk's functions is a generator that computes a piece and yields. What is held on to between forward and
backward is a choice: nothing (no backward), the inputs of each block (backward computes each block again), or
everything that autograd saved (backward computes nothing twice, and that takes many times the memory). The
weights are never differentiated. Knows tensors and blocks; knows no peer, no budget and no clock.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.model.lora import Adapter, Pair
from petalite.model.span import BlockSpan

_SMALL = 32  # values a token and block: roots of norms, places of experts, a LoRA's few


class Hold(IntEnum):
    """What is held on to for backward."""

    NOTHING = 0
    INPUTS = 1
    EVERYTHING = 2


@dataclass(frozen=True, slots=True)
class Gradients:
    """Those that were wanted; None for the others."""

    hidden: Tensor | None  # (B, T, E), in the span's dtype
    prompts: Tensor | None  # (blocks, P, E) float32
    adapter: (
        Tensor | None
    )  # (values,) float32, the adapter's tensors of these blocks as `Adapter.names` orders


@dataclass(slots=True)
class _Held:
    """Of one block: each piece's input, prompts included, and output if that can be differentiated."""

    pieces: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    factors: dict[str, Pair] = field(default_factory=dict)  # what it computed with
    source: dict[str, Pair] = field(default_factory=dict)  # the same, with the way back to `leaves`
    leaves: list[Tensor] = field(default_factory=list)  # the adapter's tensors


class Walk:
    """One call's way over blocks [start, end): forward once, then backward at most once."""

    def __init__(
        self,
        span: BlockSpan,
        start: int,
        end: int,
        hidden: Tensor,
        prompts: Tensor | None = None,
        adapter: Adapter | None = None,
        *,
        hold: Hold = Hold.NOTHING,
        piece_rows: int = 1,
    ) -> None:
        """hidden (B, T, E), prompts (blocks, P, E). Raises BadTensor."""
        span.check_sequences(hidden, prompts, end - start)
        self._span, self._start, self._end = span, start, end
        self._hidden, self._prompts, self._adapter = hidden, prompts, adapter
        self._hold = hold
        self._piece_rows = piece_rows
        self._held: dict[int, _Held] = {}

    def forward(self) -> Generator[None, None, Tensor]:
        """Ends with the outputs (B, T, E) in the span's dtype."""
        hidden = self._hidden.to(self._span.device, self._span.dtype)
        pieces = list(hidden.split(self._piece_rows))  # type: ignore[no-untyped-call]
        del hidden
        for index in range(self._start, self._end):
            held = self._adapted(index)
            if self._hold is not Hold.NOTHING:
                self._held[index] = held
            for number, given in enumerate(pieces):
                entering = self._prompted(index, given)
                if self._hold is Hold.EVERYTHING:
                    entering = entering.detach().requires_grad_()
                computed = self._compute(index, entering, held, self._hold is Hold.EVERYTHING)
                if self._hold is not Hold.NOTHING:
                    held.pieces.append((entering, computed if computed.requires_grad else None))
                pieces[number] = computed.detach()
                yield
        return torch.cat(pieces)

    def backward(
        self, gradient: Tensor, *, hidden: bool, prompts: bool, adapter: bool
    ) -> Generator[None, None, Gradients]:
        """From the gradient (B, T, E) of the outputs, after `forward` has ended and held on to something."""
        assert self._held
        gradient = gradient.to(self._span.device, self._span.dtype)
        flowing = list(gradient.split(self._piece_rows))  # type: ignore[no-untyped-call]
        of_prompts, of_adapter = [], []
        adapted = [index for index, held in self._held.items() if held.factors] if adapter else []
        lowest = self._start if hidden or prompts else min(adapted, default=self._end)
        for index in range(self._end - 1, lowest - 1, -1):
            held = self._held.pop(index)
            sums = [torch.zeros_like(factor) for factor in _flat(held.factors)] if adapter else []
            for number in range(len(flowing)):
                below, *rest = self._back(index, held, number, flowing[number], bool(sums))
                for total, part in zip(sums, rest, strict=True):
                    if part is not None:  # of an expert that nobody chose
                        total += part
                flowing[number] = below
                yield
            if prompts:
                of_prompts.append(self._of_prompt(flowing))
            if sums:
                of_adapter.append(_through_stack(held, sums))
        return Gradients(
            torch.cat(flowing) if hidden else None,
            torch.stack(of_prompts[::-1]) if prompts else None,
            torch.cat(of_adapter[::-1]) if adapter else None,
        )

    # -- one block ---------------------------------------------------------------------------------------

    def _adapted(self, index: int) -> _Held:
        """The factors that a block computes with, as leaves of their own: many pieces share them, and the
        way back to the adapter's tensors is gone once.
        """
        if self._adapter is None:
            return _Held()
        if self._hold is Hold.NOTHING:
            return _Held(factors=self._span.factors(index, self._adapter))
        leaves = {
            name: self._adapter.tensors[name].detach().requires_grad_()
            for name in self._adapter.names(index, index + 1)
        }
        with torch.enable_grad():
            source = self._span.factors(index, replace(self._adapter, tensors=leaves))
        factors = {
            name: (a.detach().requires_grad_(), b.detach().requires_grad_())
            for name, (a, b) in source.items()
        }
        return _Held(factors=factors, source=source, leaves=list(leaves.values()))

    def _prompted(self, index: int, given: Tensor) -> Tensor:
        if self._prompts is None:
            return given
        prompt = self._prompts[index - self._start].to(given.device, given.dtype)
        return given + pad(prompt, (0, 0, 0, given.shape[1] - len(prompt)))

    def _compute(self, index: int, entering: Tensor, held: _Held, differentiable: bool) -> Tensor:
        with torch.set_grad_enabled(differentiable):
            return self._span.block_stateless(index, entering, factors=held.factors)

    def _back(
        self, index: int, held: _Held, number: int, gradient: Tensor, with_factors: bool
    ) -> Sequence[Tensor]:
        """The gradients of what entered a block, and of its factors if they are asked for."""
        entering, computed = held.pieces[number]
        held.pieces[number] = (entering, None)  # nothing holds what autograd saved beyond this
        if computed is None:
            entering = entering.detach().requires_grad_()
            computed = self._compute(index, entering, held, True)
        wanted = (entering, *(_flat(held.factors) if with_factors else ()))
        return torch.autograd.grad(computed, wanted, gradient, allow_unused=True)

    def _of_prompt(self, flowing: Sequence[Tensor]) -> Tensor:
        """(P, E) float32: what was added to every row has the sum of their gradients."""
        assert self._prompts is not None
        n_prompts = self._prompts.shape[1]
        return torch.stack([piece[:, :n_prompts].float().sum(0) for piece in flowing]).sum(0)


def _flat(factors: dict[str, Pair]) -> list[Tensor]:
    return [factor for pair in factors.values() for factor in pair]


def _through_stack(held: _Held, sums: Sequence[Tensor]) -> Tensor:
    """(values,): from the gradients of the stacked factors to those of the adapter's tensors."""
    parts = torch.autograd.grad(_flat(held.source), held.leaves, sums)
    return torch.cat([part.float().cpu().flatten() for part in parts])


def activation_bytes(span: BlockSpan, row_tokens: int, *, adapted: bool) -> int:
    """At most so many bytes autograd saves for one token in one block, in rows of `row_tokens`.

    In values, and a tenth more: what enters both norms, 2 E; queries, keys and values, queries again as
    attention takes them, and its result, (3 H + 2 K) D; what the MLP multiplies, 2 F, or F without a gate;
    norms over heads, 2 (H + K) D; of each expert that a token takes its MLP, and 4 E. A LoRA's linears save
    their inputs, 2 E + F at most. With ALiBi there is the mask, which rows share, H · T.
    """
    config, attention = span.config, span.config.attention
    n_heads, n_kv_heads = attention.n_heads, attention.n_kv_heads
    hidden, inner = config.hidden_size, config.inner_size
    values = 2 * hidden + (3 * n_heads + 2 * n_kv_heads) * attention.head_dim + 2 * n_heads + _SMALL
    if attention.qk_norm:
        values += 2 * (n_heads + n_kv_heads) * attention.head_dim
    if config.experts:
        values += config.experts.n_chosen * (2 * inner + 4 * hidden) + 4 * config.experts.n_experts
        inner *= config.experts.n_chosen
    else:
        values += inner if attention.alibi else 2 * inner
    if adapted:
        values += 2 * hidden + inner
    if attention.alibi and span.device.type != "cpu" and span.dtype.itemsize == 2:
        values += 4 * n_heads * attention.head_dim  # attention is in float32 there
    mask = n_heads * row_tokens * torch.float32.itemsize if attention.alibi else 0
    return values * span.dtype.itemsize * 11 // 10 + mask
