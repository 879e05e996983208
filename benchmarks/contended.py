"""SmolLM2 token by token at two threads while another process spins on one of the two cores.

On a volunteer's machine something always does. Two threads of equal speed can hope for half of what they
did in quiet, a thread that waits by spinning for one that has no core, for far less.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from benchmarks import contenders, llama_cpp
from benchmarks.report import Check, Report

KEPT = 0.45
ROUNDS = 5
THREADS = 2
NEW_TOKENS = 24  # few: a collapse must not take the evening
FORMATS = {"int8": "Q8_0", "bfloat16": "BF16"}


def run() -> Report:
    report = Report("contended", ("tokens/s at 2 threads", "quiet", "one core taken", "kept"))
    works: dict[str, contenders.Rate] = {}
    for name, kind in FORMATS.items():
        settings = contenders.PETALITE[f"petalite {name}"]
        works[f"petalite {name}"] = contenders.petalite(*settings, prefill=False, new_tokens=NEW_TOKENS)
        if llama_cpp.build():
            works[f"llama.cpp {kind}"] = contenders.llama_cpp_rate(
                kind, THREADS, prefill=False, new_tokens=NEW_TOKENS
            )
    torch.set_num_threads(THREADS)
    samples: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS + 1):  # the first is warming up
        for name, work in works.items():
            for taken in (False, True):
                with spinning(0) if taken else nullcontext():
                    samples.setdefault((name, taken), []).append(work())
    for name in works:
        quiet, taken = (statistics.median(samples[name, taken][1:]) for taken in (False, True))
        report.rows.append((name, quiet, taken, taken / quiet))
        report.results[name] = {"quiet": quiet, "one core taken": taken, "kept": taken / quiet}
        if name.startswith("petalite"):
            report.checks.append(Check(f"{name}: kept", taken / quiet, "×", KEPT, "at least"))
    return report


@contextmanager
def spinning(core: int) -> Iterator[None]:
    """Another process keeps a core busy."""
    script = f"import os; os.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()
