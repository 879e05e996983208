"""A swarm's servers as sessions use them: planned from the DHT and what was measured, opened over RPC."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from petalite.client.hops import Reply
from petalite.client.kept import Row
from petalite.errors import BadMessage, ConnectionLost, MissingBlocks
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Message
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.net.streams import Priority
from petalite.swarm.bans import Bans
from petalite.swarm.codecs import Codec, codec_named
from petalite.swarm.directory import Directory, ServerEntry
from petalite.swarm.messages import NONE, SESSION_METHOD, OpenSession, SessionOpened, Step, StepDone
from petalite.swarm.routing import Candidate, Hop, find_chain, star_link
from petalite.swarm.spans import Span

FRESH_S = 10.0  # a directory read so recently serves a new session
UNKNOWN_RTT_S = 0.1  # of a server never connected to
HOP_S = 0.001  # what software costs per hop, beside the link
POLL_S = 0.5  # between looks for a server of missing blocks; grows to POLL_MOST_S
POLL_MOST_S = 5.0
BULK_TOKENS = 16  # a step of more is a prefill, and gives way to decode steps


class SwarmServers:
    """Implements `hops.Servers` over a host and a directory."""

    def __init__(self, host: Host, directory: Directory, bans: Bans | None = None) -> None:
        self._host = host
        self._directory = directory
        self._bans = bans or Bans()

    async def plan(self, span: Span, *, fresh: bool, timeout_s: float) -> list[Hop]:
        """The cheapest chain over `span` now; waits for missing blocks until the time is up."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = POLL_S
        if fresh or self._directory.age_s > FRESH_S:
            await self._directory.refresh(timeout_s=max(timeout_s, 1.0))
        while True:
            try:
                return self._chain(span)
            except MissingBlocks:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_MOST_S)
            await self._directory.refresh(timeout_s=max(deadline_s - time.monotonic(), 1.0))

    async def open(self, hop: Hop, *, rows: int, max_length: int) -> RemoteHop:
        request = OpenSession(self._directory.model_id, hop.span.start, hop.span.end, rows, max_length)
        call = await self._host.open(hop.peer, SESSION_METHOD, encode(request), priority=Priority.INTERACTIVE)
        try:
            opened = decode(SessionOpened, _answer(await call.receive()).body)
            return RemoteHop(call, codec_named(opened.codec))
        except BaseException:
            call.end()
            raise

    def failed(self, peer: PeerId, error: Exception) -> None:
        # A server that is full or leaving did nothing wrong, but asking it again at once is no use either.
        del error
        self._bans.failed(peer, time.monotonic())

    def succeeded(self, peer: PeerId) -> None:
        self._bans.succeeded(peer)

    def _chain(self, span: Span) -> list[Hop]:
        candidates = [self._candidate(entry) for entry in self._directory.servers]
        random.shuffle(candidates)  # equal clients spread over equal servers
        return find_chain(candidates, span, star_link(self._one_way_s, HOP_S))

    def _candidate(self, entry: ServerEntry) -> Candidate:
        self._host.book.add(entry.peer, entry.addresses)
        penalty_s = self._bans.penalty_s(entry.peer, time.monotonic())
        return Candidate(entry.peer, entry.record.span, entry.record.block_ms / 1e3, penalty_s)

    def _one_way_s(self, peer: PeerId) -> float:
        return (self._host.rtt_s(peer) or UNKNOWN_RTT_S) / 2


class RemoteHop:
    """A session at a server, over one stream. Giving up a step closes it: the answer may still come."""

    def __init__(self, call: Call, codec: Codec) -> None:
        self.codec = codec
        self._call = call

    async def step(self, rows: Sequence[Row], data: memoryview, output: str) -> Reply:
        try:
            await self._call.send(encode(Step(tuple(rows), self.codec.name, output)), [data])
            message = _answer(await self._call.receive())
        except BaseException:
            self.close()
            raise
        done = decode(StepDone, message.body)
        if len(message.buffers) != (output != NONE):
            raise BadMessage(f"asked for {output} outputs, found {len(message.buffers)} buffers")
        answer = message.buffers[0] if message.buffers else memoryview(b"")
        return Reply(memoryview(answer), done.queue_ms / 1e3, done.compute_ms / 1e3)

    def close(self) -> None:
        self._call.end()


def _answer(message: Message | None) -> Message:
    if message is None:
        raise ConnectionLost("the server closed the session")
    return message
