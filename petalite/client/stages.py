"""A chain as the client holds it: stages, the edges between them, and the answers that are awaited.

A stage is one hop's open session. Its inputs come over an edge: from the client, who then keeps them, or
pushed by the stage before, who then keeps them. A *leg* is a stage fed by the client and those that are
pushed to behind it; its last stage answers. In a star every leg has one stage; in a ring all stages are one
leg. Knows who failed; what to do about it is the chain's business.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from petalite.client.hops import Answer, OpenHop
from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.swarm.kept import KeptInputs
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

# A process that was stopped, or whose loop stood still, finds its deadlines over before it reads what came in
# time: it reads for so long first.
STOOD_STILL_S = 0.5
GRACE_S = 1.0


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
        self.asked = 0  # the last number that a replay asked of it
        self.heard = 0  # and that it answered
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


class Leg:
    """Consecutive stages: the client feeds the first, the last one answers."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.stages = stages
        self.first, self.last = stages[0], stages[-1]
        self.hops = tuple(stage.hop for stage in stages)
        assert self.first.kept is not None
        self.kept = self.first.kept  # of what the client sends into it


def legs_of(stages: Sequence[Stage]) -> list[Leg]:
    """The legs of stages whose first is fed by the client."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.kept is not None:
            groups.append([])
        groups[-1].append(stage)
    return [Leg(tuple(group)) for group in groups]


class Awaited:
    """Answers with one number, or several, which the last of `stages` gives and any of them can prevent.

    A context manager of one task: inside, answers are taken, until TimeoutError is raised at `deadline_s`.
    """

    def __init__(
        self, answers: Answers, numbers: range, stages: tuple[Stage, ...], deadline_s: float | None
    ) -> None:
        self.numbers = numbers
        self.number = numbers[0]
        self.stages = stages
        self.deadline_s = deadline_s  # by the loop's clock
        self.is_excused = False  # it was put off once
        self._answers = answers
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._is_late = False
        self._arrived: deque[Answer | Stage] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Awaited:
        for stage in self.stages:
            if stage.error is not None:
                self._arrived.append(stage)
        if self.deadline_s is not None:
            self._task = asyncio.current_task()
            assert self._task is not None
            self._cancelling = self._task.cancelling()
        self._answers.enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._answers.leave(self)
        if self._is_late:  # as `asyncio.timeout` does
            assert self._task is not None
            still = self._task.uncancel()
            if still <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def expire(self) -> None:
        """Its deadline has passed; said once."""
        assert self._task is not None
        self.deadline_s, self._is_late = None, True
        self._task.cancel()

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
    """Who waits for which answer of one session's stages, and until when.

    One timer serves all, and stays when a step ends in time, as almost every one does: to set and cancel one
    for each step costs more than to look, when it fires, whether anything is late.
    """

    def __init__(self) -> None:
        self.bad_edges: set[tuple[PeerId, PeerId]] = set()  # (from, to) that could not push
        self._awaited: dict[int, Awaited] = {}
        self._next_number = 1
        self._timer: asyncio.TimerHandle | None = None
        self._fires_s = math.inf

    def awaiting(
        self, stages: tuple[Stage, ...], timeout_s: float | None = None, *, count: int = 1
    ) -> Awaited:
        """New numbers, under which the last of `stages` is to answer, in time if one is given."""
        deadline_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        numbers = range(self._next_number, self._next_number + count)
        self._next_number = numbers.stop
        return Awaited(self, numbers, stages, deadline_s)

    def enter(self, awaited: Awaited) -> None:
        for number in awaited.numbers:
            self._awaited[number] = awaited
        if awaited.deadline_s is not None and awaited.deadline_s < self._fires_s:
            self._set_timer(awaited.deadline_s)

    def leave(self, awaited: Awaited) -> None:
        for number in awaited.numbers:
            del self._awaited[number]

    def put(self, stage: Stage, answer: Answer) -> None:
        """What nobody waits for any more, or was not asked of this stage, is dropped."""
        awaited = self._awaited.get(answer.done.number)
        if awaited is not None and awaited.stages[-1] is stage:
            stage.heard = answer.done.number
            awaited.put(answer)

    def fail(self, stage: Stage) -> None:
        for awaited in set(self._awaited.values()):
            if stage in awaited.stages:
                awaited.put(stage)

    def close(self) -> None:
        """Nothing is late any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._fires_s = None, math.inf

    def _set_timer(self, at_s: float) -> None:
        self.close()
        self._timer, self._fires_s = asyncio.get_running_loop().call_at(at_s, self._look), at_s

    def _look(self) -> None:
        """Time is up for some, perhaps."""
        now_s, self._timer, self._fires_s = self._fires_s, None, math.inf
        clock_s = asyncio.get_running_loop().time()
        stood_still = clock_s - now_s > STOOD_STILL_S
        for awaited in self._awaited.values():
            if awaited.deadline_s is not None and awaited.deadline_s <= now_s:
                if stood_still and not awaited.is_excused:
                    awaited.is_excused, awaited.deadline_s = True, clock_s + GRACE_S
                else:
                    awaited.expire()
        due_s = [one.deadline_s for one in self._awaited.values() if one.deadline_s is not None]
        if due_s:
            self._set_timer(min(due_s))
