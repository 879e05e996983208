"""Which servers to send hidden states through: the cheapest chain over the spans that servers hold.

A pure function of what is known; it reads no clock and no DHT. Nodes of the search are (server, block
reached), so a chain may leave a server before its span ends. The cost of a link is a function of the two
ends, so that one search serves the star, where each edge passes the client, and the ring, where servers talk
to each other. What a chain costs depends on the load: a decode step is all latency, a prefill and a replay
are bytes and arithmetic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from types import ModuleType

from petalite.errors import MissingBlocks
from petalite.net.identity import PeerId
from petalite.swarm.spans import Span, describe, uncovered

RELAY_S = 0.05  # one way through a third peer, where nobody has measured it
RELAY_BYTES_PER_S = 1e6  # that a relay passes on


@dataclass(frozen=True, slots=True)
class Load:
    """What is to go through a chain. The default is one decode step, of bytes that do not count."""

    steps: int = 1  # of one token each, one after the other
    tokens: int = 0  # of a prefill or a replay, on their way together
    token_bytes: int = 0  # of one token's hidden states on the wire

    def link_s(self, one_way_s: float, bytes_per_s: float) -> float:
        """Over one link, seconds."""
        nbytes = (self.steps + self.tokens) * self.token_bytes
        return (self.steps + (self.tokens > 0)) * one_way_s + nbytes / bytes_per_s

    def block_s(self, decode_s: float, prefill_s: float) -> float:
        """Through one block, which takes so long for one token alone, and for one of many; seconds."""
        return self.steps * decode_s + self.tokens * prefill_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server as routing sees it."""

    peer: PeerId
    span: Span
    block_s: float  # the load through one block, seconds
    penalty_s: float = 0.0  # added once when the chain enters it, for past failures
    queue_s: float = 0.0  # likewise: what waits there has to be computed first

    @property
    def entry_s(self) -> float:
        return self.penalty_s + self.queue_s


@dataclass(frozen=True, slots=True)
class Hop:
    """One server's part of a chain."""

    peer: PeerId
    span: Span


LinkCost = Callable[[PeerId | None, PeerId | None], float]
"""Seconds from one end to the other; None is the client."""


def find_chain(candidates: Sequence[Candidate], span: Span, link_s: LinkCost) -> list[Hop]:
    """The chain over `span` with the least sum of links, penalties and compute.

    Dijkstra over (candidate, block reached). Ties go to the chain found first in the order of `candidates`,
    so a caller that spreads equal clients shuffles them. Raises MissingBlocks, naming every block nobody
    holds.
    """
    missing = uncovered(span, (candidate.span for candidate in candidates))
    if missing:
        raise MissingBlocks(
            f"no server holds {describe(missing)} of {span}; start one with: "
            f"python -m petalite.node serve MODEL --blocks {missing[0]} --peers ...",
            [block for part in missing for block in part.blocks],
        )
    covering = {
        block: [i for i, candidate in enumerate(candidates) if block in candidate.span]
        for block in span.blocks
    }
    start = (-1, span.start)
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    done: set[tuple[int, int]] = set()
    frontier: list[tuple[float, int, tuple[int, int]]] = [(0.0, 0, start)]
    best = {start: 0.0}
    pushed = 0
    while frontier:
        cost, _, node = heapq.heappop(frontier)
        if node in done:
            continue
        done.add(node)
        current, block = node
        if current == len(candidates):
            return _chain(candidates, came_from, came_from[node], span.start)
        peer = candidates[current].peer if current >= 0 else None
        steps: list[tuple[float, tuple[int, int]]] = []
        if block == span.end:
            steps.append((link_s(peer, None), (len(candidates), block)))
        else:
            for i in covering[block]:
                entering = 0.0 if i == current else link_s(peer, candidates[i].peer) + candidates[i].entry_s
                steps.append((entering + candidates[i].block_s, (i, block + 1)))
        for extra, target in steps:
            if cost + extra < best.get(target, float("inf")):
                best[target] = cost + extra
                came_from[target] = node
                pushed += 1
                heapq.heappush(frontier, (cost + extra, pushed, target))
    raise AssertionError("a covered span has a chain")


def _chain(
    candidates: Sequence[Candidate],
    came_from: dict[tuple[int, int], tuple[int, int]],
    node: tuple[int, int],
    first_block: int,
) -> list[Hop]:
    hops: list[Hop] = []
    end = node[1]
    while node[0] >= 0:
        before = came_from[node]
        if before[0] != node[0]:
            hops.append(Hop(candidates[node[0]].peer, Span(before[1], end)))
            end = before[1]
        node = before
    assert end == first_block
    return hops[::-1]


