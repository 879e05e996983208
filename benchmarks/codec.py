"""The wire codec q8: its rate on a large message, and its error on real hidden states at every layer
boundary.

Beside it, what others do in as many bytes: bitsandbytes' blockwise dynamic quantization at 4096 values over
the flat tensor and at 64, and plain absmax int8 in blocks of 64 with float16 scales.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Check, Report
from petalite.kernels import dynamic8
from petalite.kernels.nf4 import bitsandbytes
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import load_edges
from petalite.model.span import load_span
from petalite.model.tokenizer import load_tokenizer
from petalite.node.smollm2 import smollm2_folder
from petalite.swarm.codecs import CODECS, PACKED, Q8, Codec, session_codec

SHAPE = (2048, 8192)
ROUNDS = 7
REACH_GB_S = 1.0
BOUNDARIES = (1, 2, 7, 15, 22, 29)  # of the 29 between blocks, those shown
N_TOKENS = 224


def run() -> Report:
    report = Report("codec", ("what", "q8", "bnb b64", "bnb b4096", "absmax b64", "bf16", "unit"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        _rates(report)
        states = _hidden_states()
        _errors(report, states)
        _sizes(report, states)
    torch.set_num_threads(threads)
    return report


def _rates(report: Report) -> None:
    hidden = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    functional = bitsandbytes().functional
    memory = memoryview(bytearray(Q8.nbytes(*SHAPE)))
    out = torch.empty(SHAPE)
    codes = torch.empty(SHAPE, dtype=torch.uint8)
    scales = torch.empty(SHAPE[0], dynamic8.n_blocks(SHAPE[1]), dtype=torch.float16)
    dynamic8.encode(hidden, codes, scales)
    theirs = {block: functional.quantize_blockwise(hidden, blocksize=block) for block in (64, 4096)}
    ours: list[Callable[[], object]] = [
        lambda: Q8.encode_into(hidden, memory),
        lambda: dynamic8.decode(codes, scales, out),
    ]
    others: list[list[Callable[[], object]]] = [
        [
            lambda: functional.quantize_blockwise(hidden, blocksize=64),
            lambda: functional.quantize_blockwise(hidden, blocksize=4096),
            lambda: _absmax(hidden),
        ],
        [
            lambda: functional.dequantize_blockwise(*theirs[64]),
            lambda: functional.dequantize_blockwise(*theirs[4096]),
            lambda: None,
        ],
    ]
    for name, own, rest in zip(("encode", "decode"), ours, others, strict=True):
        rates = _interleaved([own, *rest], hidden.nbytes)
        rates[3] = rates[3] if name == "encode" else float("nan")
        report.rows.append((f"{name} 2048×8192 float32, 1 thread", *rates, "", "GB/s"))
        report.results[f"{name}_gb_s"] = dict(zip(("q8", "bnb_64", "bnb_4096", "absmax"), rates, strict=True))
        report.checks.append(Check(f"q8 {name}", rates[0], "GB/s", REACH_GB_S, "at least"))


def _interleaved(works: list[Callable[[], object]], nbytes: int) -> list[float]:
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, samples, strict=True):
            began_s = time.perf_counter()
            work()
            taken.append(nbytes / (time.perf_counter() - began_s) / 1e9)
    return [statistics.median(taken) for taken in samples]


def _absmax(hidden: Tensor, block: int = 64) -> Tensor:
    blocks = hidden.view(-1, block)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float().clamp_min(1e-8)
    return ((blocks / scale).round().clamp(-127, 127).to(torch.int8).float() * scale).view(hidden.shape)


def _hidden_states() -> list[Tensor]:
    """After every block of SmolLM2 but the last, on prose: (T, E) each."""
    checkpoint = Checkpoint.open(smollm2_folder())
    span, edges = load_span(checkpoint, 0, 30), load_edges(checkpoint)
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    hidden = edges.embed(load_tokenizer(checkpoint).encode(text)[:N_TOKENS])
    states = []
    for block in range(29):
        cache = span.new_cache()
        row = cache.open_row(len(hidden), block, block + 1)
        segments = [Segment(row, 0, len(hidden))]
        hidden = span.forward(hidden, segments, cache, start=block, end=block + 1)
        states.append(hidden)
    return states


def _errors(report: Report, states: list[Tensor]) -> None:
    functional = bitsandbytes().functional

    def blockwise(hidden: Tensor, block: int) -> Tensor:
        back: Tensor = functional.dequantize_blockwise(
            *functional.quantize_blockwise(hidden, blocksize=block)
        )
        return back

    for boundary in BOUNDARIES:
        hidden = states[boundary - 1]
        made = [
            Q8.decode(Q8.encode(hidden), hidden.shape[1]),
            blockwise(hidden, 64),
            blockwise(hidden, 4096),
            _absmax(hidden),
            hidden.bfloat16().float(),
        ]
        # Per token, so that the first one's massive activation does not stand for all.
        errors = [
            100 * float(((back - hidden).norm(dim=1) / hidden.norm(dim=1)).square().mean().sqrt())
            for back in made
        ]
        report.rows.append((f"error after block {boundary}, rms over tokens", *errors, "%"))
        names = ("q8", "bnb_64", "bnb_4096", "absmax_64", "bf16")
        report.results[f"error_percent_{boundary}"] = dict(zip(names, errors, strict=True))


def _sizes(report: Report, states: list[Tensor]) -> None:
    """Bits a value of each codec, plain and compressed, over all boundaries."""
    for codec in CODECS.values():
        plain, packed = (sum(_bits(codec, state, pack) for state in states) / 29 for pack in (False, True))
        report.results[f"bits_{codec.name}"] = {"plain": plain, "zstd": packed}
        report.rows.append((f"{codec.name}: bits a value", plain, "", "", "", "", f"{packed:.2f} with zstd"))


def _bits(codec: Codec, hidden: Tensor, pack: bool) -> float:
    data = codec.encode(hidden)
    return 8 * len(session_codec(codec.name + PACKED).pack(data) if pack else data) / hidden.numel()
