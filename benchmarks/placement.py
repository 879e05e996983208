"""Placement of a whole swarm, simulated with the functions that servers run: balance, and moves it took.

80 blocks; servers of 4 to 24 blocks, their throughput log-uniform from 200 to 3,000 tokens/s. They join one
by one, 30 % leave at once, and the rest re-balance: each looks again from time to time, in random order; in
ours a claim is confirmed some looks later, and a server that moves serves nothing for as long. Beside it the
published ancestor's rule from the formulas of its paper (arXiv 2312.08361, appendix): servers each take their
own best span, when the simulation of all doing so lifts the weakest block by more than a threshold.

A balance is the weakest block's throughput over the bound, the mean over blocks.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.report import Check, Report
from petalite.net.identity import PeerId
from petalite.swarm.placement import (
    Holding,
    MoveCost,
    bound,
    decide_move,
    join_span,
    keeps_claim,
    plan_moves,
    throughputs,
)
from petalite.swarm.spans import Span

N_BLOCKS = 80
SIZES = (20, 50, 100)
SEEDS = 8
LOST = 0.3
RELOAD_S = 120.0
CLAIM_LOOKS = 2  # other servers look so many times before a claim is confirmed, and again while it loads
QUIET_ROUNDS = 2  # without a move, and the swarm has settled
MOST_ROUNDS = 20
EPS = 1e-3  # of the ancestor's formulas

Swarm = list[Holding]


def run() -> Report:
    report = Report(
        "placement",
        (
            "servers",
            "joined",
            f"{LOST:.0%} lost",
            "re-balanced",
            "moves",
            "ancestor",
            "moves",
            "with its 0.75",
            "moves",
        ),
    )
    for size in SIZES:
        runs = [simulate(size, random.Random(seed)) for seed in range(SEEDS)]
        means = [statistics.mean(column) for column in zip(*runs, strict=True)]
        report.rows.append((f"{size}, then {round(size * (1 - LOST))}", *means))
        names = ("joined", "lost", "ours", "moves", "ancestor", "ancestor_moves", "strict", "strict_moves")
        report.results[str(size)] = dict(zip(names, means, strict=True))
        report.checks += [
            Check(
                f"{size} servers: balance over the ancestor's", means[2] / means[4], "times", 1.0, "at least"
            ),
            Check(f"{size} servers: moves over the ancestor's", means[3] / means[5], "times", 0.5),
        ]
    return report


def simulate(size: int, rng: random.Random) -> tuple[float, ...]:
    held: Swarm = []
    for number in range(size):
        length, tokens_per_s = rng.randint(4, 24), math.exp(rng.uniform(math.log(200), math.log(3000)))
        span = join_span(held, N_BLOCKS, length)
        held.append(Holding(PeerId(number.to_bytes(32, "big")), span, tokens_per_s))
    left = rng.sample(held, round(size * (1 - LOST)))
    return (
        balance(held),
        balance(left),
        *settle(left, rng),
        *ancestor(left, rng, quality=1.0),
        *ancestor(left, rng, quality=0.75),
    )


def balance(held: Sequence[Holding]) -> float:
    return min(throughputs(held, N_BLOCKS)) / bound(held, N_BLOCKS)


# -- ours ----------------------------------------------------------------------------------------------------


def settle(held: Swarm, rng: random.Random) -> tuple[float, int]:
    """Balance in the end, and the moves."""
    state = {holding.peer: holding for holding in held}
    cost = MoveCost(RELOAD_S)
    waiting: deque[tuple[int, Callable[[], None]]] = deque()  # what happens after so many looks
    looks = moves = quiet = 0
    plan = plan_moves(held, N_BLOCKS)

    def confirm(peer: PeerId) -> None:
        nonlocal moves
        mover = state[peer]
        if not keeps_claim(peer, list(state.values()), N_BLOCKS, cost):
            state[peer] = replace(mover, claim=None)
            return
        moves += 1
        state[peer] = replace(mover, span=mover.future, claim=None, serving=False)
        waiting.append(
            (looks + CLAIM_LOOKS, lambda: state.update({peer: replace(state[peer], serving=True)}))
        )

    for _ in range(MOST_ROUNDS):
        before = moves
        for peer in rng.sample(list(state), len(state)):
            looks += 1
            while waiting and waiting[0][0] <= looks:
                waiting.popleft()[1]()
                plan = plan_moves(list(state.values()), N_BLOCKS)
            target = decide_move(peer, plan, list(state.values()), cost)
            if target is not None:
                state[peer] = replace(state[peer], claim=target)
                plan = plan_moves(list(state.values()), N_BLOCKS)
                waiting.append((looks + CLAIM_LOOKS, lambda peer=peer: confirm(peer)))  # type: ignore[misc]
        quiet = quiet + 1 if moves == before and not waiting else 0
        if quiet == QUIET_ROUNDS:
            break
    return balance(list(state.values())), moves


# -- the published ancestor's --------------------------------------------------------------------------------


def ancestor(held: Swarm, rng: random.Random, *, quality: float) -> tuple[float, int]:
    """Each server in turn, until none moves: it takes its best span if that of all doing so, simulated, has a
    weakest block of more than 1 / `quality` of now's; at 1.0 that is any gain at all.
    """
    spans = [holding.span for holding in held]
    speeds = [holding.tokens_per_s for holding in held]
    moves = 0
    for _ in range(MOST_ROUNDS):
        before = moves
        for index in rng.sample(range(len(held)), len(held)):
            target = _own_best(spans, speeds, index)
            if target != spans[index] and (
                quality >= 1.0 or _is_worth_it(spans, speeds, index, rng, quality)
            ):
                spans[index] = target
                moves += 1
        if moves == before:
            break
    return min(_load(spans, speeds)) * N_BLOCKS / sum(_load(spans, speeds)), moves


def _load(spans: Sequence[Span], speeds: Sequence[float]) -> list[float]:
    load = [0.0] * N_BLOCKS
    for span, speed in zip(spans, speeds, strict=True):
        for block in span.blocks:
            load[block] += speed
    return load


def _own_best(spans: Sequence[Span], speeds: Sequence[float], index: int) -> Span:
    """The weakest span without this server, whose own counts a little more than it is."""
    load, length = _load(spans, speeds), len(spans[index])
    for block in spans[index].blocks:
        load[block] -= speeds[index] * (1 + EPS)
    start = min(range(N_BLOCKS - length + 1), key=lambda first: sorted(load[first : first + length]))
    return Span(start, start + length)


def _is_worth_it(
    spans: Sequence[Span], speeds: Sequence[float], index: int, rng: random.Random, quality: float
) -> bool:
    now = min(_load(spans, speeds))
    without = _load([*spans[:index], *spans[index + 1 :]], [*speeds[:index], *speeds[index + 1 :]])
    if now > EPS and min(without) <= 0:
        return False
    after = list(spans)
    after[index] = _own_best(spans, speeds, index)
    moved = True
    while moved:
        moved = False
        for other in rng.sample(range(len(after)), len(after)):
            target = _own_best(after, speeds, other)
            moved = moved or target != after[other]
            after[other] = target
    then = min(_load(after, speeds))
    return then >= max(now, EPS) and now / then < quality - EPS
