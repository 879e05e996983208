"""Training calls to one server over RPC: one request, one answer, whose every shape is checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from petalite.client.settings import TrainingSettings
from petalite.errors import BadMessage
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Buffer, Message
from petalite.net.schema import decode, encode
from petalite.net.streams import Priority
from petalite.swarm.codecs import codec_named
from petalite.swarm.messages import HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    ADAPTER_METHOD,
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

    async def put_adapter(self, blob: Buffer) -> None:
        digest = adapter_digest(blob)
        timeout_s = self._settings.call_s
        reply = await self._host.call(
            self._peer,
            ADAPTER_METHOD,
            encode(PutAdapter(self._model_id, digest)),
            [blob],
            timeout_s=timeout_s,
            priority=Priority.BULK,
        )
        if decode(AdapterHeld, reply.body).digest != digest:
            raise BadMessage("the server says that it holds another adapter than it was sent")

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
