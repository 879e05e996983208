"""Beam search over three servers: what a token costs by the number of beams, beside greedy choice.

SmolLM2, each server on a host of its own of the lab, 20 ms round trip between any two, and on loopback.
Without the lab (it takes root) on loopback alone. A step carries a token of every beam, and rows are forked
at the servers, so more beams cost no more trips.
"""

from __future__ import annotations

import asyncio

from benchmarks.report import Check, Report
from benchmarks.wan import LOOPBACK, SMOLLM2_SPANS, at
from petalite.node.smollm2 import smollm2_folder

RTT_MS = 20
BEAMS = (2, 4, 8)
NEW_TOKENS = 24
PROMPT = "The history of the city begins with"
PARTS = (f"{RTT_MS} ms", LOOPBACK)
MOST = 2.0  # times a greedy step, with four beams


def run(only: str = "") -> Report:
    """Both parts, or those whose names contain `only`."""
    return asyncio.run(_measure(only))


async def _measure(only: str) -> Report:
    report = Report("beams", ("where", "beams", "ms per token", "against greedy", "log probability"))
    deed = ["beams", {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "beams": BEAMS}]
    for part, rtt_ms in zip(PARTS, (RTT_MS, None), strict=True):
        if only in part:
            where, rows = await at(rtt_ms, str(smollm2_folder()), SMOLLM2_SPANS, {"ring": [deed]})
            [found] = rows["ring"]
            report.results[where] = found
            greedy_ms = found["1"]["token_ms"]
            for beams, one in found.items():
                ratio = one["token_ms"] / greedy_ms
                report.rows.append((where, beams, one["token_ms"], ratio, one["logprob"]))
            four = found["4"]["token_ms"] / greedy_ms
            report.checks.append(Check(f"{where}: a token of four beams against greedy", four, "×", MOST))
    return report
