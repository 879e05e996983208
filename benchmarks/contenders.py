"""Who runs SmolLM2 in `decode` and `prefill`: petalite in each format, transformers, llama.cpp.

All in one process and one thread count; rounds interleaved.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import llama_cpp
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import load_edges
from petalite.model.span import load_span
from petalite.node.smollm2 import smollm2_folder

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 64, 48, 512
ROUNDS = 5
THREADS = (1, 2)
Rate = Callable[[], float]  # tokens/s of one run

PETALITE = {
    "petalite float32": (torch.float32, "none"),
    "petalite bfloat16": (torch.bfloat16, "none"),
    "petalite int8": (torch.float32, "int8"),
    "petalite nf4": (torch.float32, "nf4"),
}
LLAMA_CPP = {"llama.cpp Q8_0": "Q8_0", "llama.cpp BF16": "BF16", "llama.cpp Q4_1": "Q4_1"}


def medians(*, prefill: bool) -> dict[int, dict[str, float]]:
    """Median tokens/s of each by thread count, the rounds interleaved."""
    works: dict[str, Rate] = {name: petalite(*kind, prefill=prefill) for name, kind in PETALITE.items()}
    works["transformers float32"] = _transformers(prefill=prefill)
    return {threads: _interleaved(works | _others(threads, prefill), threads) for threads in THREADS}


def _others(threads: int, prefill: bool) -> dict[str, Rate]:
    if not llama_cpp.build():
        return {}
    return {name: llama_cpp_rate(kind, threads, prefill=prefill) for name, kind in LLAMA_CPP.items()}


def _interleaved(works: Mapping[str, Rate], threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):  # the first is warming up
        for name, work in works.items():
            samples[name].append(work())
    return {name: statistics.median(taken[1:]) for name, taken in samples.items()}


def _ids(count: int) -> list[int]:
    return torch.randint(1000, 40000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def petalite(dtype: torch.dtype, quant: str, *, prefill: bool, new_tokens: int = NEW_TOKENS) -> Rate:
    """Blocks and edges, the head in the blocks' format, as llama.cpp has it."""
    checkpoint = Checkpoint.open(smollm2_folder())
    span = load_span(checkpoint, 0, checkpoint.config.n_blocks, dtype=dtype, quant=quant)
    edges = load_edges(checkpoint, dtype=dtype, quant=quant)

    def run() -> float:
        cache = span.new_cache()
        row = cache.open_row(PREFILL_TOKENS + new_tokens)
        if prefill:
            began_s = time.perf_counter()
            hidden = span.forward(edges.embed(_ids(PREFILL_TOKENS)), [Segment(row, 0, PREFILL_TOKENS)], cache)
            edges.head(hidden[-1:])
            return PREFILL_TOKENS / (time.perf_counter() - began_s)
        span.forward(edges.embed(_ids(PROMPT_TOKENS)), [Segment(row, 0, PROMPT_TOKENS)], cache)
        token = torch.tensor([5])
        began_s = time.perf_counter()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + new_tokens):
            hidden = span.forward(edges.embed(token), [Segment(row, position, 1)], cache)
            token = edges.head(hidden).argmax(-1)
        return new_tokens / (time.perf_counter() - began_s)

    return run


def _transformers(*, prefill: bool) -> Rate:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()

    @torch.inference_mode()
    def run() -> float:
        ids = torch.tensor([_ids(PREFILL_TOKENS if prefill else PROMPT_TOKENS)])
        began_s = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        if prefill:
            return PREFILL_TOKENS / (time.perf_counter() - began_s)
        token, kept = output.logits[:, -1:].argmax(-1), output.past_key_values
        began_s = time.perf_counter()
        for _ in range(NEW_TOKENS):
            output = model(token, past_key_values=kept, use_cache=True)
            token, kept = output.logits[:, -1:].argmax(-1), output.past_key_values
        return NEW_TOKENS / (time.perf_counter() - began_s)

    return run


def llama_cpp_rate(kind: str, threads: int, *, prefill: bool, new_tokens: int = NEW_TOKENS) -> Rate:
    def run() -> float:
        model = llama_cpp.load(kind, threads)  # for each run: its idle threads would cost the others
        if prefill:
            return model.rates(_ids(PREFILL_TOKENS), 1)[0]
        return model.rates(_ids(PROMPT_TOKENS), new_tokens)[1]

    return run
