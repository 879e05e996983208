"""Forward and backward passes of whole batches over a span, whose servers need remember nothing.

A batch goes through in parts of a few rows, several at once, so that one server computes a part while the one
before it computes the next; each part has its own chain, drawn by speed. What entered each server is kept
here. When one fails, others compute its blocks from that, backward too: a failure costs what was under way
there, once more. What comes out does not depend on who computed it. Knows tensors and hops; knows neither
autograd nor sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from petalite.client.hops import Servers, Wanted
from petalite.client.settings import TrainingSettings
from petalite.client.spancalls import Piece, SpanCalls, Trouble, Work, remember
from petalite.errors import DeadlineExceeded, NetworkError, NotFinite, PetaliteError, RemoteError
from petalite.model.compute import is_finite
from petalite.net.identity import PeerId
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from petalite.swarm.training import ADAPTER, HIDDEN, PROMPTS, SpanGradients

R = TypeVar("R")

LEAST_PART_TOKENS = 128  # fewer cost a server nearly as much


@dataclass(frozen=True, slots=True)
class Wants:
    """Whose gradients a backward pass is to bring."""

    hidden: bool = False
    prompts: bool = False
    adapter: bool = False

    def lowest(self, work: Work) -> int:
        """The first block that backward has to reach; the end of the span where there is nothing to do."""
        if self.hidden or self.prompts:
            return work.span.start
        trained = [block for block in work.span.blocks if work.adapter is not None and block in work.adapter]
        return min(trained) if self.adapter and trained else work.span.end

    def of(self, work: Work, span: Span) -> list[str]:
        """What a server of `span` is asked for."""
        wanted = {
            HIDDEN: self.hidden or self.lowest(work) < span.start,
            PROMPTS: self.prompts,
            ADAPTER: self.adapter and work.part(span) is not None,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Those that were wanted, summed over the batch."""

    hidden: Tensor | None  # (B, T, E) float32
    prompts: Tensor | None  # (blocks of the span, P, E) float32
    adapter: dict[str, Tensor]  # float32, by the adapter's names


@dataclass(frozen=True, slots=True)
class Replaced:
    """A server that failed in a pass, and what was said of it."""

    hop: Hop
    cause: PetaliteError


