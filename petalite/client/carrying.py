"""Carrying steps through the legs of a chain: send, await, and find out who is to blame for what is late.

Knows stages and bytes; knows nothing of replacing them. A failure of any stage on the way is raised as
StageFailed, whoever noticed it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalite.client.hops import Answer
from petalite.client.patience import Patience
from petalite.client.stages import Answers, Awaited, Leg, Stage, StageFailed
from petalite.client.trace import StepTiming
from petalite.client.watching import cut_off, probe
from petalite.errors import (
    BadMessage,
    DeadlineExceeded,
    NetworkError,
    NotFinite,
    PetaliteError,
    RemoteError,
)
from petalite.swarm.codecs import Codec, session_codec, unpack
from petalite.swarm.kept import Row
from petalite.swarm.messages import ALL, LAST, NONE, FromClient, HopReport, Step

# Parts under way, with those at work: less than half of what may wait at one server (`server.session`).
AHEAD_PARTS = 12
AHEAD_BYTES = 8 << 20


@dataclass(slots=True)
class Part:
    """One step to carry: packed tokens of some rows, in wire form."""

    rows: tuple[Row, ...]
    n_tokens: int
    data: memoryview
    codec: Codec
    output: str
    forks: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Carried:
    """What came out at the end of the last leg."""

    hidden: torch.Tensor | None  # (T', E) of the outputs asked for; None if NONE were
    timing: StepTiming


class _Turn:
    """Of one part at one leg: parts go in order, whoever of them is there first."""

    def __init__(self, before: _Turn | None) -> None:
        self._before = before
        self._gone = asyncio.Event()

    async def come(self) -> None:
        if self._before is not None:
            await self._before._gone.wait()
            self._before = None

    def gone(self) -> None:
        self._gone.set()


class Carrier:
    """Of one session. `epoch` goes out with every step; whoever repairs the chain raises it."""

    def __init__(self, answers: Answers, patience: Patience, hidden_size: int) -> None:
        self.answers = answers
        self.patience = patience
        self.epoch = 0
        self._hidden_size = hidden_size
        self._in_flight = 0  # tokens sent into legs and not answered

    async def carry(
        self, legs: Sequence[Leg], part: Part, turns: Sequence[_Turn] = (), *, replaying: bool = False
    ) -> Carried:
        """One part through all legs, each leg's input kept once it has answered; but what `replaying` feeds
        into the first leg is not kept again, and has no deadline (`client.watching`). Raises StageFailed.
        """
        began_s = time.perf_counter()
        data, codec, hidden = part.data, part.codec, None
        hops, reports = legs[0].hops, tuple[HopReport]()
        for number, leg in enumerate(legs):
            is_last = leg is legs[-1]
            output = part.output if is_last else ALL
            if codec is not leg.kept.codec:
                data = recode(data, codec, leg.kept.codec, self._hidden_size)
            answer = await self._ask(leg, part, data, output, turns[number] if turns else None, replaying)
            codec, answered = await self._checked(leg, part, output, answer)
            if output != NONE:
                self._check_finite(leg, codec, answered)
                hidden = codec.decode(answered, self._hidden_size) if is_last else None
            if number > 0 or not replaying:
                self._keep(leg, part, data)
            if number > 0:
                hops += leg.hops
            data = answered
            reports += answer.done.hops
        return Carried(hidden, StepTiming(part.n_tokens, time.perf_counter() - began_s, hops, reports))

    async def flow(
        self, legs: Sequence[Leg], parts: Sequence[Part], done: list[Carried], *, replaying: bool = False
    ) -> None:
        """Many parts, in order, each on its way before the ones before it have arrived, so that a chain of
        servers computes on several at once. `done` grows with what has arrived.
        """
        window = asyncio.Semaphore(_window(legs, parts))
        turns = [_Turn(None) for _ in legs]
        tasks = []

        async def one(part: Part, turns: Sequence[_Turn]) -> Carried:
            async with window:
                return await self.carry(legs, part, turns, replaying=replaying)

        for part in parts:
            tasks.append(asyncio.create_task(one(part, turns)))
            turns = [_Turn(before) for before in turns]
        try:
            for task in tasks:
                done.append(await task)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    # -- one stage, one message --------------------------------------------------------------------------

    async def tell(self, stage: Stage, message: FromClient) -> None:
        """Raises StageFailed where the message cannot be sent in time."""
        try:
            async with asyncio.timeout(self.patience.timeout_s(self._in_flight + 1)):
                await self._send(stage, message, None)
        except TimeoutError:
            late = DeadlineExceeded(f"{stage.peer.short()} takes no more messages")
            raise self._failed(stage, late) from None

    async def next(self, awaited: Awaited) -> Answer:
        """The next of a replay's answers, of at least one token. Raises StageFailed."""
        answer = await awaited.next()
        if not all(n for _, _, n in answer.done.rows):
            raise self._failed(awaited.stages[-1], BadMessage("an answer to no tokens"))
        return answer

    async def _ask(
        self, leg: Leg, part: Part, data: memoryview, output: str, turn: _Turn | None, replaying: bool
    ) -> Answer:
        """Send a step into a leg and wait for its answer."""
        n_tokens = part.n_tokens
        self._in_flight += n_tokens
        timeout_s = self.patience.timeout_s(self._in_flight)
        clock = asyncio.get_running_loop().time
        began_s = clock()
        awaited = self.answers.awaiting(leg.stages, None if replaying else timeout_s)
        try:
            with awaited:
                if turn is not None:
                    await turn.come()
                name, stop, number = leg.kept.codec.name, leg.last.span.end, awaited.number
                step = Step(part.rows, name, stop, output, number, self.epoch, forks=part.forks)
                if replaying:
                    leg.first.asked = max(leg.first.asked, number)
                await self._send(leg.first, step, data)
                if turn is not None:
                    turn.gone()
                answer = await awaited.next()
        except TimeoutError:
            raise await self._late(awaited, timeout_s) from None
        finally:
            self._in_flight -= n_tokens
        self.patience.observe(n_tokens, clock() - began_s)
        return answer

    async def _send(self, stage: Stage, message: FromClient, data: memoryview | None) -> None:
        try:
            await stage.opened.send(message, data)
        except (NetworkError, RemoteError) as error:
            raise self._failed(stage, error) from error

    # -- judging -----------------------------------------------------------------------------------------

    def _failed(self, stage: Stage, error: PetaliteError) -> StageFailed:
        stage.lost(error)
        return StageFailed(stage, error)

    async def _checked(self, leg: Leg, part: Part, output: str, answer: Answer) -> tuple[Codec, memoryview]:
        """The codec of an answer that is one to this part, and what it holds, unpacked."""
        done, data = answer.done, answer.data
        n_outputs = {ALL: part.n_tokens, LAST: len(part.rows), NONE: 0}[output]
        try:
            codec = session_codec(done.codec)
            expected = codec.nbytes(n_outputs, self._hidden_size) if n_outputs else 0
            if expected and codec.is_packed:
                data = memoryview(await unpack(codec, data, expected))
            if (done.rows, len(done.hops), len(data)) != (part.rows, len(leg.stages), expected):
                raise BadMessage(
                    f"the answer has {len(data)} bytes for rows {str(done.rows)[:80]} from "
                    f"{len(done.hops)} servers, expected {expected} bytes, {str(part.rows)[:80]} and "
                    f"{len(leg.stages)}"
                )
        except RemoteError as error:
            raise self._failed(leg.last, error) from error
        return codec, data

    def _check_finite(self, leg: Leg, codec: Codec, data: memoryview) -> None:
        if not codec.is_finite(data, self._hidden_size):
            raise self._failed(leg.last, NotFinite(f"{leg.last.peer.short()} answered with NaN or Inf"))

    def _keep(self, leg: Leg, part: Part, data: memoryview) -> None:
        for source, target in part.forks:
            leg.kept.fork(source, target)
        if not leg.kept.put(part.rows, data):
            raise self._failed(leg.last, BadMessage(f"{leg.last.peer.short()} answers steps out of order"))

    async def _late(self, awaited: Awaited, timeout_s: float) -> StageFailed:
        """Whose fault it is that an answer did not come: the first that has not passed the step on; or the
        link to it, where the stage before says that it has, and it knows nothing of the step."""
        progress = await asyncio.gather(*map(probe, awaited.stages))
        before, culprit = None, awaited.stages[-1]
        for stage, reached in zip(awaited.stages, progress, strict=True):
            if reached is None or reached.sent < awaited.number:
                culprit = stage
                break
            before = stage
        text = f"{culprit.peer.short()} did not pass a step on within {timeout_s:.1f} s"
        late = DeadlineExceeded(text)
        if before is not None and reached is not None and reached.received < awaited.number:
            return cut_off(before, culprit, late)
        return self._failed(culprit, late)


def _window(legs: Sequence[Leg], parts: Sequence[Part]) -> int:
    """How many parts may be under way at once: one at every stage and one ahead of them, and as many more as
    keep the wires between them busy, which over long links hold several.
    """
    largest = max((len(part.data) for part in parts), default=0)
    on_wires = min(AHEAD_PARTS, AHEAD_BYTES // max(largest, 1))
    return max(sum(len(leg.stages) for leg in legs) + 1, on_wires)


def recode(data: memoryview, source: Codec, target: Codec, hidden_size: int) -> memoryview:
    """The same hidden states as the next leg keeps them; the very same bytes where it can."""
    return (
        data if source.plain == target.plain else memoryview(target.encode(source.decode(data, hidden_size)))
    )
