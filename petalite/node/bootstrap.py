"""`bootstrap`: a node that others join through, until it is told to stop. Loads no torch."""

from __future__ import annotations

from petalite.node.console import out, run_async, until_stopped
from petalite.node.settings import NodeSettings
from petalite.server.node import Node


def run(settings: NodeSettings) -> None:
    run_async(_run(settings))


async def _run(settings: NodeSettings) -> None:
    async with settings.node() as node:
        show_addresses(node, "peer")
        await until_stopped()


def show_addresses(node: Node, what: str) -> None:
    """What others need to join: one line per address, ready to be copied."""
    out.print(f"petalite {what} [bold]{node.peer_id}[/]")
    for address in node.addresses:
        out.print(f"  address  {address}")
