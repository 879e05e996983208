"""The servers of a model as routing weighs them: what they say of themselves, what was measured here, and
how they fared.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence

from petalite.client.hops import NOTHING_MORE, Wanted
from petalite.client.settings import RING, THROUGHPUT, Routing
from petalite.errors import IdleClosed, MissingBlocks, ShuttingDown
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.swarm.bans import PENALTY_S, Bans
from petalite.swarm.directory import Directory, ServerEntry
from petalite.swarm.records import ServerRecord
from petalite.swarm.routing import (
    Candidate,
    End,
    Hop,
    LinkCost,
    Load,
    Said,
    chain_cost,
    find_chain,
    ring_link,
    sample_chain,
    star_link,
)
from petalite.swarm.spans import Span

QUEUE_MOST_S = 10.0  # of what a server says that waits there: it is up to 30 s old, and a liar's may be any
UNKNOWN_RTT_S = 0.1  # of a server never connected to
UNKNOWN_BYTES_PER_S = 12.5e6  # of a link that nobody measured
HOP_S = 0.001  # what software costs per hop, beside the link
LEAVING_S = 15.0  # what a server said it leaves is avoided for so long, as records may still tell of it
MUCH_BETTER = 0.6  # of what the present chain would take: what a change has to bring, its replay included
# What a session is chosen for: it will go on for about so long, and begin with about such a prompt.
STEPS_AHEAD = 64
PROMPT_TOKENS = 128


class Outlook:
    """Over one model's directory."""

    def __init__(
        self, host: Host, directory: Directory, bans: Bans, routing: Routing, token_bytes: int
    ) -> None:
        """`token_bytes`: of one token's hidden states on the wire."""
        self.routing = routing
        self._host = host
        self._directory = directory
        self._bans = bans
        self._token_bytes = token_bytes
        self._leaving: dict[PeerId, tuple[Span, float]] = {}  # blocks, and until when they are avoided

    def failed(self, peer: PeerId, error: Exception) -> None:
        now_s = asyncio.get_running_loop().time()
        if isinstance(error, ShuttingDown):
            # No failure: it may be back, or has moved, and other blocks of it are as good as anybody's.
            self._leaving = {who: left for who, left in self._leaving.items() if now_s < left[1]}
            for entry in self._directory.servers:
                if entry.peer == peer:
                    self._leaving[peer] = entry.record.span, now_s + LEAVING_S
        elif not isinstance(error, IdleClosed):
            # A server that is full did nothing wrong, but asking it again at once is no use either.
            self._bans.failed(peer, now_s)

    def succeeded(self, peer: PeerId) -> None:
        self._bans.succeeded(peer)

    def chain(
        self,
        span: Span,
        replayed_tokens: int = 0,
        wanted: Wanted = NOTHING_MORE,
        *,
        banned: bool = True,
    ) -> list[Hop]:
        """The best one to go on with for a while, after a replay of so many tokens, or a prompt.

        Without servers that failed lately, if not `banned`. Raises MissingBlocks.
        """
        load = self._load(replayed_tokens or PROMPT_TOKENS)
        if wanted.training_tokens:
            load = Load(0, wanted.training_tokens, self._token_bytes)
        candidates = [one for one in self._candidates(load, wanted) if banned or not one.penalty_s]
        try:
            if wanted.training_tokens or self.routing.aim == THROUGHPUT:
                return sample_chain(candidates, span, random)
            random.shuffle(candidates)  # equal clients spread over equal servers
            return find_chain(candidates, span, self._link(load))
        except MissingBlocks as error:
            raise MissingBlocks(f"{error}{wanted.condition}", error.blocks) from error

    def is_much_better_than(self, chain: Sequence[Hop], history_tokens: int) -> bool:
        """Whether another chain, and the replay of the history there, would take a fraction of the time."""
        span = Span(chain[0].span.start, chain[-1].span.end)
        staying, changing = self._load(0), self._load(history_tokens)
        now_s = chain_cost(self._candidates(staying), chain, self._link(staying))
        candidates, link = self._candidates(changing), self._link(changing)
        return chain_cost(candidates, find_chain(candidates, span, link), link) < MUCH_BETTER * now_s

    def _load(self, tokens: int) -> Load:
        return Load(STEPS_AHEAD, tokens, self._token_bytes)

    def _candidates(self, load: Load, wanted: Wanted = NOTHING_MORE) -> list[Candidate]:
        return [
            self._candidate(entry, load)
            for entry in self._directory.servers
            if entry.record.serving and self.routing.permits(entry.peer) and _can(entry.record, wanted)
        ]

    def _candidate(self, entry: ServerEntry, load: Load) -> Candidate:
        self._host.book.add(entry.peer, entry.addresses)
        now_s, record = asyncio.get_running_loop().time(), entry.record
        left, until_s = self._leaving.get(entry.peer, (None, 0.0))
        is_left = left == record.span and now_s < until_s
        penalty_s = self._bans.penalty_s(entry.peer, now_s) + (PENALTY_S if is_left else 0.0)
        queue_s = record.waiting_tokens / record.tokens_per_s if record.tokens_per_s else 0.0
        block_s = load.block_s(record.block_ms / 1e3, (record.prefill_ms or record.block_ms) / 1e3)
        return Candidate(entry.peer, record.span, block_s, penalty_s, min(queue_s, QUEUE_MOST_S))

    def _link(self, load: Load) -> LinkCost:
        ends = {entry.peer: self._end(entry) for entry in self._directory.servers}
        if self.routing.route != RING:
            return star_link(ends.__getitem__, load, HOP_S)
        said = {
            (entry.peer, link.peer): Said(link.rtt_ms / 2e3, link.bytes_per_s or None)
            for entry in self._directory.servers
            for link in entry.record.links
        }
        return ring_link(ends.__getitem__, load, HOP_S, lambda source, target: said.get((source, target)))

    def _end(self, entry: ServerEntry) -> End:
        rtt_s = self._host.rtt_s(entry.peer)
        rates = [link.bytes_per_s for link in entry.record.links if link.bytes_per_s]
        return End(
            one_way_s=(rtt_s or UNKNOWN_RTT_S) / 2,
            bytes_per_s=statistics.median(rates) if rates else UNKNOWN_BYTES_PER_S,
            relayed=bool(entry.addresses) and all(one.relay is not None for one in entry.addresses),
            measured=rtt_s is not None,
        )


def _can(record: ServerRecord, wanted: Wanted) -> bool:
    hosts = wanted.adapter is None or any(wanted.adapter == hosted.digest for hosted in record.adapters)
    return hosts and record.training_tokens >= wanted.training_tokens
