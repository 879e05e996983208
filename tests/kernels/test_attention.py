"""Attention against softmax(QKᵀ/√D + mask)V written out in float64, head by head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.kernels.attention import CausalMasks, alibi_slopes, attend

CPU = torch.device("cpu")


def reference(queries, keys, values, window):
    """Queries (T, H, D) of the last T of S tokens; keys and values (K, S, D)."""
    n_tokens, n_heads, head_dim = queries.shape
    n_kv_heads, n_keys, _ = keys.shape
    query = torch.arange(n_keys - n_tokens, n_keys).unsqueeze(1)
    key = torch.arange(n_keys)
    seen = (key <= query) & (key > query - (window or n_keys + 1))
    outputs = []
    for head in range(n_heads):
        shared = head // (n_heads // n_kv_heads)
        scores = queries[:, head].double() @ keys[shared].double().T / head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(weights @ values[shared].double())
    return torch.stack(outputs, dim=1).flatten(1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 300),
    st.sampled_from([(4, 4), (6, 2), (8, 1)]),
    st.one_of(st.none(), st.integers(1, 200)),
    st.integers(0, 2**32),
)
def test_equals_the_formula(n_tokens, n_cached, heads, window, seed) -> None:
    n_heads, n_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    n_keys = n_cached + n_tokens
    queries = torch.randn(n_tokens, n_heads, 16, generator=generator)
    # A cache with room behind the keys in use: what is there must not matter.
    cached = torch.full((2, 1, n_kv_heads, n_keys + 7, 16), torch.nan)
    cached[..., :n_keys, :] = torch.randn(2, 1, n_kv_heads, n_keys, 16, generator=generator)
    keys, values = cached.narrow(3, 0, n_keys).unbind()
    masks = CausalMasks(n_heads // n_kv_heads, torch.float32, CPU)
    expected = reference(queries, keys[0], values[0], window)
    torch.testing.assert_close(
        attend(queries, keys, values, masks, window).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_bfloat16_stays_near() -> None:
    queries, cached = torch.randn(70, 6, 32).bfloat16(), torch.randn(2, 1, 2, 200, 32).bfloat16()
    keys, values = cached.unbind()
    result = attend(queries, keys, values, CausalMasks(3, torch.bfloat16, CPU), None)
    torch.testing.assert_close(
        result.double(), reference(queries, keys[0], values[0], None), rtol=0.02, atol=0.02
    )


def test_masks_are_views_of_one_table() -> None:
    """No row keeps a mask: longer rows make the one table grow, shorter ones look into it."""
    masks = CausalMasks(2, torch.float32, CPU)
    long, short = masks.view(3, 900, None), masks.view(2, 5, None)
    assert long is not None and short is not None
    assert short.untyped_storage().data_ptr() == long.untyped_storage().data_ptr()
    assert masks.view(1, 900, None) is None
    assert masks.view(1, 900, 10) is not None


@pytest.mark.parametrize("window", [None, 5])
def test_is_differentiable_in_the_queries(window) -> None:
    queries = torch.randn(6, 4, 8, requires_grad=True)
    keys, values = torch.randn(2, 1, 2, 9, 8).unbind()
    masks = CausalMasks(2, torch.float32, CPU)
    weight = torch.randn(6, 32)
    (attend(queries, keys, values, masks, window) * weight).sum().backward()
    exact = queries.detach().double().requires_grad_()
    (reference(exact, keys[0], values[0], window) * weight).sum().backward()
    torch.testing.assert_close(queries.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_heads", [1, 8, 12, 71, 112])
def test_alibi_slopes_are_those_of_transformers(n_heads: int) -> None:
    """Which multiplies them by positions; the second position's row is the slopes."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(n_heads), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n_tokens", [1, 5, 64, 150])
def test_alibi_counts_distance(n_tokens: int) -> None:
    """Against the formula softmax(qk/√D - slope · (i - j)) in float64."""
    n_keys, n_heads, head_dim = 200, 6, 8
    q, k, v = (torch.randn(n, n_heads, head_dim, dtype=torch.float64) for n in (n_tokens, n_keys, n_keys))
    slopes = alibi_slopes(n_heads)
    masks = CausalMasks(1, torch.float32, torch.device("cpu"), slopes)
    keys, values = (each.transpose(0, 1).unsqueeze(0).float() for each in (k, v))
    result = attend(q.float(), keys, values, masks, None)
    distance = torch.arange(n_keys - n_tokens, n_keys).unsqueeze(1) - torch.arange(n_keys)
    logits = torch.einsum("thd,shd->hts", q, k) / head_dim**0.5 - slopes.double().view(-1, 1, 1) * distance
    weights = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    expected = torch.einsum("hts,shd->thd", weights, v).flatten(1)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(4)], ids=["plain", "ALiBi"])
@pytest.mark.parametrize("window", [None, 9])
def test_masks_for_a_gpu_begin_where_memory_does(slopes, window) -> None:
    """Its kernels take addresses that are multiples of 16 bytes, and 16 bits where queries have 16."""
    meta = torch.device("meta")
    masks = CausalMasks(1 if slopes is not None else 2, torch.bfloat16, meta, slopes)
    for n_tokens, n_keys in ((1, 13), (3, 77), (64, 512)):
        mask = masks.view(n_tokens, n_keys, window)
        assert mask is None or (mask.is_contiguous() and mask.storage_offset() == 0)
    queries, cached = torch.randn(3, 4, 16).bfloat16(), torch.randn(2, 1, 4, 77, 16).bfloat16()
    masks = CausalMasks(1, torch.bfloat16, meta, alibi_slopes(4))
    keys, values = cached.to(meta).unbind()
    assert attend(queries.to(meta), keys, values, masks, window).dtype == torch.bfloat16
