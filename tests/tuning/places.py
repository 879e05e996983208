"""Servers of real blocks in this process, each with a part of the model: what a swarm would be, without
links.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from petalite.client.hops import NOTHING_MORE, Wanted
from petalite.client.loops import LoopThread
from petalite.client.model import open_model
from petalite.client.settings import TrainingSettings
from petalite.client.sync import DistributedModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.span import load_span
from petalite.net.identity import PeerId
from petalite.server.adapters import Adapters
from petalite.server.backend import Backend
from petalite.server.training import Trainer
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span


class Places:
    """Implements what passes need of `client.hops.Servers`: one server for each span, and none that fails."""

    pushing = False

    def __init__(self, checkpoint: Checkpoint, thread: ComputeThread, spans: Sequence[Span]) -> None:
        self.model_id = checkpoint.model_id()
        self.spans = {PeerId(number.to_bytes(32, "big")): span for number, span in enumerate(spans)}
        self.trainers = {}
        for peer, span in self.spans.items():
            blocks = load_span(checkpoint, span.start, span.end)
            backend = Backend(blocks, cache_tokens=4096, thread=thread)
            self.trainers[peer] = Trainer(backend, self.model_id, Adapters(1 << 24))

    async def plan(
        self,
        span: Span,
        *,
        fresh: bool,
        timeout_s: float,
        replayed_tokens: int = 0,
        wanted: Wanted = NOTHING_MORE,
    ) -> list[Hop]:
        return [
            Hop(peer, Span(max(held.start, span.start), min(held.end, span.end)))
            for peer, held in self.spans.items()
            if max(held.start, span.start) < min(held.end, span.end)
        ]

    def training(self, peer: PeerId, settings: TrainingSettings) -> Trainer:
        return self.trainers[peer]

    def failed(self, peer: PeerId, error: Exception) -> None:
        raise error

    def succeeded(self, peer: PeerId) -> None:
        """As always."""


def open_over(folder: Path, spans: Sequence[Span]) -> DistributedModel:
    async def places(checkpoint: Checkpoint, thread: ComputeThread) -> Any:
        return Places(checkpoint, thread, spans)

    async def opened() -> tuple[Any, AsyncExitStack]:
        async with AsyncExitStack() as stack:
            model = await stack.enter_async_context(await open_model(str(folder), places))
            return model, stack.pop_all()

    loop = LoopThread()
    model, closing = loop.run(opened())
    return DistributedModel(model, loop, closing)
