"""A session over a chain of hops: steps in, hidden states out, whatever dies in between.

The star: the client carries every edge of the chain, and keeps each hop's inputs. When a hop fails, only
its span is planned anew, its kept inputs are replayed to the replacement as chunked prefill, and the step
that failed is repeated there; the other hops keep their caches (arXiv 2312.08361, Algorithm 1). Knows rows
and hidden states; knows neither tokens nor sockets.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalite.client.hops import OpenHop, Reply, Servers
from petalite.client.kept import KeptInputs, Row
from petalite.client.trace import HopTiming, Recovery, Trace
from petalite.errors import (
    BadMessage,
    BadTensor,
    DeadlineExceeded,
    InvalidArgument,
    MissingBlocks,
    NetworkError,
    NotFinite,
    RemoteError,
    SessionGap,
    SessionLimit,
)
from petalite.net.identity import PeerId
from petalite.swarm.codecs import Codec
from petalite.swarm.messages import ALL, NONE
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

logger = logging.getLogger(__name__)

# What a server says of a step that was wrong in itself; another server would say the same.
_OUR_FAULT = (BadMessage, BadTensor, SessionGap, SessionLimit, NotFinite, MissingBlocks)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    step_s: float = 30.0  # a hop that has not answered a step by then has failed; token_s more for each token
    token_s: float = 0.25
    open_s: float = 15.0  # to find a chain and open it, in all, before opening fails
    recovery_s: float = 60.0  # to find and fill a replacement, in all, before the step fails
    chunk_tokens: int = 512  # a longer prefill, or replay, goes in steps of this many
    retry_s: float = 0.05  # pause before a third attempt to open hops; doubles up to two seconds


class _HopFailed(Exception):
    """A hop failed in a way that another server may not."""

    def __init__(self, peer: PeerId, cause: Exception) -> None:
        super().__init__(str(cause))
        self.peer = peer
        self.cause = cause


@dataclass(slots=True)
class _Stage:
    """One hop of the chain: the session open there, and what it was sent."""

    hop: Hop
    opened: OpenHop
    kept: KeptInputs

    async def step(self, rows: Sequence[Row], data: memoryview, output: str, timeout_s: float) -> Reply:
        """One step there, its input kept once it succeeded."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self.opened.step(rows, data, output)
        except _OUR_FAULT:
            raise
        except (NetworkError, RemoteError) as error:
            raise _HopFailed(self.hop.peer, error) from error
        except TimeoutError as error:
            late = DeadlineExceeded(f"{self.hop.peer.short()} did not answer a step within {timeout_s:.0f} s")
            raise _HopFailed(self.hop.peer, late) from error
        self.kept.put(rows, data)
        return reply


