"""Which servers to send hidden states through: the cheapest chain over the spans that servers hold.

A pure function of what is known; it reads no clock and no DHT. Nodes of the search are (server, block
reached), so a chain may leave a server before its span ends. The cost of a link is a function of the two
ends, so that one search serves the star, where each edge passes the client, and the ring, where servers talk
to each other.
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server as routing sees it."""

    peer: PeerId
    span: Span
    block_s: float  # one token through one block, seconds
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
    """The chain over `span` with the least sum of links, penalties and compute for one token.

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
    """Seconds of one token through a chain, as `find_chain` counts them; infinite where a hop is unknown."""
    known = {candidate.peer: candidate for candidate in candidates}
    total_s = link_s(chain[-1].peer, None)
    for before, hop in zip([None, *chain], chain, strict=False):
        candidate = known.get(hop.peer)
        if candidate is None or hop.span not in candidate.span:
            return float("inf")
        total_s += link_s(before.peer if before else None, hop.peer)
        total_s += candidate.entry_s + candidate.block_s * len(hop.span)
    return total_s


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


def star_link(to_client_s: Callable[[PeerId], float], per_hop_s: float) -> LinkCost:
    """The star's link costs: every edge goes through the client, so a switch costs both half round trips.

    `to_client_s(peer)` is the one-way latency between client and peer, `per_hop_s` what software costs per
    hop.
    """

    def link_s(source: PeerId | None, target: PeerId | None) -> float:
        back = 0.0 if source is None else to_client_s(source)
        out = 0.0 if target is None else to_client_s(target) + per_hop_s
        return back + out

    return link_s


def ring_link(
    to_client_s: Callable[[PeerId], float],
    per_hop_s: float,
    between_s: Callable[[PeerId, PeerId], float | None] = lambda source, target: None,
) -> LinkCost:
    """The ring's link costs: servers push to each other, and the last answers the client.

    What lies between two servers the client cannot see; `between_s` is what they say of it themselves, one
    way. Where they say nothing: by the triangle inequality it is between the difference and the sum of
    their distances to the client, and the larger of these distances is taken. Nor is what they say believed
    beyond that.
    """

    def link_s(source: PeerId | None, target: PeerId | None) -> float:
        ends = [to_client_s(peer) for peer in (source, target) if peer is not None]
        away_s = max(ends, default=0.0)
        if source is not None and target is not None and (said_s := between_s(source, target)) is not None:
            away_s = min(max(said_s, abs(ends[0] - ends[1])), sum(ends))
        return away_s + (per_hop_s if target is not None else 0.0)

    return link_s
