"""A server that lends a LoRA: announced, used by sessions beside others, and still there after a move, which
training calls and sessions with adapters live through like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petalite.errors import (
    InvalidAdapter,
    InvalidArgument,
    NetworkError,
    RemoteError,
    ShuttingDown,
    UnknownAdapter,
    WrongSpan,
)
from petalite.model.checkpoint import Checkpoint
from petalite.model.lora import read_peft
from petalite.model.span import load_span
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.schema import decode, encode
from petalite.server import loaded
from petalite.server.loaded import ComputeSettings
from petalite.server.memory import MemorySettings
from petalite.server.moving import MoveSettings
from petalite.server.node import Node
from petalite.server.server import BlockServer, ServerSettings
from petalite.server.throughput import BlockSpeed
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import SESSION_METHOD, OpenSession, SessionOpened, Step, write
from petalite.swarm.records import HostedAdapter, pack, unpack
from petalite.swarm.spans import Span
from petalite.swarm.training import FORWARD_METHOD, SpanInputs, TrainCall, decode_rows, input_buffers
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.lora import factors, linear_roles, peft_folder

F32 = CODECS["f32"]
FED = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))


class Lending:
    """A server of blocks 0:3 that lends "tone", its client, and the same computed here."""

    def __init__(self, server: BlockServer, client: Host, checkpoint: Checkpoint, folder: Path) -> None:
        self.server, self.client, self.checkpoint = server, client, checkpoint
        self.adapter = read_peft(
            folder, checkpoint.config, server.loaded.backend.span.block_kind, checkpoint.family.names
        )

    @property
    def address(self):
        return self.server.peer.addresses[0]

    def expected(self, span: Span, *, with_adapter: bool) -> torch.Tensor:
        blocks = load_span(self.checkpoint, span.start, span.end)
        return blocks.forward_stateless(FED, adapter=self.adapter if with_adapter else None)

    async def session(self, digest: bytes | None, span: Span) -> torch.Tensor:
        """Row 1 of FED token by token, in a session with this adapter."""
        opening = OpenSession(self.server.model_id, span.start, span.end, 1, 7, adapter=digest)
        call = await self.client.open(self.address, SESSION_METHOD, encode(opening), timeout_s=20)
        try:
            message = await call.receive()
            assert message is not None
            decode(SessionOpened, message.body)
            outputs = []
            for position in range(7):
                body = write(Step(((0, position, 1),), "f32", span.end))
                await call.send(body, [F32.encode(FED[1, position : position + 1])])
                message = await call.receive()
                assert message is not None
                outputs.append(F32.decode(message.buffers[0], 64))
            return torch.cat(outputs)
        finally:
            call.end()

    async def forward(self, span: Span, digest: bytes | None = None) -> torch.Tensor:
        call = TrainCall(self.server.model_id, span.start, span.end, 2, 7, "f32", adapter=digest)
        message = await self.client.call(
            self.address, FORWARD_METHOD, encode(call), input_buffers(F32, SpanInputs(FED)), timeout_s=20
        )
        return decode_rows(F32, message.buffers[0], (2, 7, 64))


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "measure", lambda span: BlockSpeed(0.001, 0.001))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny", num_hidden_layers=6)


def settings(*adapters: Path) -> ServerSettings:
    return ServerSettings(
        blocks=Span(0, 3),
        compute=ComputeSettings(threads=1),
        memory=MemorySettings(cache_tokens=20_000),
        moving=MoveSettings(drain_s=0.1),
        adapters=adapters,
        drain_s=0.1,
    )


@pytest.fixture
async def lending(tiny: Path, tmp_path: Path) -> AsyncIterator[Lending]:
    checkpoint = Checkpoint.open(tiny)
    folder = peft_folder(
        checkpoint, factors(checkpoint, linear_roles(checkpoint), range(6)), tmp_path / "tone"
    )
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node(listen=["/ip4/127.0.0.1/tcp/0"]))
        server = await node.serve(str(tiny), settings(folder))
        client = await stack.enter_async_context(Host(Identity.generate()))
        yield Lending(server, client, checkpoint, folder)


async def test_it_is_announced_and_chosen_by_session(lending: Lending) -> None:
    server, span = lending.server, Span(0, 3)
    record = server._record()
    assert record.adapters == (HostedAdapter("tone", lending.adapter.digest),)
    assert unpack(type(record), pack(record)) == record
    assert record.training_tokens > 0
    found = await asyncio.gather(
        lending.session(lending.adapter.digest, span), lending.session(None, span), return_exceptions=True
    )
    for output, with_adapter in zip(found, (True, False), strict=True):
        expected = lending.expected(span, with_adapter=with_adapter)[1]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnknownAdapter):
        await lending.session(bytes(32), span)
    trained = await lending.forward(span, lending.adapter.digest)
    torch.testing.assert_close(trained, lending.expected(span, with_adapter=True), rtol=1e-4, atol=1e-4)


async def test_a_move_ends_training_calls_and_keeps_what_is_lent(lending: Lending) -> None:
    digest = lending.adapter.digest
    await lending.forward(Span(0, 3))

    async def train(span: Span) -> int:
        done = 0
        while True:
            await lending.forward(span, digest)
            done += 1

    training = asyncio.create_task(train(Span(0, 3)))
    await lending.server.move(Span(3, 6))
    with pytest.raises((ShuttingDown, WrongSpan)):
        await training
    for output in (await lending.session(digest, Span(3, 6)), (await lending.forward(Span(3, 6), digest))[1]):
        expected = lending.expected(Span(3, 6), with_adapter=True)[1]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert not lending.server.loaded.backend.budget.reserved_bytes or not lending.server.sessions.count


async def test_leaving_cuts_training(lending: Lending) -> None:
    async def train() -> None:
        while True:
            await lending.forward(Span(0, 3))

    training = asyncio.create_task(train())
    await lending.server.close()
    with pytest.raises((RemoteError, NetworkError)):
        await training


async def test_what_cannot_be_lent_is_said_at_the_start(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    good = peft_folder(checkpoint, factors(checkpoint, ("query",)), tmp_path / "good")
    other = Checkpoint.open(tiny_llama(tmp_path / "other", hidden_size=32))
    wrong = peft_folder(other, factors(other, ("query",)), tmp_path / "wrong")
    async with Node(listen=["/ip4/127.0.0.1/tcp/0"]) as node:
        for adapters, error in (((wrong,), InvalidAdapter), ((good, good), InvalidArgument)):
            with pytest.raises(error):
                await node.serve(str(tiny), settings(*adapters))
        none = replace(settings(good), name="other")
        assert (await node.serve(str(tiny), none)).adapters.lent
