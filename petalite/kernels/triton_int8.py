"""Products with int8 weights on a GPU, in Triton: the exact sums of `kernels.int8` in two launches.

The first takes a token apart into two digits; the second multiplies both with the codes, which are read
once, on the integer units. Sums are whole numbers, and the few float operations after them are those of the
other kernels, none fused that they do not fuse; so a token has the same bits here too. Imports triton, so
it is loaded by `kernels.linear` where a GPU is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import DIGIT, Int8Weight

_DIGIT = tl.constexpr(float(DIGIT))
_SMALLEST = tl.constexpr(1e-30)  # keeps a token of zeros from dividing by zero
_ROUNDS = tl.constexpr(12582912.0)  # 1.5 · 2²³: what it is added to is rounded, a half to even


@triton.jit
def _digits(x, columns, digits, token_steps, to_low, n_in, n_given, n_fine, IN: tl.constexpr):
    """x (T, n_given) → digits (2, T, K + C) int8, high ones and low ones; token_steps (T,). `to_low`: T · (K
    + C).
    """
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((IN,), dtype=tl.float32)
    for start in range(0, n_given, IN):
        at = start + tl.arange(0, IN)
        values = tl.load(x + token * n_given + at, mask=at < n_given, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    step = tl.max(largest, 0) * (1 / 127) + _SMALLEST
    tl.store(token_steps + token, step)
    width = n_in + n_fine
    high_row = digits + token * width
    low_row = high_row + to_low
    for start in range(0, n_in, IN):
        at = start + tl.arange(0, IN)
        values = tl.load(x + token * n_given + at, mask=at < n_given, other=0.0).to(tl.float32)
        scaled = tl.div_rn(values, tl.full((IN,), 1.0, tl.float32) * step)
        high = (scaled + _ROUNDS) - _ROUNDS
        low = ((scaled - high) * _DIGIT + _ROUNDS) - _ROUNDS
        tl.store(high_row + at, high.to(tl.int8), mask=at < n_in)
        tl.store(low_row + at, low.to(tl.int8), mask=at < n_in)
    for start in range(0, n_fine, IN):
        at = start + tl.arange(0, IN)
        column = tl.load(columns + at, mask=at < n_fine, other=0)
        here = (at < n_fine) & (column < n_given)
        values = tl.load(x + token * n_given + column, mask=here, other=0.0).to(tl.float32)
        scaled = tl.div_rn(values, tl.full((IN,), 1.0, tl.float32) * step)
        high = (scaled + _ROUNDS) - _ROUNDS
        tl.store(high_row + n_in + at, (high * 0).to(tl.int8), mask=at < n_fine)
        tl.store(low_row + n_in + at, high.to(tl.int8), mask=at < n_fine)


@triton.jit
def _product(
    digits,
    codes,
    steps,
    token_steps,
    bias,
    y,
    to_low,
    n_tokens,
    n_out,
    width,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """digits (2, T, W) int8, codes (N, W) int8 → y (T, N)."""
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    weight = codes + out[None, :].to(tl.int64) * width
    row = digits + token[:, None].to(tl.int64) * width
    coarse = tl.zeros((TOKENS, OUT), dtype=tl.int32)
    fine = tl.zeros((TOKENS, OUT), dtype=tl.int32)
    for start in range(0, width, IN):
        at = start + tl.arange(0, IN)
        here = (token[:, None] < n_tokens) & (at[None, :] < width)
        high = tl.load(row + at[None, :], mask=here, other=0)
        low = tl.load(row + to_low + at[None, :], mask=here, other=0)
        some = tl.load(weight + at[:, None], mask=(out[None, :] < n_out) & (at[:, None] < width), other=0)
        coarse = tl.dot(high, some, acc=coarse, out_dtype=tl.int32)
        fine = tl.dot(low, some, acc=fine, out_dtype=tl.int32)
    step = tl.load(steps + out, mask=out < n_out, other=0.0)[None, :]
    token_step = tl.load(token_steps + token, mask=token < n_tokens, other=0.0)[:, None]
    result = tl.fma(
        coarse.to(tl.float32) * step, tl.full((TOKENS, OUT), _DIGIT, tl.float32), fine.to(tl.float32) * step
    )
    result *= token_step
    if HAS_BIAS:
        result += tl.load(bias + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    place = y + token[:, None].to(tl.int64) * n_out + out[None, :]
    tl.store(place, result.to(y.dtype.element_ty), mask=(token[:, None] < n_tokens) & (out[None, :] < n_out))


class TritonInt8(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        self._n_in = weight.shape[1]
        self._columns = weight.fine_columns
        self._scales = weight.scales
        self._codes = torch.cat((weight.codes, weight.fine_codes), dim=1)
        self._steps = weight.scales / DIGIT
        self._bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        n_tokens, (n_out, width) = len(x), self._codes.shape
        y = x.new_empty(n_tokens, n_out)
        if not n_tokens:
            return y
        digits = x.new_empty(2, n_tokens, width, dtype=torch.int8)
        token_steps = x.new_empty(n_tokens, dtype=torch.float32)
        to_low, sizes = n_tokens * width, (self._n_in, x.shape[1], len(self._columns))
        tokens = 16 if n_tokens <= 16 else 32 if n_tokens <= 32 else 64
        out, some = (32, 128) if tokens == 16 else (64, 64)
        grid = (triton.cdiv(n_out, out), triton.cdiv(n_tokens, tokens))
        bias = self._steps if self._bias is None else self._bias
        with torch.cuda.device_of(x):
            _digits[(n_tokens,)](
                *(x, self._columns, digits, token_steps, to_low, *sizes), IN=1024, enable_fp_fusion=False
            )
            _product[grid](
                *(digits, self._codes, self._steps, token_steps, bias, y, to_low, n_tokens, n_out, width),
                HAS_BIAS=self._bias is not None,
                TOKENS=tokens,
                OUT=out,
                IN=some,
                enable_fp_fusion=False,
            )
        return y

    def dense(self) -> Tensor:
        coarse, fine = self._codes[:, : self._n_in], self._codes[:, self._n_in :]
        return Int8Weight(coarse, self._scales, self._columns, fine).dense()
