"""`petalite.Node`: a full peer of a swarm inside an app. Joins, keeps part of the DHT, serves blocks when
asked.

Loads no torch before it serves: a bootstrap node is a `Node` that serves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from petalite.net.identity import Identity, PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.swarm.peer import PeerSettings, SwarmPeer

if TYPE_CHECKING:
    from petalite.model.checkpoint import Checkpoint
    from petalite.server.server import BlockServer, ServerSettings


class Node:
    """Listens on `listen` and joins through `peers`; without peers it is the first of a new swarm.

    With `lan`, peers on the local network find each other (needs the extra `lan`). With `peers_file`, known
    peers are saved there and joined through after a restart.

    An async context manager: leaving it withdraws what it announced and drains what it serves.
    """

    def __init__(
        self,
        *,
        listen: Iterable[str | Multiaddr] = ("/ip4/0.0.0.0/tcp/0",),
        peers: Iterable[str | Multiaddr] = (),
        identity: Identity | None = None,
        swarm_key: bytes | None = None,
        lan: bool = False,
        peers_file: Path | None = None,
    ) -> None:
        settings = PeerSettings(
            tuple(map(_address, listen)), tuple(map(_address, peers)), swarm_key, lan, peers_file
        )
        self.peer = SwarmPeer(identity or Identity.generate(), settings)
        self._serving = AsyncExitStack()

    @property
    def peer_id(self) -> PeerId:
        return self.peer.identity.peer_id

    @property
    def addresses(self) -> list[Multiaddr]:
        """Where others can dial this node, as they would write it down."""
        return self.peer.addresses

    async def __aenter__(self) -> Node:
        await self.peer.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._serving.aclose()
        finally:
            await self.peer.__aexit__(*exc_info)

    async def serve(
        self,
        path_or_repo: str,
        settings: ServerSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> BlockServer:
        """Serve blocks of a checkpoint until this node is left. `progress(done, total)` counts loaded blocks.

        `path_or_repo` may also be a model's id, `name@digest`: then its weights come from servers that hold
        them, and are kept in the cache folder. Raises InvalidCheckpoint, UnsupportedModel or InvalidArgument
        for what cannot be served, Unreachable where nobody gives the weights.
        """
        from petalite.server.server import BlockServer, ServerSettings

        settings = settings or ServerSettings()
        async with AsyncExitStack() as stack:
            checkpoint = await self._checkpoint(path_or_repo, settings.compute.cache, stack)
            server = BlockServer(self.peer, checkpoint, settings)
            await server.start(progress)
            stack.push_async_callback(server.close)
            self._serving.push_async_callback(stack.pop_all().aclose)
        return server

    async def _checkpoint(self, path_or_repo: str, cache: Path | None, stack: AsyncExitStack) -> Checkpoint:
        from petalite.model.checkpoint import Checkpoint
        from petalite.swarm.weights import names_model, open_model

        if not names_model(path_or_repo):
            return Checkpoint.open(path_or_repo)
        folder = None if cache is None else cache / "fetched"
        checkpoint, weights = await open_model(self.peer, path_or_repo, folder)
        stack.callback(weights.close)
        return checkpoint


def _address(address: str | Multiaddr) -> Multiaddr:
    return address if isinstance(address, Multiaddr) else Multiaddr.parse(address)
