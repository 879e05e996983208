"""Products with nf4 weights: bitsandbytes' packed kernel for CPUs with AVX512-BF16.

Its layout: rows in groups of 32; a byte holds the codes of row r (lower half) and r + 16 (upper half) of a
group at one column; bytes run over 16 rows × 2 columns, then along the columns, then over the groups.
Scales are bfloat16, transposed. bitsandbytes is imported on first use, and its import is kept from loading
code from the network.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.int8 import Int8Linear
from petalite.kernels.quantized import NF4_BLOCK, NF4_LEVELS, Int8Weight, Nf4Weight, nf4_dense

_GROUP_ROWS = 32


@cache
def bitsandbytes() -> Any:
    """The library. Raises ImportError."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # it would fetch code from a hub with it
    level = logging.getLogger("bitsandbytes").level
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # and says on every import that it could not
    try:
        import bitsandbytes
    finally:
        logging.getLogger("bitsandbytes").setLevel(level)
        if before is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before
    return bitsandbytes


def packed_kernel_runs() -> bool:
    """Whether this CPU has what bitsandbytes' packed product needs."""
    try:
        return bool(bitsandbytes().functional.has_avx512bf16())
    except (ImportError, AttributeError, OSError, RuntimeError):
        return False


class PackedNf4(FrozenLinear):
    """x (T, K) → (T, N): computed in bfloat16, summed in float32."""

    def __init__(self, weight: Nf4Weight, bias: Tensor | None) -> None:
        bitsandbytes()
        self._shape = weight.shape
        self._columns = weight.fine_columns
        self._inputs = weight.inputs()
        self._n_padding = -weight.shape[0] % _GROUP_ROWS
        self._bias = bias
        self._packed = _grouped(pad(weight.codes(), (0, 0, 0, self._n_padding)))
        scales = pad(weight.scales, (0, 0, 0, self._n_padding))
        self._scales = scales.t().to(torch.bfloat16).contiguous()
        self._levels = torch.tensor(NF4_LEVELS)
        self._padded_shape = [weight.shape[0] + self._n_padding, weight.packed.shape[1] * 2]
        self.nbytes = self._packed.nbytes + self._scales.nbytes + (bias.nbytes if bias is not None else 0)
        self._run = torch.ops.bitsandbytes.gemv_4bit.default

    def product(self, x: Tensor) -> Tensor:
        x = pad(x, (0, self._shape[1] + 1 - x.shape[1])).index_select(1, self._inputs)
        y: Tensor = self._run(x, self._packed, self._padded_shape, self._scales, self._levels, NF4_BLOCK)
        if self._n_padding:
            y = y[:, : self._shape[0]]
        return y if self._bias is None else y + self._bias

    def dense(self) -> Tensor:
        codes = _ungrouped(self._packed, self._padded_shape[1])
        scales = self._scales.t().float().repeat_interleave(NF4_BLOCK, dim=1)
        values = (self._levels[codes.int()] * scales)[: self._shape[0]]
        return nf4_dense(values, self._columns)


def nf4_on(int8: type[Int8Linear]) -> Callable[[Nf4Weight, Tensor | None], Int8Linear]:
    """Where no nf4 product is fast: the same values within 0.4 % of a row's largest, in twice the memory."""
    return lambda weight, bias: int8(Int8Weight.quantize(weight.dense()), bias)


class DenseNf4(FrozenLinear):
    """Unpacked once."""

    def __init__(self, weight: Nf4Weight, bias: Tensor | None) -> None:
        self._dense = weight.dense()
        self._bias = bias
        self.nbytes = self._dense.nbytes + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        weight = self._dense[:, : x.shape[1]].to(x.dtype)
        return linear(x, weight, self._bias)

    def dense(self) -> Tensor:
        return self._dense


def _grouped(codes: Tensor) -> Tensor:
    """(N, K) codes, N a multiple of 32 → (N, K / 2) bytes in the kernel's order."""
    n_rows, n_columns = codes.shape
    groups = codes.view(-1, 2, _GROUP_ROWS // 2, n_columns // 2, 2).transpose(2, 3)  # group, half, K/2, 16, 2
    return (groups[:, 0] | groups[:, 1] << 4).reshape(n_rows, n_columns // 2)


def _ungrouped(packed: Tensor, n_columns: int) -> Tensor:
    n_rows = packed.shape[0]
    groups = packed.view(-1, n_columns // 2, _GROUP_ROWS // 2, 2)
    halves = torch.stack((groups & 15, groups >> 4), dim=1)
    return halves.transpose(2, 3).reshape(n_rows, n_columns)
