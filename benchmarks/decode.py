"""SmolLM2 token by token in one process: tokens/s in every format, at one and two threads."""

from __future__ import annotations

from benchmarks.contenders import THREADS, medians
from benchmarks.report import Check, Report

REACH_TRANSFORMERS, REACH_Q8 = 1.05, 0.6


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
        if "llama.cpp Q8_0" in found:
            ratio = found["petalite int8"] / found["llama.cpp Q8_0"]
            report.checks.append(Check(f"int8 against Q8_0, {where}", ratio, "×", REACH_Q8, "at least"))
            report.results[f"nf4_against_q4_1_{threads}"] = found["petalite nf4"] / found["llama.cpp Q4_1"]
    return report
