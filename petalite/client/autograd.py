"""Blocks that are elsewhere, as one operation of torch's autograd.

Forward runs a batch through the chain and saves what entered each server; backward walks it in reverse. What
is saved is saved as autograd saves its own, so a graph that is dropped, or gone through once, frees it, and
what was changed in place meanwhile is noticed. Knows passes; knows no server.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from petalite.client.adapters import AdapterSource, HostedAdapter, OwnAdapter
from petalite.client.passes import Passes, Wants
from petalite.client.spancalls import Piece, Work
from petalite.errors import InvalidArgument
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

R = TypeVar("R")


class TrainableLora(Protocol):
    """A LoRA of the client's own, whose tensors may require gradients. `petalite.tuning.Lora` is one."""

    alpha: float

    def adapter_tensors(self) -> Mapping[str, Tensor]:
        """By the names `blocks.{index}.{role}.lora_A` (r, inputs) and `.lora_B` (outputs, r)."""
        ...


Lora = TrainableLora | bytes
"""A LoRA of one's own, or the digest of one that servers hold."""


class Runner(Protocol):
    """Runs a coroutine to its end, from a thread that is not the loop's."""

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R: ...


def source_of(lora: Lora | None, model_id: str) -> AdapterSource | None:
    """As it is now: what is trained meanwhile does not change what a pass, or a session, uses."""
    if lora is None:
        return None
    if isinstance(lora, bytes):
        return HostedAdapter(lora)
    return OwnAdapter(model_id, lora.alpha, lora.adapter_tensors())


def through_blocks(
    passes: Passes,
    loop: Runner,
    span: Span,
    hidden: Tensor,
    prompts: Tensor | None,
    lora: Lora | None,
) -> Tensor:
    """hidden (B, T, E) → (B, T, E) after the blocks of `span`, differentiable in hidden, in prompts (blocks,
    P, E) and in the tensors of `lora`.
    """
    if prompts is not None:
        _check_prompts(span, hidden, prompts)
    own = {} if lora is None or isinstance(lora, bytes) else dict(lora.adapter_tensors())
    work = Work(
        span,
        None if prompts is None else prompts.detach().to("cpu", torch.float32).contiguous(),
        source_of(lora, passes.model_id),
    )
    call = _Call(passes, loop, work, tuple(own))
    output: Tensor = _Through.apply(call, hidden, prompts, *own.values())  # type: ignore[no-untyped-call]
    return output


@dataclass(frozen=True, slots=True)
class _Call:
    passes: Passes
    loop: Runner
    work: Work
    names: tuple[str, ...]  # of the LoRA's tensors, in the order they are given


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, prompts: Tensor | None, *lora: Tensor) -> Tensor:
        _, hidden_wanted, prompts_wanted, *lora_wanted = ctx.needs_input_grad
        ctx.call = call
        ctx.wants = Wants(hidden_wanted, prompts_wanted, any(lora_wanted))
        ctx.like = [None if one is None else (one.device, one.dtype) for one in (hidden, prompts, *lora)]
        output, parts = call.loop.run(call.passes.forward(call.work, hidden, ctx.wants))
        ctx.hops = [[(piece.hop, piece.kept) for piece in part] for part in parts]
        ctx.save_for_backward(*(piece.hidden for part in parts for piece in part))
        return output.to(hidden.device, hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        pieces = _pieces(ctx.hops, ctx.saved_tensors)
        found = call.loop.run(call.passes.backward(call.work, pieces, gradient, ctx.wants))
        adapter = [found.adapter.get(name) for name in call.names]
        gradients = (found.hidden, found.prompts, *adapter)
        wanted = ctx.needs_input_grad[1:]
        return None, *map(_as_given, gradients, ctx.like, wanted)


def _pieces(hops: Sequence[Sequence[tuple[Hop, bytes | None]]], saved: Sequence[Tensor]) -> list[list[Piece]]:
    tensors = iter(saved)
    return [[Piece(hop, next(tensors), kept) for hop, kept in part] for part in hops]


def _as_given(
    gradient: Tensor | None, like: tuple[torch.device, torch.dtype] | None, is_wanted: bool
) -> Tensor | None:
    if gradient is None or like is None or not is_wanted:
        return None
    return gradient.to(*like)


def _check_prompts(span: Span, hidden: Tensor, prompts: Tensor) -> None:
    blocks, n_tokens, size = (*prompts.shape, 0, 0, 0)[:3]
    if prompts.ndim != 3 or blocks != len(span) or size != hidden.shape[2] or not n_tokens <= hidden.shape[1]:
        raise InvalidArgument(
            f"prompts of blocks {span} have shape ({len(span)}, P, {hidden.shape[2]}) with P at most the "
            f"{hidden.shape[1]} tokens that there are, found {tuple(prompts.shape)}"
        )
