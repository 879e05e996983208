"""Training through a server's blocks: forward and backward calls over whole sequences.

Each call is a `Walk` in pieces, of which the backend computes one at a time, after everything that sessions
ask; the memory for it is reserved before it begins (`training_memory`). What a forward holds on to for its
backward is let go of after a while, and as soon as anybody else needs the room. Knows a backend and adapters;
knows no socket, so `petalite.load(peers=None)` trains through it too.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from petalite.errors import (
    BadAdapter,
    BadMessage,
    Busy,
    InvalidAdapter,
    NotFinite,
    NotKept,
)
from petalite.model.compute import is_finite
from petalite.model.lora import read_adapter
from petalite.model.walk import Gradients, Hold, Walk
from petalite.net.messages import Buffer
from petalite.server.adapters import Adapters, HeldAdapter
from petalite.server.backend import Backend, Timing
from petalite.server.budget import RETRY_S
from petalite.server.training_memory import CallSize, TrainingMemory, TrainingSettings
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


class Trainer:
    """Implements `swarm.training.SpanTraining` over one backend's blocks."""

    def __init__(
        self,
        backend: Backend,
        model_id: str,
        adapters: Adapters,
        settings: TrainingSettings = TrainingSettings(),
    ) -> None:
        self.memory = TrainingMemory(backend, settings)
        self._backend = backend
        self._model_id = model_id
        self._adapters = adapters
        self._settings = settings
        self._kept: dict[bytes, _Kept] = {}  # the oldest first
        self._under_way: Counter[Hashable] = Counter()
        backend.budget.reclaim = self._let_go

    def close(self) -> None:
        """Let go of what is kept: the blocks go."""
        for token in list(self._kept):
            self._drop(token)

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
            size = self.memory.size(span, inputs, held)
            spare = self.memory.reserve_spare(size) if keep else 0
            room = 0 if spare else await self.memory.reserve(size, Hold.NOTHING, timeout_s)
            try:
                walk = self._walk(span, inputs, held, Hold.EVERYTHING if spare else Hold.NOTHING, size)
                pieces = self._measured(_forward(walk, inputs, span), size)
                output, timing = await self._backend.train(
                    pieces, size.n_pieces, peer=peer, timeout_s=timeout_s
                )
                kept = None
                if spare:
                    kept, spare = self._keep(_Kept(walk, span, inputs, peer, size, spare)), 0
                return SpanOutputs(output, _report(timing), kept)
            finally:
                self.memory.release(room)
                self.memory.release_spare(spare)

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
                size = self.memory.size(span, inputs, held)
                hold = Hold.EVERYTHING if self.memory.has_room(size, Hold.EVERYTHING) else Hold.INPUTS
                room = await self.memory.reserve(size, hold, timeout_s)
                try:
                    walk = self._walk(span, inputs, held, hold, size)
                    pieces = _forward_and_backward(walk, inputs, gradient, wants, span)
                    found, timing = await self._backend.train(
                        self._measured(pieces, size), 2 * size.n_pieces, peer=peer, timeout_s=timeout_s
                    )
                    return _answer(found, timing)
                finally:
                    self.memory.release(room)

    async def put_adapter(self, blob: Buffer, digest: bytes | None = None, *, peer: Hashable = None) -> None:
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
        self._adapters.put(adapter, peer)

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
        self, span: Span, inputs: SpanInputs, held: HeldAdapter | None, hold: Hold, size: CallSize
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

    def _measured(self, pieces: Generator[None, None, R], size: CallSize) -> Generator[None, None, R]:
        """The same pieces; how long they take sets the size of those of later calls."""
        n_tokens = min(size.piece_rows, size.n_rows) * size.row_tokens
        while True:
            began_s = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as end:
                result: R = end.value
                return result
            self.memory.observe(n_tokens, time.perf_counter() - began_s)
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
            self.memory.release_spare(kept.spare_bytes)

    def _let_go(self, nbytes: int) -> None:
        """Somebody needs so much more."""
        freed = 0
        for token in list(self._kept):
            if freed >= nbytes:
                break
            freed += self._kept[token].spare_bytes
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
            self.memory.release_spare(kept.spare_bytes)


@dataclass(slots=True)
class _Kept:
    """What a forward held on to."""

    walk: Walk
    span: Span
    inputs: SpanInputs
    peer: Hashable
    size: CallSize
    spare_bytes: int
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
