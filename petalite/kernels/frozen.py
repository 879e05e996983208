"""What every kernel with constant weights shares: the gradient with respect to its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class FrozenLinear(ABC):
    """x (T, K) → (T, N). Differentiable in x; the weights are unpacked when a gradient is asked for."""

    nbytes: int  # of weight and bias, as they are held

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """The result, without autograd."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight, (N, K or more; the rest is padding)."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return self.product(x)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: FrozenLinear) -> Tensor:
        ctx.kernel = kernel
        ctx.n_in = x.shape[1]
        return kernel.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.kernel.dense()[:, : ctx.n_in]
        return grad @ weight.to(grad.dtype), None
