"""SmolLM2 token by token in one process: tokens/s in every format, at one and two threads."""

from __future__ import annotations

from benchmarks.contenders import THREADS, medians
from benchmarks.report import Check, Report

REACH_TRANSFORMERS, REACH_LLAMA_CPP = 1.05, 1.2
RIVALS = {"int8": "Q8_0", "nf4": "Q4_1", "bfloat16": "BF16"}


def run() -> Report:
    report = Report("decode", ("tokens/s", *(f"{threads} threads" for threads in THREADS)))
    rates = medians(prefill=False)
    for name in rates[1]:
        report.rows.append((name, *(rates[threads][name] for threads in THREADS)))
    for threads, found in rates.items():
        report.results[f"threads_{threads}"] = found
        ratio = found["petalite float32"] / found["transformers float32"]
        where = f"{threads} threads"
        report.checks.append(
            Check(f"float32 against transformers, {where}", ratio, "×", REACH_TRANSFORMERS, "at least")
        )
        for ours, theirs in RIVALS.items():
            if f"llama.cpp {theirs}" in found:
                ratio = found[f"petalite {ours}"] / found[f"llama.cpp {theirs}"]
                name = f"{ours} against {theirs}, {where}"
                report.checks.append(Check(name, ratio, "×", REACH_LLAMA_CPP, "at least"))
    return report
