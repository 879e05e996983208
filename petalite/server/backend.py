"""A span of blocks and its KV cache behind one compute thread, which the scheduler keeps in work.

Sessions ask for steps; ready steps of the same blocks run in one pass over the weights. Every touch of the
blocks and the cache happens on the compute thread, in order, or on the event loop while that thread has
nothing to do, so neither needs a lock. A step that fails, fails alone. Knows no peer but as a name to be
fair to, and no socket: `petalite.load(peers=None)` runs a whole model through it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch

from petalite.errors import Busy, DeadlineExceeded, ShuttingDown
from petalite.model.block import Block
from petalite.model.cache import Segment
from petalite.model.compute import ComputeThread, is_finite
from petalite.model.span import BlockSpan
from petalite.server.adapters import HeldAdapter
from petalite.server.budget import RETRY_S, Budget
from petalite.server.gathering import Gathering
from petalite.server.scheduler import Kind, Part, Request, Scheduler, SchedulerSettings
from petalite.server.steps import check_finite, cut
from petalite.swarm.messages import DECODE_TOKENS

P = ParamSpec("P")
R = TypeVar("R")
# A pass of decode steps that took no longer the last time runs on the event loop itself, which it holds up
# for no longer: to change to another thread and back takes some 0.15 ms between two passes over the
# weights.
HERE_S = 1e-3
MOST_SHAPES = 256  # of passes, whose times are remembered
_CLOSED = "the blocks that were to compute this are closed"


@dataclass(slots=True)
class Timing:
    """What one step cost here, seconds."""

    queue_s: float  # from asking until the thread first took it up
    compute_s: float  # of the passes it was in


@dataclass(slots=True, eq=False)
class _Asked:
    """Something that was asked for, and is waited for."""

    answer: asyncio.Future[Any]  # of a result and its Timing
    asked_s: float
    began_s: float = 0.0
    compute_s: float = 0.0

    def timing(self) -> Timing:
        return Timing(self.began_s - self.asked_s, self.compute_s)


@dataclass(slots=True, eq=False)
class _Step(_Asked):
    """A step under way."""

    hidden: torch.Tensor = field(kw_only=True)
    n_tokens: int = field(kw_only=True)
    segments: Sequence[Segment] = field(kw_only=True)
    start: int = field(kw_only=True)
    end: int = field(kw_only=True)
    adapted: Sequence[Block] | None = field(kw_only=True)
    done_tokens: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)

    def next_hidden(self, n_tokens: int) -> torch.Tensor:
        if n_tokens == self.n_tokens:  # mostly; a slice is one of few tensor operations in a decode step
            return self.hidden
        return self.hidden[self.done_tokens : self.done_tokens + n_tokens]

    def next_segments(self, n_tokens: int) -> Sequence[Segment]:
        return self.segments if n_tokens == self.n_tokens else cut(self.segments, self.done_tokens, n_tokens)

    def result(self) -> torch.Tensor:
        return self.outputs[0] if len(self.outputs) == 1 else torch.cat(self.outputs)


@dataclass(slots=True, eq=False)
class _Turns(_Asked):
    """A training call under way."""

    pieces: Generator[None, None, Any] = field(kw_only=True)
    ended: bool = False
    value: Any = None  # that the pieces ended with

    def result(self) -> Any:
        return self.value


_Work: TypeAlias = _Step | _Turns
_Shape: TypeAlias = tuple[Hashable, int]
"""Group and tokens, which a pass's time depends on; the group of training calls, None, is no pass's of decode
steps."""


@dataclass(slots=True)
class _Pass:
    seconds: float
    errors: list[tuple[Part[_Work], Exception]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Cache rows of one session, as many as were opened, and the budget that they hold."""

    numbers: list[int]
    reserved_bytes: int
    adapter: HeldAdapter | None = None  # that its steps are computed with


