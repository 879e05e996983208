"""Native linears of Llama-70B's size, weights cold, in every format: beside what memory gives, and beside
torch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.report import Check, Report
from petalite.kernels.linear import KERNELS, Linear, LinearKernel
from petalite.kernels.native import Library, library
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.quantized import FORMATS, NONE

SHAPE = (28672, 8192)  # outputs, inputs: the int8 weight is seven times the last cache
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS = (1, 8, 32)
ROUNDS = 5
PREFILL = 256
REACH = 0.8  # of the memory's rate, one token
REACH_EIGHT = 1.3  # times one token's time, eight tokens in int8
REACH_AVX2 = 0.6
BOUND_FORMATS = ("int8", "nf4", "bfloat16")
_CPU = torch.device("cpu")
PARTS = (*FORMATS, *DTYPES)


def run(only: str = "") -> Report:
    found = library()
    if found is None:
        raise SystemExit("there are no native kernels to measure; build them with `make native`")
    report = Report("linear", ("what", "native", "of memory", "torch's best", "unit"))
    before = torch.get_num_threads()
    ceiling = torch.empty(1 << 28)
    found.functions.petalite_huge_pages(ceiling.data_ptr(), ceiling.nbytes)  # as the weights have them
    ceiling.fill_(1.0)
    with torch.inference_mode():
        dense = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
        for name in PARTS:
            if only in name:
                _measure(report, found, name, dense, ceiling)
    torch.set_num_threads(before)
    return report


def _measure(report: Report, found: Library, name: str, dense: torch.Tensor, ceiling: torch.Tensor) -> None:
    dtype = DTYPES.get(name, torch.float32)
    weight = FORMATS[name].quantize(dense) if name in FORMATS else dense.to(dtype)
    native = NativeLinear(weight, None)
    rival = _rival(NONE if name in DTYPES else name, dtype)
    other: Linear = rival.make(weight, None)
    del weight
    for threads in (1, 2):
        torch.set_num_threads(threads)
        works: dict[str, Callable[[], object]] = {"read": ceiling.sum}
        for n_tokens in TOKENS:
            x = torch.randn(n_tokens, SHAPE[1]).to(dtype)
            works[f"native {n_tokens}"] = lambda x=x: native(x)  # type: ignore[misc]
            works[f"torch {n_tokens}"] = lambda x=x: other(x)  # type: ignore[misc]
        taken = _medians(works, ROUNDS)
        memory = ceiling.nbytes / taken["read"] / 1e9
        report.rows.append((f"memory, {threads} threads", memory, "", "", "GB/s"))
        rate = native.nbytes / taken["native 1"] / 1e9
        theirs = other.nbytes / taken["torch 1"] / 1e9
        report.rows.append((f"{name}, T = 1, {threads} threads", rate, rate / memory, theirs, "GB/s"))
        for n_tokens in TOKENS:
            ours_ms, theirs_ms = 1e3 * taken[f"native {n_tokens}"], 1e3 * taken[f"torch {n_tokens}"]
            report.rows.append(
                (
                    f"{name}, T = {n_tokens}, {threads} threads",
                    ours_ms,
                    "",
                    f"{theirs_ms:.3g} ({rival.name})",
                    "ms",
                )
            )
        report.results[f"{name}_{threads}"] = {"memory_gb_s": memory, "gb_s": rate, "s": taken}
        if name in BOUND_FORMATS:
            what = f"{name} beside reading, {threads} threads"
            report.checks.append(Check(what, rate / memory, "×", REACH, "at least"))
        if name == "int8":
            ratio = taken["native 8"] / taken["native 1"]
            report.checks.append(Check(f"int8, T = 8 beside 1, {threads} threads", ratio, "×", REACH_EIGHT))
            _beside_avx2(report, found, native, threads)
    x = torch.randn(PREFILL, SHAPE[1]).to(dtype)
    taken = _medians({"native": lambda: native(x), "torch": lambda: other(x)}, 2)
    flops = 2 * PREFILL * SHAPE[0] * SHAPE[1] / 1e9
    row = (
        f"{name}, T = {PREFILL}, 2 threads",
        flops / taken["native"],
        "",
        flops / taken["torch"],
        "GFLOP/s",
    )
    report.rows.append(row)
    report.results[f"{name}_prefill"] = taken


def _rival(quant: str, dtype: torch.dtype) -> LinearKernel:
    """The best of what runs here that is not native."""
    return next(kernel for kernel in KERNELS[quant][1:] if kernel.works_on(_CPU, dtype))


def _beside_avx2(report: Report, found: Library, native: NativeLinear, threads: int) -> None:
    if found.instructions == "avx2" or not found.instruction_sets().get("avx2"):
        return
    x = torch.randn(1, SHAPE[1])

    def narrow() -> None:
        with _using(found, "avx2"):
            native(x)

    taken = _medians({"wide": lambda: native(x), "narrow": narrow}, ROUNDS)
    ratio = taken["wide"] / taken["narrow"]
    report.rows.append((f"int8 by AVX2, T = 1, {threads} threads", 1e3 * taken["narrow"], "", "", "ms"))
    report.results[f"int8_avx2_{threads}"] = taken
    what = f"int8 by AVX2 beside {found.instructions}, {threads} threads"
    report.checks.append(Check(what, ratio, "×", REACH_AVX2, "at least"))


@contextmanager
def _using(found: Library, name: str) -> Iterator[None]:
    before = found.instructions
    found.choose(name)
    yield
    found.choose(before)


def _medians(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, taken in turns, the second time: while the first runs, threads of the one before it
    stop spinning (torch's do after some milliseconds, which cost one token's product at two threads a
    third).
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):  # the first is warming up
        for name, work in works.items():
            began_s = time.perf_counter()
            work()
            samples[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(taken[1:]) for name, taken in samples.items()}
