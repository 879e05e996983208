"""silu(gate) · up, of a gated MLP: in place without gradients; with them, saving its inputs and no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """(T, F), (T, F) → (T, F)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        result: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
        return result
    return silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """Both inputs are halves of one tensor, so that this saves 2 F values a token, where autograd of the two
    operations saves 3 F."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, silu(gate).mul_(gradient)
