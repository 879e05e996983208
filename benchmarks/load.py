"""One linear of Llama-70B's size, weights cold, beside what memory gives; loading blocks, beside reading a
file.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.report import Check, Report
from petalite.kernels.linear import pick
from petalite.kernels.quantized import FORMATS

SHAPE = (28672, 8192)  # outputs, inputs
ROUNDS = 5
REACH = {1: 0.6, 2: 0.5}
REACH_LOAD = 0.8
HIDDEN, INNER, BLOCKS = 1024, 4096, 8  # the shard: 8 blocks, 0.5 GB
_CPU = torch.device("cpu")


def run() -> Report:
    report = Report("load", ("what", "1 thread", "2 threads", "unit"))
    before = torch.get_num_threads()
    with torch.inference_mode():
        _linear(report)
    torch.set_num_threads(before)
    _load(report)
    return report


def _linear(report: Report) -> None:
    """GB/s of weight bytes. One such weight is several times any cache, so each pass finds it cold."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    x = torch.randn(1, SHAPE[1])
    ceiling = torch.randn(1 << 28)
    works: dict[str, tuple[Callable[[], object], int]] = {"read (sum)": (ceiling.sum, ceiling.nbytes)}
    for quant, format_ in FORMATS.items():
        made = pick(_CPU, torch.float32, quant).make(format_.quantize(weight), None)
        works[quant] = (lambda made=made: made(x), made.nbytes)  # type: ignore[misc]
    narrow = pick(_CPU, torch.bfloat16).make(weight.bfloat16(), None)
    works["bfloat16"] = (lambda: narrow(x.bfloat16()), narrow.nbytes)
    del weight
    rates: dict[str, list[float]] = {name: [] for name in works}
    for threads in REACH:
        torch.set_num_threads(threads)
        for name, rate in _medians(works).items():
            rates[name].append(rate)
    for name, found in rates.items():
        report.rows.append((f"{name}, 8192×28672", *found, "GB/s"))
        report.results[f"linear_{name}_gb_s"] = found
        for place, (threads, bound) in enumerate(REACH.items()):
            if name in FORMATS:
                ratio = found[place] / rates["read (sum)"][place]
                what = f"{name} beside reading, {threads} threads"
                report.checks.append(Check(what, ratio, "×", bound, "at least"))


def _medians(works: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):  # the first is warming up
        for name, (work, nbytes) in works.items():
            began_s = time.perf_counter()
            work()
            samples[name].append(nbytes / (time.perf_counter() - began_s) / 1e9)
    return {name: statistics.median(taken[1:]) for name, taken in samples.items()}


_LOADER = """
import sys, time, resource, pathlib, torch
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
checkpoint = Checkpoint.open(sys.argv[1])
load_span(Checkpoint.open(sys.argv[3]), 0, 1, dtype=torch.bfloat16, quant=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
cache = pathlib.Path(sys.argv[4])
span = load_span(
    checkpoint, 0, checkpoint.config.n_blocks, dtype=torch.bfloat16, quant=sys.argv[2], cache=cache
)
seconds = time.perf_counter() - began
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(seconds, peak, span.nbytes)
"""


def _load(report: Report) -> None:
    """A process of its own for each load, the files dropped from the page cache before it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard, tiny = _model(folder / "model", BLOCKS), _model(folder / "tiny", 1)
        plain_s = _read_s(shard / "model.safetensors")
        report.rows.append(("sequential read of the shard, cold", plain_s, "", "s"))
        for quant, what in (("none", "bfloat16"), ("int8", "int8, quantizing"), ("int8", "int8, from cache")):
            for path in folder.rglob("*.safetensors"):
                _drop(path)
            command = [sys.executable, "-c", _LOADER, shard, quant, tiny, folder / "cache"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            seconds, peak, held = float(output[0]), float(output[1]), float(output[2])
            report.rows.append((f"load as {what}", seconds, "", "s"))
            report.rows.append((f"load as {what}: peak over weights held", peak / held, "", "×"))
            report.results[f"load_{what}"] = {"s": seconds, "peak_bytes": peak, "weights_bytes": held}
            if quant == "none":
                ratio = plain_s / seconds
                report.checks.append(Check("load beside a plain read", ratio, "×", REACH_LOAD, "at least"))
        report.results["read_s"] = plain_s


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
    """Median of three cold reads into one buffer."""
    taken, buffer = [], bytearray(1 << 22)
    for _ in range(3):
        _drop(path)
        began_s = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        taken.append(time.perf_counter() - began_s)
    return statistics.median(taken)
