"""Attention of a few tokens over cached rows on a GPU, in Triton: three launches, however many rows.

The first appends keys and values to the rows. The second takes, for each token and key head, the query heads
that share it and one part of the keys; the third merges the parts. Where a row lies, its room and a token's
position are read on the device, so the launches are the same in every step and can be replayed. Keys are
parted by the token's own position alone, so its neighbours do not change a bit of it. Tokens of one row may
follow each other: all are appended before any is attended to. Imports triton, so it is loaded where a GPU is.
"""

from __future__ import annotations

from math import gcd, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 16  # of what a token sees
_LEAST = 16  # rows and columns of a product
_TILE_BYTES = 1 << 14  # of keys at a time, and of values: twice both fits into what every SM shares


@triton.jit
def _head(places, stride, token, like, block, head, N_KV_HEADS: tl.constexpr, D: tl.constexpr):
    """Head `head` of all keys, then all values, of the token's row: where it begins, how many tokens it has
    room for, and the token's position among them.
    """
    origin = tl.load(places + token)
    capacity = tl.load(places + stride + token)
    position = tl.load(places + 2 * stride + token)
    begins = (block.to(tl.int64) * (2 * N_KV_HEADS) + head) * capacity * D
    return origin.to(like.dtype) + begins, capacity, position


@triton.jit(do_not_specialize=["block"])
def _append(
    heads,
    places,
    stride,
    block,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
):
    """heads (T, H + 2K, D): each key and value to its place. Nothing where a row has no such place."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, capacity, position = _head(places, stride, token, heads, block, head, N_KV_HEADS, D)
    at = tl.arange(0, PADDED_D)
    there = at < tl.where(position < capacity, D, 0)
    value = tl.load(heads + (token * (N_HEADS + 2 * N_KV_HEADS) + N_HEADS + head) * D + at, mask=there)
    tl.store(row + position * D + at, value, mask=there)


@triton.jit(do_not_specialize=["block"])
def _attend(
    heads,
    places,
    slopes,
    sums,
    weights,
    stride,
    block,
    scale,
    WINDOW: tl.constexpr,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED_D: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums (T, H, parts, D) of exp(logit - largest) · value; weights (T, H, parts, 2): the largest logit and
    the sum of exp(logit - largest), over each part of what a token sees.
    """
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, n_parts = tl.program_id(2), tl.num_programs(2)
    keys, capacity, position = _head(places, stride, token, heads, block, kv_head, N_KV_HEADS, D)
    keys = tl.multiple_of(keys, ALIGNED)
    values = tl.multiple_of(keys + N_KV_HEADS * capacity * D, ALIGNED)
    end = tl.where(position < capacity, position + 1, 0)
    first = tl.maximum(end - WINDOW, 0) if WINDOW else 0
    size = tl.cdiv(tl.cdiv(end - first, n_parts), TILE) * TILE
    first += part * size
    end = tl.minimum(first + size, end)

    shared: tl.constexpr = N_HEADS // N_KV_HEADS
    member, at, beside = tl.arange(0, GROUP), tl.arange(0, PADDED_D), tl.arange(0, TILE)
    head = kv_head * shared + member
    query = tl.load(
        heads + (token * (N_HEADS + 2 * N_KV_HEADS) + head[:, None]) * D + at[None, :],
        mask=(member < shared)[:, None] & (at < D)[None, :],
        other=0.0,
    ).to(tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=member < shared, other=0.0)

    largest = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((GROUP,), dtype=tl.float32)
    total = tl.zeros((GROUP, PADDED_D), dtype=tl.float32)
    for start in tl.range(first, end, TILE, num_stages=2):
        place = start + beside
        seen = place < end
        key = tl.load(
            keys + place[None, :] * D + at[:, None], mask=seen[None, :] & (at < D)[:, None], other=0.0
        )
        logits = tl.dot(query, key.to(tl.float32), input_precision=PRECISION) * scale
        if slopes is not None:
            logits += slope[:, None] * (place - position).to(tl.float32)[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 1))
        shrunk = tl.exp(before - largest)
        each = tl.exp(logits - largest[:, None])
        weight = weight * shrunk + tl.sum(each, 1)
        value = tl.load(
            values + place[:, None] * D + at[None, :], mask=seen[:, None] & (at < D)[None, :], other=0.0
        )
        total *= shrunk[:, None]
        total = tl.dot(each, value.to(tl.float32), acc=total, input_precision=PRECISION)

    result = (token * N_HEADS + head) * n_parts + part
    tl.store(
        sums + result[:, None] * D + at[None, :],
        total,
        mask=(member < shared)[:, None] & (at < D)[None, :],
    )
    tl.store(weights + 2 * result, largest, mask=member < shared)
    tl.store(weights + 2 * result + 1, weight, mask=member < shared)


