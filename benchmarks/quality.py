"""What formats of the weights cost SmolLM2, against its own float32: perplexity and divergence on prose, and
greedy answers.

Beside petalite's formats the weights as other implementations round them, computed in float32 here: those of
llama.cpp by its own library `gguf`, and bitsandbytes' nf4. The divergence is the mean Kullback-Leibler
divergence of the next token's distribution, in nats, after each of 1,024 tokens. Answers are 64 tokens for
each of 20 prompts.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.report import Check, Report
from petalite.kernels.nf4 import bitsandbytes
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import Edges, load_edges
from petalite.model.manifest import Manifest
from petalite.model.span import BlockSpan, load_span
from petalite.model.tokenizer import load_tokenizer
from petalite.node.smollm2 import smollm2_folder

N_TOKENS, NEW_TOKENS = 1024, 64
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis in one paragraph.",
    "List three uses of a paper clip.",
    "What is 12 plus 30?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What do bees make?",
    "Name the planets of the solar system.",
    "How does a bicycle stay upright?",
    "Summarize the story of Cinderella.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a joke about computers.",
    "What causes the tides?",
    "Write a short letter to a friend about the weather.",
    "How many legs does a spider have?",
    "What is the largest ocean?",
)
MOST_PERCENT = {"petalite int8": 0.5, "petalite nf4": 5.0}
LEAST_EQUAL = 18

Change = Callable[[Tensor], Tensor]  # a weight (N, K) float32 to what a format makes of it


def run() -> Report:
    columns = ("", "perplexity, %", "divergence", "same choice, %", "equal answers of 20")
    report = Report("quality", columns)
    plain = smollm2_folder()
    exact = _Found(plain, torch.float32, "none")
    for name, dtype, quant in (
        ("petalite bfloat16", torch.bfloat16, "none"),
        ("petalite int8", torch.float32, "int8"),
        ("petalite nf4", torch.float32, "nf4"),
    ):
        _compare(report, name, exact, _Found(plain, dtype, quant))
    with tempfile.TemporaryDirectory() as folder:
        for name, change in _others().items():
            _compare(
                report, name, exact, _Found(_changed(plain, Path(folder), change), torch.float32, "none")
            )
    return report


class _Found:
    """What a checkpoint computes in a format."""

    def __init__(self, folder: Path, dtype: torch.dtype, quant: str) -> None:
        checkpoint = Checkpoint.open(folder)
        tokenizer = load_tokenizer(checkpoint)
        span = load_span(checkpoint, 0, checkpoint.config.n_blocks, dtype=dtype, quant=quant)
        edges = load_edges(checkpoint, dtype=dtype)
        text = Path(__file__).with_name("prose.txt").read_text()
        self.ids = tokenizer.encode(text)[:N_TOKENS]
        cache = span.new_cache()
        output = span.forward(edges.embed(self.ids), [Segment(cache.open_row(N_TOKENS), 0, N_TOKENS)], cache)
        self.logprobs = edges.head(output).log_softmax(-1)
        self.prompts = [
            tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            for prompt in PROMPTS
        ]
        stop = tokenizer.encode("<|im_end|>")[-1]
        self.answers = [_until(answer, stop) for answer in greedy(span, edges, self.prompts, NEW_TOKENS)]


def greedy(span: BlockSpan, edges: Edges, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest tokens behind each prompt, one of each in every step."""
    cache = span.new_cache()
    rows = [cache.open_row(len(prompt) + new_tokens) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    fed = prompts
    for _ in range(new_tokens):
        segments = [Segment(row, cache.length(row), len(ids)) for row, ids in zip(rows, fed, strict=True)]
        output = span.forward(edges.embed([token for ids in fed for token in ids]), segments, cache)
        last = torch.tensor([len(ids) for ids in fed]).cumsum(0) - 1
        fed = [[token] for token in edges.head(output[last]).argmax(-1).tolist()]
        for answer, (token,) in zip(answers, fed, strict=True):
            answer.append(token)
    return answers


def _until(answer: list[int], stop: int) -> list[int]:
    return answer[: answer.index(stop)] if stop in answer else answer


def _equal(theirs: list[int], ours: list[int]) -> bool:
    return theirs[: len(ours)] == ours


def _compare(report: Report, name: str, exact: _Found, found: _Found) -> None:
    after, following = torch.arange(N_TOKENS - 1), torch.tensor(exact.ids[1:])
    losses = [-float(each.logprobs[after, following].mean()) for each in (exact, found)]
    percent = 100 * (math.exp(losses[1] - losses[0]) - 1)
    weights = exact.logprobs.exp()
    divergence = float((weights * (exact.logprobs - found.logprobs)).sum(-1).mean())
    same = 100 * float((exact.logprobs.argmax(-1) == found.logprobs.argmax(-1)).float().mean())
    equal = sum(map(_equal, found.answers, exact.answers))
    report.rows.append((name, f"{percent:+.2f}", f"{divergence:.2e}", f"{same:.1f}", equal))
    report.results[name] = {
        "perplexity_percent": percent,
        "divergence": divergence,
        "same_choice_percent": same,
        "equal_answers": equal,
    }
    if name in MOST_PERCENT:
        report.checks.append(Check(f"{name}: perplexity", percent, "%", MOST_PERCENT[name]))
    if name == "petalite int8":
        report.checks.append(Check(f"{name}: equal answers", equal, "of 20", LEAST_EQUAL, "at least"))


def _others() -> dict[str, Change]:
    changes: dict[str, Change] = {"bitsandbytes nf4, weights": _bitsandbytes_nf4}
    try:
        import gguf
    except ImportError:
        return changes
    for kind in ("Q8_0", "Q5_0", "Q4_0"):
        type_ = gguf.GGMLQuantizationType[kind]
        changes[f"llama.cpp {kind}, weights"] = lambda weight, type_=type_: torch.from_numpy(  # type: ignore[misc]
            gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), type_), type_)
        ).view(weight.shape)
    return changes


def _bitsandbytes_nf4(weight: Tensor) -> Tensor:
    functional = bitsandbytes().functional
    dense: Tensor = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    )
    return dense


def _changed(source: Path, folder: Path, change: Change) -> Path:
    """The checkpoint with every weight of its blocks changed."""
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != Manifest.FILE:
            shutil.copy(path, folder / path.name)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensors[name] = change(tensor.float()).contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder
