"""Which blocks a server should hold: where to join, and whether to move.

Joining takes the weakest contiguous span (arXiv 2312.08361, appendix). Moving departs from the paper, whose
servers each take their own best span until nobody moves: here a server plans for the whole swarm, a few moves
that lift its weakest block furthest, and moves only if it is in that plan and the gain pays for what moving
costs. Servers announce what they are about to hold (a claim), wait a while and decide again, so that two that
want the same span do not both take it; of two that claimed at once, the lower peer id is first.

Pure functions of what is announced: they read no clock, no DHT, and keep nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalite.errors import InvalidArgument
from petalite.net.identity import PeerId
from petalite.swarm.spans import Span, uncovered

Floats: TypeAlias = NDArray[np.float64]
Servers: TypeAlias = Sequence[int] | slice
"""Some of a swarm, by their indices."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A server as placement sees it."""

    peer: PeerId
    span: Span  # it holds, or is loading
    tokens_per_s: float  # what it adds to each of its blocks
    serving: bool = True  # False: still loading
    claim: Span | None = None  # it is about to move there, or to load that, unless others come first
    pinned: bool = False  # its owner chose its blocks

    @property
    def future(self) -> Span:
        """What it will hold, as far as it says."""
        return self.span if self.claim is None else self.claim


@dataclass(frozen=True, slots=True)
class Move:
    """One server's part of a plan."""

    peer: PeerId
    source: Span
    target: Span


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves, and the throughput of the weakest block (tokens/s) before and after all of them."""

    moves: tuple[Move, ...]
    before: float
    after: float
    n_blocks: int  # of the model


@dataclass(frozen=True, slots=True)
class MovePolicy:
    """When a plan is worth its moves."""

    least_gain: float = 0.005  # of the weakest block's throughput, by the whole plan
    price: float = 0.03  # moving every server must lift the weakest block by this share of the bound
    horizon_s: float = 3600.0  # a new arrangement is expected to last so long


@dataclass(frozen=True, slots=True)
class MoveCost:
    """What moving costs the server that decides."""

    reload_s: float  # it serves nothing for so long
    session_tokens: int = 0  # of live sessions, to be computed again elsewhere


# Shares of the bound that plans aim at. One aim alone is too high for some swarms, whose moves are then
# spent on blocks that are not the weakest, and too low for others.
_AIMS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)
_NOTICEABLE = 1e-3  # a move that takes less than this of what is missing is not worth simulating


def throughputs(held: Sequence[Holding], n_blocks: int) -> list[float]:
    """The sum, for each block, over the servers that will hold it, tokens/s."""
    load = [0.0] * n_blocks
    for holding in held:
        for block in range(holding.future.start, min(holding.future.end, n_blocks)):
            load[block] += holding.tokens_per_s
    return load


def bound(held: Sequence[Holding], n_blocks: int) -> float:
    """What the weakest block's throughput could be if spans were perfectly spread: the mean over blocks."""
    return sum(throughputs(held, n_blocks)) / n_blocks


def _ceiling(held: Sequence[Holding], n_blocks: int) -> float:
    """The same where one server is so fast, or says so, that it lifts the mean beyond what its few blocks can
    give to all: the most that the weakest block can have if no server counts for more than that in any block.
    """
    inside = ((one.tokens_per_s, min(one.future.end, n_blocks) - one.future.start) for one in held)
    servers = sorted((tokens_per_s, length) for tokens_per_s, length in inside if length > 0)
    totals = [0.0, *accumulate(tokens_per_s * length for tokens_per_s, length in servers)]
    left = n_blocks
    while servers and servers[-1][1] < left and totals[-1] < left * servers[-1][0]:
        left -= servers.pop()[1]
        totals.pop()
    return totals[-1] / left


def join_span(held: Sequence[Holding], n_blocks: int, length: int) -> Span:
    """The span of `length` blocks where the swarm is weakest.

    Spans are compared by their blocks' summed throughputs in ascending order, so the span with the weakest
    block wins, and among equals the one whose next weakest is weaker; ties go to the lowest start.
    """
    if not 0 < length <= n_blocks:
        raise InvalidArgument(f"a span of {length} blocks does not fit a model of {n_blocks}")
    load = throughputs(held, n_blocks)
    start = min(range(n_blocks - length + 1), key=lambda first: sorted(load[first : first + length]))
    return Span(start, start + length)


def before_me(me: PeerId, held: Sequence[Holding]) -> list[Holding]:
    """The others, as who re-checks its own claim sees them: claims of higher peer ids give way to it."""
    others = (holding for holding in held if holding.peer != me)
    return [
        holding
        if holding.claim is None or holding.peer.public_key < me.public_key
        else replace(holding, claim=None)
        for holding in others
    ]


def joins_before_me(me: PeerId, held: Sequence[Holding]) -> list[Holding]:
    """The others as who joins sees them: without those that claim to join too and have a higher peer id."""
    return [
        holding
        for holding in held
        if holding.peer != me
        and (holding.serving or holding.claim is None or holding.peer.public_key < me.public_key)
    ]


def decide_move(
    me: PeerId, plan: Plan, held: Sequence[Holding], cost: MoveCost, policy: MovePolicy = MovePolicy()
) -> Span | None:
    """Where the server `me`, one of `held`, should move now by the swarm's `plan`; None: it stays.

    It moves if the plan has it move, if the plan's gain over the policy's horizon is more than what is lost
    while servers reload and sessions are computed anew, and if each of its blocks has another server that
    serves it and stays.
    """
    own = next((move for move in plan.moves if move.peer == me), None)
    if own is None or not _is_spared(me, own.source, held):
        return None
    n_blocks = plan.n_blocks
    if plan.before > 0:
        without = throughputs([holding for holding in held if holding.peer != me], n_blocks)
        lost_per_s = plan.before - min(without)
        lost = len(plan.moves) * lost_per_s * cost.reload_s + cost.session_tokens
        if plan.after < (1 + policy.least_gain) * plan.before:
            return None
        if (plan.after - plan.before) * policy.horizon_s <= lost:
            return None
    return own.target


def keeps_claim(
    me: PeerId,
    held: Sequence[Holding],
    n_blocks: int,
    cost: MoveCost,
    policy: MovePolicy = MovePolicy(),
) -> bool:
    """Whether the server `me`, one of `held`, should go on to what it claimed some time ago, now that others
    have seen it and it has seen theirs.
    """
    own = next(holding for holding in held if holding.peer == me)
    seen = [*before_me(me, held), replace(own, claim=None)]
    return decide_move(me, plan_moves(seen, n_blocks, policy), seen, cost, policy) == own.claim


def _is_spared(me: PeerId, span: Span, held: Sequence[Holding]) -> bool:
    """Whether others serve every block of `span`, and will go on doing so."""
    staying = [other.span for other in held if other.peer != me and other.serving and other.claim is None]
    return not uncovered(span, staying)


def plan_moves(held: Sequence[Holding], n_blocks: int, policy: MovePolicy = MovePolicy()) -> Plan:
    """The few moves that lift the weakest block furthest, each worth its price.

    Steepest descent of the squared shortfall of all blocks below an aim, for each of several aims, the moves
    found before put right after each; of all the plans so found, and of their beginnings, the one with the
    greatest lift less the price of its moves. No move of it leaves a block to nobody. The same for all who
    know the same, in any order.
    """
    ordered = sorted(held, key=lambda holding: holding.peer.public_key)
    load = throughputs(ordered, n_blocks)
    best = Plan((), min(load), min(load), n_blocks)
    ceiling = _ceiling(ordered, n_blocks)
    if not ordered or ceiling <= 0:
        return best
    price = policy.price * ceiling / len(ordered)
    for share in _AIMS:
        for plan in _descents(ordered, n_blocks, share * ceiling):
            if plan.after - price * len(plan.moves) > best.after - price * len(best.moves) + 1e-9 * ceiling:
                best = plan
    return best


def _descents(held: Sequence[Holding], n_blocks: int, aim: float) -> list[Plan]:
    """The plan towards one aim, and every beginning of it."""
    swarm = _Arrangement(held, n_blocks, aim)
    before = aim - max(swarm.lacking)
    movable = np.array([_may_move(holding, n_blocks) for holding in held])
    moved: list[int] = []
    plans = []
    while max(swarm.lacking) > 0:
        missing = sum(lack * lack for lack in swarm.lacking if lack > 0)
        gains = np.where(movable, swarm.gains(), 0.0)
        gains[moved] = 0.0
        most = gains.max()
        if most <= _NOTICEABLE * missing:
            break
        start, index = max((swarm.best_start(i), -i) for i in np.flatnonzero(gains == most).tolist())
        swarm.put(-index, start)
        moved = sorted([*moved, -index])
        _put_right(swarm, moved, _NOTICEABLE**2 * missing)
        moved = [i for i in moved if swarm.spans[i] != held[i].span]
        moves = tuple(Move(held[i].peer, held[i].span, swarm.spans[i]) for i in moved)
        plans.append(Plan(moves, before, aim - max(swarm.lacking), n_blocks))
    return plans


