"""A server: one span of a model's blocks, announced in the DHT and served to sessions until told to leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import torch

from petalite.dht.announcements import Announcement
from petalite.errors import InvalidArgument, NetworkError, Unreachable
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.span import BlockSpan, load_span
from petalite.net.identity import PeerId
from petalite.server.backend import Backend
from petalite.server.memory import available_bytes, block_bytes
from petalite.server.sessions import SessionService
from petalite.server.throughput import block_seconds
from petalite.swarm import records
from petalite.swarm.directory import Directory
from petalite.swarm.peer import SwarmPeer
from petalite.swarm.placement import Holding, join_span
from petalite.swarm.records import ModelRecord, ServerRecord
from petalite.swarm.spans import Span
from petalite.version import __version__

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_FIND_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    blocks: Span | None = None  # None: as many as fit half of the free memory, where the swarm is weakest
    dtype: str = AUTO  # to compute in
    name: str | None = None  # of the model in the swarm; None: the checkpoint's own
    cache_tokens: int = 65536  # room for keys and values of so many tokens, all sessions together
    threads: int | None = None  # of tensor work; None: torch's choice
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
        self._closing = AsyncExitStack()

    async def start(self, progress: Progress | None = None) -> None:
        """Raises what choosing, loading and announcing can raise; then nothing is left behind."""
        async with AsyncExitStack() as stack:
            self.thread = ComputeThread()
            stack.callback(self.thread.close)
            self.span = await self._choose_span()
            blocks = await self.thread.run(self._load, progress)
            self.block_s = await self.thread.run(block_seconds, blocks)
            self.backend = Backend(blocks, cache_tokens=self.settings.cache_tokens, thread=self.thread)
            self.sessions = SessionService(self.backend, self.model_id, self.peer.host, self._resolve)
            announcement = await self.peer.dht.announce_all(self._entries(), self.settings.record_ttl_s)
            stack.push_async_callback(self._leave, announcement)
            updates = asyncio.create_task(self._keep_true(announcement))
            stack.push_async_callback(_end, updates)
            self._closing = stack.pop_all()

    async def close(self) -> None:
        """Announce leaving, let sessions end for `drain_s`, cut the rest with a code that sends them
        elsewhere.
        """
        await self._closing.aclose()

    async def _leave(self, announcement: Announcement) -> None:
        await announcement.withdraw()
        await self.sessions.drain(self.settings.drain_s)

    async def _choose_span(self) -> Span:
        config = self.checkpoint.config
        if self.settings.blocks is not None:
            if self.settings.blocks.end > config.n_blocks:
                raise InvalidArgument(
                    f"blocks {self.settings.blocks} are outside the model; {self.checkpoint.name} has blocks "
                    f"0:{config.n_blocks}"
                )
            return self.settings.blocks
        size = block_bytes(config, compute_dtype(self.checkpoint, self.settings.dtype))
        length = min(available_bytes() // 2 // size, config.n_blocks)
        if length < 1:
            raise InvalidArgument(
                f"one block of {self.checkpoint.name} needs {size >> 20} MiB, half of the free memory is "
                f"{available_bytes() >> 21} MiB; free some, or choose blocks yourself with --blocks"
            )
        await self.directory.refresh(timeout_s=_FIND_S)
        held = [
            Holding(entry.peer, entry.record.span, 1e3 / max(entry.record.block_ms, 1e-6))
            for entry in self.directory.servers
            if entry.peer != self.peer.identity.peer_id
        ]
        return join_span(held, config.n_blocks, length)

    def _load(self, progress: Progress | None) -> BlockSpan:
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        dtype = compute_dtype(self.checkpoint, self.settings.dtype)
        return load_span(self.checkpoint, self.span.start, self.span.end, dtype=dtype, progress=progress)

    async def _resolve(self, peer: PeerId) -> None:
        """Find out where a server of this model listens, that a session is to be pushed to."""
        for fresh in (False, True):
            if fresh:
                await self.directory.refresh(timeout_s=_FIND_S)
            for entry in self.directory.servers:
                if entry.peer == peer:
                    self.peer.host.book.add(peer, entry.addresses)
                    return
        raise Unreachable(f"{peer.short()} announces no blocks of {self.model_id}")

    # -- announcing --------------------------------------------------------------------------------------

    def _entries(self) -> dict[tuple[str, bytes], bytes]:
        record = ServerRecord(
            start=self.span.start,
            end=self.span.end,
            addresses=tuple(map(str, self.peer.addresses))[: records.MAX_ADDRESSES],
            dtype=str(self.backend.span.dtype).removeprefix("torch."),
            quant="none",
            block_ms=self.block_s * 1e3,
            free_tokens=self.backend.free_tokens(),
            version=__version__,
        )
        value = records.pack(record)
        entries = {
            (records.SERVERS, name.encode()): value for name in records.server_names(self.model_id, self.span)
        }
        model = ModelRecord(self.model_id, self.checkpoint.config.n_blocks)
        entries[records.MODELS, records.CATALOGUE.encode()] = records.pack(model)
        return entries

    async def _keep_true(self, announcement: Announcement) -> None:
        """Announce anew when what is announced has changed; the DHT itself keeps it alive meanwhile."""
        while True:
            await asyncio.sleep(self.settings.record_ttl_s / 3)
            entries = self._entries()
            if entries == announcement.entries:
                continue
            try:
                await announcement.update(entries)
            except NetworkError as error:
                logger.warning("the announcement could not be renewed: %s", error)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what had gone wrong in it is raised here."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
