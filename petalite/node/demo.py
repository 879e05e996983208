"""`make demo`: a swarm of six processes on this machine, two questions, and a server killed during the
second.

Everything is real and separate: a bootstrap node, four servers with overlapping spans, and this process as
the client, over sockets on loopback. The answers are compared with those of the whole model in one process.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from rich.table import Table

import petalite
from petalite.client.sync import DistributedModel
from petalite.client.trace import Trace
from petalite.net.identity import PeerId
from petalite.node.console import out, progress
from petalite.node.processes import NodeProcess, bootstrap_node, serve_node
from petalite.node.smollm2 import smollm2_folder
from petalite.node.talk import describe_recovery, hop_table

SPANS = ("0:10", "10:20", "20:30", "8:22")  # the second and the fourth can stand in for each other
FIRST = "What is the capital of France?"
SECOND = "Explain in a few sentences why the sky is blue."
KILL_AFTER_PIECES = 24
MAX_NEW_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question."""

    question: str
    text: str
    token_ids: list[int]  # those that went through the chain: all but the last
    trace: Trace
    killed: PeerId | None


class Checks:
    """What the demo promises, shown as it is found out."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, held: bool, what: str) -> None:
        self.failed += not held
        out.print(f"  [green]✓[/] {what}" if held else f"  [red]✗ {what}[/]")


def run() -> int:
    """The exit code: 0 only if everything held."""
    with progress("importing SmolLM2-135M-Instruct") as report:
        folder = str(smollm2_folder(report))
    checks = Checks()
    with ExitStack() as stack:
        out.rule("a swarm of six processes")
        bootstrap, servers = start_swarm(stack, folder)
        show_swarm(bootstrap, servers)
        with out.status("the client loads embeddings, norm, head and tokenizer"):
            model = stack.enter_context(petalite.load(folder, peers=[bootstrap.address]))
        out.rule("a question")
        first = ask(model, FIRST)
        out.rule("another, and a server is killed in the middle of the answer")
        second = ask(model, SECOND, servers)
    out.rule("what held")
    recovered = [recovery.lost for recovery in second.trace.recoveries]
    checks(second.killed is not None, "a server was killed with SIGKILL in the middle of the second answer")
    checks(recovered == [(second.killed,)], "the session replaced that server, no other, and went on")
    with out.status("the same questions, the whole model in one process"):
        same = compare(folder, [first, second])
    for answer, held in zip((first, second), same, strict=True):
        checks(held, f"{len(answer.token_ids)} tokens equal to those of a single process: {answer.question}")
    show_times(second.trace)
    return 1 if checks.failed else 0


def start_swarm(stack: ExitStack, folder: str) -> tuple[NodeProcess, dict[PeerId, NodeProcess]]:
    """A bootstrap node and the servers, stopped when `stack` is left."""
    bootstrap = stack.enter_context(bootstrap_node())
    starting = [stack.enter_context(serve_node(folder, span, [bootstrap.address])) for span in SPANS]
    with out.status("four servers load their blocks"):
        return bootstrap, {server.peer_id: server for server in starting}


def show_swarm(bootstrap: NodeProcess, servers: dict[PeerId, NodeProcess]) -> None:
    table = Table("process", "peer", "blocks", "ready after", box=None)
    table.add_row(str(bootstrap.pid), bootstrap.peer_id.short(), "bootstrap", f"{bootstrap.ready_s:.1f} s")
    for (peer, server), span in zip(servers.items(), SPANS, strict=True):
        table.add_row(str(server.pid), peer.short(), span, f"{server.ready_s:.1f} s")
    out.print(table)


def ask(model: DistributedModel, question: str, victims: dict[PeerId, NodeProcess] | None = None) -> Answer:
    """Stream the answer; with `victims`, kill the server in the middle of the chain on the way."""
    out.print(f"[cyan]{question}[/]")
    killed: PeerId | None = None
    pieces: list[str] = []
    prompt = model.encode(_chat(question))
    with model.session(len(prompt) + MAX_NEW_TOKENS) as session:
        began_s = time.perf_counter()
        for piece in model.stream(prompt, max_new_tokens=MAX_NEW_TOKENS, session=session):
            out.print(piece, end="", markup=False)
            pieces.append(piece)
            if victims and killed is None and len(pieces) >= KILL_AFTER_PIECES:
                killed = session.session.chain[1].peer
                victims[killed].kill()
                out.print(f" [red]✂ {killed.short()} killed[/] ", end="")
        seconds = time.perf_counter() - began_s
        new = session.token_ids[len(prompt) :]
        trace = session.trace
    out.print(f"\n[dim]{len(new) + 1} tokens in {seconds:.2f} s, {(len(new) + 1) / seconds:.1f} tokens/s[/]")
    return Answer(question, "".join(pieces), new, trace, killed)


def compare(folder: str, answers: list[Answer]) -> list[bool]:
    """Whether each answer is what the whole model says in this process."""
    with petalite.load(folder) as alone:
        expected = [alone.generate(_chat(a.question), max_new_tokens=MAX_NEW_TOKENS) for a in answers]
    return [
        answer.text == alone.text and answer.token_ids == alone.token_ids[:-1]
        for answer, alone in zip(answers, expected, strict=True)
    ]


def show_times(trace: Trace) -> None:
    """Time per hop, before and after the kill, and of the recovery."""
    out.print(hop_table(trace))
    for recovery in trace.recoveries:
        out.print(describe_recovery(recovery))


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]
