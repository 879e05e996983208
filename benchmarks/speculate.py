"""What guessing ahead brings: SmolLM2 over three servers, without and with guesses looked up in the text.

Each on a host of its own of the lab, 100 ms round trip between any two, and on loopback, where a step is all
computing and a wrong guess costs the most. Without the lab (it takes root) on loopback alone. A text to
quote, code to give back, and prose, in which there is little to look up; the same tokens in either case.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.report import Check, Report
from benchmarks.wan import LOOPBACK, SMOLLM2_SPANS, at
from petalite.node.smollm2 import smollm2_folder

RTT_MS = 100
NEW_TOKENS = 60
ROUNDS = {RTT_MS: 2, None: 4}
PARTS = (f"{RTT_MS} ms", LOOPBACK)
GAIN, HARM = 2.0, 0.95

PARAGRAPH = (
    "The lighthouse on Skerry Point was built in 1843 by Thomas Alden, a mason from Hull. It stands "
    "31 metres tall and its lamp can be seen for 22 miles. In 1911 a storm broke two of its windows and "
    "drowned the keeper's boat."
)
CODE = """```python
def total(items):
    result = 0
    for item in items:
        if item.price is None:
            continue
        result += item.price * item.count
    return result
```"""
# What is asked, and what of it must come out of it at least.
PROMPTS: dict[str, tuple[Any, float]] = {
    "quote": ([{"role": "user", "content": f"Repeat this text word for word:\n\n{PARAGRAPH}"}], GAIN),
    "code": ([{"role": "user", "content": f"Write this code again, without any change:\n\n{CODE}"}], HARM),
    "story": ([{"role": "user", "content": "Tell me a story about a fox and a clockmaker."}], HARM),
    "prose": ("My grandmother kept bees behind the old stone barn, and every", HARM),
}


def run(only: str = "") -> Report:
    """Both parts, or those whose names contain `only`."""
    return asyncio.run(_measure(only))


async def _measure(only: str) -> Report:
    report = Report("speculate", ("where", "text", "plain, tokens/s", "lookup, tokens/s", "ratio", "steps"))
    for part, rtt_ms in zip(PARTS, (RTT_MS, None), strict=True):
        if only in part:
            deeds = [
                ["speculate", {"prompt": prompt, "new_tokens": NEW_TOKENS, "rounds": ROUNDS[rtt_ms]}]
                for prompt, _ in PROMPTS.values()
            ]
            where, rows = await at(rtt_ms, str(smollm2_folder()), SMOLLM2_SPANS, {"ring": deeds})
            for (name, (_, bound)), result in zip(PROMPTS.items(), rows["ring"], strict=True):
                _row(report, where, name, bound, result)
    return report


def _row(report: Report, where: str, name: str, bound: float, result: dict[str, Any]) -> None:
    ratio = result["lookup"] / result["plain"]
    steps = f"{result['lookup_steps']} for {result['tokens']} tokens"
    report.rows.append((where, name, result["plain"], result["lookup"], ratio, steps))
    report.results[f"{where} {name}"] = result
    bound = HARM if where == LOOPBACK else bound
    report.checks.append(Check(f"{where}, {name}: lookup against plain", ratio, "×", bound, "at least"))
