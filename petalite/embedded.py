"""Every block in this process: `load(peers=None)` goes through the server's backend, without sockets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from petalite.client.adapters import AdapterSource
from petalite.client.hops import NOTHING_MORE, Answer, Listener, Opening, Wanted
from petalite.client.model import AsyncDistributedModel, open_model
from petalite.client.settings import SessionSettings, TrainingSettings
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.span import load_span
from petalite.net.identity import PeerId
from petalite.server.adapters import Adapters, HeldAdapter
from petalite.server.backend import Backend, Rows
from petalite.server.memory import available_bytes
from petalite.server.steps import checked_forks, wanted_outputs
from petalite.server.training import Trainer
from petalite.server.training_memory import TrainingSettings as TrainerSettings
from petalite.swarm.codecs import Codec, raw_codec
from petalite.swarm.messages import FromClient, HopReport, Progress, Step, StepDone
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from petalite.swarm.training import SpanTraining

HERE = PeerId(bytes(32))
"""Stands in traces for this process."""

CACHE_TOKENS = 1 << 24  # nobody else uses this memory, and it is only taken as rows fill


class EmbeddedServers:
    """Implements `client.hops.Servers`: one hop that holds everything and never fails."""

    def __init__(self, backend: Backend, model_id: str) -> None:
        self._backend = backend
        self.model_id = model_id
        room = available_bytes(backend.span.device) // 4  # the budget is no bound here, memory is
        self._adapters = Adapters(room)
        self._trainer = Trainer(backend, model_id, self._adapters, TrainerSettings(limit_bytes=room))

    pushing = False

    async def plan(
        self,
        span: Span,
        *,
        fresh: bool,
        timeout_s: float,
        replayed_tokens: int = 0,
        wanted: Wanted = NOTHING_MORE,
    ) -> list[Hop]:
        return [Hop(HERE, span)]

    def training(self, peer: PeerId, settings: TrainingSettings) -> SpanTraining:
        """The training calls of this process."""
        return self._trainer

    async def is_much_better_than(self, chain: Sequence[Hop], history_tokens: int) -> bool:
        return False

    async def bring(self, hop: Hop, adapter: AdapterSource) -> None:
        part = adapter.part(hop.span)
        if part is not None and part.blob is not None:
            await self._trainer.put_adapter(part.blob)

    async def open(self, hop: Hop, opening: Opening, listener: Listener) -> EmbeddedHop:
        span, part = hop.span, None if opening.adapter is None else opening.adapter.part(hop.span)
        with ExitStack() as stack:
            adapter = stack.enter_context(self._adapters.use(None if part is None else part.digest))
            rows = await self._backend.open_rows(opening.rows, opening.max_length, span.start, span.end)
            stack.callback(self._backend.drop_rows, rows)
            return EmbeddedHop(self._backend, span, rows, adapter, listener, stack.pop_all())

    def failed(self, peer: PeerId, error: Exception) -> None:
        """Nobody else could do better."""

    def succeeded(self, peer: PeerId) -> None:
        """As always."""


class EmbeddedHop:
    """Rows of the backend's cache. A step is answered before its sending returns."""

    def __init__(
        self,
        backend: Backend,
        span: Span,
        rows: Rows,
        adapter: HeldAdapter | None,
        listener: Listener,
        closing: ExitStack,
    ) -> None:
        """`closing` frees the rows, and lets go of the adapter."""
        self.codec: Codec = raw_codec(backend.span.dtype)
        self._backend = backend
        self._span = span
        self._rows = rows
        self._adapter = adapter
        self._listener = listener
        self._closing = closing
        self._reached = 0

    async def send(self, message: FromClient, data: memoryview | None = None) -> None:
        assert isinstance(message, Step) and data is not None
        hidden = self.codec.decode(data, self._backend.span.config.hidden_size)
        if message.forks:
            await self._backend.fork(checked_forks(message, self._rows.numbers))
        segments = [Segment(self._rows.numbers[row], position, n) for row, position, n in message.rows]
        outputs, timing = await self._backend.step(
            hidden, segments, self._span.start, self._span.end, adapter=self._adapter
        )
        self._reached = max(self._reached, message.number)
        hops = (HopReport(timing.queue_s * 1e3, timing.compute_s * 1e3),)
        done = StepDone(message.rows, self.codec.name, message.number, message.epoch, hops)
        wanted = self.codec.encode(wanted_outputs(outputs, message.rows, message.output))
        self._listener.answered(Answer(done, memoryview(wanted)))

    @property
    def traffic(self) -> tuple[int, int]:
        return 0, 0

    async def probe(self) -> Progress:
        return Progress(self._reached, self._reached)

    def close(self) -> None:
        self._closing.close()


async def open_embedded(
    path_or_repo: str,
    *,
    dtype: str = AUTO,
    settings: SessionSettings = SessionSettings(),
    training: TrainingSettings = TrainingSettings(),
    threads: int | None = None,
) -> AsyncDistributedModel:
    """A model with all its blocks here. Edges and blocks share one thread, and so the cores."""

    async def servers(checkpoint: Checkpoint, thread: ComputeThread) -> EmbeddedServers:
        load = partial(load_span, dtype=compute_dtype(checkpoint, dtype))
        blocks = await thread.run(load, checkpoint, 0, checkpoint.config.n_blocks)
        backend = Backend(blocks, cache_tokens=CACHE_TOKENS, thread=thread)
        return EmbeddedServers(backend, checkpoint.model_id())

    return await open_model(
        path_or_repo, servers, dtype=dtype, settings=settings, training=training, threads=threads
    )
