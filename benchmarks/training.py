"""Forward, and forward and backward, of batches over three servers, beside one process on the same cores.

SmolLM2 in float32 over processes on loopback, one thread each; beside it, in the same rounds and with all
cores, its blocks in this process under torch's autograd, and transformers' own. Rates by the clock, and by
the processor's time of all processes together, which others on the machine disturb less. Then what a server
killed in the middle of a step costs, and the client's memory beside what the formula says.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import petalite
from benchmarks.report import Check, Report
from petalite.client.sync import DistributedModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
from petalite.node.processes import NodeProcess, serve_node
from petalite.node.smollm2 import smollm2_folder
from petalite.tuning import Lora

PARTS = ("32x128", "1x128", "kill", "memory")
SPANS = ("0:10", "10:20", "20:30")
BATCHES = {"32x128": (32, 128), "1x128": (1, 128)}
ROUNDS = 2
BOUND = 0.85  # of one process, at 32×128
KILL = (8, 128)
KILLED_AT = 0.25  # of a forward or a backward
MEMORY = (64, 256)
RANK = 8
# What autograd saves of 4,096 tokens in 10 blocks is 2.2 GB; with room for it, backward computes nothing
# twice.
ROOM = ("--dtype", "float32", "--cache-tokens", "400000", "--training-share", "0.9")


def run(only: str = "") -> Report:
    torch.set_num_threads(os.cpu_count() or 1)
    report = Report("training", ("batch", "what", "three servers", "one process", "ratio", "transformers"))
    for part in PARTS:
        if only in part:
            if part in BATCHES:
                _speed(report, part, *BATCHES[part])
            elif part == "kill":
                _kill(report)
            else:
                _memory(report)
    return report


@contextmanager
def _swarm(*more: str) -> Iterator[tuple[DistributedModel, list[NodeProcess]]]:
    model = str(smollm2_folder())
    with ExitStack() as stack:
        first = stack.enter_context(serve_node(model, SPANS[0], [], *ROOM))
        peers = [first.address]
        nodes = [
            first,
            *(stack.enter_context(serve_node(model, span, peers, *ROOM)) for span in (*SPANS[1:], *more)),
        ]
        for node in nodes:
            assert node.address
        yield stack.enter_context(petalite.load(model, peers=peers, dtype="float32")), nodes


# -- speed -----------------------------------------------------------------------------------------------


def _speed(report: Report, name: str, n_rows: int, n_tokens: int) -> None:
    folder = smollm2_folder()
    span = load_span(Checkpoint.open(folder), 0, 30)
    reference = _transformers(folder)
    with _swarm() as (model, nodes):
        blocks, pids = model.blocks[:], ["self", *(str(node.pid) for node in nodes)]
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "three servers": blocks,
            "one process": span.forward_stateless,
            "transformers": reference,
        }
        hidden = torch.randn(n_rows, n_tokens, model.config.hidden_size)
        rates: dict[str, dict[str, list[float]]] = {}
        works: dict[str, dict[str, list[float]]] = {}
        for way in ways.values():  # links are up, kernels warm
            _step(way, hidden[:1])
        for number in range(ROUNDS if n_rows > 1 else 3 * ROUNDS):
            for which, way in ways.items():
                if which == "transformers" and number > 0 and n_rows > 1:
                    continue  # for comparison only, and slow
                for what, act in (("forward", _forward), ("forward and backward", _step)):
                    began_s, worked_s = time.perf_counter(), _processor_s(pids)
                    act(way, hidden)
                    seconds, work_s = time.perf_counter() - began_s, _processor_s(pids) - worked_s
                    rates.setdefault(what, {}).setdefault(which, []).append(n_rows * n_tokens / seconds)
                    works.setdefault(what, {}).setdefault(which, []).append(work_s)
    for what, of_way in rates.items():
        medians = {which: statistics.median(found) for which, found in of_way.items()}
        ratio = medians["three servers"] / medians["one process"]
        work = {which: statistics.median(found) for which, found in works[what].items()}
        saved = work["one process"] / work["three servers"]
        report.rows.append(
            (name, what, medians["three servers"], medians["one process"], ratio, medians["transformers"])
        )
        report.rows.append(
            (
                name,
                "processor seconds",
                work["three servers"],
                work["one process"],
                saved,
                work["transformers"],
            )
        )
        report.results[f"{name} {what}"] = medians | {"ratio": ratio, "processor_s": work, "by_work": saved}
        if n_rows > 1:
            report.checks.append(
                Check(f"{name} {what}: three servers against one process", ratio, "×", BOUND, "at least")
            )


def _processor_s(pids: list[str]) -> float:
    """Seconds that processes have computed."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _transformers(folder: Path) -> Callable[[Tensor], Tensor]:
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).model
    )
    model.norm = torch.nn.Identity()
    return lambda hidden: model(inputs_embeds=hidden, use_cache=False).last_hidden_state


