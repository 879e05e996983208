"""Which blocks a server should hold: where to join, and whether to move.

Joining takes the weakest contiguous span (arXiv 2312.08361, appendix). Moving departs from the paper, whose
servers each take their own best span until nobody moves: here a server plans for the whole swarm, a few moves
that lift its weakest block furthest, and moves only if it is in that plan and the gain pays for what moving
costs. Servers announce what they are about to hold (a claim), wait a while and decide again, so that two that
want the same span do not both take it; of two that claimed at once, the lower peer id is first.

Pure functions of what is announced: they read no clock, no DHT, and keep nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from petalite.errors import InvalidArgument
from petalite.net.identity import PeerId
from petalite.swarm.spans import Span, uncovered


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
    spans = [holding.future for holding in held]
    lacking = [aim - tokens_per_s for tokens_per_s in throughputs(held, n_blocks)]
    holders = [sum(block in span for span in spans) for block in range(n_blocks)]
    before = aim - max(lacking)
    moved: set[int] = set()
    plans = []

    def best(index: int) -> tuple[float, int]:
        return _best_shift(lacking, holders, spans[index], held[index].tokens_per_s)

    def put(index: int, start: int) -> None:
        target = Span(start, start + len(spans[index]))
        _shift(lacking, holders, spans[index], target, held[index].tokens_per_s)
        spans[index] = target

    while max(lacking) > 0 and len(moved) < len(held):
        missing = sum(lack * lack for lack in lacking if lack > 0)
        free = [i for i in range(len(held)) if i not in moved and _may_move(held[i], n_blocks)]
        gain, start, index = max(((*best(i), -i) for i in free), default=(0.0, 0, 0))
        if gain <= _NOTICEABLE * missing:
            break
        put(-index, start)
        moved.add(-index)
        for i in sorted(moved):  # those planned before may go better elsewhere now, at no further price
            gain, start = best(i)
            if gain > _NOTICEABLE**2 * missing:
                put(i, start)
        moved = {i for i in moved if spans[i] != held[i].span}
        moves = tuple(Move(held[i].peer, held[i].span, spans[i]) for i in sorted(moved))
        plans.append(Plan(moves, before, aim - max(lacking), n_blocks))
    return plans


def _may_move(holding: Holding, n_blocks: int) -> bool:
    return holding.serving and not holding.pinned and holding.claim is None and holding.span.end <= n_blocks


def _best_shift(
    lacking: Sequence[float], holders: Sequence[int], span: Span, tokens_per_s: float
) -> tuple[float, int]:
    """How much of the squares of what blocks lack one server can take away by going elsewhere, and where it
    must begin for that.
    """
    n_blocks, length = len(lacking), len(span)
    relief = _relief(lacking, tokens_per_s)
    own = slice(span.start, span.end)
    relief[own] = _relief([lack + tokens_per_s for lack in lacking[own]], tokens_per_s)
    sole = [block for block in span.blocks if holders[block] == 1]
    first = max(sole[-1] - length + 1, 0) if sole else 0
    last = min(sole[0], n_blocks - length) if sole else n_blocks - length
    sums = [0.0, *accumulate(relief)]
    gains = [sums[start + length] - sums[start] for start in range(first, last + 1)]
    best = max(gains)
    return best - (sums[span.end] - sums[span.start]), first + gains.index(best)


def _relief(lacking: Sequence[float], tokens_per_s: float) -> list[float]:
    """For each block how much less the square of what it lacks is with a server of `tokens_per_s`."""
    return [
        tokens_per_s * (2 * lack - tokens_per_s) if lack > tokens_per_s else lack * lack if lack > 0 else 0.0
        for lack in lacking
    ]


def _shift(lacking: list[float], holders: list[int], source: Span, target: Span, tokens_per_s: float) -> None:
    for span, sign in ((source, -1), (target, 1)):
        for block in span.blocks:
            lacking[block] -= sign * tokens_per_s
            holders[block] += sign
