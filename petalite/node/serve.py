"""`serve`: hold blocks of a model for a swarm, until told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petalite.node.bootstrap import show_addresses
from petalite.node.console import out, progress, run_async, until_stopped
from petalite.node.settings import NodeSettings

if TYPE_CHECKING:
    from petalite.server.server import BlockServer, ServerSettings


def run(model: str, settings: ServerSettings, node: NodeSettings) -> None:
    run_async(_run(model, settings, node))


async def _run(model: str, settings: ServerSettings, node_settings: NodeSettings) -> None:
    async with node_settings.node() as node:
        with progress("loading blocks") as report:
            server = await node.serve(model, settings, report)
        show_server(server)
        show_addresses(node, "server")
        reason = await until_stopped()
        out.print(f"{reason}: leaving the swarm")


def show_server(server: BlockServer) -> None:
    blocks = server.backend.span
    rows = {
        "model": server.model_id,
        "blocks": f"{server.span} of {server.checkpoint.config.n_blocks}, {blocks.nbytes / 1e6:.0f} MB",
        "dtype": str(blocks.dtype).removeprefix("torch."),
        "speed": f"{server.block_s * 1e3:.2f} ms per token and block",
        "cache": f"{server.backend.free_tokens()} tokens",
    }
    for what, value in rows.items():
        out.print(f"  {what:<7}  {value}")
