"""The RPC methods of training: who may call, and how calls end when the blocks leave.

Lengths are checked against what the message says before anything is computed or reserved; what is wrong ends
that call with a code, and no other.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from petalite.errors import BadMessage, Busy, DeadlineExceeded, WrongModel, WrongSpan
from petalite.net.host import Host
from petalite.net.messages import Buffer, Message
from petalite.net.methods import MethodPolicy
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.net.streams import Priority
from petalite.server.adapters import Adapters
from petalite.server.backend import Backend
from petalite.server.budget import RETRY_S
from petalite.server.open_calls import OpenCalls
from petalite.server.training import Trainer
from petalite.server.training_memory import TrainingSettings, check_batch
from petalite.swarm.codecs import codec_named
from petalite.swarm.messages import HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER_METHOD,
    ADAPTER_PIECE_BYTES,
    ADAPTER_PIECE_S,
    BACKWARD_METHOD,
    F32,
    FORWARD_METHOD,
    MAX_PROMPT_TOKENS,
    AdapterHeld,
    PutAdapter,
    TrainCall,
    TrainDone,
    decode_rows,
    encode_rows,
    gradient_buffers,
    read_inputs,
)

_ADAPTERS_AT_ONCE = 16  # being received, some of them over slow links


class TrainingService:
    """Serves training calls over one backend's blocks."""

    def __init__(
        self,
        backend: Backend,
        model_id: str,
        host: Host,
        adapters: Adapters,
        settings: TrainingSettings,
    ) -> None:
        self._model_id = model_id
        self._adapters = adapters
        self._settings = settings
        self._take(backend)
        self._open = OpenCalls()
        self._brought_bytes = 0  # by calls under way
        # Hidden states, a gradient like them, and prompts of every block.
        config = backend.span.config
        most_vectors = 2 * settings.most_tokens + config.n_blocks * MAX_PROMPT_TOKENS
        most_bytes = most_vectors * config.hidden_size * F32.dtype.itemsize
        of_calls = MethodPolicy(max_message_bytes=most_bytes, max_buffers=3, priority=Priority.BULK)
        of_adapters = MethodPolicy(
            max_message_bytes=settings.adapter_bytes,
            max_buffers=1,
            max_concurrent=_ADAPTERS_AT_ONCE,
            priority=Priority.BULK,
        )
        host.serve(FORWARD_METHOD, self._forward, request=TrainCall, policy=of_calls)
        host.serve(BACKWARD_METHOD, self._backward, request=TrainCall, policy=of_calls)
        host.serve(ADAPTER_METHOD, self._put_adapter, request=PutAdapter, policy=of_adapters)

    def _take(self, backend: Backend) -> None:
        self._backend = backend
        self.trainer = Trainer(backend, self._model_id, self._adapters, self._settings)

    @property
    def count(self) -> int:
        """Calls under way."""
        return len(self._open)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls and wait for those under way; what outlasts `timeout_s` is cut with a code."""
        await self._open.drain(timeout_s)

    def suspend(self) -> None:
        """After draining: let go of the blocks. Calls are refused until others are given to `resume`."""
        self._open.check_drained()
        self.trainer.close()
        self._adapters.let_go()
        del self.trainer, self._backend

    def resume(self, backend: Backend) -> None:
        """Serve calls over these blocks."""
        self._take(backend)
        self._open.resume()

    # -- the methods -------------------------------------------------------------------------------------

    async def _forward(self, call: Call, request: TrainCall) -> Message:
        with self._entered(call, request.model_id):
            span, codec = self._checked(request), codec_named(request.codec)
            inputs = await self._backend.aside(read_inputs, request, call.request.buffers, self._hidden_size)
            done = await self.trainer.forward(
                span, inputs, keep=request.keep, peer=call.peer, timeout_s=_left_s(call)
            )
            data = await self._backend.aside(encode_rows, codec, done.hidden)
            return Message(_done(request, done.report, done.kept), [data])

    async def _backward(self, call: Call, request: TrainCall) -> Message:
        with self._entered(call, request.model_id):
            span, codec = self._checked(request), codec_named(request.codec)
            buffers = call.request.buffers
            if len(buffers) < 1 or (request.kept is not None and len(buffers) > 1):
                raise BadMessage(
                    f"{len(buffers)} buffers came; a backward call has a gradient, and its inputs"
                )
            shape = (request.rows, request.tokens, self._hidden_size)
            gradient = await self._backend.aside(decode_rows, codec, buffers[0], shape)
            inputs = None
            if request.kept is None:
                inputs = await self._backend.aside(read_inputs, request, buffers[1:], self._hidden_size)
            found = await self.trainer.backward(
                span,
                inputs,
                gradient,
                request.wants,
                kept=request.kept,
                peer=call.peer,
                timeout_s=_left_s(call),
            )
            data = await self._backend.aside(gradient_buffers, codec, found)
            return Message(_done(request, found.report), data)

    async def _put_adapter(self, call: Call, request: PutAdapter) -> Message:
        with self._entered(call, request.model_id, request.more):
            if len(call.request.buffers) != 1:
                raise BadMessage(
                    f"{len(call.request.buffers)} buffers came; an adapter is one file in one buffer"
                )
            [blob] = call.request.buffers
            self._adapters.check_size(len(blob) + request.more)
            if request.digest not in self._adapters:
                if request.more:
                    blob = await _rest(call, request, blob)
                await self.trainer.put_adapter(blob, request.digest, peer=call.peer)
            return Message(encode(AdapterHeld(request.digest)))

    @property
    def _hidden_size(self) -> int:
        return self._backend.span.config.hidden_size

    @contextmanager
    def _entered(self, call: Call, model_id: str, more_bytes: int = 0) -> Iterator[None]:
        self._open.check_open()
        if model_id != self._model_id:
            raise WrongModel(f"this server holds {self._model_id}, the call is for {model_id}")
        brought_bytes = sum(map(len, call.request.buffers)) + more_bytes
        if self._brought_bytes and self._brought_bytes + brought_bytes > self._settings.calls_bytes:
            raise Busy(
                f"training calls under way have brought {self._brought_bytes >> 20} MiB, this one brings "
                f"{brought_bytes >> 20} more; try again later or elsewhere",
                retry_after_s=RETRY_S,
            )
        self._brought_bytes += brought_bytes
        try:
            with self._open.entered(call):
                yield
        finally:
            self._brought_bytes -= brought_bytes

    def _checked(self, request: TrainCall) -> Span:
        """The blocks. Raises WrongSpan, BatchTooLarge, BadMessage for what cannot be right."""
        if not request.start < request.end:
            raise WrongSpan(f"blocks {request.start}:{request.end} are none")
        check_batch(request.rows, request.tokens, self._settings.most_tokens)
        if request.prompt_tokens > request.tokens:
            raise BadMessage(f"{request.prompt_tokens} prompts cannot be added to {request.tokens} tokens")
        return Span(request.start, request.end)


async def _rest(call: Call, request: PutAdapter, begun: Buffer) -> bytearray:
    """The whole file. Each piece has to come in time, and none is smaller than it must be."""
    blob, nbytes = bytearray(begun), len(begun) + request.more
    wanted = encode(AdapterHeld(request.digest, request.more))
    while len(blob) < nbytes:
        try:
            async with asyncio.timeout(ADAPTER_PIECE_S):
                if wanted:
                    await call.send(wanted)
                    wanted = {}
                message = await call.receive()
        except TimeoutError:
            raise DeadlineExceeded(f"no piece of the adapter came for {ADAPTER_PIECE_S:g} s") from None
        sizes = [] if message is None else [len(piece) for piece in message.buffers]
        expected = min(ADAPTER_PIECE_BYTES, nbytes - len(blob))
        if message is None or sizes != [expected]:
            raise BadMessage(f"pieces of {sizes} bytes of an adapter came, expected one of {expected}")
        blob += message.buffers[0]
    return blob


def _left_s(call: Call) -> float:
    left_s = call.remaining_s()
    return math.inf if left_s is None else left_s


def _done(request: TrainCall, report: HopReport, kept: bytes | None = None) -> dict[str, object]:
    return encode(TrainDone(request.codec, report.queue_ms, report.compute_ms, kept))
