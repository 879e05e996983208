"""Products with nf4 weights on a GPU, in Triton, in two launches; to the bit those of the native kernels.

Digits of the inputs are made as for int8. Then codes become levels of one digit in registers: half a byte
each, the even inputs' above, the odd ones' below, so that two products of 32 inputs take both. A block's sum
is a whole number; blocks are added in order, in float32, as on a CPU (native/digits.h, native/scalar.cc).
Imports triton, so it is loaded by `kernels.linear` where a GPU is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import NF4_BLOCK, NF4_LEVELS, Nf4Weight
from petalite.kernels.triton_int8 import in_digits

_BLOCK = tl.constexpr(NF4_BLOCK)
_HALF = tl.constexpr(NF4_BLOCK // 2)
_STEPS = 124.11  # levels are whole numbers of them
_UNIT = tl.constexpr(0.008057367987930775)  # 1 / 124.11 in float32


@triton.jit
def _levels(packed, levels, there):
    """Those of the even inputs of a block, and of the odd ones, (32, N) int8 each."""
    both = tl.load(packed, mask=there, other=0).to(tl.int32)
    return tl.load(levels + (both >> 4)), tl.load(levels + (both & 15))


@triton.jit
def _sums(digits, here, even, odd):
    """Of (T, 64) digits with those levels, (T, N) int32."""
    part = tl.dot(tl.load(digits, mask=here, other=0), even, out_dtype=tl.int32)
    return tl.dot(tl.load(digits + 1, mask=here, other=0), odd, acc=part, out_dtype=tl.int32)


@triton.jit
def _product(
    digits,
    factors,
    packed,
    scales,
    levels,
    bias,
    y,
    n_tokens,
    n_out,
    n_fine_blocks,
    n_blocks,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
):
    """digits (T, 64 · (2 F + B)) int8 and factors (F + B, T); packed (N, 32 · (2 F + B)) and scales
    (N, 2 F + B) → y (T, N).
    """
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here, there = (token < n_tokens)[:, None], (out < n_out)[None, :]
    n_all, pair = 2 * n_fine_blocks + n_blocks, tl.arange(0, _HALF)
    digits += token[:, None].to(tl.int64) * n_all * _BLOCK + 2 * pair[None, :]
    packed += out[None, :].to(tl.int64) * n_all * _HALF + pair[:, None]
    scales += out.to(tl.int64) * n_all
    factors += token
    sums = tl.zeros((TOKENS, OUT), dtype=tl.float32)
    for block in range(2 * n_fine_blocks):  # first codes, then second ones
        fine = block % n_fine_blocks
        even, odd = _levels(packed + block * _HALF, levels, there)
        high = digits + 2 * fine * _BLOCK
        whole = _sums(high, here, even, odd) * 254 + _sums(high + _BLOCK, here, even, odd)
        scale = tl.load(scales + block, mask=out < n_out, other=0.0)[None, :]
        factor = tl.load(factors + fine * n_tokens, mask=token < n_tokens, other=0.0)[:, None]
        sums = tl.fma(whole.to(tl.float32), scale * factor, sums)
    factors -= n_fine_blocks * n_tokens
    for block in range(2 * n_fine_blocks, n_all):
        even, odd = _levels(packed + block * _HALF, levels, there)
        whole = _sums(digits + block * _BLOCK, here, even, odd)
        scale = tl.load(scales + block, mask=out < n_out, other=0.0)[None, :]
        factor = tl.load(factors + block * n_tokens, mask=token < n_tokens, other=0.0)[:, None]
        sums = tl.fma(whole.to(tl.float32), scale * factor, sums)
    sums *= _UNIT
    if bias is not None:
        sums += tl.load(bias + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    place = y + token[:, None].to(tl.int64) * n_out + out[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=here & there)


class TritonNf4(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x."""

    def __init__(self, weight: Nf4Weight, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._n_fine_blocks = -(-len(weight.fine_columns) // NF4_BLOCK)
        self._columns = weight.inputs()[self._n_fine_blocks * NF4_BLOCK :].int()
        levels = [round(level * _STEPS) for level in NF4_LEVELS]
        self._levels = torch.tensor(levels, dtype=torch.int8, device=weight.packed.device)
        held = weight.nbytes + self._columns.nbytes
        self.nbytes = held + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        weight, n_tokens, n_out = self._weight, len(x), self._weight.shape[0]
        y = x.new_empty(n_tokens, n_out)
        if not n_tokens:
            return y
        n_fine_blocks = self._n_fine_blocks
        n_blocks = weight.scales.shape[1] - 2 * n_fine_blocks
        tokens, out = (16, 32) if n_tokens <= 16 else (32, 64) if n_tokens <= 32 else (64, 64)
        grid = (triton.cdiv(n_out, out), triton.cdiv(n_tokens, tokens))
        with torch.cuda.device_of(x):
            digits, factors = in_digits(x, self._columns, n_fine_blocks, n_blocks)
            _product[grid](
                *(digits, factors, weight.packed, weight.scales, self._levels, self._bias, y),
                *(n_tokens, n_out, n_fine_blocks, n_blocks),
                TOKENS=tokens,
                OUT=out,
                enable_fp_fusion=False,
            )
        return y

    def dense(self) -> Tensor:
        return self._weight.dense()
