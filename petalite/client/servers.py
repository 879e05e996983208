"""A swarm's servers as sessions use them: planned from the DHT and what was measured, opened over RPC."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from petalite.client.hops import Answer, Listener, Opening
from petalite.client.settings import RING, THROUGHPUT, Routing
from petalite.errors import (
    BadMessage,
    ConnectionLost,
    IdleClosed,
    MissingBlocks,
    PetaliteError,
    ShuttingDown,
)
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Message
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.net.streams import Priority
from petalite.swarm.bans import PENALTY_S, Bans
from petalite.swarm.codecs import Codec, codec_named
from petalite.swarm.directory import Directory, ServerEntry
from petalite.swarm.messages import (
    DECODE_TOKENS,
    FROM_SERVER,
    SESSION_METHOD,
    FromClient,
    FromServer,
    LinkDown,
    OpenSession,
    Probe,
    Progress,
    SessionOpened,
    Step,
    StepDone,
    read,
    write,
)
from petalite.swarm.routing import (
    Candidate,
    Hop,
    LinkCost,
    chain_cost,
    find_chain,
    ring_link,
    sample_chain,
    star_link,
)
from petalite.swarm.spans import Span

FRESH_S = 10.0  # a directory read so recently serves a new session
KNOWN_S = 120.0  # one read so recently serves to replace a server; whoever left since is found out
LOOK_S = 5.0  # for a look at whether there is a better chain
QUEUE_MOST_S = 10.0  # of what a server says that waits there: it is up to 30 s old, and a liar's may be any
MUCH_BETTER = 0.6  # of the present chain's time: what a change has to bring to be worth a replay
UNKNOWN_RTT_S = 0.1  # of a server never connected to
HOP_S = 0.001  # what software costs per hop, beside the link
LEAVING_S = 15.0  # what a server said it leaves is avoided for so long, as records may still tell of it
POLL_S = 0.5  # between looks for a server of missing blocks; grows to POLL_MOST_S
POLL_MOST_S = 5.0


class SwarmServers:
    """Implements `hops.Servers` over a host and a directory."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        bans: Bans | None = None,
        routing: Routing = Routing(),
    ) -> None:
        self.routing = routing
        self._host = host
        self._directory = directory
        self._bans = bans or Bans()
        self._leaving: dict[PeerId, tuple[Span, float]] = {}  # blocks, and until when they are avoided

    @property
    def pushing(self) -> bool:
        return self.routing.route == RING

    async def plan(self, span: Span, *, fresh: bool, timeout_s: float) -> list[Hop]:
        """A chain over `span`; waits for missing blocks until the time is up.

        `fresh` asks for another chain than the last: from what is known, if that has servers that did not
        fail lately, else from a new look at the DHT.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        pause_s = POLL_S
        if fresh and self._directory.age_s <= KNOWN_S:
            try:
                return self._chain(span, banned=False)
            except MissingBlocks:
                pass  # nobody is left whom we know
        if fresh or self._directory.age_s > FRESH_S:
            await self._directory.refresh(timeout_s=max(timeout_s, 1.0))
        while True:
            try:
                return self._chain(span)
            except MissingBlocks:
                left_s = deadline_s - asyncio.get_running_loop().time()
                if left_s <= 0:
                    raise
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_MOST_S)
            await self._directory.refresh(timeout_s=max(deadline_s - asyncio.get_running_loop().time(), 1.0))

    async def open(self, hop: Hop, opening: Opening, listener: Listener) -> RemoteHop:
        request = OpenSession(
            self._directory.model_id,
            hop.span.start,
            hop.span.end,
            opening.rows,
            opening.max_length,
            opening.token,
            opening.successor,
            opening.wait_s,
            opening.codec,
        )
        call = await self._host.open(hop.peer, SESSION_METHOD, encode(request), priority=Priority.INTERACTIVE)
        try:
            message = await call.receive()
            if message is None:
                raise ConnectionLost("the server ended the session unasked")
            return RemoteHop(call, codec_named(decode(SessionOpened, message.body).codec), listener)
        except BaseException:
            call.end()
            raise

    def failed(self, peer: PeerId, error: Exception) -> None:
        now_s = asyncio.get_running_loop().time()
        if isinstance(error, ShuttingDown):
            # No failure: it may be back, or has moved, and other blocks of it are as good as anybody's.
            for entry in self._directory.servers:
                if entry.peer == peer:
                    self._leaving[peer] = entry.record.span, now_s + LEAVING_S
        elif not isinstance(error, IdleClosed):
            # A server that is full did nothing wrong, but asking it again at once is no use either.
            self._bans.failed(peer, now_s)

    def succeeded(self, peer: PeerId) -> None:
        self._bans.succeeded(peer)

    async def is_much_better_than(self, chain: Sequence[Hop]) -> bool:
        """Whether a chain over the same blocks would take a fraction of the time, as far as is known."""
        span = Span(chain[0].span.start, chain[-1].span.end)
        if self._directory.age_s > FRESH_S:
            await self._directory.refresh(timeout_s=LOOK_S)
        candidates = self._candidates()
        now_s = chain_cost(candidates, chain, self._link)
        best_s = chain_cost(candidates, find_chain(candidates, span, self._link), self._link)
        return best_s < MUCH_BETTER * now_s

    def _chain(self, span: Span, *, banned: bool = True) -> list[Hop]:
        """Without servers that failed lately, if not `banned`."""
        candidates = [one for one in self._candidates() if banned or not one.penalty_s]
        if self.routing.aim == THROUGHPUT:
            return sample_chain(candidates, span, random)
        random.shuffle(candidates)  # equal clients spread over equal servers
        return find_chain(candidates, span, self._link)

    @property
    def _link(self) -> LinkCost:
        if not self.pushing:
            return star_link(self._one_way_s, HOP_S)
        said_s = {
            (one.peer, link.peer): link.rtt_ms / 2e3
            for one in self._directory.servers
            for link in one.record.links
        }
        return ring_link(self._one_way_s, HOP_S, lambda source, target: said_s.get((source, target)))

    def _candidates(self) -> list[Candidate]:
        return [
            self._candidate(one)
            for one in self._directory.servers
            if one.record.serving and self.routing.permits(one.peer)
        ]

    def _candidate(self, entry: ServerEntry) -> Candidate:
        self._host.book.add(entry.peer, entry.addresses)
        now_s, record = asyncio.get_running_loop().time(), entry.record
        left, until_s = self._leaving.get(entry.peer, (None, 0.0))
        is_left = left == record.span and now_s < until_s
        penalty_s = self._bans.penalty_s(entry.peer, now_s) + (PENALTY_S if is_left else 0.0)
        queue_s = record.waiting_tokens / record.tokens_per_s if record.tokens_per_s else 0.0
        return Candidate(
            entry.peer, record.span, record.block_ms / 1e3, penalty_s, min(queue_s, QUEUE_MOST_S)
        )

    def _one_way_s(self, peer: PeerId) -> float:
        return (self._host.rtt_s(peer) or UNKNOWN_RTT_S) / 2


class RemoteHop:
    """A session at a server, over one stream, which a task reads until the session ends."""

    def __init__(self, call: Call, codec: Codec, listener: Listener) -> None:
        self.codec = codec
        self._call = call
        self._listener = listener
        self._probed: asyncio.Future[Progress] | None = None
        self._reading = asyncio.create_task(self._read())

    async def send(self, message: FromClient, data: memoryview | None = None) -> None:
        if isinstance(message, Step):
            longest = max(n_tokens for _, _, n_tokens in message.rows)
            self._call.priority = Priority.INTERACTIVE if longest <= DECODE_TOKENS else Priority.BULK
        await self._call.send(write(message), [] if data is None else [data])

    async def probe(self) -> Progress:
        if self._probed is None or self._probed.done():
            self._probed = asyncio.get_running_loop().create_future()
            await self.send(Probe())
        return await asyncio.shield(self._probed)

    def close(self) -> None:
        self._reading.cancel()
        self._call.end()
        if self._probed is not None:
            self._probed.cancel()

    async def _read(self) -> None:
        error: PetaliteError = ConnectionLost("the server ended the session unasked")
        try:
            while (message := await self._call.receive()) is not None:
                self._heard(read(FROM_SERVER, message.body), message)
        except PetaliteError as failure:
            error = failure
        self._listener.lost(error)

    def _heard(self, said: FromServer, message: Message) -> None:
        match said:
            case StepDone():
                if len(message.buffers) > 1:
                    raise BadMessage(f"an answer carries one buffer, found {len(message.buffers)}")
                data = memoryview(message.buffers[0]) if message.buffers else memoryview(b"")
                self._listener.answered(Answer(said, data))
            case LinkDown():
                self._listener.link_down(said.epoch, said.reason)
            case Progress():
                if self._probed is not None and not self._probed.done():
                    self._probed.set_result(said)
