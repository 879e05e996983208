"""`generate` and `chat`: text from a swarm, or from this process, printed as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.table import Table

import petalite
from petalite.client.session import SessionSettings
from petalite.client.sync import DistributedModel
from petalite.client.trace import HopTiming, Trace
from petalite.node.console import err, out
from petalite.node.settings import GenerationOptions, ModelSource
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
    source: ModelSource, prompt: str, options: GenerationOptions, *, chat_template: bool, verbose: bool
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


def chat(source: ModelSource, system: str | None, options: GenerationOptions) -> None:
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
    table = Table("server", "blocks", "steps", "ms per step", "of it computing", box=None)
    for row in hop_rows(trace):
        table.add_row(*row)
    err.print(table)
    for recovery in trace.recoveries:
        err.print(
            f"replaced {recovery.lost.short()} (blocks {recovery.span}) in {recovery.seconds:.2f} s, "
            f"{recovery.replayed_tokens} tokens replayed: {recovery.cause}"
        )
    tokens = len(trace.steps)
    err.print(f"{tokens} steps in {seconds:.2f} s, prompt included")


def hop_rows(trace: Trace) -> list[tuple[str, ...]]:
    """For a table: per hop that the decode steps went through, medians of the time it took."""
    hops: dict[tuple[str, str], list[HopTiming]] = {}
    for step in list(trace.steps)[1:]:  # the first is the prompt's
        for hop in step:
            hops.setdefault((hop.peer.short(), str(hop.span)), []).append(hop)
    return [
        (
            peer,
            span,
            str(len(timings)),
            f"{median(timing.total_s for timing in timings) * 1e3:.2f}",
            f"{median(timing.compute_s for timing in timings) * 1e3:.2f}",
        )
        for (peer, span), timings in hops.items()
    ]
