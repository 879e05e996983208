"""Products with nf4 weights on a GPU, in Triton: codes become levels in registers, for few tokens.

A step takes one block of 64 codes of some rows: half a byte each, the even inputs above, the odd ones
below, so that two products of 32 inputs take both. Inputs come in the codes' order, those of outlier
columns twice. Of many tokens the weights are unpacked first, some rows at a time. Imports triton, so it is
loaded by `kernels.linear` where a GPU is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import NF4_BLOCK, NF4_LEVELS, Nf4Weight

_MANY_TOKENS = 128  # beyond, a product of unpacked weights is faster
_ROWS = 4096  # that are unpacked at a time
_HALF = tl.constexpr(NF4_BLOCK // 2)


@triton.jit
def _of_block(sums, even, odd, packed, scales, levels, out, n_out, n_blocks, block, PRECISION: tl.constexpr):
    """`sums` (T, N) and what one block of inputs, `even` and `odd` ones (T, 32), adds to them."""
    pair = tl.arange(0, _HALF)
    place = packed + out[None, :].to(tl.int64) * n_blocks * _HALF + block * _HALF + pair[:, None]
    both = tl.load(place, mask=out[None, :] < n_out, other=0).to(tl.int32)
    above = tl.load(levels + (both >> 4))
    below = tl.load(levels + (both & 15))
    part = tl.dot(even.to(tl.float32), above, input_precision=PRECISION)
    part = tl.dot(odd.to(tl.float32), below, acc=part, input_precision=PRECISION)
    scale = tl.load(scales + out.to(tl.int64) * n_blocks + block, mask=out < n_out, other=0.0)
    return sums + part * scale[None, :]


@triton.jit
def _product(
    x,
    packed,
    scales,
    columns,
    levels,
    bias,
    y,
    n_tokens,
    n_out,
    n_given,
    n_blocks,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
):
    """x (T, n_given), packed (N, blocks · 32), scales (N, blocks), columns (blocks · 64) → y (T, N)."""
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = x + token[:, None].to(tl.int64) * n_given
    there = token[:, None] < n_tokens
    pair = 2 * tl.arange(0, _HALF)
    sums = tl.zeros((TOKENS, OUT), dtype=tl.float32)
    for block in range(n_blocks):
        at = block * 2 * _HALF + pair
        first, second = tl.load(columns + at)[None, :], tl.load(columns + at + 1)[None, :]
        even = tl.load(row + first, mask=there & (first < n_given), other=0.0)
        odd = tl.load(row + second, mask=there & (second < n_given), other=0.0)
        sums = _of_block(sums, even, odd, packed, scales, levels, out, n_out, n_blocks, block, PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    place = y + token[:, None].to(tl.int64) * n_out + out[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=there & (out[None, :] < n_out))


class TritonNf4(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x; levels in float32, or TF32 for inputs of 16 bits."""

    def __init__(self, weight: Nf4Weight, bias: Tensor | None) -> None:
        self._weight = weight
        self._inputs = weight.inputs()
        self._bias = bias
        self._levels = torch.tensor(NF4_LEVELS, device=weight.packed.device)
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if len(x) > _MANY_TOKENS:
            return self._unpacked(x)
        weight, n_tokens, n_out = self._weight, len(x), self._weight.shape[0]
        y = x.new_empty(n_tokens, n_out)
        if not n_tokens:
            return y
        tokens, out = (16, 32) if n_tokens <= 16 else (32, 64)
        grid = (triton.cdiv(n_out, out), triton.cdiv(n_tokens, tokens))
        sizes = (n_tokens, n_out, x.shape[1], weight.scales.shape[1])
        parts = (weight.packed, weight.scales, self._inputs, self._levels)
        with torch.cuda.device_of(x):
            _product[grid](
                *(x, *parts, self._levels if self._bias is None else self._bias, y, *sizes),
                HAS_BIAS=self._bias is not None,
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # which 16-bit inputs fit into
                TOKENS=tokens,
                OUT=out,
                enable_fp_fusion=True,
            )
        return y

    def _unpacked(self, x: Tensor) -> Tensor:
        weight, results = self._weight, []
        for packed, scales in zip(weight.packed.split(_ROWS), weight.scales.split(_ROWS), strict=True):
            dense = Nf4Weight(packed, scales, weight.fine_columns).dense()[:, : x.shape[1]]
            results.append(linear(x, dense.to(x.dtype)))
        y = torch.cat(results, dim=1)
        return y if self._bias is None else y + self._bias

    def dense(self) -> Tensor:
        return self._weight.dense()
