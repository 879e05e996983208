"""One training call to one server: what it lacks is sent, what is too much for it is cut, what it answers is
checked. And what to do when it fails.

Knows tensors and hops; knows no socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from petalite.client.adapters import AdapterPart, AdapterSource
from petalite.client.hops import Servers, Wanted
from petalite.client.settings import TrainingSettings
from petalite.errors import (
    BadAdapter,
    BadMessage,
    BadTensor,
    BatchTooLarge,
    Busy,
    NotFinite,
    NotKept,
    PetaliteError,
    UnknownAdapter,
    WrongModel,
)
from petalite.model.compute import is_finite
from petalite.net.identity import PeerId
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from petalite.swarm.training import SpanGradients, SpanInputs, SpanOutputs

logger = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

# The call may be at fault, or the server: one more server is asked, and then believed.
DOUBTFUL = (BadAdapter, BadMessage, BadTensor, BatchTooLarge, NotFinite, UnknownAdapter, WrongModel)
LONGEST_PAUSE_S = 5.0
MOST_KNOWN = 1024  # servers of which something is remembered


@dataclass(frozen=True, slots=True)
class Work:
    """What all parts of a batch have in common."""

    span: Span
    # (blocks of the span, P, E): added to the first P tokens of what enters each.
    prompts: Tensor | None = None
    adapter: AdapterSource | None = None

    def prompts_of(self, span: Span) -> Tensor | None:
        if self.prompts is None:
            return None
        return self.prompts[span.start - self.span.start : span.end - self.span.start]

    def part(self, span: Span) -> AdapterPart | None:
        return None if self.adapter is None else self.adapter.part(span)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one server computed of one part of a batch, and what another needs to compute it again."""

    hop: Hop
    hidden: Tensor  # (b, T, E) that entered
    kept: bytes | None = None  # names what the server holds on to of it