@triton.jit
def _merge(sums, weights, y, D: tl.constexpr, PADDED_D: tl.constexpr, PARTS: tl.constexpr):
    """→ y (T, H, D); zeros for a token that sees nothing."""
    head = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS), tl.arange(0, PADDED_D)
    largest = tl.load(weights + 2 * (head * PARTS + part))
    weight = tl.load(weights + 2 * (head * PARTS + part) + 1)
    place = (head * PARTS + part)[:, None] * D + at[None, :]
    total = tl.load(sums + place, mask=(at < D)[None, :], other=0.0)
    share = tl.where(weight == 0, 0.0, tl.exp(largest - tl.max(largest, 0)))
    whole = tl.sum(weight * share, 0)
    result = tl.sum(total * share[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(y + head * D + at, result.to(y.dtype.element_ty), mask=at < D)


def append_and_attend(
    heads: Tensor, places: Tensor, block: int, n_heads: int, slopes: Tensor | None, window: int | None
) -> Tensor:
    """heads (T, H + 2K, D), contiguous: `n_heads` queries, then keys, then values → (T, H · D).

    places (3, T or more) int64, contiguous along the last axis, is of each token: the address at which its
    row's block 0 lies or would lie, rows being (blocks, 2, K, capacity, D) in the dtype of `heads`; the row's
    capacity; the token's position. A position that is no less than the capacity is none: such a token's
    result is zeros, and nothing is read or written for it. Tokens of one row have positions that follow each
    other. slopes (H,) float32 are ALiBi's. With a `window`, a token sees itself and the `window - 1` before.
    """
    (n_tokens, _, head_dim), n_kv_heads = heads.shape, (heads.shape[1] - n_heads) // 2
    assert heads.is_contiguous() and places.dtype == torch.int64
    padded = max(_LEAST, triton.next_power_of_2(head_dim))
    shape = {"N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads, "D": head_dim, "PADDED_D": padded}
    stride = places.stride(0)
    sums = heads.new_empty(n_tokens, n_heads, PARTS, head_dim, dtype=torch.float32)
    weights = heads.new_empty(n_tokens, n_heads, PARTS, 2, dtype=torch.float32)
    y = heads.new_empty(n_tokens, n_heads * head_dim)
    with torch.cuda.device_of(heads):
        _append[(n_tokens, 2 * n_kv_heads)](heads, places, stride, block, **shape)
        _attend[(n_tokens, n_kv_heads, PARTS)](
            *(heads, places, slopes, sums, weights, stride, block, 1 / sqrt(head_dim)),
            WINDOW=window or 0,
            **shape,
            **tiling(n_heads // n_kv_heads, head_dim, heads.dtype),
        )
        _merge[(n_tokens * n_heads,)](sums, weights, y, D=head_dim, PADDED_D=padded, PARTS=PARTS)
    return y


def tiling(group: int, head_dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """How `_attend` cuts products of `group` query heads."""
    padded = max(_LEAST, triton.next_power_of_2(head_dim))
    return {
        "ALIGNED": gcd(16, head_dim * dtype.itemsize),
        "GROUP": max(_LEAST, triton.next_power_of_2(group)),
        "TILE": max(_LEAST, min(128, _TILE_BYTES // (padded * dtype.itemsize))),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # which 16-bit keys and values fit into
    }
