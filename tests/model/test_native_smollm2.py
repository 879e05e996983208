"""The real model in int8, by the native kernels and by torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import benchmarks.quality
from benchmarks.quality import PROMPTS, greedy
from petalite.kernels import linear, native
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import Edges, load_edges
from petalite.model.span import BlockSpan, load_span
from petalite.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels, or torch's are forced")

NEW_TOKENS = 32
PROSE = Path(benchmarks.quality.__file__).with_name("prose.txt")


def load(smollm2: Path) -> tuple[BlockSpan, Edges]:
    checkpoint = Checkpoint.open(smollm2)
    return load_span(checkpoint, 0, 30, quant="int8"), load_edges(checkpoint, quant="int8")


@pytest.mark.slow
def test_twenty_answers_in_int8_are_the_same_alone_and_in_company(smollm2: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(smollm2))
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        for prompt in PROMPTS
    ]
    span, edges = load(smollm2)
    assert span._native is not None
    alone = [greedy(span, edges, [prompt], NEW_TOKENS)[0] for prompt in prompts]
    assert greedy(span, edges, prompts, NEW_TOKENS) == alone


def logprobs(smollm2: Path) -> Tensor:
    """(1024, V) after every token of the prose."""
    span, edges = load(smollm2)
    ids = load_tokenizer(Checkpoint.open(smollm2)).encode(PROSE.read_text())[:1024]
    cache = span.new_cache()
    output = span.forward(edges.embed(ids), [Segment(cache.open_row(1024), 0, 1024)], cache)
    return edges.head(output).log_softmax(-1)


@pytest.mark.slow
def test_torch_says_the_same_but_for_what_one_digit_rounds(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last bit of an attention sum moves some digit of an input, and what that changes moves others: after
    a few blocks two paths have rounded as independently as they may. They are as near to each other as to
    float32 (0.0014), no nearer.
    """
    ours = logprobs(smollm2)
    linear.pick.cache_clear()
    monkeypatch.setattr("petalite.model.span.library", lambda: None)
    monkeypatch.setattr(linear, "library", lambda: None)
    try:
        theirs = logprobs(smollm2)
    finally:
        linear.pick.cache_clear()
    assert 0 < float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 0.002
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.97
