"""`petalite.Swarm`: a client's place in a swarm, and the models it can use there."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack

from petalite.client.model import AsyncDistributedModel, open_model
from petalite.client.servers import SwarmServers
from petalite.client.settings import Routing, SessionSettings, TrainingSettings
from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.swarm.bans import Bans
from petalite.swarm.codecs import raw_codec, session_codec
from petalite.swarm.directory import Directory
from petalite.swarm.peer import PeerSettings, SwarmPeer
from petalite.swarm.spans import Span
from petalite.swarm.weights import names_model
from petalite.swarm.weights import open_model as fetch_model


class Swarm:
    """Joined through `peers` (addresses as nodes print them) or, with `lan`, whoever is found on the local
    network; an async context manager.

    A swarm client dials and is not dialled: it reads the DHT and stands in nobody's table.
    """

    def __init__(
        self,
        peers: Iterable[str | Multiaddr] = (),
        *,
        identity: Identity | None = None,
        swarm_key: bytes | None = None,
        lan: bool = False,
    ) -> None:
        addresses = tuple(peer if isinstance(peer, Multiaddr) else Multiaddr.parse(peer) for peer in peers)
        if not addresses and not lan:
            raise InvalidArgument("a swarm is joined through at least one peer; give its address")
        settings = PeerSettings(bootstrap=addresses, swarm_key=swarm_key, lan=lan)
        self._peer = SwarmPeer(identity or Identity.generate(), settings)
        self._bans = Bans()
        self._models = AsyncExitStack()

    async def __aenter__(self) -> Swarm:
        await self._peer.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._models.aclose()
        finally:
            await self._peer.__aexit__(*exc_info)

    async def model(
        self,
        path_or_repo: str,
        *,
        name: str | None = None,
        dtype: str = AUTO,
        settings: SessionSettings = SessionSettings(),
        routing: Routing = Routing(),
        training: TrainingSettings = TrainingSettings(),
        threads: int | None = None,
    ) -> AsyncDistributedModel:
        """A model of this swarm: its edges are loaded here, its blocks are found when they are needed.

        A model may also be given by its id, `name@digest`: its tokenizer and edges then come from servers
        that hold them, checked against the id. `name` is the model's name in the swarm where it is not the
        folder's or repository's; `dtype` is what the edges compute in, by default what the checkpoint was
        saved in; `threads` is with how many, at most the cores there are. The model closes with the swarm.
        """

        async def servers(checkpoint: Checkpoint, thread: ComputeThread) -> SwarmServers:
            span = Span(0, checkpoint.config.n_blocks)
            directory = Directory(self._peer.dht, checkpoint.model_id(name), span)
            codec = (
                session_codec(settings.wire) if settings.wire else raw_codec(compute_dtype(checkpoint, AUTO))
            )
            token_bytes = codec.nbytes(1, checkpoint.config.hidden_size)
            return SwarmServers(self._peer.host, directory, self._bans, routing, token_bytes=token_bytes)

        source: str | Checkpoint = path_or_repo
        if names_model(path_or_repo):
            source, weights = await fetch_model(self._peer, path_or_repo)
            self._models.callback(weights.close)
        model = await open_model(
            source, servers, dtype=dtype, settings=settings, training=training, threads=threads
        )
        self._models.push_async_callback(model.close)
        return model