def chain_cost(candidates: Sequence[Candidate], chain: Sequence[Hop], link_s: LinkCost) -> float:
    """Seconds of the load through a chain, as `find_chain` counts them; infinite where a hop is unknown."""
    known = {candidate.peer: candidate for candidate in candidates}
    total_s = 0.0
    for before, hop in zip([None, *chain], chain, strict=False):
        candidate = known.get(hop.peer)
        if candidate is None or hop.span not in candidate.span:
            return float("inf")
        total_s += link_s(before.peer if before else None, hop.peer)
        total_s += candidate.entry_s + candidate.block_s * len(hop.span)
    return total_s + link_s(chain[-1].peer, None)


def sample_chain(candidates: Sequence[Candidate], span: Span, chance: Random | ModuleType) -> list[Hop]:
    """A chain for throughput: each hop drawn with a probability in proportion to its server's speed.

    So many clients load servers in that proportion (arXiv 2312.08361, appendix). A server is used to the end
    of its span. Raises MissingBlocks like `find_chain`; servers with a penalty are drawn only where no other
    holds the block.
    """
    find_chain(candidates, span, lambda source, target: 0.0)  # raises for what nobody holds
    hops: list[Hop] = []
    block = span.start
    while block < span.end:
        holders = [candidate for candidate in candidates if block in candidate.span]
        able = [candidate for candidate in holders if not candidate.penalty_s] or holders
        speeds = [1.0 / max(candidate.block_s, 1e-9) for candidate in able]
        (drawn,) = chance.choices(able, speeds)
        end = min(drawn.span.end, span.end)
        hops.append(Hop(drawn.peer, Span(block, end)))
        block = end
    return hops


@dataclass(frozen=True, slots=True)
class End:
    """A server as an end of links. Of the client nothing is known: a link of its own is the server's."""

    one_way_s: float  # between it and the client
    bytes_per_s: float = float("inf")  # of its links, where nothing is known of the one in question
    relayed: bool = False  # nobody reaches it but through a third peer
    measured: bool = True  # the latency is; a relay on the way is in it


@dataclass(frozen=True, slots=True)
class Said:
    """What a server says of its link to another."""

    one_way_s: float
    bytes_per_s: float | None = None  # None: not measured


def star_link(end: Callable[[PeerId], End], load: Load, per_hop_s: float) -> LinkCost:
    """The star's link costs: every edge goes through the client, so a switch costs both halves.

    `per_hop_s` is what software costs per hop and step.
    """

    def link_s(source: PeerId | None, target: PeerId | None) -> float:
        ways_s = [load.link_s(*_to_client(end(peer))) for peer in (source, target) if peer is not None]
        return sum(ways_s) + (load.steps * per_hop_s if target is not None else 0.0)

    return link_s


def ring_link(
    end: Callable[[PeerId], End],
    load: Load,
    per_hop_s: float,
    between: Callable[[PeerId, PeerId], Said | None] = lambda source, target: None,
) -> LinkCost:
    """The ring's link costs: servers push to each other, and the last answers the client.

    What lies between two servers the client cannot see; `between` is what they say of it themselves. Where
    they say nothing: by the triangle inequality the latency is between the difference and the sum of their
    distances to the client, and the larger of these distances is taken, and a relay's for each that is
    behind one. Nor is what they say of latency believed beyond that.
    """

    def link_s(source: PeerId | None, target: PeerId | None) -> float:
        ends = [end(peer) for peer in (source, target) if peer is not None]
        if source is None or target is None:
            way = _to_client(*ends)
        else:
            way = _between(ends[0], ends[1], between(source, target))
        return load.link_s(*way) + (load.steps * per_hop_s if target is not None else 0.0)

    return link_s


def _to_client(end: End) -> tuple[float, float]:
    """One way, seconds, and bytes per second."""
    if not end.relayed:
        return end.one_way_s, end.bytes_per_s
    detour_s = 0.0 if end.measured else RELAY_S
    return end.one_way_s + detour_s, min(end.bytes_per_s, RELAY_BYTES_PER_S)


def _between(source: End, target: End, said: Said | None) -> tuple[float, float]:
    relays = source.relayed + target.relayed
    bytes_per_s = min(source.bytes_per_s, target.bytes_per_s, *[RELAY_BYTES_PER_S] * (relays > 0))
    if said is None:
        return max(source.one_way_s, target.one_way_s) + relays * RELAY_S, bytes_per_s
    nearest_s, farthest_s = abs(source.one_way_s - target.one_way_s), source.one_way_s + target.one_way_s
    return min(max(said.one_way_s, nearest_s), farthest_s), said.bytes_per_s or bytes_per_s
