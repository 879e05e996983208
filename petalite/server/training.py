"""Training through a server's blocks: forward and backward calls over whole sequences.

Each call is a `Walk` in pieces, of which the backend computes one at a time, after everything that sessions
ask. What a call takes is reserved before it begins, from the memory that sessions' caches share, of which all
training together may have a part. For N tokens over n blocks, E and the dtype's bytes d, pieces of C tokens,
and `activation_bytes` a of one token in one block:

    forward                     2 N E d                   + C a + factors
    backward, from the inputs   (n + 3) N E d             + C a + factors
    backward, nothing twice     3 N E d          + N n a        + factors

The last is taken where there is room at once, and is what a forward holds on to when asked; it is let go of
after a while, and as soon as anybody else needs the room. Factors are three times the float32 bytes of
prompts and adapter: themselves stacked, and their gradients twice. Knows a backend and adapters; knows no
socket, so `petalite.load(peers=None)` trains through it too.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from petalite.errors import (
    BadAdapter,
    BadMessage,
    BatchTooLarge,
    Busy,
    InvalidAdapter,
    NotFinite,
    NotKept,
    WrongSpan,
)
from petalite.model.compute import is_finite
from petalite.model.lora import read_adapter
from petalite.model.span import BlockSpan
from petalite.model.walk import Gradients, Hold, Walk, activation_bytes
from petalite.net.messages import Buffer
from petalite.server.adapters import Adapters, HeldAdapter
from petalite.server.backend import Backend, Timing
from petalite.server.budget import RETRY_S, Budget
from petalite.swarm.messages import TOKEN_BYTES, HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    GRADIENTS,
    HIDDEN,
    PROMPTS,
    SpanGradients,
    SpanInputs,
    SpanOutputs,
    adapter_digest,
)

R = TypeVar("R")
_FIRST_PIECE_TOKENS = 256  # before anything was measured
_PIECE_TOKENS = (64, 4096)  # at least and at most
_USUAL_ROW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    share: float = 0.5  # of the memory for caches: what training may have of it; 0: no training
    limit_bytes: int | None = None  # and no more than this
    most_tokens: int = 8192  # in one call
    most: int = 64  # calls at once, waiting ones too
    most_per_peer: int = 16  # of them, one peer's
    longest_wait_s: float = 60.0  # in line for memory
    kept_s: float = 120.0  # what a forward held on to is let go of then
    piece_s: float = 0.05  # a piece takes about so long, seconds; a decode step waits for one at most
    adapter_bytes: int = 512 << 20  # for adapters that clients sent


class Trainer:
    """Implements `swarm.training.SpanTraining` over one backend's blocks."""

    def __init__(
        self,
        backend: Backend,
        model_id: str,
        adapters: Adapters,
        settings: TrainingSettings = TrainingSettings(),
    ) -> None:
        self._backend = backend
        self._model_id = model_id
        self._adapters = adapters
        self._settings = settings
        room = int(backend.budget.total_bytes * settings.share)
        limit = room if settings.limit_bytes is None else min(room, settings.limit_bytes)
        self._memory = Budget(limit, "the training call")
        self._kept: dict[bytes, _Kept] = {}  # the oldest first
        self._under_way: Counter[Hashable] = Counter()
        self._token_s = 0.0  # of one token in one block, as measured
        backend.budget.reclaim = self._let_go
        self._memory.reclaim = self._let_go

    # -- the three calls ---------------------------------------------------------------------------------

    async def forward(
        self,
        span: Span,
        inputs: SpanInputs,
        *,
        keep: bool = False,
        peer: Hashable = None,
        timeout_s: float = float("inf"),
    ) -> SpanOutputs:
        """`SpanTraining.forward`."""
        with self._admitted(peer), self._adapters.use(inputs.adapter) as held:
            size = self._size(span, inputs, held)
            hold, room = await self._room(size, (Hold.EVERYTHING,) if keep else (), Hold.NOTHING, timeout_s)
            try:
                walk = self._walk(span, inputs, held, hold, size)
                output, timing = await self._backend.train(
                    self._measured(_forward(walk, inputs, span), size),
                    size.n_pieces,
                    peer=peer,
                    timeout_s=timeout_s,
                )
                kept = None
                if hold is Hold.EVERYTHING:
                    kept, room = self._keep(_Kept(walk, span, inputs, peer, size, room)), 0
                return SpanOutputs(output, _report(timing), kept)
            finally:
                self._release(room)

    async def backward(
        self,
        span: Span,
        inputs: SpanInputs | None,
        gradient: Tensor,
        wants: Sequence[str],
        *,
        kept: bytes | None = None,
        peer: Hashable = None,
        timeout_s: float = float("inf"),
    ) -> SpanGradients:
        """`SpanTraining.backward`."""
        with self._admitted(peer):
            if kept is not None:
                return await self._from_kept(kept, span, gradient, wants, peer, timeout_s)
            assert inputs is not None
            with self._adapters.use(inputs.adapter) as held:
                _check_wants(wants, inputs, held, span)
                size = self._size(span, inputs, held)
                hold, room = await self._room(size, (Hold.EVERYTHING,), Hold.INPUTS, timeout_s)
                try:
                    walk = self._walk(span, inputs, held, hold, size)
                    pieces = _forward_and_backward(walk, inputs, gradient, wants, span)
                    found, timing = await self._backend.train(
                        self._measured(pieces, size), 2 * size.n_pieces, peer=peer, timeout_s=timeout_s
                    )
                    return _answer(found, timing)
                finally:
                    self._release(room)

    async def put_adapter(self, blob: Buffer, digest: bytes | None = None) -> None:
        """`SpanTraining.put_adapter`. Raises BadAdapter, too, for a file that has not the `digest`."""
        self._adapters.check_size(len(blob))
        found = await asyncio.to_thread(adapter_digest, blob)  # a pass over the bytes, without torch
        if digest not in (None, found):
            raise BadAdapter(
                f"the adapter's digest is {found.hex()[:16]}…, it was sent as {digest.hex()[:16]}…"
            )
        if found in self._adapters:
            return
        span = self._backend.span
        try:
            adapter = await self._backend.aside(
                read_adapter, memoryview(blob), self._model_id, span.config, span.block_kind, digest=found
            )
        except InvalidAdapter as error:
            raise BadAdapter(str(error)) from error
        self._adapters.put(adapter)

    # -- what they take ----------------------------------------------------------------------------------

    @property
    def most_tokens(self) -> int:
        """What one call may have of them, over the whole span, in rows of a usual length."""
        span = self._backend.span
        return self._most_tokens(_Size.of(span, span.end - span.start, 1, _USUAL_ROW_TOKENS, 0))

    @property
    def reserved_bytes(self) -> int:
        return self._memory.reserved_bytes

    def close(self) -> None:
        """Let go of what is kept: the blocks go."""
        for token in list(self._kept):
            self._drop(token)

    def _size(self, span: Span, inputs: SpanInputs, held: HeldAdapter | None) -> _Size:
        """Raises WrongSpan, BadTensor, BatchTooLarge."""
        blocks = self._backend.span
        if not blocks.start <= span.start < span.end <= blocks.end:
            raise WrongSpan(f"this server holds blocks {blocks.start}:{blocks.end}, the call is for {span}")
        blocks.check_sequences(inputs.hidden, inputs.prompts, len(span))
        n_rows, n_tokens, _ = inputs.hidden.shape
        given = 0 if inputs.prompts is None else inputs.prompts.numel() * 4
        given += 0 if held is None else held.adapter.nbytes
        size = _Size.of(blocks, len(span), n_rows, n_tokens, given)
        most_tokens = self._most_tokens(size)
        most_rows = most_tokens // n_tokens
        if n_rows > most_rows:
            raise BatchTooLarge(
                f"{n_rows} rows of {n_tokens} tokens are more than this server takes in one call: at most "
                f"{most_tokens} tokens",
                most_rows * n_tokens or None,
            )
        return replace(size, piece_rows=self._piece_rows(size))

    def _most_tokens(self, size: _Size) -> int:
        """For pieces of one row."""
        room = self._memory.total_bytes - size.factor_bytes - size.row_tokens * size.activation_bytes
        return max(0, min(room // ((size.n_blocks + 3) * size.token_bytes), self._settings.most_tokens))

    def _piece_rows(self, size: _Size) -> int:
        """As many as take about `piece_s`, if they and the call's inputs leave room for each other."""
        least, most = _PIECE_TOKENS
        wanted = int(self._settings.piece_s / self._token_s) if self._token_s else _FIRST_PIECE_TOKENS
        room = self._memory.total_bytes - replace(size, piece_rows=0).nbytes(Hold.INPUTS)
        fitting = min(room, self._memory.total_bytes // 4) // size.activation_bytes
        return max(1, min(max(least, wanted), most, fitting) // size.row_tokens)

    async def _room(
        self, size: _Size, first: Sequence[Hold], otherwise: Hold, timeout_s: float
    ) -> tuple[Hold, int]:
        """Reserve for the first of these that there is room for at once, or in line for the last.

        Raises Busy.
        """
        for hold in first:
            nbytes = size.nbytes(hold)
            if nbytes <= min(self._memory.free_bytes, self._backend.budget.free_bytes):
                await self._reserve(nbytes, 0.0)
                return hold, nbytes
        nbytes = size.nbytes(otherwise)
        await self._reserve(nbytes, min(timeout_s, self._settings.longest_wait_s))
        return otherwise, nbytes

    async def _reserve(self, nbytes: int, wait_s: float) -> None:
        await self._memory.reserve(nbytes, wait_s)
        try:
            # Never in the sessions' line, where it would keep those behind it waiting.
            await self._backend.budget.reserve(nbytes, 0.0)
        except BaseException:
            self._memory.release(nbytes)
            raise

    def _release(self, nbytes: int) -> None:
        if nbytes:
            self._backend.budget.release(nbytes)
            self._memory.release(nbytes)

    @contextmanager
    def _admitted(self, peer: Hashable) -> Iterator[None]:
        """A place among the calls under way. Raises Busy."""
        of_peer = self._under_way[peer]
        if of_peer >= self._settings.most_per_peer or self._under_way.total() >= self._settings.most:
            raise Busy(
                f"{self._under_way.total()} training calls are under way here, {of_peer} of them yours; "
                f"try again later or elsewhere",
                retry_after_s=RETRY_S,
            )
        self._under_way[peer] += 1
        try:
            yield
        finally:
            self._under_way[peer] -= 1
            if not self._under_way[peer]:
                del self._under_way[peer]

    def _walk(
        self, span: Span, inputs: SpanInputs, held: HeldAdapter | None, hold: Hold, size: _Size
    ) -> Walk:
        return Walk(
            self._backend.span,
            span.start,
            span.end,
            inputs.hidden,
            inputs.prompts,
            None if held is None else held.adapter,
            hold=hold,
            piece_rows=size.piece_rows,
        )

    def _measured(self, pieces: Generator[None, None, R], size: _Size) -> Generator[None, None, R]:
        """The same pieces; how long they take sets the size of those of later calls."""
        n_tokens = min(size.piece_rows, size.n_rows) * size.row_tokens
        while True:
            began_s = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as end:
                result: R = end.value
                return result
            token_s = (time.perf_counter() - began_s) / n_tokens
            # Backward takes about twice as long as forward; what the longer ones take is what matters.
            weight = 0.5 if token_s > self._token_s else 0.1
            self._token_s = token_s if not self._token_s else (1 - weight) * self._token_s + weight * token_s
            yield

    # -- what is kept ------------------------------------------------------------------------------------

    def _keep(self, kept: _Kept) -> bytes:
        token = secrets.token_bytes(TOKEN_BYTES)
        self._kept[token] = kept
        kept.timer = asyncio.get_running_loop().call_later(self._settings.kept_s, self._drop, token)
        return token

    def _drop(self, token: bytes) -> None:
        kept = self._kept.pop(token, None)
        if kept is not None:
            kept.forget()
            self._release(kept.reserved_bytes)

    def _let_go(self, nbytes: int) -> None:
        """Somebody needs so much more."""
        freed = 0
        for token in list(self._kept):
            if freed >= nbytes:
                break
            freed += self._kept[token].reserved_bytes
            self._drop(token)

    async def _from_kept(
        self,
        token: bytes,
        span: Span,
        gradient: Tensor,
        wants: Sequence[str],
        peer: Hashable,
        timeout_s: float,
    ) -> SpanGradients:
        kept = self._kept.get(token)
        if kept is None or kept.peer != peer or kept.span != span:
            raise NotKept("what that forward held on to is gone; repeat the call with its inputs")
        with self._adapters.use(kept.inputs.adapter) as held:
            _check_wants(wants, kept.inputs, held, span)
            if gradient.shape != kept.inputs.hidden.shape:
                raise BadMessage(
                    f"a gradient of {tuple(gradient.shape)}, of {tuple(kept.inputs.hidden.shape)}"
                )
        del self._kept[token]
        kept.forget()
        try:
            found, timing = await self._backend.train(
                self._measured(_backward(kept.walk, kept.inputs, gradient, wants, span), kept.size),
                kept.size.n_pieces,
                peer=peer,
                timeout_s=timeout_s,
            )
            return _answer(found, timing)
        finally:
            self._release(kept.reserved_bytes)


@dataclass(frozen=True, slots=True)
class _Size:
    """What a call's memory follows from."""

    n_blocks: int
    n_rows: int
    row_tokens: int
    factor_bytes: int  # of prompts and adapter, three times over
    token_bytes: int  # of one token's hidden states
    activation_bytes: int  # of one token in one block
    piece_rows: int = 1

    @classmethod
    def of(cls, span: BlockSpan, n_blocks: int, n_rows: int, row_tokens: int, given_bytes: int) -> _Size:
        return cls(
            n_blocks,
            n_rows,
            row_tokens,
            3 * given_bytes,
            span.config.hidden_size * span.dtype.itemsize,
            activation_bytes(span, row_tokens),
        )

    @property
    def n_pieces(self) -> int:
        return self.n_blocks * -(-self.n_rows // self.piece_rows)

    def nbytes(self, hold: Hold) -> int:
        """As this module's first lines have it."""
        n_tokens = self.n_rows * self.row_tokens
        piece = min(self.piece_rows * self.row_tokens, n_tokens) * self.activation_bytes
        hidden = n_tokens * self.token_bytes
        return (
            self.factor_bytes
            + {
                Hold.NOTHING: 2 * hidden + piece,
                Hold.INPUTS: (self.n_blocks + 3) * hidden + piece,
                Hold.EVERYTHING: 3 * hidden + n_tokens * self.n_blocks * self.activation_bytes,
            }[hold]
        )


@dataclass(slots=True)
class _Kept:
    """What a forward held on to."""

    walk: Walk
    span: Span
    inputs: SpanInputs
    peer: Hashable
    size: _Size
    reserved_bytes: int
    timer: asyncio.TimerHandle | None = field(default=None)

    def forget(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


# -- on the compute thread -------------------------------------------------------------------------------


def _forward(walk: Walk, inputs: SpanInputs, span: Span) -> Generator[None, None, Tensor]:
    output = yield from walk.forward()
    _check_finite("outputs", span, (output,), (inputs.hidden, inputs.prompts))
    return output


def _backward(
    walk: Walk, inputs: SpanInputs, gradient: Tensor, wants: Sequence[str], span: Span
) -> Generator[None, None, Gradients]:
    found = yield from walk.backward(
        gradient, hidden=HIDDEN in wants, prompts=PROMPTS in wants, adapter=ADAPTER in wants
    )
    made = (found.hidden, found.prompts, found.adapter)
    _check_finite("gradients", span, made, (gradient, inputs.hidden, inputs.prompts))
    return found


def _forward_and_backward(
    walk: Walk, inputs: SpanInputs, gradient: Tensor, wants: Sequence[str], span: Span
) -> Generator[None, None, Gradients]:
    yield from walk.forward()
    return (yield from _backward(walk, inputs, gradient, wants, span))


def _check_finite(
    what: str, span: Span, made: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> None:
    """Raises NotFinite, saying where what is not a number came from."""
    if all(tensor is None or is_finite(tensor) for tensor in made):
        return
    if all(tensor is None or is_finite(tensor) for tensor in given):
        raise NotFinite(
            f"blocks {span} made NaN or Inf in their {what} of numbers that had none", given=False
        )
    raise NotFinite(
        f"what blocks {span} were given has NaN or Inf, and so have their {what}; whoever made that computes "
        f"wrongly",
        given=True,
    )


# -- small things ----------------------------------------------------------------------------------------


def _check_wants(wants: Sequence[str], inputs: SpanInputs, held: HeldAdapter | None, span: Span) -> None:
    """Raises BadMessage for gradients that there cannot be."""
    there = {
        HIDDEN: True,
        PROMPTS: inputs.prompts is not None,
        ADAPTER: held is not None and bool(held.adapter.names(span.start, span.end)),
    }
    if not wants or len(set(wants)) < len(wants) or not all(there.get(name, False) for name in wants):
        possible = ", ".join(name for name in GRADIENTS if there[name])
        raise BadMessage(
            f"gradients of {list(wants)} are asked for over blocks {span}; possible are {possible}"
        )


def _report(timing: Timing) -> HopReport:
    return HopReport(timing.queue_s * 1e3, timing.compute_s * 1e3)


def _answer(found: Gradients, timing: Timing) -> SpanGradients:
    return SpanGradients(found.hidden, found.prompts, found.adapter, _report(timing))
