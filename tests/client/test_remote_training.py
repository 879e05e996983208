"""Training calls on the wire: what is sent is what a server reads, and what else comes back is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from petalite.client.remote_training import RemoteTraining
from petalite.client.settings import TrainingSettings
from petalite.errors import BadMessage, BadTensor, PetaliteError
from petalite.net.messages import Message
from petalite.net.schema import decode, encode
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import HopReport
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    ADAPTER_METHOD,
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


async def test_an_adapter_is_handed_over_by_its_digest() -> None:
    def answer(method: str, body: dict[str, Any], buffers: Sequence[Any]) -> Message:
        put = decode(PutAdapter, body)
        assert method == ADAPTER_METHOD and put == PutAdapter("toy@0", adapter_digest(b"blob"))
        assert bytes(buffers[0]) == b"blob"
        return Message(encode(AdapterHeld(put.digest)))

    await training(answer).put_adapter(b"blob")
    with pytest.raises(BadMessage, match="another adapter"):
        await training(lambda *_: Message(encode(AdapterHeld(bytes(32))))).put_adapter(b"blob")


async def test_a_call_has_time_for_what_is_before_it() -> None:
    host: Any = Host(lambda *_: Message(encode(DONE), [bytes(240)]))
    settings = TrainingSettings(call_s=10.0, token_s=0.1, in_flight=4)
    await RemoteTraining(host, peer(1), "toy@0", settings).forward(SPAN, INPUTS)
    assert host.timeouts == [10.0 + 0.1 * 4 * 15]
