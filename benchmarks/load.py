"""Loading blocks from a cold disk, beside reading the same bytes, and the memory that it takes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.report import Check, Report

ROUNDS = 5
REACH_LOAD = 0.8
HIDDEN, INNER, BLOCKS = 1024, 4096, 8  # the shard: 8 blocks, 0.5 GB


def run() -> Report:
    report = Report("load", ("what", "", "unit"))
    _load(report)
    return report


_LOADER = """
import json, pathlib, re, sys, time, torch
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
model, quant, tiny, cache = sys.argv[1:]
load_span(Checkpoint.open(tiny), 0, 1, dtype=torch.bfloat16, quant=quant)  # what is done once in a process
def kib(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
checkpoint, before = Checkpoint.open(model), kib("VmRSS")
began = time.perf_counter()
n_blocks = checkpoint.config.n_blocks
span = load_span(checkpoint, 0, n_blocks, dtype=torch.bfloat16, quant=quant, cache=pathlib.Path(cache))
seconds = time.perf_counter() - began
print(json.dumps([seconds, 1024 * (kib("VmHWM") - before), span.nbytes]))
"""
_LOADS = (("none", "bfloat16"), ("int8", "int8, quantizing"), ("int8", "int8, from cache"))


def _load(report: Report) -> None:
    """Each load in a process of its own, its files dropped from the page cache before it; plain reads of the
    same bytes in turns with it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard, tiny = _model(folder / "model", BLOCKS), _model(folder / "tiny", 1)
        weights = shard / "model.safetensors"
        block_bytes = weights.stat().st_size / BLOCKS
        for quant, what in _LOADS:
            source = list(folder.glob("cache/*/*")) if "cache" in what else [weights]
            samples = []
            for _ in range(1 if "quantizing" in what else ROUNDS):
                read_s = sum(map(_read_s, source))
                for path in folder.rglob("*.safetensors"):
                    _drop(path)
                command = [sys.executable, "-c", _LOADER, shard, quant, tiny, folder / "cache"]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                samples.append((read_s, *json.loads(output)))
            read_s, load_s, peak, held = map(statistics.median, zip(*samples, strict=True))
            report.rows.append((f"cold read of {what}", read_s, "s"))
            report.rows.append((f"load as {what}", load_s, "s"))
            ratio = statistics.median(sample[0] / sample[1] for sample in samples)
            over = (peak - held) / block_bytes
            report.rows.append((f"load as {what}: most memory beyond the weights held", over, "blocks"))
            report.results[f"load_{what}"] = {
                "read_s": read_s,
                "load_s": load_s,
                "read_over_load": ratio,
                "peak_bytes": peak,
                "weights_bytes": held,
            }
            if "quantizing" not in what:
                name = f"{what}: cold read / load"
                report.checks.append(Check(name, ratio, "×", REACH_LOAD, "at least"))
            report.checks.append(Check(f"{what}: memory beyond the weights", over, "blocks", 1.0))


def _model(folder: Path, n_blocks: int) -> Path:
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 64}
    config |= {"num_hidden_layers": n_blocks, "num_attention_heads": 16, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(str(config).replace("'", '"'))
    sizes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    sizes |= {
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    tensors = {}
    for block in range(n_blocks):
        for name, size in sizes.items():
            tensors[f"model.layers.{block}.{name}.weight"] = torch.randn(size).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return folder


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_s(path: Path) -> float:
    """One cold read from beginning to end into one buffer."""
    buffer = bytearray(1 << 22)
    _drop(path)
    began_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began_s
