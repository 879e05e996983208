"""Runs of sessions over servers in memory, under virtual time, and what must come out of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import torch

from petalite.client.session import Session, StepInput
from petalite.client.settings import SessionSettings
from petalite.net.identity import PeerId
from petalite.sim import loop
from petalite.swarm.spans import Span
from tests.client.fakes import CLIENT, E, FakeSwarm, reference

T = TypeVar("T")
WHOLE = Span(0, 6)
QUICK = SessionSettings(chunk_tokens=3, recovery_s=60.0)
CHAIN = {1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6)}
# For each of the chain a replacement; the middle one's is two servers.
SPANS = CHAIN | {4: Span(0, 2), 5: Span(2, 3), 6: Span(3, 4), 7: Span(4, 6)}
BOTH = pytest.mark.parametrize("pushing", [True, False], ids=["ring", "star"])


def run(main: Coroutine[Any, Any, T]) -> T:
    random.seed(0)
    return loop.run(main)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (count, E), generator=torch.Generator().manual_seed(seed)).float()


def session_over(swarm: FakeSwarm, *, rows: int = 1, max_length: int = 100) -> Session:
    return Session(swarm, WHOLE, E, max_length=max_length, rows=rows, settings=QUICK)


async def generate(swarm: FakeSwarm) -> torch.Tensor:
    """A prefill of 4 in three steps, 3 decode steps, a rollback by 2, then 2 more; every step's outputs."""
    fed = tokens(9)
    async with session_over(swarm) as session:
        prefill = [StepInput(fed[:2], [(0, 0, 2)]), StepInput(fed[2:3], [(0, 2, 1)])]
        outputs = await session.steps([*prefill, StepInput(fed[3:4], [(0, 3, 1)])])
        for position, part in ((4, 4), (5, 5), (6, 6), (5, 7), (6, 8)):
            outputs.append(await session.step(fed[part : part + 1], [(0, position, 1)]))
    await until_free(swarm)
    return torch.cat(outputs)


async def until_free(swarm: FakeSwarm) -> None:
    """Leaving the session frees every row at every server, within a message's time."""
    for _ in range(100):
        await asyncio.sleep(swarm.net.latency_s)
    assert swarm.open_rows() == 0


def expected() -> torch.Tensor:
    fed = tokens(9)
    first, second = fed[:7], torch.cat([fed[:5], fed[7:]])
    return torch.cat([reference(WHOLE, first), reference(WHOLE, second)[5:]])


def messages_of_a_run(pushing: bool) -> list[tuple[PeerId, PeerId]]:
    sent: list[tuple[PeerId, PeerId]] = []

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        swarm.net.on_message = lambda number, source, target: sent.append((source, target))
        assert torch.equal(await generate(swarm), expected())

    run(main())
    return sent


Deed = Callable[[FakeSwarm], Coroutine[Any, Any, T]]


def with_a_death(spans: dict[int, Span], deed: Deed[T], fatal: int = -1, end: int = 0) -> tuple[T, int]:
    """What `deed` gives, and how many messages it takes; the server at one end of message `fatal` dies."""
    swarm = FakeSwarm(spans)

    def on_message(number: int, source: PeerId, target: PeerId) -> None:
        victim = (source, target)[end]
        if number == fatal and victim != CLIENT:
            swarm.net.kill(victim)

    swarm.net.on_message = on_message
    return run(deed(swarm)), swarm.net.messages


def with_each_death(spans: dict[int, Span], deed: Deed[T], messages: int) -> Iterator[T]:
    """What `deed` gives with a death at either end of each of so many messages."""
    for fatal in range(messages):
        for end in (0, 1):
            yield with_a_death(spans, deed, fatal, end)[0]