@torch.no_grad()
def _forward(way: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    way(hidden)


# -- a kill in the middle of a step ----------------------------------------------------------------------


def _kill(report: Report) -> None:
    """One of two servers of the middle blocks is killed while it computes: early in forward, then (another
    swarm) early in backward, while all parts of the batch are under way.
    """
    hidden = torch.randn(*KILL, 576, generator=torch.Generator().manual_seed(0))
    for what in ("forward", "backward"):
        with _swarm(SPANS[1]) as (model, nodes):
            blocks = model.blocks[:]
            _step(blocks, hidden)
            usual = [_step(blocks, hidden) for _ in range(ROUNDS)]
            expected = usual[0].gradient
            usual_s = statistics.median(one.forward_s + one.backward_s for one in usual)
            shortest_s = min(one.forward_s if what == "forward" else one.backward_s for one in usual)
            killer = threading.Timer(KILLED_AT * shortest_s, nodes[1].kill)
            step = _step(blocks, hidden, **{f"before_{what}": killer.start})
            killer.join()
            seconds = step.forward_s + step.backward_s
            off = float((step.gradient - expected).norm() / expected.norm())
            repeated = len(model.passes.replaced)
        name = f"{KILL[0]}x{KILL[1]}"
        row = (name, f"killed in {what}: s, usual s, ratio", seconds, usual_s, seconds / usual_s, "")
        report.rows.append(row)
        report.results[f"kill in {what}"] = {
            "seconds": seconds,
            "usual_s": usual_s,
            "off": off,
            "calls_repeated": repeated,
        }
        report.checks += [
            Check(f"killed in {what}: calls made again elsewhere", repeated, "", 1, "at least"),
            Check(f"killed in {what}: the step, against two", seconds / usual_s, "×", 2.0),
            Check(f"killed in {what}: gradient against an undisturbed one", off, "", 1e-5),
        ]


@dataclass(frozen=True)
class _Step:
    forward_s: float
    backward_s: float
    gradient: Tensor


def _step(
    way: Callable[[Tensor], Tensor],
    hidden: Tensor,
    before_forward: Callable[[], None] = lambda: None,
    before_backward: Callable[[], None] = lambda: None,
) -> _Step:
    given = hidden.clone().requires_grad_()
    before_forward()
    began_s = time.perf_counter()
    loss = way(given).square().mean()
    middle_s = time.perf_counter()
    before_backward()
    loss.backward()
    assert given.grad is not None
    return _Step(middle_s - began_s, time.perf_counter() - middle_s, given.grad)


# -- memory ----------------------------------------------------------------------------------------------


def _memory(report: Report) -> None:
    """Between forward and backward of a step, beyond what was there before: float32, in MB.

    N = B·T tokens of E values and s spans: 4 N E (s + 1) for what entered each span and what came out; 4 · 2
    for A and B twice (as they were, and as sent); then gradients 4, and AdamW's moments 8 for each value.
    """
    with _swarm() as (model, _):
        lora = Lora(model, RANK)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-3)
        hidden = torch.randn(*MEMORY, model.config.hidden_size)
        model.blocks[:](hidden[:1], lora=lora).sum().backward()
        optimizer.zero_grad()
        before = _resident_bytes()
        given = hidden.clone().requires_grad_()
        output = model.blocks[:](given, lora=lora)
        between = _resident_bytes() - before
        output.square().mean().backward()
        optimizer.step()
        del output, given
        after = _resident_bytes() - before
        values = sum(one.numel() for one in lora.parameters())
        held = 4 * hidden.numel() * (len(SPANS) + 1) + 8 * values
        kept = 12 * values
    for what, found, predicted in (
        ("between forward and backward", between, held),
        ("after a step: gradients and optimizer", after, kept),
    ):
        report.rows.append(
            (
                f"{MEMORY[0]}x{MEMORY[1]}",
                f"{what}: MB, predicted",
                found / 1e6,
                predicted / 1e6,
                found / predicted,
                "",
            )
        )
        report.results[what] = {"bytes": found, "predicted_bytes": predicted}
    report.checks.append(
        Check("client memory between forward and backward, against the formula", between / held, "×", 1.15)
    )


def _resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
