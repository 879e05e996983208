"""The chain of one session: opened, mended when stages are lost, and the replays that this takes.

Dual caches (arXiv 2312.08361, Algorithm 1): a server holds attention keys and values, and whoever feeds it
keeps what it fed. Where a run of stages is lost, its span is planned anew, and the keeper before it (the
client, or the stage that pushed to it) replays to the replacements; stages behind them keep their caches.
Whatever goes wrong meanwhile makes a run of lost stages again, perhaps a longer one, so mending is one loop.
Knows rows and hidden states in wire form; knows neither tokens nor sockets.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from petalite.client.adapters import AdapterSource
from petalite.client.carrying import Carrier, Part
from petalite.client.hops import NOTHING_MORE, Opening, Servers, Wanted
from petalite.client.settings import SessionSettings
from petalite.client.stages import Answers, Leg, Stage, StageFailed, legs_of
from petalite.client.trace import Recovery, Trace
from petalite.client.watching import watched
from petalite.errors import (
    BadMessage,
    BadTensor,
    DeadlineExceeded,
    InvalidArgument,
    NetworkError,
    NotFinite,
    PetaliteError,
    RemoteError,
    SessionGap,
    SessionLimit,
)
from petalite.swarm.codecs import unpack
from petalite.swarm.kept import KeptInputs
from petalite.swarm.messages import NONE, REPLAY_TOKENS, TOKEN_BYTES, Expect, Relink, Successor
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

logger = logging.getLogger(__name__)

T = TypeVar("T")

SUSPECT_S = 2.0  # a stage that another says is gone has so long to say that it is there
LONGEST_PAUSE_S = 2.0
# What a server says of a step: the step may be wrong in itself, or the server, or whoever pushed to it.
DOUBTFUL = (BadMessage, BadTensor, SessionGap, SessionLimit, NotFinite)
QUEUE_S = 5.0  # to stand in line at a full server, where there is no other


@dataclass(frozen=True, slots=True)
class Gap:
    """Stages [first, end) of the chain are lost, which held `span`."""

    first: int
    end: int
    span: Span


class Chain:
    """Stages over `span`; none at first, which is a gap like any other."""

    def __init__(
        self,
        servers: Servers,
        span: Span,
        hidden_size: int,
        *,
        rows: int,
        max_length: int,
        carrier: Carrier,
        settings: SessionSettings,
        adapter: AdapterSource | None = None,
    ) -> None:
        self.span = span
        self.stages: list[Stage] = []
        self.legs: list[Leg] = []  # of the stages
        self.trace = Trace()
        self.is_closed = False
        self._opening: list[Stage] = []  # and not yet among the stages
        self._servers = servers
        self._hidden_size = hidden_size
        self._rows = rows
        self._max_length = max_length
        self._carrier = carrier
        self._answers: Answers = carrier.answers
        self._settings = settings
        self._adapter = adapter
        self._wanted = NOTHING_MORE if adapter is None else Wanted(adapter=adapter.hosted)

    def length(self, row: int) -> int:
        """Tokens of the row that every leg has answered."""
        return min([leg.kept.length(row) for leg in self.legs], default=0)

    def truncate(self, row: int, length: int) -> None:
        """Forget what the client keeps at and after `length`; the hops follow with the next step."""
        for leg in self.legs:
            leg.kept.truncate(row, length)

    def close(self) -> None:
        """Free everything at every hop, and end what is under way; waits for nothing."""
        self.is_closed = True
        self.abandon("the session was closed")
        self.stages, self.legs = [], []
        self._answers.close()

    def check_open(self) -> None:
        """Raises InvalidArgument once the chain is closed."""
        if self.is_closed:
            raise InvalidArgument("the session was closed while a step was under way; await the step first")

    # -- mending -----------------------------------------------------------------------------------------

    @property
    def gap(self) -> Gap | None:
        """The first run of lost stages; the whole span before it was opened."""
        if not self.stages:
            return Gap(0, 0, self.span)
        lost = [i for i, stage in enumerate(self.stages) if stage.error is not None]
        if not lost:
            return None
        first = end = lost[0]
        while end < len(self.stages) and self.stages[end].error is not None:
            end += 1
        return Gap(first, end, Span(self.stages[first].span.start, self.stages[end - 1].span.end))

    async def mend(self, deadline_s: float) -> None:
        """Until nothing is lost. Raises what the last attempt failed of once the deadline has passed.

        MissingBlocks where no server holds some blocks until then; the gap stays, to be mended later.
        """
        pause_s = 0.0
        attempt = 0
        while (gap := self.gap) is not None:
            self.check_open()
            try:
                await self._replace(gap, deadline_s, attempt)
                continue
            except StageFailed as failure:
                await self._report(failure.stage)
                if asyncio.get_running_loop().time() + pause_s >= deadline_s:
                    raise failure.cause from failure
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, self._settings.retry_s), LONGEST_PAUSE_S)
            attempt += 1

    async def _replace(self, gap: Gap, deadline_s: float, attempt: int) -> None:
        """New stages where the lost ones were. Raises StageFailed of one of them, or of the keeper."""
        began_s = time.perf_counter()
        lost = self.stages[gap.first : gap.end]
        before = self.stages[gap.first - 1] if gap.first > 0 else None
        after = self.stages[gap.end] if gap.end < len(self.stages) else None
        await asyncio.gather(*(self._report(stage) for stage in lost))
        fresh = bool(lost) or attempt > 0
        hops = await self._servers.plan(
            gap.span,
            fresh=fresh,
            timeout_s=max(deadline_s - asyncio.get_running_loop().time(), 0.0),
            replayed_tokens=self.n_tokens,
            wanted=self._wanted,
        )
        self.check_open()
        pushed_after = after if after is not None and after.kept is None else None
        if pushed_after is not None and not self._pushes(hops[-1], pushed_after.hop):
            pushed_after.suspect("the server before it cannot reach it")  # so the client has to feed it
            return
        self._carrier.epoch += 1
        plan = await self._feeding(lost, before, hops)
        tokens = [secrets.token_bytes(TOKEN_BYTES) for _ in range(len(hops) + 1)]
        if pushed_after is not None:
            await self._carrier.tell(pushed_after, Expect(tokens[-1], self._carrier.epoch))
        stages = await self._open(hops, plan, pushed_after, tokens, attempt)
        try:
            await self._fill(plan, stages, tokens[0])
            self.check_open()
        except BaseException:
            for stage in stages:
                stage.close()
            raise
        finally:
            self._opening = []
        self.stages[gap.first : gap.end] = stages
        self.legs = legs_of(self.stages)
        self._carrier.patience.forget()
        if lost:
            self._record(gap.span, lost, stages, began_s)

    def _record(self, span: Span, lost: list[Stage], stages: list[Stage], began_s: float) -> None:
        recovery = Recovery(
            span=span,
            lost=tuple(stage.peer for stage in lost),
            replacements=tuple(stage.peer for stage in stages),
            replayed_tokens=self.n_tokens,
            seconds=time.perf_counter() - began_s,
            cause=str(lost[0].error),
        )
        logger.info("replaced %s with blocks %s: %s", recovery.lost, span, recovery.cause)
        self.trace.recoveries.append(recovery)

    async def _report(self, stage: Stage) -> None:
        """Tell who failed, once; first ask it, where only another has said so. Of one that answers there is
        nothing to tell."""
        if stage.is_suspect and not stage.is_reported:
            try:
                async with asyncio.timeout(SUSPECT_S):
                    await stage.opened.probe()
                stage.is_reported = True
                stage.close()
                return
            except (NetworkError, RemoteError, TimeoutError) as error:
                if stage.is_suspect:
                    late = DeadlineExceeded(f"{stage.peer.short()} answers nobody")
                    stage.lost(late if isinstance(error, TimeoutError) else error)
        if not stage.is_reported and stage.error is not None:
            stage.is_reported = True
            self._servers.failed(stage.peer, stage.error)

    def _pushes(self, source: Hop, target: Hop) -> bool:
        """Whether one hop may be asked to push to another."""
        return self._servers.pushing and (source.peer, target.peer) not in self._answers.bad_edges

    @property
    def n_tokens(self) -> int:
        """Of all rows: what a replay carries."""
        return sum(self._lengths)

    @property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(self.length(row) for row in range(self._rows))

    def abandon(self, why: str) -> None:
        """Every stage is given up, through no fault of its own; mending finds others."""
        for stage in (*self.stages, *self._opening):
            stage.is_reported = True
            stage.lost(PetaliteError(why))

    def blame(self, failure: StageFailed) -> None:
        """A stage was refused what it was fed, or broke on it: whoever pushed that to it may be the liar."""
        for stage in self.stages:
            if stage.pushes_to is failure.stage and isinstance(failure.cause, DOUBTFUL):
                stage.lost(
                    BadMessage(f"it pushed what {failure.stage.peer.short()} cannot take: {failure.cause}")
                )

    # -- opening -----------------------------------------------------------------------------------------

    async def _feeding(
        self, lost: list[Stage], before: Stage | None, hops: Sequence[Hop]
    ) -> KeptInputs | Stage | None:
        """Who feeds the replacements: the client with these inputs (None: there are none yet), or a stage."""
        if before is None or (lost and lost[0].kept is not None):
            return lost[0].kept if lost else None
        one_leg = all(self._pushes(a, b) for a, b in zip([before.hop, *hops], hops, strict=False))
        return before if one_leg else await self._watched((before,), self._pull(before))

    async def _open(
        self,
        hops: Sequence[Hop],
        feeder: KeptInputs | Stage | None,
        after: Stage | None,
        tokens: Sequence[bytes],
        attempt: int,
    ) -> list[Stage]:
        """A session at every hop, all at once. Raises StageFailed of one that opened none; then none is."""
        wait_s = QUEUE_S if attempt else 0.0
        pushed = [isinstance(feeder, Stage), *map(self._pushes, hops, hops[1:]), after is not None]
        stages = self._opening = [Stage(hop, self._answers, None) for hop in hops]
        targets: list[Stage | None] = [*stages[1:], after]
        openings = []
        for i, stage in enumerate(stages):
            target = targets[i] if pushed[i + 1] else None
            stage.pushes_to = target
            stage.epoch = 0  # it has heard of none when it says that it cannot attach
            successor = Successor(target.peer, tokens[i + 1]) if target is not None else None
            token = tokens[i] if pushed[i] else None
            opening = Opening(
                self._rows,
                self._max_length,
                token,
                successor,
                wait_s,
                self._settings.wire,
                self._adapter,
            )
            openings.append((stage, opening))
        # First, as hops attach to each other once they are open, and wait a few seconds for that.
        if self._adapter is not None:
            await _all_of(stages, [self._bring(stage, self._adapter) for stage in stages])
            self.check_open()
        await _all_of(stages, [self._open_one(*each) for each in openings])
        for i, stage in enumerate(stages):
            if not pushed[i]:
                stage.kept = KeptInputs(stage.opened.codec, self._hidden_size)
        if isinstance(feeder, KeptInputs):
            stages[0].kept = feeder
        return stages

    async def _bring(self, stage: Stage, adapter: AdapterSource) -> None:
        try:
            await self._servers.bring(stage.hop, adapter)
        except (NetworkError, RemoteError) as error:
            stage.lost(error)
            raise StageFailed(stage, error) from error

    async def _open_one(self, stage: Stage, opening: Opening) -> None:
        try:
            async with asyncio.timeout(self._settings.hop_s + opening.wait_s):
                stage.opened = await self._servers.open(stage.hop, opening, stage)
        except (NetworkError, RemoteError) as error:
            stage.lost(error)
            raise StageFailed(stage, error) from error
        except TimeoutError as error:
            late = DeadlineExceeded(
                f"{stage.peer.short()} opened no session within {self._settings.hop_s:g} s"
            )
            stage.lost(late)
            raise StageFailed(stage, late) from error

    # -- replaying ---------------------------------------------------------------------------------------

    async def _fill(self, feeder: KeptInputs | Stage | None, stages: list[Stage], token: bytes) -> None:
        """Bring new stages to where the lost ones were. Raises StageFailed."""
        try:
            if isinstance(feeder, Stage):
                await self._watched((feeder, *stages), self._replay_from(feeder, stages, token))
            elif feeder is not None:
                await self._watched(stages, self._replay(feeder, stages))
        except StageFailed as failure:
            await self._report(failure.stage)  # while it can still be asked
            raise

    async def _watched(self, stages: Sequence[Stage], replay: Coroutine[Any, Any, T]) -> T:
        return await watched(stages, replay, self._carrier.patience.longest_s(self.n_tokens))

    async def _replay(self, inputs: KeptInputs, stages: list[Stage]) -> None:
        """Feed `stages` what the lost ones were fed; what each leg passes on is kept for the next."""
        parts = [
            Part((row,), row[2], data, inputs.codec, NONE)
            for row, data in inputs.replay(self._settings.chunk_tokens, self._lengths)
        ]
        await self._carrier.flow(legs_of(stages), parts, [], replaying=True)

    async def _replay_from(self, keeper: Stage, stages: list[Stage], token: bytes) -> None:
        """Have the stage before feed them what it pushed to the lost ones."""
        lengths = self._lengths
        with self._answers.awaiting((keeper, *stages), count=_replayed_steps(lengths)) as awaited:
            keeper.asked = awaited.numbers[-1]
            keeper.pushes_to = stages[0]
            keeper.epoch = self._carrier.epoch
            successor = Successor(stages[0].peer, token)
            stop = stages[-1].span.end
            relink = Relink(successor, awaited.number, self._carrier.epoch, stop, lengths)
            await self._carrier.tell(keeper, relink)
            left = sum(lengths)
            while left > 0:
                answer = await self._carrier.next(awaited)
                left -= sum(n_tokens for _, _, n_tokens in answer.done.rows)

    async def _pull(self, keeper: Stage) -> KeptInputs:
        """What a stage pushed on, for the client to keep from now on; the stage pushes no more."""
        lengths = self._lengths
        with self._answers.awaiting((keeper,), count=_replayed_steps(lengths)) as awaited:
            keeper.asked = awaited.numbers[-1]
            keeper.pushes_to = None
            relink = Relink(None, awaited.number, self._carrier.epoch, keeper.span.end, lengths)
            await self._carrier.tell(keeper, relink)
            inputs = KeptInputs(keeper.opened.codec, self._hidden_size)
            left = sum(lengths)
            while left > 0:
                answer = await self._carrier.next(awaited)
                left -= await self._take(keeper, inputs, answer.done.rows, answer.data, answer.done.codec)
        return inputs

    async def _take(
        self, keeper: Stage, inputs: KeptInputs, rows: Sequence[tuple[int, ...]], data: memoryview, codec: str
    ) -> int:
        """Keep one step of what was pulled; how many tokens it has."""
        n_tokens = sum(n for _, _, n in rows)
        expected = inputs.codec.nbytes(n_tokens, self._hidden_size)
        try:
            follows = all(position == inputs.length(row) for row, position, _ in rows)
            if not follows or codec != inputs.codec.name or n_tokens > sum(self._lengths):
                raise BadMessage(f"{keeper.peer.short()} returned other inputs than it was fed")
            unpacked = memoryview(await unpack(inputs.codec, data, expected))
            if len(unpacked) != expected:
                raise BadMessage(f"{keeper.peer.short()} returned {len(unpacked)} bytes, not {expected}")
        except RemoteError as error:
            keeper.lost(error)
            raise StageFailed(keeper, error) from error
        inputs.put([(row, position, n) for row, position, n in rows], unpacked)
        return n_tokens


def _replayed_steps(lengths: Sequence[int]) -> int:
    """In how many steps a server replays rows of these lengths; one where there is nothing to replay."""
    return max(1, sum(-(-length // REPLAY_TOKENS) for length in lengths))


async def _all_of(stages: Sequence[Stage], tries: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Of each stage one, at once. Where one fails, none goes on and every stage is closed."""
    tasks = [asyncio.create_task(one) for one in tries]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for stage, task in zip(stages, tasks, strict=True):
            task.cancel()
            stage.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
