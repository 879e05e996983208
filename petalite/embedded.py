"""Every block in this process: `load(peers=None)` goes through the server's backend, without sockets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from petalite.client.hops import Reply
from petalite.client.kept import Row
from petalite.client.model import AsyncDistributedModel, open_model
from petalite.client.session import SessionSettings
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.span import load_span
from petalite.net.identity import PeerId
from petalite.server.backend import Backend, wanted_outputs
from petalite.swarm.codecs import Codec, raw_codec
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

HERE = PeerId(bytes(32))
"""Stands in traces for this process."""

CACHE_TOKENS = 1 << 24  # nobody else uses this memory, and it is only taken as rows fill


class EmbeddedServers:
    """Implements `client.hops.Servers`: one hop that holds everything and never fails."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def plan(self, span: Span, *, fresh: bool, timeout_s: float) -> list[Hop]:
        return [Hop(HERE, span)]

    async def open(self, hop: Hop, *, rows: int, max_length: int) -> EmbeddedHop:
        opened = await self._backend.open_rows(rows, max_length, hop.span.start, hop.span.end)
        return EmbeddedHop(self._backend, hop.span, opened)

    def failed(self, peer: PeerId, error: Exception) -> None:
        """Nobody else could do better."""

    def succeeded(self, peer: PeerId) -> None:
        """As always."""


class EmbeddedHop:
    """Rows of the backend's cache."""

    def __init__(self, backend: Backend, span: Span, rows: list[int]) -> None:
        self.codec: Codec = raw_codec(backend.span.dtype)
        self._backend = backend
        self._span = span
        self._rows = rows

    async def step(self, rows: Sequence[Row], data: memoryview, output: str) -> Reply:
        hidden = self.codec.decode(data, self._backend.span.config.hidden_size)
        segments = [Segment(self._rows[row], position, n_tokens) for row, position, n_tokens in rows]
        outputs, timing = await self._backend.step(hidden, segments, self._span.start, self._span.end)
        wanted = self.codec.encode(wanted_outputs(outputs, rows, output))
        return Reply(memoryview(wanted), timing.queue_s, timing.compute_s)

    def close(self) -> None:
        rows, self._rows = self._rows, []
        self._backend.drop_rows(rows)


async def open_embedded(
    path_or_repo: str, *, dtype: str = AUTO, settings: SessionSettings = SessionSettings()
) -> AsyncDistributedModel:
    """A model with all its blocks here. Edges and blocks share one thread, and so the cores."""

    async def servers(checkpoint: Checkpoint, thread: ComputeThread) -> EmbeddedServers:
        load = partial(load_span, dtype=compute_dtype(checkpoint, dtype))
        blocks = await thread.run(load, checkpoint, 0, checkpoint.config.n_blocks)
        return EmbeddedServers(Backend(blocks, cache_tokens=CACHE_TOKENS, thread=thread))

    return await open_model(path_or_repo, servers, dtype=dtype, settings=settings)
