"""Loading blocks from a cold disk, beside reading the same bytes, and the memory that it takes.

Both in processes that differ in nothing else: what the system has to do for new memory depends on how long
ago somebody freed it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
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


_CHILD = """
import json, pathlib, re, sys, time, torch
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
how, model, quant, tiny, cache, *source = sys.argv[1:]
load_span(Checkpoint.open(tiny), 0, 1, dtype=torch.bfloat16, quant=quant)  # what is done once in a process
def kib(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
def read(room):
    for path in source:
        done = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(room(path, done)):
                done += count
held = {}
def kept(path, done):
    if path not in held:
        held[path] = torch.empty(pathlib.Path(path).stat().st_size, dtype=torch.uint8).numpy()
    return memoryview(held[path])[done : done + (1 << 22)]
buffer = bytearray(1 << 22)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
checkpoint, before, nbytes = Checkpoint.open(model), kib("VmRSS"), 0
began = time.perf_counter()
if how == "read":
    read(lambda path, done: buffer)
elif how == "keep":
    read(kept)
else:
    options = {"quant": quant, "cache": pathlib.Path(cache)}
    span = load_span(checkpoint, 0, checkpoint.config.n_blocks, dtype=torch.bfloat16, **options)
    nbytes = span.nbytes
seconds = time.perf_counter() - began
print(json.dumps([seconds, 1024 * (kib("VmHWM") - before), nbytes]))
"""
_LOADS = (("none", "bfloat16"), ("int8", "int8, quantizing"), ("int8", "int8, from cache"))


def _load(report: Report) -> None:
    """Each load, and each plain read of the same bytes, in a process of its own, in turns; files are dropped
    from the page cache before each.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard, tiny = _model(folder / "model", BLOCKS), _model(folder / "tiny", 1)
        weights = shard / "model.safetensors"
        for quant, what in _LOADS:
            source = sorted(folder.glob("cache/*/*")) if "cache" in what else [weights]
            arguments = [shard, quant, tiny, folder / "cache", *source]
            samples: dict[str, list[list[float]]] = {"read": [], "keep": [], "load": []}
            for _ in range(1 if "quantizing" in what else ROUNDS):
                for how, taken in samples.items():
                    for path in folder.rglob("*.safetensors"):
                        _drop(path)
                    command = [sys.executable, "-c", _CHILD, how, *arguments]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    taken.append(json.loads(done.stdout))
            _add(report, what, samples, weights.stat().st_size / BLOCKS)


def _add(report: Report, what: str, samples: dict[str, list[list[float]]], block_bytes: float) -> None:
    seconds = {how: [sample[0] for sample in taken] for how, taken in samples.items()}
    read_s, keep_s, load_s = map(statistics.median, seconds.values())
    peak, held = (statistics.median(sample[place] for sample in samples["load"]) for place in (1, 2))
    ratios = [
        statistics.median(read / load for read, load in zip(seconds[how], seconds["load"], strict=True))
        for how in ("read", "keep")
    ]
    over = (peak - held) / block_bytes
    report.rows += [
        (f"cold read of {what}", read_s, "s"),
        (f"cold read of {what} into memory that is kept", keep_s, "s"),
        (f"load as {what}", load_s, "s"),
        (f"{what}: cold read into memory that is kept / load", ratios[1], "×"),
        (f"load as {what}: most memory beyond the weights held", over, "blocks"),
    ]
    report.results[f"load_{what}"] = {
        "read_s": read_s,
        "keep_s": keep_s,
        "load_s": load_s,
        "read_over_load": ratios[0],
        "keep_over_load": ratios[1],
        "peak_bytes": peak,
        "weights_bytes": held,
    }
    if "quantizing" not in what:
        name = f"{what}: cold read / load"
        report.checks.append(Check(name, ratios[0], "×", REACH_LOAD, "at least"))
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
