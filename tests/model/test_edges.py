"""Logits of 16-bit models keep float32's sums, with native kernels and with torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petalite.kernels import linear, native
from petalite.kernels.wide import WideLinear
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import load_edges
from tests.helpers.checkpoints import tiny_llama

HIDDEN = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "native" and native.library() is None:
        pytest.skip("no native kernels, or torch's are forced")
    if request.param == "torch":
        monkeypatch.setattr(linear, "library", lambda: None)
    linear.pick.cache_clear()
    yield request.param
    linear.pick.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded_to_the_models_dtype(kernels: str, dtype, tied: bool, tmp_path: Path) -> None:
    """Against float64 over what the norm gives: bfloat16 would be off by up to 4e-3."""
    checkpoint = Checkpoint.open(tiny_llama(tmp_path, tie_word_embeddings=tied))
    edges = load_edges(checkpoint, dtype=dtype)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    weight = checkpoint.read({name: (260, 64)})[name].to(dtype).double()
    logits = edges.head(HIDDEN)
    expected = edges.norm(HIDDEN).double() @ weight.t()
    assert logits.dtype == torch.float32
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-6
    assert isinstance(edges._head, WideLinear) == (kernels == "torch")


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantized_heads_give_float32(kernels: str, quant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama(tmp_path))
    exact = load_edges(checkpoint).head(HIDDEN)
    logits = load_edges(checkpoint, dtype=torch.bfloat16, quant=quant).head(HIDDEN)
    assert logits.dtype == torch.float32
    if (kernels, quant) != ("torch", "nf4"):  # bitsandbytes' product rounds to bfloat16 by itself
        assert len(logits.unique()) > 0.95 * logits.numel()  # bfloat16 has fewer numbers than that
    assert float((logits - exact).norm() / exact.norm()) < {"int8": 0.01, "nf4": 0.12}[quant]
