"""The RPC `session`: one stream is one session, and its cache rows live exactly as long as the stream.

Everything a client says is checked before anything is reserved or computed. What is wrong ends that session
with a code, and no other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

import torch

from petalite.errors import (
    BadMessage,
    BadTensor,
    IdleClosed,
    NotFinite,
    PetaliteError,
    ResourceLimit,
    ShuttingDown,
    WrongModel,
    WrongSpan,
)
from petalite.model.cache import Segment
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Message
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.server.backend import Backend, wanted_outputs
from petalite.swarm.codecs import codec_named, raw_codec
from petalite.swarm.messages import (
    MAX_STEP_TOKENS,
    NONE,
    OUTPUTS,
    SESSION_METHOD,
    OpenSession,
    SessionOpened,
    Step,
    StepDone,
)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    idle_s: float = 600.0  # a session without a step for so long is closed, seconds
    most: int = 256  # sessions open at once
    most_per_peer: int = 32  # of them, one peer's


class SessionService:
    """Serves sessions over one backend's blocks."""

    def __init__(
        self, backend: Backend, model_id: str, settings: SessionSettings = SessionSettings()
    ) -> None:
        self._backend = backend
        self._model_id = model_id
        self._settings = settings
        self._open: dict[Call, PeerId] = {}
        self._draining = False
        self._none_open = asyncio.Event()
        self._none_open.set()

    def attach(self, host: Host) -> None:
        host.serve(SESSION_METHOD, self._serve, request=OpenSession)

    @property
    def count(self) -> int:
        """Sessions open now."""
        return len(self._open)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions and wait for the open ones; what outlasts `timeout_s` is cut with a code."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            for call in list(self._open):
                call.cancel(ShuttingDown.code)

    async def _serve(self, call: Call, request: OpenSession) -> None:
        self._admit(call.peer, request)
        self._open[call] = call.peer
        self._none_open.clear()
        rows: list[int] = []
        try:
            rows = await self._backend.open_rows(request.rows, request.max_length, request.start, request.end)
            await call.send(encode(SessionOpened(raw_codec(self._backend.span.dtype).name)))
            while (message := await self._next(call)) is not None:
                await self._step(call, request, rows, message)
        finally:
            del self._open[call]
            if not self._open:
                self._none_open.set()
            self._backend.drop_rows(rows)

    def _admit(self, peer: PeerId, request: OpenSession) -> None:
        span = self._backend.span
        if self._draining:
            raise ShuttingDown("this server is leaving; open the session at another")
        if request.model_id != self._model_id:
            raise WrongModel(f"this server holds {self._model_id}, the session is for {request.model_id}")
        if not span.start <= request.start < request.end <= span.end:
            raise WrongSpan(
                f"this server holds blocks {span.start}:{span.end}, "
                f"the session is for {request.start}:{request.end}"
            )
        if len(self._open) >= self._settings.most:
            raise ResourceLimit(f"{self._settings.most} sessions are open, the most this server takes")
        if Counter(self._open.values())[peer] >= self._settings.most_per_peer:
            raise ResourceLimit(
                f"{self._settings.most_per_peer} sessions of yours are open, the most one peer may have"
            )

    async def _next(self, call: Call) -> Message | None:
        try:
            async with asyncio.timeout(self._settings.idle_s):
                return await call.receive()
        except TimeoutError as error:
            if isinstance(error, PetaliteError):
                raise  # the call's own deadline
            raise IdleClosed(f"no step came for {self._settings.idle_s:g} s; open another session") from error

    async def _step(self, call: Call, request: OpenSession, rows: list[int], message: Message) -> None:
        step = decode(Step, message.body)
        codec = codec_named(step.codec)
        segments = [_segment(rows, *triple) for triple in step.rows]
        hidden = self._hidden_of(step, message)
        output, timing = await self._backend.step(hidden, segments, request.start, request.end)
        done = StepDone(queue_ms=timing.queue_s * 1e3, compute_ms=timing.compute_s * 1e3)
        buffers = (
            [] if step.output == NONE else [codec.encode(wanted_outputs(output, step.rows, step.output))]
        )
        await call.send(encode(done), buffers)

    def _hidden_of(self, step: Step, message: Message) -> torch.Tensor:
        if step.output not in OUTPUTS:
            raise BadMessage(f"unknown output {step.output[:20]!r}; known are {', '.join(OUTPUTS)}")
        if len(message.buffers) != 1:
            raise BadMessage(f"a step carries one buffer of hidden states, found {len(message.buffers)}")
        n_tokens = sum(n for _, _, n in step.rows)
        if n_tokens > MAX_STEP_TOKENS:
            raise BadMessage(f"a step packs at most {MAX_STEP_TOKENS} tokens, found {n_tokens}")
        hidden = codec_named(step.codec).decode(message.buffers[0], self._backend.span.config.hidden_size)
        if len(hidden) != n_tokens:
            raise BadTensor(f"the step names {n_tokens} tokens, its hidden states have {len(hidden)}")
        if not torch.isfinite(hidden).all():
            raise NotFinite(
                f"the hidden states that came in for block {self._backend.span.start} have NaN or Inf"
            )
        return hidden


def _segment(rows: list[int], row: int, position: int, n_tokens: int) -> Segment:
    if row >= len(rows) or n_tokens < 1:
        raise BadMessage(f"{n_tokens} tokens of row {row} are no step; the session has {len(rows)} rows")
    return Segment(rows[row], position, n_tokens)
