"""When a server moves: it looks at the swarm from time to time, claims a better span, and confirms the claim.

The decisions are `swarm.placement`'s; here they get their order and their pauses. Knows no blocks and no
socket: what it moves is behind `Movable`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.swarm.placement import (
    Holding,
    MoveCost,
    MovePolicy,
    decide_move,
    join_span,
    joins_before_me,
    keeps_claim,
    plan_moves,
)
from petalite.swarm.spans import Span

logger = logging.getLogger(__name__)

# A plan for a thousand servers takes seconds, which the event loop must not stand still for.
aside = asyncio.to_thread

MOST_CLAIMS = 4  # of one that joins beside others; after that it takes what it has


@dataclass(frozen=True, slots=True)
class MoveSettings:
    check_s: float = 300.0  # between looks at the swarm; each is half to one and a half of it
    claim_s: float = 5.0  # a claim is confirmed after one to two of it; longer than an announcement takes
    drain_s: float = 60.0  # sessions may go on for so long before the blocks under them are unloaded
    policy: MovePolicy = field(default_factory=MovePolicy)


class Movable(Protocol):
    """A server as who moves it sees it."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def n_blocks(self) -> int:
        """Of the model."""
        ...

    async def holdings(self) -> Sequence[Holding]:
        """Everybody's, as announced now; its own included once it has announced any."""
        ...

    async def claim(self, span: Span | None) -> None:
        """Announce where it is about to go; None takes that back."""
        ...

    async def prepare(self, span: Span) -> None:
        """Bring to this machine what those blocks need, while it still serves its own."""
        ...

    async def move(self, span: Span) -> None:
        """Drain, unload, load and serve."""
        ...

    def cost(self) -> MoveCost: ...


async def join(server: Movable, length: int, settings: MoveSettings) -> Span:
    """Where a server of `length` blocks joins: the weakest span, claimed, so that of several that start at
    once each takes another.
    """
    me = server.peer_id
    others = [holding for holding in await server.holdings() if holding.peer != me]
    span = join_span(others, server.n_blocks, length)
    if not others:
        return span  # nobody to share with
    for _ in range(MOST_CLAIMS):
        await server.claim(span)
        await asyncio.sleep(settings.claim_s * random.uniform(1, 2))
        again = join_span(joins_before_me(me, await server.holdings()), server.n_blocks, length)
        if again == span:
            break
        span = again
    return span


async def keep_placed(server: Movable, settings: MoveSettings) -> None:
    """Look, and move where it is worth it, until cancelled."""
    while True:
        await asyncio.sleep(settings.check_s * random.uniform(0.5, 1.5))
        try:
            await look(server, settings)
        except PetaliteError as error:
            logger.warning("could not see whether to move: %s", error)


async def look(server: Movable, settings: MoveSettings) -> None:
    """One look at the swarm, and the move if there is one."""
    me, n_blocks, policy = server.peer_id, server.n_blocks, settings.policy
    held = await server.holdings()
    plan = await aside(plan_moves, held, n_blocks, policy)
    target = decide_move(me, plan, held, server.cost(), policy)
    if target is None:
        return
    await server.claim(target)
    try:
        await asyncio.gather(server.prepare(target), asyncio.sleep(settings.claim_s * random.uniform(1, 2)))
        held = await server.holdings()
        confirmed = await aside(keeps_claim, me, held, n_blocks, server.cost(), policy)
    except BaseException:
        await server.claim(None)
        raise
    if not confirmed:
        await server.claim(None)
        return
    logger.info(
        "moving to blocks %s: the swarm's weakest block would have %.0f tokens/s, and has %.0f",
        target,
        plan.after,
        plan.before,
    )
    await server.move(target)
