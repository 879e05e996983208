"""Training calls on the wire: what is sent is what a server reads, and what else comes back is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from petalite.client.remote_training import RemoteTraining
from petalite.client.settings import TrainingSettings
from petalite.errors import BadMessage, BadTensor, DeadlineExceeded, PetaliteError
from petalite.net.messages import Message
from petalite.net.schema import decode, encode
from petalite.sim import loop
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    ADAPTER_METHOD,
    ADAPTER_PIECE_BYTES,
    BACKWARD_METHOD,
    F32,
    FORWARD_METHOD,
    GRADIENTS,
    HIDDEN,
    PROMPTS,
    AdapterHeld,
    PutAdapter,
    SpanGradients,
    SpanInputs,
    TrainCall,
    TrainDone,
    adapter_digest,
    gradient_buffers,
    read_inputs,
)
from tests.client.toy_training import peer

E = 4
SPAN = Span(2, 4)
INPUTS = SpanInputs(torch.randn(3, 5, E), torch.randn(2, 1, E), b"d" * 32)
GRADIENT = torch.randn(3, 5, E)
DONE = TrainDone("f32", 1.0, 2.0)
Answer = Callable[[str, dict[str, Any], Sequence[Any]], Message]


class Host:
    """Answers every call by a function."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.timeouts: list[float] = []

    async def call(
        self, who: object, method: str, body: Any, buffers: Sequence[Any] = (), *, timeout_s: float, **_: Any
    ) -> Message:
        self.timeouts.append(timeout_s)
        return self.answer(method, body, [memoryview(bytearray(one)) for one in buffers])


def training(answer: Answer, **settings: Any) -> RemoteTraining:
    host: Any = Host(answer)
    return RemoteTraining(host, peer(1), "toy@0", TrainingSettings(**settings))


@pytest.mark.parametrize("wire", ["f32", "bf16", "q8"])
async def test_forward_sends_what_a_server_reads(wire: str) -> None:
    def answer(method: str, body: dict[str, Any], buffers: Sequence[Any]) -> Message:
        call = decode(TrainCall, body)
        assert method == FORWARD_METHOD and call.keep
        assert (call.model_id, call.start, call.end, call.codec) == ("toy@0", 2, 4, wire)
        found = read_inputs(call, buffers, E)
        close = {"f32": 0.0, "bf16": 0.01, "q8": 0.1}[wire]
        torch.testing.assert_close(found.hidden.float(), INPUTS.hidden, rtol=close, atol=close)
        assert torch.equal(found.prompts, INPUTS.prompts) and found.adapter == INPUTS.adapter
        return Message(
            encode(TrainDone(wire, 1.0, 2.0, b"k" * 16)), [CODECS[wire].encode(found.hidden.view(-1, E))]
        )

    outputs = await training(answer, wire=wire).forward(SPAN, INPUTS, keep=True)
    assert outputs.kept == b"k" * 16 and outputs.report == HopReport(1.0, 2.0)
    assert outputs.hidden.shape == INPUTS.hidden.shape


@pytest.mark.parametrize("kept", [None, b"k" * 16])
async def test_backward_sends_inputs_unless_they_are_kept(kept: bytes | None) -> None:
    expected = SpanGradients(torch.randn(3, 5, E), torch.randn(2, 1, E), torch.randn(6), HopReport(1.0, 2.0))

    def answer(method: str, body: dict[str, Any], buffers: Sequence[Any]) -> Message:
        call = decode(TrainCall, body)
        assert method == BACKWARD_METHOD and call.wants == GRADIENTS and call.kept == kept
        assert torch.equal(F32.decode(buffers[0], E).view(3, 5, E), GRADIENT)
        assert len(buffers) == (3 if kept is None else 1)
        return Message(encode(DONE), gradient_buffers(F32, expected))

    found = await training(answer).backward(SPAN, INPUTS, GRADIENT, GRADIENTS, kept=kept)
    assert found.adapter is not None and torch.equal(found.adapter, expected.adapter)
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.prompts, expected.prompts)


@pytest.mark.parametrize(
    ("buffers", "error"),
    [
        ([], BadMessage),
        ([bytes(240), bytes(240)], BadMessage),
        ([bytes(236)], BadTensor),
        ([bytes(244)], BadTensor),
        ([b""], BadTensor),
    ],
)
async def test_answers_to_forward_that_are_wrong(buffers: list[bytes], error: type[PetaliteError]) -> None:
    with pytest.raises(error):
        await training(lambda *_: Message(encode(DONE), buffers)).forward(SPAN, INPUTS)


