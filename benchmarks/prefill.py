"""SmolLM2's prefill of 512 tokens in one process: tokens/s in every format, at one and two threads."""

from __future__ import annotations

from benchmarks.contenders import THREADS, medians
from benchmarks.report import Check, Report

REACH = 1.0


def run() -> Report:
    report = Report("prefill", ("tokens/s", *(f"{threads} threads" for threads in THREADS)))
    rates = medians(prefill=True)
    for name in rates[1]:
        report.rows.append((name, *(rates[threads][name] for threads in THREADS)))
    for threads, found in rates.items():
        report.results[f"threads_{threads}"] = found
        ours = max(found["petalite bfloat16"], found["petalite int8"])
        theirs = [rate for name, rate in found.items() if name.startswith("llama.cpp")]
        if theirs:
            name = f"best of bfloat16 and int8 against llama.cpp's best, {threads} threads"
            report.checks.append(Check(name, ours / max(theirs), "×", REACH, "at least"))
    return report
