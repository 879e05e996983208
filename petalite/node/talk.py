"""`generate` and `chat`: text from a swarm, or from this process, printed as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.table import Table

import petalite
from petalite.client.options import Options
from petalite.client.settings import SessionSettings
from petalite.client.sync import DistributedModel
from petalite.client.trace import HopTiming, Recovery, Trace
from petalite.node.console import err, out
from petalite.node.settings import ModelSource
from petalite.swarm.messages import DECODE_TOKENS
from petalite.swarm.peer import load_swarm_key

PROMPT = "[bold cyan]you[/]  "


@contextmanager
def _opened(source: ModelSource) -> Iterator[DistributedModel]:
    source.check()
    with err.status("loading the model's edges"):
        model = petalite.load(
            source.model,
            peers=None if source.local else source.peers,
            lan=source.lan,
            swarm_key=None if source.swarm_key is None else load_swarm_key(source.swarm_key),
            name=source.name,
            dtype=source.dtype,
            settings=SessionSettings(open_s=source.wait_s, recovery_s=source.wait_s),
        )
    with model:
        yield model


def generate(
    source: ModelSource, prompt: str, options: Options, *, chat_template: bool, verbose: bool
) -> None:
    with _opened(source) as model:
        messages = [{"role": "user", "content": prompt}]
        ids = model.encode(messages if chat_template else prompt)
        length = min(len(ids) + options.max_new_tokens, model.config.max_position_embeddings)
        with model.session(length) as session:
            began_s = time.perf_counter()
            for piece in model.stream(ids, session=session, **options.as_keywords()):
                print(piece, end="", flush=True)
            print()
            if verbose:
                show_trace(session.trace, time.perf_counter() - began_s)
                err.print(f"{session.position - len(ids) + 1} new tokens")


def chat(source: ModelSource, system: str | None, options: Options) -> None:
    with _opened(source) as model, model.session() as session:
        messages = [] if system is None else [{"role": "system", "content": system}]
        out.print("An empty line ends the talk.", style="dim")
        while True:
            try:
                said = out.input(PROMPT)
            except EOFError:
                print()
                return
            if not said.strip():
                return
            messages.append({"role": "user", "content": said})
            pieces = []
            for piece in model.stream(messages, session=session, **options.as_keywords()):
                print(piece, end="", flush=True)
                pieces.append(piece)
            print()
            messages.append({"role": "assistant", "content": "".join(pieces)})


def show_trace(trace: Trace, seconds: float) -> None:
    """Where the time of a generation went, on standard error."""
    err.print(hop_table(trace))
    for recovery in trace.recoveries:
        err.print(describe_recovery(recovery))
    err.print(f"{len(trace.steps)} steps in {seconds:.2f} s, prompt included")


def hop_table(trace: Trace) -> Table:
    """Medians over the decode steps, milliseconds: each hop's own account, and what lies between the hops."""
    table = Table("server", "blocks", "steps", "waiting ms", "computing ms", box=None)
    decodes = [step for step in trace.steps if step.n_tokens <= DECODE_TOKENS]
    hops: dict[tuple[str, str], list[HopTiming]] = {}
    for step in decodes:
        for hop in step.hops:
            hops.setdefault((hop.peer.short(), str(hop.span)), []).append(hop)
    for (peer, span), timings in hops.items():
        waiting = median(timing.queue_s for timing in timings) * 1e3
        computing = median(timing.compute_s for timing in timings) * 1e3
        table.add_row(peer, span, str(len(timings)), f"{waiting:.2f}", f"{computing:.2f}")
    if decodes:
        links = median(step.links_s for step in decodes) * 1e3
        total = median(step.total_s for step in decodes) * 1e3
        table.add_row("links and software", "", str(len(decodes)), f"{links:.2f}", "")
        table.add_row("whole step", "", str(len(decodes)), f"{total:.2f}", "")
    return table


def describe_recovery(recovery: Recovery) -> str:
    lost = " and ".join(peer.short() for peer in recovery.lost)
    return (
        f"replaced {lost} (blocks {recovery.span}) in {recovery.seconds * 1e3:.0f} ms, "
        f"{recovery.replayed_tokens} tokens replayed: {recovery.cause}"
    )
