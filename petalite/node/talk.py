"""`generate` and `chat`: text from a swarm, or from this process, printed as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from rich.table import Table

import petalite
from petalite.client.generation import TokenSession
from petalite.client.model import Prompt
from petalite.client.sync import DistributedModel
from petalite.client.trace import HopTiming, Recovery, Trace
from petalite.errors import InvalidArgument
from petalite.node.console import err, out, plain
from petalite.node.options import Blocks, Choosing, Way
from petalite.swarm.messages import DECODE_TOKENS
from petalite.swarm.peer import load_swarm_key

PROMPT = "[bold cyan]you[/]  "


@contextmanager
def _opened(name: str, blocks: Blocks, way: Way) -> Iterator[DistributedModel]:
    blocks.check()
    if blocks.local and way != Way():
        raise InvalidArgument("--local has no way to choose; leave out --route, --wire, --only and --avoid")
    settings, routing = way.session(blocks.wait), way.routing()
    with err.status("loading the model's edges"):
        model = petalite.load(
            name,
            peers=None if blocks.local else blocks.addresses(),
            lan=blocks.lan,
            swarm_key=None if blocks.swarm_key is None else load_swarm_key(blocks.swarm_key),
            name=blocks.name,
            dtype=blocks.dtype,
            settings=settings,
            routing=routing,
        )
    with model:
        yield model


def generate(
    name: str,
    blocks: Blocks,
    way: Way,
    choosing: Choosing,
    prompt: str,
    *,
    chat_template: bool,
    verbose: bool,
) -> None:
    options = choosing.options()
    with _opened(name, blocks, way) as model:
        ids = model.encode([{"role": "user", "content": prompt}] if chat_template else prompt)
        length = min(len(ids) + options.max_new_tokens, model.config.max_position_embeddings)
        began_s = time.perf_counter()
        with ExitStack() as stack:
            session = None if choosing.beams > 1 else stack.enter_context(model.session(length))
            _say(model, ids, choosing, session)
            if verbose:
                show_trace(model.trace(), time.perf_counter() - began_s)
                if session is not None:
                    err.print(f"{session.position - len(ids) + 1} new tokens")


def chat(name: str, blocks: Blocks, way: Way, choosing: Choosing, system: str | None) -> None:
    choosing.options()
    with _opened(name, blocks, way) as model, model.session() as session:
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
            answer = _say(model, messages, choosing, session)
            messages.append({"role": "assistant", "content": answer})


def _say(model: DistributedModel, prompt: Prompt, choosing: Choosing, session: TokenSession | None) -> str:
    """Print what follows the prompt: as it comes, or what a search found, which has a session of its own."""
    options = choosing.options().as_keywords()
    pieces: Iterable[str]
    if choosing.beams > 1:
        pieces = [model.beam_search(prompt, beams=choosing.beams, **options)[0].text]
    else:
        pieces = model.stream(prompt, session=session, **options)
    said = []
    for piece in pieces:
        print(piece, end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


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
        f"{recovery.replayed_tokens} tokens replayed: {plain(recovery.cause)}"
    )
