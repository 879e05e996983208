"""What lies between this server and its neighbours, measured by exchanging bytes with them and no one else.

A neighbour is a server of the same model that may be pushed to: one that serves the block after our last, or
in want of such any. Its round trip is the connection's own; bandwidth is how fast a piece of a megabyte goes
there and another comes back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from petalite.errors import BadMessage, NetworkError, RemoteError
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Message
from petalite.net.methods import MethodPolicy
from petalite.net.rpc import Call
from petalite.net.schema import between, encode
from petalite.net.streams import Priority
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import MAX_LINKS, LinkTo
from petalite.swarm.spans import Span

logger = logging.getLogger(__name__)

METHOD = "transfer"
PIECE_BYTES = 1 << 20
MOST_MEASURED = 3  # neighbours that bytes are exchanged with; of the others the round trip is known
CALL_S = 20.0
# Of all callers together two at a time, and of one two a second: what asks for the round trip, and a piece.
_POLICY = MethodPolicy(PIECE_BYTES, 1, max_concurrent=2, calls_per_s=2.0, priority=Priority.BULK)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Give so many bytes back."""

    nbytes: Annotated[int, between(0, PIECE_BYTES)]


class Links:
    """The links of one server. Answers its neighbours' measurements, too."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._noise = os.urandom(PIECE_BYTES)  # nothing on the way can compress it
        self.to: tuple[LinkTo, ...] = ()
        self.bytes_per_s: float | None = None  # each way; None: never measured
        host.serve(METHOD, self._serve, request=Transfer, policy=_POLICY)

    async def _serve(self, call: Call, request: Transfer) -> Message:
        return Message({}, [memoryview(self._noise)[: request.nbytes]])

    async def look(self, span: Span, servers: Sequence[ServerEntry]) -> None:
        """Connect to neighbours of `span` and measure. Those that do not answer are left out."""
        near = neighbours(span, self._host.peer_id, servers)
        for entry in near:
            self._host.book.add(entry.peer, entry.addresses)
        rates: dict[PeerId, float] = {}
        measured, others = near[:MOST_MEASURED], near[MOST_MEASURED:]
        await asyncio.gather(self._measure(measured, rates), *(self._connect(entry.peer) for entry in others))
        if rates:
            self.bytes_per_s = statistics.median(rates.values())
        known = [(entry.peer, self._host.rtt_s(entry.peer)) for entry in near]
        self.to = tuple(
            LinkTo(peer, min(rtt_s * 1e3, 1e5), rates.get(peer, 0.0))
            for peer, rtt_s in known
            if rtt_s is not None
        )

    async def _measure(self, near: Sequence[ServerEntry], rates: dict[PeerId, float]) -> None:
        """One after the other, so that they do not share our own link."""
        for entry in near:
            try:
                rates[entry.peer] = await self._rate(entry.peer)
            except (NetworkError, RemoteError) as error:
                logger.debug("no link to %s was measured: %s", entry.peer.short(), error)

    async def _connect(self, peer: PeerId) -> None:
        try:
            if not self._host.is_connected(peer):
                await self._host.connect(peer, timeout_s=CALL_S)
        except (NetworkError, RemoteError) as error:
            logger.debug("no connection to %s: %s", peer.short(), error)

    async def _rate(self, peer: PeerId) -> float:
        """Bytes per second each way, the round trip that it takes to ask left out."""
        # The first call opens the connection; its time is not the link's.
        await self._exchange(peer, 0)
        began_s = time.perf_counter()
        await self._exchange(peer, PIECE_BYTES)
        took_s = time.perf_counter() - began_s - (self._host.rtt_s(peer) or 0.0)
        return 2 * PIECE_BYTES / max(took_s, 1e-4)

    async def _exchange(self, peer: PeerId, nbytes: int) -> None:
        noise = memoryview(self._noise)[:nbytes]
        answer = await self._host.call(
            peer, METHOD, encode(Transfer(nbytes)), [noise], timeout_s=CALL_S, priority=Priority.BULK
        )
        if sum(map(len, answer.buffers)) != nbytes:
            raise BadMessage(f"{peer.short()} was asked for {nbytes} bytes and gave another number")


def neighbours(span: Span, me: PeerId, servers: Sequence[ServerEntry]) -> list[ServerEntry]:
    """Whom a server of `span` may push to, in random order; at most MAX_LINKS."""
    others = [entry for entry in servers if entry.peer != me and entry.record.serving]
    after = [entry for entry in others if span.end in entry.record.span]
    chosen = after or others
    return random.sample(chosen, min(len(chosen), MAX_LINKS))