def _put_right(swarm: _Arrangement, moved: list[int], least: float) -> None:
    """Those planned before may go better elsewhere now, at no further price."""
    while moved:
        better = np.flatnonzero(swarm.gains(moved) > least).tolist()
        if not better:
            return
        swarm.put(moved[better[0]], swarm.best_start(moved[better[0]]))
        moved = moved[better[0] + 1 :]


def _may_move(holding: Holding, n_blocks: int) -> bool:
    return holding.serving and not holding.pinned and holding.claim is None and holding.span.end <= n_blocks


class _Arrangement:
    """Where servers are in a plan, and what each block lacks there of an aim, tokens/s.

    What each could gain elsewhere is computed for all together, as matrices (blocks, servers).
    """

    def __init__(self, held: Sequence[Holding], n_blocks: int, aim: float) -> None:
        self.spans = [holding.future for holding in held]
        self.lacking = [aim - tokens_per_s for tokens_per_s in throughputs(held, n_blocks)]
        holders = Counter(block for span in self.spans for block in span.blocks)
        self._holders = [holders[block] for block in range(n_blocks)]
        self._tokens_per_s = [holding.tokens_per_s for holding in held]
        self._speed = np.array(self._tokens_per_s)
        self._length = np.array([len(span) for span in self.spans])
        self._start = np.array([span.start for span in self.spans])
        self._blocks = blocks = np.arange(n_blocks)[:, None]
        # Where a server ends that begins at a block; one that would not fit there has no length.
        self._ends = blocks + self._length * (blocks + self._length <= n_blocks)
        self._own = self._speed * ((blocks >= self._start) & (blocks < self._start + self._length))

    def put(self, server: int, start: int) -> None:
        """It begins there now."""
        tokens_per_s, source = self._tokens_per_s[server], self.spans[server]
        self.spans[server] = target = Span(start, start + len(source))
        for span, sign in ((source, -1), (target, 1)):
            for block in span.blocks:
                self.lacking[block] -= sign * tokens_per_s
                self._holders[block] += sign
        self._start[server] = start
        self._own[:, server] = 0.0
        self._own[target.start : target.end, server] = tokens_per_s

    def gains(self, some: Servers = slice(None)) -> Floats:
        """How much of the squares of what blocks lack some servers can each take away elsewhere."""
        taken, now = self._taken(some)
        gains: Floats = taken.max(0) - now
        return gains

    def best_start(self, server: int) -> int:
        """Where it must begin to take away most."""
        return int(self._taken([server])[0].argmax())  # of equals, the first

    def _taken(self, some: Servers) -> tuple[Floats, Floats]:
        """By some servers, if each begins at each of the blocks; and where it is."""
        speed, start = self._speed[some], self._start[some]
        # What blocks lack without the server, and how much less the square of that is with it.
        relief = self._own[:, some] + np.array(self.lacking)[:, None]
        np.maximum(relief, 0.0, out=relief)
        part = np.minimum(relief, speed)
        relief += relief
        relief -= part
        relief *= part
        sums = np.zeros((len(relief) + 1, len(speed)))
        for block, more in enumerate(relief):
            np.add(sums[block], more, out=sums[block + 1])
        servers = np.arange(len(speed))
        taken = sums[self._ends[:, some], servers]
        taken -= sums[:-1]
        if 1 in self._holders:
            self._forbid(taken, some)
        return taken, sums[start + self._length[some], servers] - sums[start, servers]

    def _forbid(self, taken: Floats, some: Servers) -> None:
        """To begin where a block would be left that a server alone holds."""
        blocks = self._blocks
        sole = (self._own[:, some] > 0) & (np.array(self._holders)[:, None] == 1)
        first = np.where(sole, blocks, -1).max(0) - self._length[some] + 1
        last = np.where(sole, blocks, len(blocks)).min(0)
        taken[(blocks < first) | (blocks > last)] = -math.inf
