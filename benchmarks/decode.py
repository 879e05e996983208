"""SmolLM2 in one process, tokens/s at one and two threads, beside transformers on the same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import petalite
from benchmarks.report import Check, Report
from petalite.node.smollm2 import smollm2_folder

PROMPT = "The history of the steam engine begins"
NEW_TOKENS = 64
ROUNDS = 7
THREADS = (1, 2)
REACH = 1.05


def run() -> Report:
    report = Report("decode", ("threads", "petalite, tokens/s", "transformers, tokens/s", "ratio"))
    for threads in THREADS:
        ours, theirs = _both(threads)
        report.rows.append((threads, ours, theirs, ours / theirs))
        report.results[f"threads_{threads}"] = {"petalite": ours, "transformers": theirs}
        name = f"float32 against transformers, {threads} threads"
        report.checks.append(Check(name, ours / theirs, "×", REACH, "at least"))
    return report


def _both(threads: int) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    folder = smollm2_folder()
    torch.set_num_threads(threads)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with petalite.load(str(folder), dtype="float32") as model:
        ids = model.encode(PROMPT)
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)

        def ours() -> list[int]:
            return model.generate(ids, max_new_tokens=NEW_TOKENS).token_ids

        def theirs() -> list[int]:
            with torch.inference_mode():
                output = reference.generate(
                    prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
                )
            return output[0, len(ids) :].tolist()

        if ours() != theirs():
            raise RuntimeError("the two do not say the same; nothing to compare")
        rates: dict[Callable[[], list[int]], list[float]] = {ours: [], theirs: []}
        for _ in range(ROUNDS):
            for generate, samples in rates.items():
                began_s = time.perf_counter()
                count = len(generate())
                samples.append(count / (time.perf_counter() - began_s))
    return statistics.median(rates[ours]), statistics.median(rates[theirs])
