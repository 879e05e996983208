"""The codec q8 on a GPU, in Triton: the same bytes as `kernels.dynamic8`, in one launch and without scratch.

Imports triton, so it is loaded by `kernels.dynamic8` where a GPU is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(64)
_STEPS = tl.constexpr(32767.0)
_MIDDLE = tl.constexpr(32768.5)
_LARGEST_SCALE = tl.constexpr(65504.0)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_ROUND_UP = tl.constexpr(1 + 2.0**-10)
_BLOCKS = 16  # of a token, by one program


@triton.jit
def _encode(
    hidden,
    codes,
    scales,
    nearest,
    width,
    n_blocks,
    hidden_stride,
    codes_stride,
    scales_stride,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    values = tl.load(hidden + token * hidden_stride + at, mask=at < width, other=0.0).to(tl.float32)
    finite = tl.abs(values) <= _LARGEST
    is_finite = tl.min(finite.to(tl.int32), 1) == 1
    values = tl.where(finite, values, 0.0)
    largest = tl.max(tl.abs(values), 1)
    scale = tl.minimum(largest * _ROUND_UP, _LARGEST_SCALE).to(tl.float16)
    wide = scale.to(tl.float32)
    usable = (wide > 0) & is_finite
    inverse = tl.where(
        usable, tl.div_rn(tl.full((BLOCKS,), _STEPS, tl.float32), tl.where(usable, wide, 1.0)), 0.0
    )
    tl.store(
        scales + token * scales_stride + block,
        tl.where(is_finite, wide, float("nan")).to(tl.float16),
        mask=block < n_blocks,
    )
    # The clamp also keeps product and sum apart, which one rounding of both would change.
    steps = tl.minimum(tl.maximum(values * inverse[:, None], -_STEPS), _STEPS)
    chosen = tl.load(nearest + (steps + _MIDDLE).to(tl.int32))
    tl.store(codes + token * codes_stride + at, chosen, mask=at < width)


@triton.jit
def _decode(
    codes,
    scales,
    table,
    out,
    width,
    n_blocks,
    codes_stride,
    scales_stride,
    out_stride,
    BLOCKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    code = tl.load(codes + token * codes_stride + at, mask=at < width, other=0).to(tl.int32)
    scale = tl.load(scales + token * scales_stride + block, mask=block < n_blocks, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + at, tl.load(table + code) * scale[:, None], mask=at < width)


def encode(hidden: Tensor, codes: Tensor, scales: Tensor, nearest: Tensor) -> None:
    """As `dynamic8.encode`; `nearest` is its table by step. Last axes are contiguous."""
    (n_tokens, width), n_blocks = hidden.shape, scales.shape[1]
    strides = (hidden.stride(0), codes.stride(0), scales.stride(0))
    grid = (n_tokens, triton.cdiv(n_blocks, _BLOCKS))
    with torch.cuda.device_of(codes):
        _encode[grid](
            hidden, codes, scales, nearest, width, n_blocks, *strides, BLOCKS=_BLOCKS, enable_fp_fusion=False
        )


def decode(codes: Tensor, scales: Tensor, out: Tensor, table: Tensor) -> None:
    """As `dynamic8.decode`; `table` is the levels."""
    (n_tokens, width), n_blocks = codes.shape, scales.shape[1]
    strides = (codes.stride(0), scales.stride(0), out.stride(0))
    grid = (n_tokens, triton.cdiv(n_blocks, _BLOCKS))
    with torch.cuda.device_of(codes):
        _decode[grid](
            codes, scales, table, out, width, n_blocks, *strides, BLOCKS=_BLOCKS, enable_fp_fusion=False
        )
