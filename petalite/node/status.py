"""`status`: the swarm as its DHT tells it. Loads no torch."""

from __future__ import annotations

from rich.table import Table

from petalite.node.console import out, plain, run_async
from petalite.node.settings import NodeSettings
from petalite.swarm.directory import Directory, find_models
from petalite.swarm.peer import SwarmPeer
from petalite.swarm.records import ModelRecord, ServerRecord
from petalite.swarm.spans import Span, describe, uncovered

_FIND_S = 10.0


def run(settings: NodeSettings) -> None:
    run_async(_run(settings))


async def _run(settings: NodeSettings) -> None:
    async with SwarmPeer(settings.identity, settings.peer) as peer:
        models = await find_models(peer.dht, timeout_s=_FIND_S)
        if not models:
            out.print(
                "the swarm serves no model; start a server: python -m petalite.node serve MODEL --peers …"
            )
        for model in models:
            directory = Directory(peer.dht, model.model_id, Span(0, model.n_blocks))
            await directory.refresh(timeout_s=_FIND_S)
            show_model(model, directory)
        known, size = len(peer.dht.table), peer.dht.swarm_size
        out.print(f"\npeers of the DHT: {known} known from here, about {size:.0f} in all")


def show_model(model: ModelRecord, directory: Directory) -> None:
    spans = [entry.record.span for entry in directory.servers if entry.record.serving]
    missing = uncovered(directory.span, spans)
    out.print(f"\n[bold]{plain(model.model_id)}[/]  {model.n_blocks} blocks, {len(spans)} servers")
    if missing:
        out.print(f"[red]nobody serves {describe(missing)}[/]")
    out.print(f"  holders per block  {holders(directory.span, spans)}")
    table = Table("server", "blocks", "dtype", "ms per block", "sessions", "free tokens", "address", box=None)
    for entry in sorted(directory.servers, key=lambda entry: entry.record.span):
        record = entry.record
        going = f" to {record.claim}" if record.serving and record.claim else ""
        table.add_row(
            entry.peer.short(),
            f"{record.span}{going}",
            plain(record.dtype) if record.quant == "none" else plain(f"{record.dtype} {record.quant}"),
            f"{record.block_ms:.2f}",
            f"{record.sessions}, {record.kept_mib} MiB kept" if record.kept_mib else str(record.sessions),
            str(record.free_tokens) if record.serving else "loading",
            plain(record.addresses[0]) if record.addresses else str(entry.peer),
        )
    out.print(table)
    lent = {(one.name, one.digest) for entry in directory.servers for one in entry.record.adapters}
    for name, digest in sorted(lent):
        spans = [entry.record.span for entry in directory.servers if lends(entry.record, digest)]
        out.print(f"  adapter {plain(name)} ({digest.hex()[:12]})  {holders(directory.span, spans)}")


def lends(record: ServerRecord, digest: bytes) -> bool:
    return record.serving and any(one.digest == digest for one in record.adapters)


def holders(span: Span, held: list[Span]) -> str:
    """One digit per block, in groups of ten: how many servers hold it; 9 stands for more, too."""
    digits = [str(min(sum(block in other for other in held), 9)) for block in span.blocks]
    return " ".join("".join(digits[start : start + 10]) for start in range(0, len(digits), 10))
