"""A chain as the client holds it: stages, the edges between them, and the answers that are awaited.

A stage is one hop's open session. Its inputs come over an edge: from the client, who then keeps them, or
pushed by the stage before, who then keeps them. A *leg* is a stage fed by the client and those that are
pushed to behind it; its last stage answers. In a star every leg has one stage; in a ring all stages are one
leg. Knows who failed; what to do about it is the chain's business.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from petalite.client.hops import Answer, OpenHop
from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.swarm.kept import KeptInputs
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span


class StageFailed(Exception):
    """A stage failed in a way that another server may not."""

    def __init__(self, stage: Stage, cause: PetaliteError) -> None:
        super().__init__(str(cause))
        self.stage = stage
        self.cause = cause


class Stage:
    """One hop. Listens to it (`hops.Listener`) and passes on what it hears."""

    def __init__(self, hop: Hop, answers: Answers, kept: KeptInputs | None) -> None:
        self.hop = hop
        self.opened: OpenHop  # set once the hop has opened it
        self.kept = kept  # of its inputs, if the client feeds it
        self.pushes_to: Stage | None = None
        self.epoch = 0  # what it says of its successor in earlier ones is stale
        self.error: PetaliteError | None = None  # why it is lost
        self.is_suspect = False  # lost by another's word alone
        self.is_reported = False  # whoever chooses servers was told
        self._answers = answers

    @property
    def peer(self) -> PeerId:
        return self.hop.peer

    @property
    def span(self) -> Span:
        return self.hop.span

    def answered(self, answer: Answer) -> None:
        self._answers.put(self, answer)

    def link_down(self, epoch: int, reason: str) -> None:
        """It cannot push on. Nobody knows yet whether it, the successor or the link is to blame."""
        if epoch >= self.epoch and self.pushes_to is not None:
            self._answers.bad_edges.add((self.peer, self.pushes_to.peer))
            self.pushes_to.suspect(reason)

    def suspect(self, reason: str) -> None:
        """Whoever pushes to it says that it is gone."""
        if self.error is None:
            self.is_suspect = True
            self.error = PetaliteError(reason)
            self._answers.fail(self)

    def lost(self, error: PetaliteError) -> None:
        """It is of no use any more: its own word, or ours."""
        if self.error is None or self.is_suspect:
            self.is_suspect = False
            self.error = error
            self.close()
            self._answers.fail(self)

    def close(self) -> None:
        if hasattr(self, "opened"):
            self.opened.close()


@dataclass(frozen=True, slots=True)
class Leg:
    """Consecutive stages: the client feeds the first, the last one answers."""

    stages: tuple[Stage, ...]

    @property
    def first(self) -> Stage:
        return self.stages[0]

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def kept(self) -> KeptInputs:
        """Of what the client sends into it."""
        assert self.first.kept is not None
        return self.first.kept


def legs_of(stages: Sequence[Stage]) -> list[Leg]:
    """The legs of stages whose first is fed by the client."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.kept is not None:
            groups.append([])
        groups[-1].append(stage)
    return [Leg(tuple(group)) for group in groups]


class Awaited:
    """Answers with one number, which the last of `stages` gives and any of them can prevent."""

    def __init__(self, number: int, stages: tuple[Stage, ...]) -> None:
        self.number = number
        self.stages = stages
        self._arrived: deque[Answer | Stage] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Answer | Stage) -> None:
        """An answer, or a stage that is lost."""
        self._arrived.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Answer:
        """For one task. Raises StageFailed once one of the stages is lost."""
        while not self._arrived:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._arrived.popleft()
        if isinstance(item, Stage):
            assert item.error is not None
            raise StageFailed(item, item.error)
        return item


class Answers:
    """Who waits for which answer of one session's stages."""

    def __init__(self) -> None:
        self.bad_edges: set[tuple[PeerId, PeerId]] = set()  # (from, to) that could not push
        self._awaited: dict[int, Awaited] = {}
        self._numbers = itertools.count(1)

    @contextmanager
    def awaiting(self, stages: tuple[Stage, ...]) -> Iterator[Awaited]:
        """A new number, under which the last of `stages` is to answer."""
        awaited = Awaited(next(self._numbers), stages)
        for stage in stages:
            if stage.error is not None:
                awaited.put(stage)
        self._awaited[awaited.number] = awaited
        try:
            yield awaited
        finally:
            del self._awaited[awaited.number]

    def put(self, stage: Stage, answer: Answer) -> None:
        """What nobody waits for any more, or was not asked of this stage, is dropped."""
        awaited = self._awaited.get(answer.done.number)
        if awaited is not None and awaited.stages[-1] is stage:
            awaited.put(answer)

    def fail(self, stage: Stage) -> None:
        for awaited in self._awaited.values():
            if stage in awaited.stages:
                awaited.put(stage)
