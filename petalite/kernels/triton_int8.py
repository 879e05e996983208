"""Products with int8 weights on a GPU, in Triton, in two launches; to the bit those of the native kernels.

The first makes digits of each token: two of the inputs that meet outlier columns, which all have one step,
and one of the others, in blocks of 64 with a step each. The second multiplies them with the codes on the
integer units. A block's sum is a whole number; blocks are added in order, in float32, as on a CPU
(native/digits.h, native/scalar.cc), so neither kernel nor neighbours change a bit. Imports triton, so it is
loaded by `kernels.linear` where a GPU is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import DIGIT, Int8Weight, column_order

BLOCK = 64  # columns; the outlier columns are at most as many

_BLOCK = tl.constexpr(BLOCK)
_DIGIT = tl.constexpr(DIGIT)
_SMALLEST = tl.constexpr(1e-30)  # keeps zeros from dividing by zero
_MULTIPLES = tl.constexpr(128.0)  # a block's step is 1 to as many units
_ROUNDS = tl.constexpr(12582912.0)  # 1.5 · 2²³: what it is added to is rounded, a half to even


@triton.jit
def _inputs(x, columns, at, n_places, n_given):
    column = tl.load(columns + at, mask=at < n_places, other=n_given)
    return tl.load(x + column, mask=column < n_given, other=0.0).to(tl.float32)


@triton.jit
def _magnitude(values):
    """Its bits, of which the largest is NaN where there is one, as it need not be of floats."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _step(bits):
    """One digit's worth where the largest magnitude has these bits."""
    step = bits.to(tl.float32, bitcast=True) * (1 / 127)
    return tl.maximum(step, _SMALLEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rounded(scaled):
    """A digit in float32; 0 where the input or its step is not finite, which is left to the factor to say."""
    return tl.where(scaled == scaled, (scaled + _ROUNDS) - _ROUNDS, 0.0)


@triton.jit
def _outliers(x, columns, digits, factors, n_given):
    column = tl.arange(0, _BLOCK)
    values = _inputs(x, columns, column, _BLOCK, n_given)
    step = _step(tl.max(_magnitude(values)))
    scaled = values * tl.div_rn(1.0, step)
    high = _rounded(scaled)
    tl.store(digits + column, high.to(tl.int8))
    tl.store(digits + _BLOCK + column, _rounded((scaled - high) * _DIGIT).to(tl.int8))
    tl.store(factors, tl.div_rn(step, _DIGIT))


@triton.jit
def _others(x, columns, digits, factors, n_tokens, n_given, n_blocks, BLOCKS: tl.constexpr):
    n_columns = n_blocks * _BLOCK
    largest = tl.zeros((BLOCKS * _BLOCK,), dtype=tl.int32)
    for start in range(0, n_columns, BLOCKS * _BLOCK):
        at = start + tl.arange(0, BLOCKS * _BLOCK)
        largest = tl.maximum(largest, _magnitude(_inputs(x, columns, at, n_columns, n_given)))
    unit = _step(tl.max(largest)) * (1 / _MULTIPLES)
    for start in range(0, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        values = _inputs(x, columns, at, n_columns, n_given)
        of_block = tl.max(_magnitude(values), 1).to(tl.float32, bitcast=True)
        factor = tl.clamp(tl.ceil(tl.div_rn(of_block, unit * 127)), 1.0, _MULTIPLES) * unit
        digit = _rounded(values * tl.div_rn(1.0, factor)[:, None])
        tl.store(digits + at, digit.to(tl.int8), mask=at < n_columns)
        tl.store(factors + block * n_tokens, factor, mask=block < n_blocks)


@triton.jit
def _digits(x, columns, digits, factors, n_given, n_fine_blocks, n_blocks, BLOCKS: tl.constexpr):
    """x (T, n_given), columns (64 · (F + B)) → digits (T, 64 · (2 F + B)) int8: high and low ones of each
    block of outliers, those of the other blocks; factors (F + B, T), by which sums of digits are in the
    scale of x.
    """
    token, n_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    x += token * n_given
    digits += token * (n_blocks + 2 * n_fine_blocks) * _BLOCK
    factors += token
    for _ in range(n_fine_blocks):
        _outliers(x, columns, digits, factors, n_given)
        columns, digits, factors = columns + _BLOCK, digits + 2 * _BLOCK, factors + n_tokens
    _others(x, columns, digits, factors, n_tokens, n_given, n_blocks, BLOCKS)


@triton.jit
def _product(
    digits,
    factors,
    codes,
    scales,
    bias,
    y,
    n_tokens,
    n_out,
    n_blocks,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """digits and factors as above, codes (N, 64 · (2 + B)) int8: coarse and fine ones of outlier columns,
    those of the others → y (T, N).
    """
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here, there = (token < n_tokens)[:, None], (out < n_out)[None, :]
    width, column = (n_blocks + 2) * _BLOCK, tl.arange(0, _BLOCK)
    digits += token[:, None].to(tl.int64) * width + column[None, :]
    codes += out[None, :].to(tl.int64) * width + column[:, None]
    factors += token[:, None]

    high = tl.load(digits, mask=here, other=0)
    low = tl.load(digits + _BLOCK, mask=here, other=0)
    coarse = tl.load(codes, mask=there, other=0)
    fine = tl.load(codes + _BLOCK, mask=there, other=0)
    whole = tl.dot(high, coarse, out_dtype=tl.int32) * _DIGIT
    whole = tl.dot(low, coarse, acc=whole, out_dtype=tl.int32)
    whole = tl.dot(high, fine, acc=whole, out_dtype=tl.int32)
    sums = whole.to(tl.float32) * tl.load(factors, mask=here, other=0.0)
    # With a number of stages of its own, a loop asks for factors ahead, too, not only for what is multiplied.
    for block in tl.range(1, n_blocks + 1, num_stages=STAGES):
        digit = tl.load(digits + (block + 1) * _BLOCK, mask=here, other=0)
        code = tl.load(codes + (block + 1) * _BLOCK, mask=there, other=0)
        factor = tl.load(factors + block * n_tokens, mask=here, other=0.0)
        whole = tl.dot(digit, code, out_dtype=tl.int32)
        sums = tl.fma(whole.to(tl.float32), factor, sums)
    sums *= tl.load(scales + out, mask=out < n_out, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    place = y + token[:, None].to(tl.int64) * n_out + out[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=here & there)


def in_digits(x: Tensor, columns: Tensor, n_fine_blocks: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Digits and factors of x, on the device that is current; see `_digits`."""
    n_tokens = len(x)
    digits = x.new_empty(n_tokens, (2 * n_fine_blocks + n_blocks) * BLOCK, dtype=torch.int8)
    factors = x.new_empty(n_fine_blocks + n_blocks, n_tokens, dtype=torch.float32)
    sizes = (x.shape[1], n_fine_blocks, n_blocks)
    _digits[(n_tokens,)](x, columns, digits, factors, *sizes, BLOCKS=16, enable_fp_fusion=False)
    return digits, factors


class TritonInt8(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        self._n_in, self._n_fine = weight.shape[1], len(weight.fine_columns)
        assert self._n_fine <= BLOCK
        order = column_order(weight.fine_columns, self._n_in)
        codes = weight.codes.index_select(1, order)
        parts = (codes[:, : self._n_fine], weight.fine_codes, codes[:, self._n_fine :])
        self._codes = torch.cat([_filled(part, 0) for part in parts], dim=1)
        columns = order.int().tensor_split((self._n_fine,))
        self._columns = torch.cat([_filled(part, self._n_in) for part in columns])  # which has no input
        self._scales = weight.scales
        self._bias = bias
        held = (self._codes, self._columns, self._scales, bias)
        self.nbytes = sum(part.nbytes for part in held if part is not None)

    def product(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        n_tokens, (n_out, width) = len(x), self._codes.shape
        y = x.new_empty(n_tokens, n_out)
        if not n_tokens:
            return y
        n_blocks = width // BLOCK - 2
        tokens = 16 if n_tokens <= 16 else 32 if n_tokens <= 32 else 64
        out, stages = (32, 5) if tokens == 16 else (64, 3)  # the smaller a step, the more are on their way
        grid = (triton.cdiv(n_out, out), triton.cdiv(n_tokens, tokens))
        with torch.cuda.device_of(x):
            digits, factors = in_digits(x, self._columns, 1, n_blocks)
            _product[grid](
                *(digits, factors, self._codes, self._scales, self._bias, y, n_tokens, n_out, n_blocks),
                TOKENS=tokens,
                OUT=out,
                STAGES=stages,
                enable_fp_fusion=False,
            )
        return y

    def dense(self) -> Tensor:
        coarse, fine, others = self._codes.tensor_split((BLOCK, 2 * BLOCK), dim=1)
        n_fine, n_others = self._n_fine, self._n_in - self._n_fine
        ordered = torch.cat((coarse[:, :n_fine], others[:, :n_others]), dim=1)
        order = torch.cat((self._columns[:n_fine], self._columns[BLOCK : BLOCK + n_others])).long()
        codes = torch.empty_like(ordered)
        codes[:, order] = ordered
        return Int8Weight(codes, self._scales, order[:n_fine], fine[:, :n_fine]).dense()


def _filled(part: Tensor, value: int) -> Tensor:
    """To whole blocks along the last axis, to one where there is nothing."""
    n = part.shape[-1]
    return pad(part, (0, max(BLOCK - n, -n % BLOCK)), value=value)