@pytest.mark.parametrize(
    ("wants", "buffers", "error"),
    [
        ((HIDDEN,), [], BadMessage),
        ((HIDDEN,), [bytes(240), bytes(32)], BadMessage),
        ((HIDDEN,), [bytes(32)], BadTensor),
        ((HIDDEN, PROMPTS), [bytes(240), bytes(28)], BadTensor),
        ((HIDDEN, ADAPTER), [bytes(240), bytes(7)], BadTensor),
    ],
)
async def test_answers_to_backward_that_are_wrong(
    wants: tuple[str, ...], buffers: list[bytes], error: type[PetaliteError]
) -> None:
    with pytest.raises(error):
        await training(lambda *_: Message(encode(DONE), buffers)).backward(SPAN, INPUTS, GRADIENT, wants)


async def test_bodies_that_are_wrong() -> None:
    for body in ({}, encode(TrainDone("morse", 1.0, 2.0)), encode(DONE) | {"kept": b"short"}):
        with pytest.raises((BadMessage, BadTensor)):
            await training(lambda *_, body=body: Message(body, [bytes(240)])).forward(SPAN, INPUTS)


class Upload:
    """A call of one who hands over an adapter; a message takes `message_s` to leave."""

    def __init__(self, host: Uploads, body: Any, begun: bytes) -> None:
        self.host, self.put, self.got = host, decode(PutAdapter, body), bytearray(begun)
        self.pieces = 0
        self.is_over = False

    async def send(self, body: Any, buffers: Sequence[Any]) -> None:
        await asyncio.sleep(self.host.message_s)
        self.got += buffers[0]
        self.pieces += 1

    async def receive(self) -> Message:
        digest = self.put.digest
        missing = self.put.more - self.pieces * ADAPTER_PIECE_BYTES
        if digest in self.host.held or missing <= 0:
            assert digest in self.host.held or adapter_digest(self.got) == digest
            self.host.held.add(digest)
            missing = 0
        return Message(encode(AdapterHeld(self.host.says or digest, missing)))

    def end(self) -> None:
        self.is_over = True


class Uploads:
    """A host of such calls."""

    def __init__(self, message_s: float = 0.0) -> None:
        self.message_s = message_s
        self.held: set[bytes] = set()
        self.says: bytes | None = None
        self.calls: list[Upload] = []

    async def open(self, who: object, method: str, body: Any, buffers: Sequence[Any], **_: Any) -> Upload:
        assert method == ADAPTER_METHOD
        self.calls.append(Upload(self, body, buffers[0]))
        return self.calls[-1]

    def put(self, blob: bytes, *, ask: bool = False) -> None:
        host: Any = self
        place = RemoteTraining(host, peer(1), "toy@0", TrainingSettings())
        loop.run(place.put_adapter(blob, ask=ask))
        assert self.calls[-1].is_over


def test_a_small_adapter_goes_with_the_question() -> None:
    host = Uploads()
    host.put(b"blob")
    assert host.calls[0].put == PutAdapter("toy@0", adapter_digest(b"blob"))
    host.says = bytes(32)
    with pytest.raises(BadMessage, match="another adapter"):
        host.put(b"blob")
    assert host.calls[1].is_over


def test_an_adapter_has_as_long_as_its_pieces_leave_in_time() -> None:
    """Nine seconds each; all of it takes minutes. What the server has is not sent."""
    blob = bytes(range(256)) * (20 * ADAPTER_PIECE_BYTES // 256) + b"rest"
    host = Uploads(message_s=9.0)
    host.put(blob, ask=True)
    assert host.calls[0].pieces == 21
    host.put(blob, ask=True)
    host.put(blob)
    assert [one.pieces for one in host.calls] == [21, 0, 0]
    host = Uploads(message_s=11.0)
    with pytest.raises(DeadlineExceeded, match="took longer than 10 s"):
        host.put(blob)
    assert host.calls[0].is_over


async def test_a_call_has_time_for_what_is_before_it() -> None:
    host: Any = Host(lambda *_: Message(encode(DONE), [bytes(240)]))
    settings = TrainingSettings(call_s=10.0, token_s=0.1, in_flight=4)
    await RemoteTraining(host, peer(1), "toy@0", settings).forward(SPAN, INPUTS)
    assert host.timeouts == [10.0 + 0.1 * 4 * 15]