class Session:
    """Rows of one client over the blocks of `span`, each up to `max_length` tokens.

    An async context manager: hops are opened on entering, and freed at every server on leaving.
    """

    def __init__(
        self,
        servers: Servers,
        span: Span,
        hidden_size: int,
        *,
        max_length: int,
        rows: int = 1,
        settings: SessionSettings = SessionSettings(),
    ) -> None:
        self.span = span
        self.rows = rows
        self.max_length = max_length
        self.settings = settings
        self.trace = Trace()
        self._servers = servers
        self._hidden_size = hidden_size
        self._stages: list[_Stage] = []

    async def __aenter__(self) -> Session:
        deadline_s = time.monotonic() + self.settings.open_s
        self._stages = await self._open_span(self.span, deadline_s, fresh=False)
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        stages, self._stages = self._stages, []
        if error_type is None:
            for stage in stages:
                self._servers.succeeded(stage.hop.peer)
        _close_all(stages)

    def length(self, row: int = 0) -> int:
        """Tokens of the row that every hop has seen."""
        return min((stage.kept.length(row) for stage in self._stages), default=0)

    @property
    def chain(self) -> list[Hop]:
        return [stage.hop for stage in self._stages]

    @property
    def kept_bytes(self) -> int:
        """Memory that the inputs kept for replay take here."""
        return sum(stage.kept.nbytes for stage in self._stages)

    async def step(self, hidden: torch.Tensor, rows: Sequence[Row], output: str = ALL) -> torch.Tensor:
        """hidden (T, E), packed by `rows` of (row, position, n_tokens) -> the outputs asked for, (T', E).

        A position inside a row rolls it back to there first. Raises MissingBlocks when a block has had no
        live server for `recovery_s`; the rows then stand at their positions and the step can be tried again
        later.
        """
        self._check(hidden, rows)
        for stage in self._stages:
            for row, position, _ in rows:
                stage.kept.truncate(row, position)
        codec = self._stages[0].opened.codec
        data = memoryview(codec.encode(hidden))
        timings: list[HopTiming] = []
        while len(timings) < len(self._stages):
            index = len(timings)
            stage = self._stages[index]
            wanted = output if index == len(self._stages) - 1 else ALL
            data, codec = _recode(data, codec, stage.opened.codec, self._hidden_size)
            began_s = time.perf_counter()
            try:
                reply = await stage.step(rows, data, wanted, self._timeout_s(rows))
            except _HopFailed as failure:
                await self._replace(index, failure)
                continue
            total_s = time.perf_counter() - began_s
            timings.append(HopTiming(stage.hop.peer, stage.hop.span, total_s, reply.queue_s, reply.compute_s))
            data = reply.data
        self.trace.steps.append(tuple(timings))
        return codec.decode(data, self._hidden_size)

    def _check(self, hidden: torch.Tensor, rows: Sequence[Row]) -> None:
        if not self._stages:
            raise InvalidArgument("the session is not open; use it inside `async with`")
        n_tokens = sum(n for _, _, n in rows)
        if hidden.shape != (n_tokens, self._hidden_size):
            raise InvalidArgument(
                f"hidden states have shape {tuple(hidden.shape)}, the step's {n_tokens} tokens need "
                f"({n_tokens}, {self._hidden_size})"
            )
        for row, position, n in rows:
            if not 0 <= row < self.rows or n < 1:
                raise InvalidArgument(
                    f"the step names {n} tokens of row {row}; the session has {self.rows} rows"
                )
            if not 0 <= position <= self.length(row):
                raise SessionGap(f"row {row} holds {self.length(row)} tokens, the step begins at {position}")
            if position + n > self.max_length:
                raise SessionLimit(
                    f"the session was opened for {self.max_length} tokens, the step reaches {position + n}; "
                    f"open it with a larger max_length"
                )

    def _timeout_s(self, rows: Sequence[Row]) -> float:
        return self.settings.step_s + self.settings.token_s * sum(n for _, _, n in rows)

    # -- opening and replacing hops ----------------------------------------------------------------------

    async def _open_span(self, span: Span, deadline_s: float, *, fresh: bool) -> list[_Stage]:
        """A chain over `span` with a session at each hop; others are tried for those that fail, in time."""
        pause_s = 0.0
        while True:
            left_s = max(deadline_s - time.monotonic(), 0.0)
            hops = await self._servers.plan(span, fresh=fresh, timeout_s=left_s)
            stages, failures = await self._open_hops(hops)
            if not failures:
                return stages
            _close_all(stages)
            for failure in failures:
                self._servers.failed(failure.peer, failure.cause)
            if time.monotonic() + pause_s >= deadline_s:
                raise failures[0].cause
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, self.settings.retry_s), 2.0)
            fresh = True

    async def _open_hops(self, hops: Sequence[Hop]) -> tuple[list[_Stage], list[_HopFailed]]:
        """Open all at once. Anything but a hop's own failure closes what was opened and is raised."""
        tasks = [asyncio.create_task(self._open_hop(hop)) for hop in hops]
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, _HopFailed):
                    raise result
        except BaseException:
            for task in tasks:
                task.cancel()
            for task in tasks:
                task.add_done_callback(_close_late)
            raise
        stages = [result for result in results if isinstance(result, _Stage)]
        return stages, [result for result in results if isinstance(result, _HopFailed)]

    async def _open_hop(self, hop: Hop) -> _Stage:
        try:
            async with asyncio.timeout(self.settings.step_s):
                opened = await self._servers.open(hop, rows=self.rows, max_length=self.max_length)
        except (NetworkError, RemoteError) as error:
            raise _HopFailed(hop.peer, error) from error
        except TimeoutError as error:
            late = DeadlineExceeded(
                f"{hop.peer.short()} opened no session within {self.settings.step_s:.0f} s"
            )
            raise _HopFailed(hop.peer, late) from error
        return _Stage(hop, opened, KeptInputs(opened.codec.nbytes(1, self._hidden_size)))

    async def _replace(self, index: int, failure: _HopFailed) -> None:
        """Put new hops where stage `index` was, brought to its state before the step that failed."""
        began_s = time.monotonic()
        deadline_s = began_s + self.settings.recovery_s
        lost = self._stages[index]
        logger.info("lost %s with blocks %s: %s", lost.hop.peer.short(), lost.hop.span, failure.cause)
        _close_all([lost])
        latest = failure
        while True:
            self._servers.failed(latest.peer, latest.cause)
            stages = await self._open_span(lost.hop.span, deadline_s, fresh=True)
            try:
                await self._replay(lost, stages)
                break
            except BaseException as error:
                _close_all(stages)
                if not isinstance(error, _HopFailed):
                    raise
                if time.monotonic() > deadline_s:
                    raise error.cause from failure
                latest = error
        self._stages[index : index + 1] = stages
        self.trace.recoveries.append(
            Recovery(
                span=lost.hop.span,
                lost=lost.hop.peer,
                replacements=tuple(stage.hop.peer for stage in stages),
                replayed_tokens=sum(lost.kept.length(row) for row in range(self.rows)),
                seconds=time.monotonic() - began_s,
                cause=str(failure.cause),
            )
        )

    async def _replay(self, lost: _Stage, stages: list[_Stage]) -> None:
        """Feed `stages` what `lost` was sent; what each passes on becomes what the next was sent."""
        for row, kept in lost.kept.replay(self.settings.chunk_tokens):
            data, codec = kept, lost.opened.codec
            for stage in stages:
                data, codec = _recode(data, codec, stage.opened.codec, self._hidden_size)
                output = NONE if stage is stages[-1] else ALL
                data = (await stage.step([row], data, output, self._timeout_s([row]))).data


def _recode(data: memoryview, source: Codec, target: Codec, hidden_size: int) -> tuple[memoryview, Codec]:
    """The same hidden states as the next hop wants them; the very same bytes where it can take them."""
    if source is target:
        return data, target
    return memoryview(target.encode(source.decode(data, hidden_size))), target


def _close_all(stages: Sequence[_Stage]) -> None:
    for stage in stages:
        stage.opened.close()


def _close_late(task: asyncio.Task[_Stage]) -> None:
    """For an opening nobody waits for any more: close what it opened all the same."""
    if not task.cancelled() and task.exception() is None:
        task.result().opened.close()