class Backend:
    """The one owner of `span` and its cache. Used from one event loop."""

    def __init__(
        self,
        span: BlockSpan,
        *,
        cache_tokens: int,
        thread: ComputeThread,
        settings: SchedulerSettings = SchedulerSettings(),
        prefill_s: float = 0.0,
    ) -> None:
        """`cache_tokens`: room for so many over the whole span. `prefill_s`: what a token of prefill takes
        there; 0: nobody has measured it. The thread stays its owner's to close.
        """
        self.span = span
        self._thread = thread
        self._cache = span.new_cache()
        self.budget = Budget(self._cache.row_bytes(cache_tokens))
        self._scheduler: Scheduler[_Work] = Scheduler(settings, prefill_s)
        self._computing = False
        self._gathering = Gathering()
        self._lingering: asyncio.TimerHandle | None = None
        self._usual_s: dict[_Shape, float] = {}  # of passes of decode steps
        self._turned = True  # the loop has seen to others since the last pass on it

    def free_tokens(self) -> int:
        """How many more tokens over the whole span the budget has room for."""
        return self.budget.free_bytes // self._cache.row_bytes(1)

    @property
    def waiting_tokens(self) -> int:
        """Of all sessions' steps that have not begun, or not ended."""
        return self._scheduler.waiting_tokens

    # -- rows --------------------------------------------------------------------------------------------

    async def open_rows(
        self,
        count: int,
        max_length: int,
        start: int,
        end: int,
        *,
        extra_bytes: int = 0,
        wait_s: float = 0.0,
        adapter: HeldAdapter | None = None,
    ) -> Rows:
        """Reserve `count` cache rows over blocks [start, end), and `extra_bytes` beside them.

        Waits in line for at most `wait_s`. Raises Busy where there is no room by then, or the device does not
        give what the budget has. The `adapter` is the caller's to hold for as long as it has the rows.
        """
        nbytes = count * self._cache.row_bytes(max_length, start, end) + extra_bytes
        await self.budget.reserve(nbytes, wait_s)
        rows = Rows([], nbytes, adapter)
        try:
            await self._thread.run(self._open_rows, rows, count, max_length, start, end)
        except BaseException:  # with some of them open, or, where the wait was given up, soon
            self.drop_rows(rows)
            raise
        return rows

    def drop_rows(self, rows: Rows) -> None:
        """Free them once the thread gets to it; waits for nothing. A closed thread's rows went with it."""
        self.budget.release(rows.reserved_bytes)
        for number in rows.numbers:
            self._gathering.left(number)
        if not self._thread.closed:
            self._thread.run(self._drop_rows, rows.numbers)

    def held_tokens(self, rows: Rows) -> int:
        """In the caches of these rows, which are open, as of the last pass."""
        return sum(map(self._cache.length, rows.numbers))

    async def fork(self, forks: Sequence[tuple[int, int]]) -> None:
        """For each (row, other row) of cache rows, make the other one a copy."""
        await self._thread.run(self._fork, forks)

    def _fork(self, forks: Sequence[tuple[int, int]]) -> None:
        for source, target in forks:
            self._cache.fork_onto(source, target)

    def _open_rows(self, rows: Rows, count: int, max_length: int, start: int, end: int) -> None:
        if rows.adapter is not None:
            rows.adapter.blocks_of(self.span)  # makes them, so that no step has to
        try:
            for _ in range(count):
                rows.numbers.append(self._cache.open_row(max_length, start, end))
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise Busy(f"this server promised memory that it does not get: {error}", RETRY_S) from error

    def _drop_rows(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._cache.drop(number)

    # -- steps -------------------------------------------------------------------------------------------

    async def step(
        self,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        start: int,
        end: int,
        *,
        peer: Hashable = None,
        timeout_s: float = float("inf"),
        adapter: HeldAdapter | None = None,
    ) -> tuple[torch.Tensor, Timing]:
        """hidden (T, E) through blocks [start, end) -> (T, E), the caches of the segments' rows extended.

        Raises what `BlockSpan.forward` raises, NotFinite, or DeadlineExceeded if it has not begun in time.
        A step of many tokens may run in several passes; one that fails in the middle leaves its rows cut
        there.
        """
        now_s = time.perf_counter()
        work = _Step(
            asyncio.get_running_loop().create_future(),
            now_s,
            hidden=hidden,
            n_tokens=sum([segment.n_tokens for segment in segments]),
            segments=segments,
            start=start,
            end=end,
            adapted=None if adapter is None else adapter.blocks_of(self.span),
        )
        longest = max([segment.n_tokens for segment in segments])
        kind = Kind.DECODE if longest <= DECODE_TOKENS else Kind.PREFILL
        group = (start, end, None if adapter is None else adapter.digest)
        self._gathering.came(segments[0].row, now_s)
        request: Request[_Work] = Request(work, kind, group, peer, work.n_tokens, now_s + timeout_s)
        output, timing = await self._answer(request)
        return output, timing

    async def train(
        self,
        pieces: Generator[None, None, R],
        n_pieces: int,
        *,
        peer: Hashable = None,
        timeout_s: float = float("inf"),
    ) -> tuple[R, Timing]:
        """What `pieces` ends with, computed piece by piece on the thread, after everything that sessions ask.

        Raises what it raises, or DeadlineExceeded if it is not done in time.
        """
        now_s = time.perf_counter()
        work = _Turns(asyncio.get_running_loop().create_future(), now_s, pieces=pieces)
        # One turn more than there are pieces: the last is for what comes after the last yield.
        request = Request[_Work](work, Kind.TRAINING, None, peer, n_pieces + 1, deadline_s=now_s + timeout_s)
        result, timing = await self._answer(request)
        return result, timing

    def aside(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Something short on the thread, before the next pass."""
        return self._thread.run(function, *args, **kwargs)

    async def _answer(self, request: Request[_Work]) -> tuple[Any, Timing]:
        self._scheduler.add(request)
        self._pump()
        try:
            result = await request.work.answer
            return result, request.work.timing()
        except asyncio.CancelledError:
            self._scheduler.remove(request)
            raise

    def _pump(self) -> None:
        """Give the idle thread its next pass."""
        if self._computing or not len(self._scheduler):
            return
        for late in self._scheduler.expired(time.perf_counter()):
            _fail(late.work, DeadlineExceeded("the server was too busy to do this in time"))
        if self._lingers():
            return
        while parts := self._scheduler.next_batch():
            if not self._thread.closed:
                break
            for part in parts:
                _fail(part.request.work, ShuttingDown(_CLOSED))
        else:
            return
        self._computing = True
        self._gathering.began()
        shape = parts[0].request.group, sum([part.n_tokens for part in parts])
        if self._is_quick(shape):
            self._passed(parts, shape, self._pass(parts))
        else:
            self._thread.run(self._pass, parts).add_done_callback(partial(self._arrived, parts, shape))

    def _is_quick(self, shape: _Shape) -> bool:
        """Whether the pass may hold up the event loop, once in each of its turns."""
        usual_s = self._usual_s.get(shape)
        if usual_s is None or usual_s > HERE_S or not (self._turned and self._thread.is_idle):
            return False
        self._turned = False
        asyncio.get_running_loop().call_soon(self._turn)
        return True

    def _turn(self) -> None:
        self._turned = True

    def _lingers(self) -> bool:
        """Whether the next pass is put off for a moment, for whoever is about to come back."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        wait_s = 0.0
        if self._gathering.anybody:
            wait_s = self._gathering.wait_s(time.perf_counter(), self._scheduler.decoding)
        if wait_s > 0:
            self._lingering = asyncio.get_running_loop().call_later(wait_s, self._pump)
        return wait_s > 0

    def _arrived(self, parts: list[Part[_Work]], shape: _Shape, passed: asyncio.Future[_Pass]) -> None:
        """The thread has done with a pass."""
        if not passed.cancelled():
            self._passed(parts, shape, passed.result())
            return
        self._computing = False
        for part in parts:
            _fail(part.request.work, ShuttingDown(_CLOSED))
        self._pump()

    def _passed(self, parts: list[Part[_Work]], shape: _Shape, result: _Pass) -> None:
        """A pass is over: answer whom it finished, and go on."""
        self._computing = False
        self._scheduler.observe(parts, result.seconds)
        if parts[0].request.kind is Kind.DECODE:  # then nothing else was in it
            self._gathering.passed(result.seconds)
            if len(self._usual_s) > MOST_SHAPES:
                self._usual_s.clear()
            self._usual_s[shape] = result.seconds
        now_s = time.perf_counter()
        for part, error in result.errors:
            self._scheduler.remove(part.request)
            _fail(part.request.work, error)
        for part in parts:
            work = part.request.work
            if isinstance(work, _Step) and not part.request.n_tokens:
                if not work.answer.done():  # else whoever asked has gone, and its session has left
                    self._gathering.answered(work.segments[0].row, now_s, part.request.group)
                _finish(work)
            elif isinstance(work, _Turns) and work.ended:
                self._scheduler.remove(part.request)
                _finish(work)
        self._pump()

    # -- on the compute thread ---------------------------------------------------------------------------

    def _pass(self, parts: list[Part[_Work]]) -> _Pass:
        """One forward for all; where that fails, one for each, so that only the guilty ones fail."""
        began_s = time.perf_counter()
        errors: list[tuple[Part[_Work], Exception]] = []
        try:
            self._forward(parts)
        except Exception as error:
            if len(parts) == 1:
                errors.append((parts[0], error))
            else:
                for part in parts:
                    try:
                        self._forward([part])
                    except Exception as own:
                        errors.append((part, own))
        seconds = time.perf_counter() - began_s
        for part in parts:
            work = part.request.work
            work.began_s = work.began_s or began_s
            work.compute_s += seconds
        return _Pass(seconds, errors)

    def _forward(self, parts: list[Part[_Work]]) -> None:
        first = parts[0].request.work
        if isinstance(first, _Turns):
            _next_piece(first)
            return
        steps = [(part.request.work, part.n_tokens) for part in parts if isinstance(part.request.work, _Step)]
        hidden = [work.next_hidden(n_tokens) for work, n_tokens in steps]
        segments = [segment for work, n_tokens in steps for segment in work.next_segments(n_tokens)]
        packed = hidden[0] if len(hidden) == 1 else torch.cat([one.to(self.span.dtype) for one in hidden])
        output = self.span.forward(
            packed, segments, self._cache, start=first.start, end=first.end, adapted=first.adapted
        )
        lengths = [n_tokens for _, n_tokens in steps]
        outputs = [output] if len(lengths) == 1 else output.split(lengths)  # type: ignore[no-untyped-call]
        if not is_finite(output):
            for given, computed in zip(hidden, outputs, strict=True):
                check_finite(given, computed)
        for part, (work, n_tokens), computed in zip(parts, steps, outputs, strict=True):
            # The event loop encodes few tokens itself. On a device it would wait for the pass after this.
            decodes = part.request.kind is Kind.DECODE
            work.outputs.append(computed.cpu() if decodes else computed)
            work.done_tokens += n_tokens


def _next_piece(work: _Turns) -> None:
    try:
        next(work.pieces)
    except StopIteration as end:
        work.ended, work.value = True, end.value


def _fail(work: _Work, error: Exception) -> None:
    if not work.answer.done():
        work.answer.set_exception(error)


def _finish(work: _Work) -> None:
    if not work.answer.done():
        work.answer.set_result(work.result())
