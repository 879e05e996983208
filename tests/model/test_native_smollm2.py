"""The real model in int8: what the native kernels say, torch's say too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality import PROMPTS
from petalite.kernels import linear, native
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import Edges, load_edges
from petalite.model.span import BlockSpan, load_span
from petalite.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels, or torch's are forced")

NEW_TOKENS = 32


def load(smollm2: Path) -> tuple[BlockSpan, Edges]:
    checkpoint = Checkpoint.open(smollm2)
    return load_span(checkpoint, 0, 30, quant="int8"), load_edges(checkpoint, quant="int8")


def greedy(span: BlockSpan, edges: Edges, prompts: list[list[int]]) -> list[list[int]]:
    """NEW_TOKENS of each, all prompts in each step."""
    cache = span.new_cache()
    rows = [cache.open_row(len(prompt) + NEW_TOKENS) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    fed = prompts
    for _ in range(NEW_TOKENS):
        segments = [Segment(row, cache.length(row), len(ids)) for row, ids in zip(rows, fed, strict=True)]
        output = span.forward(edges.embed([token for ids in fed for token in ids]), segments, cache)
        last = torch.tensor([len(ids) for ids in fed]).cumsum(0) - 1
        fed = [[token] for token in edges.head(output[last]).argmax(-1).tolist()]
        for answer, (token,) in zip(answers, fed, strict=True):
            answer.append(token)
    return answers


@pytest.mark.slow
def test_twenty_answers_in_int8_are_those_of_torch(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(smollm2))
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
        for prompt in PROMPTS
    ]
    span, edges = load(smollm2)
    assert span._native is not None
    answers = greedy(span, edges, prompts)
    assert answers == [greedy(span, edges, [prompt])[0] for prompt in prompts]  # alone as in company

    linear.pick.cache_clear()
    monkeypatch.setattr("petalite.model.span.library", lambda: None)
    monkeypatch.setattr(linear, "library", lambda: None)
    try:
        span, edges = load(smollm2)
        assert span._native is None
        assert greedy(span, edges, prompts) == answers
    finally:
        linear.pick.cache_clear()
