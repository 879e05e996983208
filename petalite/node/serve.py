"""`serve`: hold blocks of a model for a swarm, until told to stop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

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
        stopped = asyncio.create_task(until_stopped())
        both: set[asyncio.Future[Any]] = {stopped, server.failed}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if server.failed.done():
            stopped.cancel()
            server.failed.result()
        out.print(f"{stopped.result()}: leaving the swarm")


def show_server(server: BlockServer) -> None:
    loaded = server.loaded
    blocks, speed = loaded.backend.span, loaded.speed
    quant = "" if server.quant == "none" else f" {server.quant}"
    dtype = str(blocks.dtype).removeprefix("torch.")
    chosen = "" if server.pinned else ", where the swarm is weakest"
    rows = {
        "model": server.model_id,
        "blocks": f"{server.span} of {server.n_blocks}{chosen}",
        "memory": f"{blocks.nbytes / 1e6:.0f} MB, {dtype}{quant} on {blocks.device}",
        "speed": f"{speed.decode_s * 1e3:.2f} ms per token and block, "
        f"{speed.prefill_s * 1e3:.3f} ms in a prefill; carries {server.tokens_per_s:.0f} tokens/s",
        "cache": f"{loaded.backend.free_tokens()} tokens",
    }
    if server.adapters.lent:
        rows["lends"] = ", ".join(
            f"{name} ({digest.hex()[:12]})" for name, digest in server.adapters.lent.items()
        )
    for what, value in rows.items():
        out.print(f"  {what:<7}  {value}")
