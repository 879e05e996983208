"""Linear layers whose weights never change, and the table of kernels that run them.

`pick(device, dtype)` chooses once per device and dtype: the first row of `KERNELS` that says it works there
and whose answers agree with the plain product. A kernel may keep its weights in a layout of its own;
`dense()` gives them back as (N, K) for the backward pass, which every kernel shares. Knows tensors only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

logger = logging.getLogger(__name__)

_linear_pointwise: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default


class Linear(Protocol):
    """x (T, K) → (T, N)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def dense(self) -> Tensor:
        """The weight, (N, K)."""
        ...

    @property
    def nbytes(self) -> int: ...


class DenseLinear:
    """torch's own product, on every device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def dense(self) -> Tensor:
        return self._weight

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)


class OneDnnLinear:
    """oneDNN's product over weights reordered once into its blocked layout (CPU; float32, bfloat16).

    Against `DenseLinear` at decode, weights cold: 1.2 to 2 times faster at one thread, 1.5 to 2.9 at two,
    where torch's float32 product of one row uses one core only (torch 2.13, AVX512). Below four rows oneDNN
    takes a slower path, so fewer are repeated up to four.
    """

    MIN_ROWS = 4

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = weight.shape
        self._bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        n_rows = x.shape[0]
        if n_rows < self.MIN_ROWS:
            x = torch.cat((x,) * -(-self.MIN_ROWS // n_rows))
            return _linear_pointwise(x, self._packed, self._bias, "none", [], "")[:n_rows]
        return _linear_pointwise(x, self._packed, self._bias, "none", [], "")

    def dense(self) -> Tensor:
        return self._packed.to_dense()

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self._dtype.itemsize + (
            self._bias.nbytes if self._bias is not None else 0
        )


class _FrozenProduct(torch.autograd.Function):
    """The gradient with respect to the input of any kernel: weights are constants, unpacked when needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: OneDnnLinear) -> Tensor:
        ctx.kernel = kernel
        return kernel.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.kernel.dense(), None


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """One row of the table: how to make the linear, and where it may be tried."""

    name: str
    make: Callable[[Tensor, Tensor | None], Linear]
    works_on: Callable[[torch.device, torch.dtype], bool]
    min_rows: int = (
        1  # fewer tokens than this cost as much; a caller that pads once spares every linear doing so
    )


def _onednn_works_on(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Without AVX512-BF16 or AMX, oneDNN's bfloat16 product is emulated and slow.
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


KERNELS = (  # best first
    LinearKernel("onednn", OneDnnLinear, _onednn_works_on, OneDnnLinear.MIN_ROWS),
    LinearKernel("dense", DenseLinear, lambda device, dtype: True),
)


@functools.cache
def pick(device: torch.device, dtype: torch.dtype) -> LinearKernel:
    """The kernel for dense weights of `dtype` on `device`. Chosen and checked once; said in one log line."""
    for kernel in KERNELS:
        if kernel.works_on(device, dtype):
            error = _self_check(kernel, device, dtype)
            if error is None:
                logger.info("linear layers in %s on %s run on %s", dtype, device, kernel.name)
                return kernel
            logger.warning("linear kernel %s does not work on %s: %s", kernel.name, device, error)
    raise AssertionError("the dense kernel works everywhere")


def _self_check(kernel: LinearKernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with `kernel` here; None if it agrees with the product in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    try:
        made = kernel.make(weight.to(device), bias.to(device))
        for n_rows in (1, 3, 4, 40):
            x = torch.randn(n_rows, 64, generator=generator).to(dtype)
            expected = linear(x.double(), weight.double(), bias.double())
            difference = (made(x.to(device)).cpu().double() - expected).abs().max() / expected.abs().max()
            if not difference < tolerance:
                return f"off by {float(difference):.1e} at {n_rows} rows"
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return str(error).splitlines()[0]
    return None
