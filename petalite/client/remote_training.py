"""Training calls to one server over RPC: one request, one answer, whose every shape is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torch import Tensor

from petalite.client.settings import TrainingSettings
from petalite.errors import BadMessage, DeadlineExceeded
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Buffer, Message
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.net.streams import Priority
from petalite.swarm.codecs import codec_named
from petalite.swarm.messages import HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    ADAPTER_METHOD,
    ADAPTER_PIECE_BYTES,
    ADAPTER_PIECE_S,
    BACKWARD_METHOD,
    F32,
    FORWARD_METHOD,
    AdapterHeld,
    PutAdapter,
    SpanGradients,
    SpanInputs,
    SpanOutputs,
    TrainCall,
    TrainDone,
    adapter_digest,
    decode_rows,
    encode_rows,
    input_buffers,
    read_gradients,
)

T = TypeVar("T")


class RemoteTraining:
    """Implements `swarm.training.SpanTraining`."""

    def __init__(self, host: Host, peer: PeerId, model_id: str, settings: TrainingSettings) -> None:
        self._host = host
        self._peer = peer
        self._model_id = model_id
        self._settings = settings

    async def forward(self, span: Span, inputs: SpanInputs, *, keep: bool = False) -> SpanOutputs:
        codec = codec_named(self._settings.wire)
        call = self._describe(span, inputs, keep=keep)
        reply = await self._call(FORWARD_METHOD, call, input_buffers(codec, inputs))
        done = decode(TrainDone, reply.body)
        if len(reply.buffers) != 1:
            raise BadMessage(f"an answer to forward carries one buffer, found {len(reply.buffers)}")
        hidden = decode_rows(codec_named(done.codec), reply.buffers[0], tuple(inputs.hidden.shape))
        return SpanOutputs(hidden, HopReport(done.queue_ms, done.compute_ms), done.kept)

    async def backward(
        self,
        span: Span,
        inputs: SpanInputs,
        gradient: Tensor,
        wants: Sequence[str],
        *,
        kept: bytes | None = None,
    ) -> SpanGradients:
        codec = codec_named(self._settings.wire)
        call = self._describe(span, inputs, kept=kept, wants=wants)
        buffers: list[Buffer] = [encode_rows(codec, gradient)]
        if kept is None:
            buffers += input_buffers(codec, inputs)
        reply = await self._call(BACKWARD_METHOD, call, buffers)
        # How many values an adapter has here its owner knows, and compares.
        n_values = len(reply.buffers[-1]) // F32.dtype.itemsize if ADAPTER in wants and reply.buffers else 0
        done = decode(TrainDone, reply.body)
        return read_gradients(call, done, reply.buffers, inputs.hidden.shape[2], n_values)

    async def put_adapter(self, blob: Buffer, *, ask: bool = False) -> None:
        """`SpanTraining.put_adapter`. `ask`: send nothing before it is clear that the server lacks it.

        However long all of it takes, each piece has to leave in time.
        """
        data, digest = memoryview(blob), adapter_digest(blob)
        begun = 0 if ask else min(len(data), ADAPTER_PIECE_BYTES)
        put = PutAdapter(self._model_id, digest, len(data) - begun)
        opening = self._host.open(
            self._peer, ADAPTER_METHOD, encode(put), [data[:begun]], priority=Priority.BULK
        )
        call = await self._within(self._settings.call_s, opening)
        try:
            wanted = await self._wanted(call, digest)
            if wanted not in (0, put.more):
                raise BadMessage(f"the server wants {wanted} bytes more of an adapter that has {put.more}")
            if wanted:
                for start in range(begun, len(data), ADAPTER_PIECE_BYTES):
                    piece = data[start : start + ADAPTER_PIECE_BYTES]
                    await self._within(ADAPTER_PIECE_S, call.send({}, [piece]))
                if await self._wanted(call, digest):
                    raise BadMessage("the server wants more of an adapter than there is")
        finally:
            call.end()

    async def _wanted(self, call: Call, digest: bytes) -> int:
        """How many bytes of the adapter the server says that it wants."""
        reply = await self._within(self._settings.call_s, call.receive())
        held = decode(AdapterHeld, {} if reply is None else reply.body)
        if held.digest != digest:
            raise BadMessage("the server says that it holds another adapter than it was sent")
        return held.more

    async def _within(self, timeout_s: float, step: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await step
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._peer.short()} took longer than {timeout_s:g} s for a piece of an adapter"
            ) from None

    def _describe(
        self,
        span: Span,
        inputs: SpanInputs,
        *,
        keep: bool = False,
        kept: bytes | None = None,
        wants: Sequence[str] = (),
    ) -> TrainCall:
        n_rows, n_tokens, _ = inputs.hidden.shape
        return TrainCall(
            self._model_id,
            span.start,
            span.end,
            n_rows,
            n_tokens,
            self._settings.wire,
            0 if inputs.prompts is None else inputs.prompts.shape[1],
            inputs.adapter,
            keep,
            kept,
            tuple(wants),
        )

    async def _call(self, method: str, call: TrainCall, buffers: Sequence[Buffer]) -> Message:
        # What else is under way may stand before it at the server.
        waiting = self._settings.in_flight * call.rows * call.tokens
        timeout_s = self._settings.call_s + self._settings.token_s * waiting
        return await self._host.call(
            self._peer, method, encode(call), buffers, timeout_s=timeout_s, priority=Priority.BULK
        )
