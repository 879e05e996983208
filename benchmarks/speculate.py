"""What guessing ahead brings: SmolLM2 over three servers, without and with guesses looked up in the text.

Each on a host of its own of the lab, 100 ms round trip between any two, and on loopback, where a step is all
computing and a wrong guess costs the most. Without the lab (it takes root) on loopback alone. A text to
quote, code to give back, and prose, in which there is little to look up; the same tokens in either case.
Then a small model in the client that guesses: SmolLM2 itself, which is always right and costs as
much as the servers compute, and the first half of its blocks, which is quicker and seldom right.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import Check, Report
from benchmarks.wan import LOOPBACK, SMOLLM2_SPANS, at
from petalite.node.smollm2 import smollm2_folder

RTT_MS = 100
NEW_TOKENS = 60
ROUNDS = {RTT_MS: 2, None: 5}
DRAFTS = "draft models"
PARTS = (f"{RTT_MS} ms", LOOPBACK, DRAFTS)
N_BLOCKS = 30
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


GUESSING = {"lookup": "lookup"}


def run(only: str = "") -> Report:
    """All parts, or those whose names contain `only`."""
    return asyncio.run(_measure(only))


async def _measure(only: str) -> Report:
    report = Report(
        "speculate", ("where", "text", "guesses", "plain, tokens/s", "guessing", "ratio", "steps")
    )
    for part, rtt_ms in ((f"{RTT_MS} ms", RTT_MS), (LOOPBACK, None)):
        if only in part:
            await _texts(report, rtt_ms, PROMPTS, GUESSING)
    if only in DRAFTS:
        with tempfile.TemporaryDirectory() as folder:
            half = first_blocks(smollm2_folder(), Path(folder) / "half", N_BLOCKS // 2)
            models = {"the model itself": str(smollm2_folder()), "half of its blocks": str(half)}
            await _texts(report, RTT_MS, {"story": PROMPTS["story"]}, models)
    return report


async def _texts(
    report: Report, rtt_ms: int | None, prompts: dict[str, tuple[Any, float]], guessing: dict[str, str]
) -> None:
    options = {"new_tokens": NEW_TOKENS, "rounds": ROUNDS[rtt_ms], "guessing": guessing}
    deeds = [["speculate", options | {"prompt": prompt}] for prompt, _ in prompts.values()]
    where, rows = await at(rtt_ms, str(smollm2_folder()), SMOLLM2_SPANS, {"ring": deeds})
    for (text, (_, bound)), result in zip(prompts.items(), rows["ring"], strict=True):
        for guesses in guessing:
            _row(report, where, text, guesses, bound, result)


def first_blocks(source: Path, folder: Path, n_blocks: int) -> Path:
    """A checkpoint of the first blocks of another, its edges and its tokenizer: a poor and quick one."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_blocks}))
    return folder


def _row(report: Report, where: str, text: str, guesses: str, bound: float, result: dict[str, Any]) -> None:
    plain, rate = result["rates"]["plain"], result["rates"][guesses]
    steps = f"{result['steps'][guesses]} for {result['tokens']} tokens"
    report.rows.append((where, text, guesses, plain, rate, rate / plain, steps))
    report.results[f"{where} {text} {guesses}"] = result
    bound = HARM if where == LOOPBACK or guesses not in GUESSING else bound
    name = f"{where}, {text}: {guesses} against plain"
    report.checks.append(Check(name, rate / plain, "×", bound, "at least"))