class Passes:
    """Passes of one model's batches over its servers."""

    def __init__(self, servers: Servers, settings: TrainingSettings = TrainingSettings()) -> None:
        self.settings = settings
        self.replaced: deque[Replaced] = deque(maxlen=1024)  # the latest last
        self._servers = servers
        self._calls = SpanCalls(servers, settings)
        self._failures: dict[PeerId, tuple[float, PetaliteError]] = {}  # the latest, and when it was

    @property
    def model_id(self) -> str:
        return self._servers.model_id

    async def forward(
        self, work: Work, hidden: Tensor, wants: Wants = Wants()
    ) -> tuple[Tensor, list[list[Piece]]]:
        """hidden (B, T, E) → (B, T, E) float32, and what a backward pass for `wants` needs of each part.

        Raises MissingBlocks, DeadlineExceeded; NotFinite, BatchTooLarge and the like where two servers agree.
        """
        hidden = hidden.detach().to("cpu", torch.float32)
        output = torch.empty(hidden.shape)
        pieces: list[list[Piece]] = []
        wanted, lowest = _wanted(work, hidden), wants.lowest(work)

        async def one(rows: slice, chain: Sequence[Hop]) -> list[Piece]:
            found, output[rows] = await self._through(work, chain, hidden[rows], wanted, lowest)
            return [piece for piece in found if piece.hop.span.end > lowest]

        async with self._deadline("forward", work.span):
            timeout_s = self.settings.recovery_s
            parts = self._parts(hidden)
            chains = [
                await self._servers.plan(work.span, fresh=False, timeout_s=timeout_s, wanted=wanted)
                for _ in parts
            ]
            await self._each([partial(one, *each) for each in zip(parts, chains, strict=True)], pieces.append)
        return output, pieces

    async def backward(
        self, work: Work, pieces: Sequence[Sequence[Piece]], gradient: Tensor, wants: Wants
    ) -> Gradients:
        """From the gradient (B, T, E) of what `forward` gave, and the pieces that it gave. Raises like it."""
        gradient = gradient.detach().to("cpu", torch.float32)
        if not is_finite(gradient):
            raise NotFinite(
                f"the gradient that is to go back through blocks {work.span} has NaN or Inf in it before any "
                f"server has seen it; look at the loss, or lower the learning rate",
                given=True,
            )
        total = Gradients(
            torch.empty(gradient.shape) if wants.hidden else None,
            torch.zeros(work.prompts.shape) if wants.prompts and work.prompts is not None else None,
            {},
        )

        async def one(rows: slice, part: Sequence[Piece]) -> list[tuple[Span, SpanGradients]]:
            found, entering = await self._back(work, part, gradient[rows], wants)
            if total.hidden is not None:
                total.hidden[rows] = entering
            return found

        async with self._deadline("backward", work.span):
            parts = zip(self._parts(gradient), pieces, strict=True)
            await self._each([partial(one, *each) for each in parts], lambda found: _add(total, work, found))
        return total

    # -- one part of a batch -----------------------------------------------------------------------------

    async def _through(
        self, work: Work, chain: Sequence[Hop], hidden: Tensor, wanted: Wanted, lowest: int
    ) -> tuple[list[Piece], Tensor]:
        """hidden (b, T, E) through the hops of a chain, or through others where one fails → what each was
        given, and what came out.
        """
        trouble = Trouble(self._servers, wanted, self.settings)
        pieces: list[Piece] = []
        left, planned_s = deque(chain), self._now_s()
        while left:
            hop = left.popleft()
            try:
                self._check_alive(hop, planned_s)
                found = await self._calls.forward(work, hop, hidden, keep=hop.span.end > lowest)
            except (NetworkError, RemoteError) as error:
                self._failed(hop, error, planned_s)
                left.extendleft(reversed(await trouble.instead(hop, error)))
                planned_s = self._now_s()
                continue
            trouble.over()
            pieces.append(Piece(hop, hidden, found.kept))
            hidden = found.hidden
        return pieces, hidden

    async def _back(
        self, work: Work, pieces: Sequence[Piece], gradient: Tensor, wants: Wants
    ) -> tuple[list[tuple[Span, SpanGradients]], Tensor]:
        """The gradient (b, T, E) back through the pieces → what each server gave, and the first one's
        input's.
        """
        wanted, lowest = _wanted(work, gradient), wants.lowest(work)
        trouble = Trouble(self._servers, wanted, self.settings)
        found: list[tuple[Span, SpanGradients]] = []
        left, planned_s = list(pieces), self._now_s()
        while left:
            piece = left.pop()
            span = piece.hop.span
            if span.end <= lowest:
                break
            try:
                self._check_alive(piece.hop, planned_s)
                back = await self._calls.backward(work, piece, gradient, wants.of(work, span))
            except (NetworkError, RemoteError) as error:
                self._failed(piece.hop, error, planned_s)
                hops = await trouble.instead(piece.hop, error)
                planned_s = self._now_s()
                # Backward computes its blocks' forward itself; only what enters the later hops is missing.
                before, entering = await self._through(work, hops[:-1], piece.hidden, wanted, span.start)
                left += [*before, Piece(hops[-1], entering)]
                continue
            trouble.over()
            found.append((span, back))
            if back.hidden is not None:
                gradient = back.hidden
        return found, gradient

    def _check_alive(self, hop: Hop, planned_s: float) -> None:
        """Raises what another part found out about the hop's server since this one planned to go there."""
        failed_s, error = self._failures.get(hop.peer, (planned_s, None))
        if failed_s > planned_s and isinstance(error, NetworkError):
            raise error

    def _failed(self, hop: Hop, error: PetaliteError, planned_s: float) -> None:
        """Told once, of however many parts that were to go there."""
        self.replaced.append(Replaced(hop, error))
        failed_s, _ = self._failures.get(hop.peer, (planned_s, error))
        if failed_s <= planned_s:
            self._servers.failed(hop.peer, error)
            remember(self._failures, hop.peer, (self._now_s(), error))

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()

    # -- all parts of it ---------------------------------------------------------------------------------

    def _parts(self, hidden: Tensor) -> list[slice]:
        """The rows of (B, T, E) in parts of at most about `part_tokens`, and enough of them to keep every
        server of a chain at work.
        """
        n_rows, n_tokens, _ = hidden.shape
        share = max(LEAST_PART_TOKENS, n_rows * n_tokens // self.settings.in_flight)
        at_once = max(1, min(self.settings.part_tokens, share) // n_tokens)
        return [slice(start, min(start + at_once, n_rows)) for start in range(0, n_rows, at_once)]

    async def _each(self, parts: Iterable[Callable[[], Awaitable[R]]], take: Callable[[R], object]) -> None:
        """Run them, so many at once, and take what they give in their order. One that fails ends all."""
        places = asyncio.Semaphore(self.settings.in_flight)

        async def one(part: Callable[[], Awaitable[R]]) -> R:
            async with places:
                return await part()

        tasks = [asyncio.create_task(one(part)) for part in parts]
        try:
            for task in tasks:
                take(await task)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    @asynccontextmanager
    async def _deadline(self, which: str, span: Span) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.settings.pass_s) as timeout:
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(
                f"a {which} pass over blocks {span} took longer than {self.settings.pass_s:g} s; "
                f"see TrainingSettings.pass_s"
            ) from error


def _wanted(work: Work, hidden: Tensor) -> Wanted:
    hosted = None if work.adapter is None else work.adapter.hosted
    return Wanted(training_tokens=hidden.shape[1], adapter=hosted)


def _add(total: Gradients, work: Work, found: Sequence[tuple[Span, SpanGradients]]) -> None:
    """Those of one part, in the parts' order: sums of floats depend on it."""
    for span, back in found:
        if total.prompts is not None and back.prompts is not None:
            first = span.start - work.span.start
            total.prompts[first : first + len(span)] += back.prompts
        part = work.part(span)
        if back.adapter is not None and part is not None:
            for name, gradient in part.split(back.adapter):
                if name in total.adapter:
                    total.adapter[name] += gradient
                else:
                    total.adapter[name] = gradient.clone()
