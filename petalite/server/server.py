"""A server: one span of a model's blocks, announced in the DHT and served to sessions until told to leave.

Where its owner did not choose its blocks, it serves those where the swarm is weakest, and moves when that
changes enough. A move drains sessions, whose clients go on elsewhere, before it unloads anything.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petalite.dht.announcements import Announcement
from petalite.errors import NetworkError
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.net.identity import PeerId
from petalite.server.adapters import Adapters, read_lent
from petalite.server.giving import WeightsService, gives
from petalite.server.links import Links
from petalite.server.loaded import BlockLoader, ComputeSettings, LoadedBlocks, Progress
from petalite.server.memory import MemorySettings
from petalite.server.moving import MoveSettings, join, keep_placed
from petalite.server.resolving import Resolver
from petalite.server.sessions import SessionService, SessionSettings
from petalite.server.throughput import BlockSpeed, tokens_per_s
from petalite.server.training_calls import TrainingService
from petalite.server.training_memory import TrainingSettings
from petalite.swarm import records
from petalite.swarm.directory import Directory, ServerEntry
from petalite.swarm.peer import SwarmPeer
from petalite.swarm.placement import Holding, MoveCost
from petalite.swarm.records import HostedAdapter, ModelRecord, ServerRecord
from petalite.swarm.spans import Span
from petalite.version import __version__

logger = logging.getLogger(__name__)

_FIND_S = 10.0
_FAREWELL_S = 5.0  # for the DHT to hear that we leave
_LOOKS_PER_LINKS = 10  # of renewing the announcement, to one of measuring links


@dataclass(frozen=True, slots=True)
class ServerSettings:
    blocks: Span | None = None  # None: as many as fit, where the swarm is weakest
    name: str | None = None  # of the model in the swarm; None: the checkpoint's own
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    sessions: SessionSettings = field(default_factory=SessionSettings)
    moving: MoveSettings = field(default_factory=MoveSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    adapters: tuple[Path, ...] = ()  # PEFT folders of LoRAs to lend
    record_ttl_s: int = 90  # announcements live so long, and are renewed three times in it
    drain_s: float = 10.0  # sessions may go on for so long once the server is told to leave


class BlockServer:
    """Blocks of one checkpoint on one peer. `start` loads, measures and announces; `close` leaves."""

    def __init__(self, peer: SwarmPeer, checkpoint: Checkpoint, settings: ServerSettings) -> None:
        self.peer = peer
        self.checkpoint = checkpoint
        self.settings = settings
        self.model_id = checkpoint.model_id(settings.name)
        everything = Span(0, checkpoint.config.n_blocks)
        self.directory = Directory(peer.dht, self.model_id, everything)  # as of the last look
        self.failed: asyncio.Future[None] = asyncio.Future()  # done if the server cannot go on
        self._announcement: Announcement | None = None
        self._claim: Span | None = None
        self._loaded: LoadedBlocks | None = None  # None: nothing is served, while it loads
        self._speed: BlockSpeed | None = None  # of the blocks served last
        self._load_s = 0.0
        self._leaving = False
        self._closing = AsyncExitStack()

    async def start(self, progress: Progress | None = None) -> None:
        """Raises what choosing, loading and announcing can raise; then nothing is left behind."""
        async with AsyncExitStack() as stack:
            thread = ComputeThread()
            stack.callback(thread.close)
            settings = self.settings
            self._loader = BlockLoader(self.checkpoint, settings.compute, settings.memory, thread)
            lent = read_lent(self.settings.adapters, self.checkpoint)
            self.adapters = Adapters(settings.training.adapter_bytes, lent)
            self.links = Links(self.peer.host)
            stack.push_async_callback(self._withdraw)
            fixed = self._loader.fixed_span(settings.blocks)
            self.pinned = fixed is not None
            self.span = fixed or await join(self, self._loader.length(), settings.moving)
            self._claim = None
            if not self.pinned:
                await self._announce()
            self._loaded = loaded = await self._load(self.span, progress)
            resolve = Resolver(self.peer.host, self.directory)
            self.sessions = SessionService(
                loaded.backend, self.model_id, self.peer.host, resolve, settings.sessions, self.adapters
            )
            self.training = TrainingService(
                loaded.backend, self.model_id, self.peer.host, self.adapters, settings.training
            )
            stack.push_async_callback(self._drain)
            if gives(self.checkpoint):
                WeightsService(self.peer.host, self.checkpoint, self.model_id)
            await self._announce()
            stack.push_async_callback(self._withdraw)  # before it drains
            stack.push_async_callback(_end, self._spawn(self._keep_true()))
            if not self.pinned:
                stack.push_async_callback(_end, self._spawn(keep_placed(self, settings.moving)))
            self._closing = stack.pop_all()

    def _spawn(self, life: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something without which the server cannot go on."""
        task = asyncio.create_task(life)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """For the first reason that there is."""
        if not self.failed.done():
            self.failed.set_exception(error)

    async def close(self) -> None:
        """Announce leaving, let sessions end for `drain_s`, cut the rest with a code that sends them
        elsewhere.

        Takes at most 5 s more than `drain_s`.
        """
        self._leaving = True
        await self._closing.aclose()

    @property
    def loaded(self) -> LoadedBlocks:
        """What is served now. Raises AssertionError while it moves."""
        assert self._loaded is not None
        return self._loaded

    @property
    def quant(self) -> str:
        """The format of the weights."""
        return self._loader.quant

    @property
    def tokens_per_s(self) -> float:
        """What it can carry, as announced; 0 before it has measured itself."""
        if self._speed is None:
            return 0.0
        token_bytes = self.checkpoint.config.hidden_size * self._loader.dtype.itemsize
        return tokens_per_s(self._speed, len(self.span), token_bytes, self.links.bytes_per_s)

    async def _drain(self, drain_s: float | None = None) -> None:
        wait_s = self.settings.drain_s if drain_s is None else drain_s
        await asyncio.gather(self.sessions.drain(wait_s), self.training.drain(wait_s))

    async def _withdraw(self) -> None:
        announcement, self._announcement = self._announcement, None
        if announcement is not None:
            with suppress(TimeoutError):  # the record then ends by itself
                async with asyncio.timeout(_FAREWELL_S):
                    await announcement.withdraw()

    async def _load(self, span: Span, progress: Progress | None = None) -> LoadedBlocks:
        began_s = time.monotonic()
        loaded = await self._loader.load(span, progress)
        self._load_s = time.monotonic() - began_s
        self._speed = loaded.speed
        return loaded

    # -- being placed (`moving.Movable`) -----------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self.peer.identity.peer_id

    @property
    def n_blocks(self) -> int:
        return self.checkpoint.config.n_blocks

    async def holdings(self) -> list[Holding]:
        await self.directory.refresh(timeout_s=_FIND_S)
        entries = [entry for entry in self.directory.servers if entry.peer != self.peer_id]
        if self._announcement is not None:  # of ourselves we know more than the DHT may
            entries.append(ServerEntry(self.peer_id, self._record()))
        return holdings_of(entries)

    async def claim(self, span: Span | None) -> None:
        if self._loaded is None and span is not None:
            self.span = span  # it joins: what it claims is what it will load
        self._claim = span
        await self._announce()

    def cost(self) -> MoveCost:
        if self._loaded is None:
            return MoveCost(self._load_s)
        backend = self._loaded.backend
        reserved = backend.budget.reserved_bytes // backend.span.token_bytes()
        return MoveCost(self.settings.moving.drain_s + self._load_s, reserved)

    async def prepare(self, span: Span) -> None:
        await asyncio.to_thread(self._loader.bring, span)

    async def move(self, span: Span) -> None:
        """Drain, unload, load and serve; if the new blocks cannot be loaded, the old ones again. Raises what
        announcing can raise where that cannot be said; then it goes on as before.
        """
        source, loaded = self.span, self._loaded
        self.span, self._loaded, self._claim = span, None, None
        try:
            await self._announce()
        except BaseException:
            self.span, self._loaded = source, loaded
            raise
        await self._drain(self.settings.moving.drain_s)
        self.sessions.suspend()
        self.training.suspend()
        await self._loader.free()
        try:
            self._loaded = await self._load(span)
        except Exception as error:
            logger.error("cannot load blocks %s, going back to %s: %s", span, source, error)
            self.span = source
            try:
                self._loaded = await self._load(source)
            except Exception as again:
                await self._withdraw()
                self._fail(again)
                raise
        self.sessions.resume(self.loaded.backend)
        self.training.resume(self.loaded.backend)
        await self._announce()

    # -- announcing --------------------------------------------------------------------------------------

    def _record(self) -> ServerRecord:
        loaded, claim, speed = self._loaded, self._claim, self._speed
        dtype = self._loader.dtype
        return ServerRecord(
            start=self.span.start,
            end=self.span.end,
            addresses=tuple(map(str, self.peer.addresses))[: records.MAX_ADDRESSES],
            dtype=str(dtype).removeprefix("torch."),
            quant=self._loader.quant,
            block_ms=speed.decode_s * 1e3 if speed else 0.0,
            free_tokens=loaded.backend.free_tokens() if loaded else 0,
            version=__version__,
            tokens_per_s=self.tokens_per_s,
            prefill_ms=speed.prefill_s * 1e3 if speed else 0.0,
            waiting_tokens=loaded.backend.waiting_tokens if loaded else 0,
            links=self.links.to,
            serving=loaded is not None,
            pinned=self.pinned,
            claim_start=claim.start if claim else 0,
            claim_end=claim.end if claim else 0,
            gives_weights=loaded is not None and gives(self.checkpoint),
            sessions=self.sessions.count if loaded else 0,
            kept_mib=self.sessions.kept_bytes >> 20 if loaded else 0,
            adapters=tuple(HostedAdapter(name, digest) for name, digest in self.adapters.lent.items()),
            training_tokens=self.training.trainer.memory.most_tokens if loaded else 0,
        )

    def _entries(self) -> dict[tuple[str, bytes], bytes]:
        value = records.pack(self._record())
        entries = {
            (records.SERVERS, name.encode()): value for name in records.server_names(self.model_id, self.span)
        }
        model = ModelRecord(self.model_id, self.n_blocks)
        entries[records.MODELS, records.CATALOGUE.encode()] = records.pack(model)
        return entries

    async def _announce(self) -> None:
        """Say what is so now; once it leaves, there is nothing more to say than that."""
        if self._leaving:
            return
        entries = self._entries()
        if self._announcement is None:
            self._announcement = await self.peer.dht.announce_all(entries, self.settings.record_ttl_s)
        elif entries != self._announcement.entries:
            await self._announcement.update(entries)

    async def _keep_true(self) -> None:
        """Announce anew when what is announced has changed; the DHT itself keeps it alive meanwhile."""
        looks = 0
        while True:
            try:
                if looks % _LOOKS_PER_LINKS == 0 and self._loaded is not None:
                    await self.directory.refresh(timeout_s=_FIND_S)
                    await self.links.look(self.span, self.directory.servers)
                if self._announcement is not None:
                    await self._announce()
            except NetworkError as error:
                logger.warning("the announcement could not be renewed: %s", error)
            looks += 1
            await asyncio.sleep(self.settings.record_ttl_s / 3)


def holdings_of(entries: Sequence[ServerEntry]) -> list[Holding]:
    """Records as placement sees them. Who has not measured itself yet is taken for as fast as most."""
    known = [entry.record.tokens_per_s for entry in entries if entry.record.tokens_per_s]
    usual = statistics.median(known) if known else 1.0
    return [
        Holding(
            entry.peer,
            entry.record.span,
            entry.record.tokens_per_s or usual,
            entry.record.serving,
            entry.record.claim,
            entry.record.pinned,
        )
        for entry in entries
    ]


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what had gone wrong in it is raised here."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