class SpanCalls:
    """Calls of one model's training to its servers."""

    def __init__(self, servers: Servers, settings: TrainingSettings) -> None:
        self._servers = servers
        self._settings = settings
        self._most_tokens: dict[PeerId, int] = {}  # in one call, of servers that found one too large
        self._sent: dict[tuple[PeerId, Span], bytes] = {}  # the adapter that a server was sent last
        # For as long as somebody holds one, or waits for it.
        self._sending: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()

    async def forward(self, work: Work, hop: Hop, hidden: Tensor, *, keep: bool) -> SpanOutputs:
        """hidden (b, T, E) through the hop's blocks. Raises what the server raises; BadTensor, NotFinite."""
        place, part = self._servers.training(hop.peer, self._settings), work.part(hop.span)

        async def call(rows: slice) -> SpanOutputs:
            inputs = self._inputs(work, hop.span, hidden[rows], part)
            outputs = await place.forward(hop.span, inputs, keep=keep and len(inputs.hidden) == len(hidden))
            _check(hop, "hidden states", outputs.hidden, inputs.hidden.shape)
            return outputs

        found = await self._cut(hop.peer, hidden, lambda rows: self._having(hop, part, lambda: call(rows)))
        if len(found) == 1:
            return found[0]
        return SpanOutputs(torch.cat([one.hidden for one in found]), found[0].report)

    async def backward(
        self, work: Work, piece: Piece, gradient: Tensor, wants: Sequence[str]
    ) -> SpanGradients:
        """From the gradient (b, T, E) of what came out of the piece's hop. Raises like `forward`."""
        hop, part = piece.hop, work.part(piece.hop.span)
        place, prompts = self._servers.training(hop.peer, self._settings), work.prompts_of(hop.span)

        async def call(rows: slice) -> SpanGradients:
            inputs = self._inputs(work, hop.span, piece.hidden[rows], part)
            if piece.kept is not None and len(inputs.hidden) == len(piece.hidden):
                try:
                    return await place.backward(hop.span, inputs, gradient[rows], wants, kept=piece.kept)
                except NotKept:
                    pass
            return await place.backward(hop.span, inputs, gradient[rows], wants)

        async def checked(rows: slice) -> SpanGradients:
            found = await self._having(hop, part, lambda: call(rows))
            _check(hop, "gradients", found.hidden, gradient[rows].shape)
            _check(hop, "gradients of prompts", found.prompts, None if prompts is None else prompts.shape)
            _check(hop, "gradients of the adapter", found.adapter, None if part is None else (part.n_values,))
            return found

        return _summed(await self._cut(hop.peer, gradient, checked))

    @staticmethod
    def _inputs(work: Work, span: Span, hidden: Tensor, part: AdapterPart | None) -> SpanInputs:
        return SpanInputs(hidden, work.prompts_of(span), None if part is None else part.digest)

    async def _cut(self, peer: PeerId, hidden: Tensor, call: Callable[[slice], Awaitable[T]]) -> list[T]:
        """All rows of (b, T, E) in one call, or as few at a time as the server takes."""
        n_rows, n_tokens, _ = hidden.shape
        found: list[T] = []
        start = 0
        while start < n_rows:
            at_once = max(1, self._most_tokens.get(peer, n_rows * n_tokens) // n_tokens)
            rows = slice(start, min(start + at_once, n_rows))
            try:
                found.append(await call(rows))
                start = rows.stop
            except BatchTooLarge as error:
                tried = rows.stop - start
                if tried == 1:
                    raise
                half = tried // 2 * n_tokens
                most_tokens = min(error.most_tokens or half, (tried - 1) * n_tokens)
                remember(self._most_tokens, peer, most_tokens)
        return found

    async def _having(self, hop: Hop, part: AdapterPart | None, call: Callable[[], Awaitable[T]]) -> T:
        """A call that finds the adapter at the server, which may have dropped it since it was sent."""
        await self._send(hop, part)
        try:
            return await call()
        except UnknownAdapter:
            if part is None or part.blob is None:
                raise
            self._sent.pop((hop.peer, hop.span), None)
            await self._send(hop, part)
            return await call()

    async def _send(self, hop: Hop, part: AdapterPart | None) -> None:
        if part is None or part.blob is None:
            return
        lock = self._sending.setdefault(hop.peer, asyncio.Lock())
        async with lock:  # parts of a batch that come together need it sent once
            if self._sent.get((hop.peer, hop.span)) != part.digest:
                await self._servers.training(hop.peer, self._settings).put_adapter(part.blob)
                remember(self._sent, (hop.peer, hop.span), part.digest)


class Trouble:
    """What went wrong with one part of a batch since it last came further."""

    def __init__(self, servers: Servers, wanted: Wanted, settings: TrainingSettings) -> None:
        self._servers = servers
        self._wanted = wanted
        self._settings = settings
        self._deadline_s: float | None = None
        self._pause_s = 0.0
        self._doubts: list[tuple[PeerId, PetaliteError]] = []

    def over(self) -> None:
        """It went on."""
        self._deadline_s, self._pause_s = None, 0.0
        self._doubts.clear()

    async def instead(self, hop: Hop, error: PetaliteError) -> list[Hop]:
        """Who computes the blocks of a hop that failed. Raises the error where nobody else would do better:
        two servers say so, or there was no progress for `recovery_s`; MissingBlocks where nobody is there.
        """
        loop = asyncio.get_running_loop()
        logger.info("%s failed at blocks %s: %s", hop.peer.short(), hop.span, error)
        if isinstance(error, DOUBTFUL):
            self._doubts.append((hop.peer, error))
            if len(self._doubts) > 1:
                raise self._verdict(hop.span) from error
        if self._deadline_s is None:
            self._deadline_s = loop.time() + self._settings.recovery_s
        if isinstance(error, Busy) and error.retry_after_s is not None:
            self._pause_s = max(self._pause_s, min(error.retry_after_s, LONGEST_PAUSE_S))
        if loop.time() + self._pause_s >= self._deadline_s:
            raise error
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(max(2 * self._pause_s, self._settings.retry_s), LONGEST_PAUSE_S)
        left_s = max(self._deadline_s - loop.time(), 0.0)
        return await self._servers.plan(hop.span, fresh=True, timeout_s=left_s, wanted=self._wanted)

    def _verdict(self, span: Span) -> PetaliteError:
        """Two servers agree."""
        (first, _), (second, error) = self._doubts[-2:]
        who = f"{first.short()} and {second.short()}" if first != second else f"{first.short()}, twice,"
        if isinstance(error, NotFinite):
            for peer in (first, second):
                self._servers.succeeded(peer)  # it is in the numbers, not in them
            return NotFinite(f"blocks {span} at {who} give NaN or Inf: {error}", error.given)
        return type(error)(f"blocks {span} at {who}: {error}")


def remember(known: dict[K, V], key: K, value: V) -> None:
    """What was set longest ago is forgotten, where there is too much: a loop of days meets many servers."""
    known.pop(key, None)
    known[key] = value
    if len(known) > MOST_KNOWN:
        del known[next(iter(known))]


def _check(hop: Hop, what: str, found: Tensor | None, shape: Sequence[int] | None) -> None:
    if found is None:
        return
    if shape is None or tuple(found.shape) != tuple(shape):
        raise BadTensor(
            f"{hop.peer.short()} answers {what} of blocks {hop.span} in shape {tuple(found.shape)}, expected "
            f"{None if shape is None else tuple(shape)}"
        )
    if not is_finite(found):
        raise NotFinite(
            f"{hop.peer.short()} answers {what} of blocks {hop.span} with NaN or Inf", given=False
        )


def _summed(found: Sequence[SpanGradients]) -> SpanGradients:
    """Of parts of a batch, one behind the other."""
    if len(found) == 1:
        return found[0]

    def total(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.stack(there).sum(0) if there else None

    hidden = [one.hidden for one in found if one.hidden is not None]
    return SpanGradients(
        torch.cat(hidden) if hidden else None,
        total([one.prompts for one in found]),
        total([one.adapter for one in found]),
        found[0].report,
    )
