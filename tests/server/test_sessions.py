"""The RPC `session` over real sockets on loopback: right results, and a code for everything that is wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petalite.errors import (
    BadMessage,
    BadTensor,
    Busy,
    IdleClosed,
    NotFinite,
    ResourceLimit,
    SessionGap,
    SessionLimit,
    ShuttingDown,
    WrongModel,
    WrongSpan,
)
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.span import BlockSpan, load_span
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.server.backend import Backend
from petalite.server.sessions import SessionService, SessionSettings
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import SESSION_METHOD, OpenSession, SessionOpened, Step, StepDone
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.waiting import until

MODEL_ID = "tiny@0"
CACHE_TOKENS = 64
OPEN = OpenSession(MODEL_ID, start=1, end=4, rows=2, max_length=16)
F32 = CODECS["f32"]


class Serving:
    """One server's session service, and hosts of clients that dial it."""

    def __init__(self, span: BlockSpan, stack: AsyncExitStack, settings: SessionSettings) -> None:
        self.span = span
        thread = ComputeThread()
        stack.callback(thread.close)
        self.backend = Backend(span, cache_tokens=CACHE_TOKENS, thread=thread)
        self.service = SessionService(self.backend, MODEL_ID, settings)
        self._stack = stack

    async def listen(self) -> None:
        host = await self._stack.enter_async_context(Host(Identity.generate()))
        (self.address,) = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        self.service.attach(host)

    async def client(self) -> Host:
        return await self._stack.enter_async_context(Host(Identity.generate()))

    async def open(self, client: Host, request: OpenSession = OPEN) -> Call:
        call = await client.open(self.address, SESSION_METHOD, encode(request), timeout_s=20)
        self._stack.callback(call.end)
        message = await call.receive()
        assert message is not None
        assert decode(SessionOpened, message.body).codec == "f32"
        return call

    async def until_free(self) -> None:
        """Every row is given back, and all of the budget with it."""
        await until(lambda: not self.service.count and self.backend.free_tokens() == CACHE_TOKENS)


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=5)
    return load_span(Checkpoint.open(folder), 1, 5)


@pytest.fixture
async def serving(span: BlockSpan, request: pytest.FixtureRequest) -> AsyncIterator[Serving]:
    async with AsyncExitStack() as stack:
        serving = Serving(span, stack, getattr(request, "param", SessionSettings()))
        await serving.listen()
        yield serving


def hidden(span: BlockSpan, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, span.config.hidden_size, generator=torch.Generator().manual_seed(seed))


async def step(
    call: Call, states: torch.Tensor, *rows: tuple[int, int, int], output: str = "all"
) -> torch.Tensor:
    await call.send(encode(Step(rows, "f32", output)), [F32.encode(states)])
    message = await call.receive()
    assert message is not None
    decode(StepDone, message.body)
    return F32.decode(message.buffers[0], states.shape[1]) if message.buffers else states[:0]


async def test_steps_equal_the_span_itself(serving: Serving) -> None:
    """Two rows, packed and rolled back, against the span's own forward over a cache of its own."""
    call = await serving.open(await serving.client())
    cache = serving.span.new_cache()
    rows = [cache.open_row(16, 1, 4) for _ in range(2)]
    for triples in ([(0, 0, 5), (1, 0, 3)], [(1, 3, 1), (0, 5, 1)], [(0, 4, 2)], [(1, 0, 6)]):
        states = hidden(serving.span, sum(n for _, _, n in triples), seed=len(triples))
        segments = [Segment(rows[row], position, n) for row, position, n in triples]
        expected = serving.span.forward(states, segments, cache, start=1, end=4)
        assert torch.equal(await step(call, states, *triples), expected)


async def test_only_the_outputs_asked_for_travel(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    states = hidden(serving.span, 7)
    whole = await step(call, states, (0, 0, 4), (1, 0, 3))
    last = await step(call, states, (0, 0, 4), (1, 0, 3), output="last")
    none = await step(call, states, (0, 0, 4), (1, 0, 3), output="none")
    assert torch.equal(last, whole[[3, 6]])
    assert len(none) == 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (replace(OPEN, model_id="other@0"), WrongModel),
        (replace(OPEN, start=0), WrongSpan),
        (replace(OPEN, end=6), WrongSpan),
        (replace(OPEN, start=3, end=3), WrongSpan),
        (replace(OPEN, rows=0), BadMessage),
        (replace(OPEN, rows=257), BadMessage),
        (replace(OPEN, max_length=1 << 30), BadMessage),
        (replace(OPEN, max_length=65, rows=2), Busy),
    ],
)
async def test_openings_that_are_refused(
    serving: Serving, request_: OpenSession, error: type[Exception]
) -> None:
    client = await serving.client()
    with pytest.raises(error):
        await serving.open(client, request_)
    await serving.until_free()
    await serving.open(client)


STATES = torch.ones(2, 64)
WRONG_STEPS = {
    "row": (Step(((2, 0, 2),), "f32"), [F32.encode(STATES)], BadMessage),
    "no tokens": (Step(((0, 0, 0),), "f32"), [F32.encode(STATES)], BadMessage),
    "row twice": (Step(((0, 0, 1), (0, 1, 1)), "f32"), [F32.encode(STATES)], BadMessage),
    "too many tokens": (Step(((0, 0, 5000),), "f32"), [F32.encode(STATES)], BadMessage),
    "gap": (Step(((0, 1, 2),), "f32"), [F32.encode(STATES)], SessionGap),
    "beyond what was opened": (Step(((0, 0, 17),), "f32"), [F32.encode(torch.ones(17, 64))], SessionLimit),
    "no buffer": (Step(((0, 0, 2),), "f32"), [], BadMessage),
    "two buffers": (Step(((0, 0, 2),), "f32"), [F32.encode(STATES)] * 2, BadMessage),
    "fewer states": (Step(((0, 0, 3),), "f32"), [F32.encode(STATES)], BadTensor),
    "not a whole token": (Step(((0, 0, 2),), "f32"), [F32.encode(STATES)[:-1]], BadTensor),
    "empty": (Step(((0, 0, 2),), "f32"), [b""], BadTensor),
    "codec": (Step(((0, 0, 2),), "q3"), [F32.encode(STATES)], BadTensor),
    "output": (Step(((0, 0, 2),), "f32", "some"), [F32.encode(STATES)], BadMessage),
    "NaN": (Step(((0, 0, 2),), "f32"), [F32.encode(STATES * math.nan)], NotFinite),
    "Inf": (Step(((0, 0, 2),), "f32"), [F32.encode(STATES * math.inf)], NotFinite),
}


@pytest.mark.parametrize("case", WRONG_STEPS)
async def test_a_wrong_step_ends_its_session_and_no_other(serving: Serving, case: str) -> None:
    wrong, buffers, error = WRONG_STEPS[case]
    client = await serving.client()
    bystander = await serving.open(client)
    before = await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    call = await serving.open(client, replace(OPEN, max_length=16))
    await call.send(encode(wrong), buffers)
    with pytest.raises(error):
        await call.receive()
    await until(lambda: serving.service.count == 1)
    assert torch.equal(await step(bystander, hidden(serving.span, 3), (0, 0, 3)), before)
    bystander.end()
    await serving.until_free()


async def test_a_client_that_vanishes_leaves_nothing_behind(serving: Serving) -> None:
    client = await serving.client()
    call = await serving.open(client)
    await step(call, hidden(serving.span, 3), (0, 0, 3))
    assert serving.backend.free_tokens() < CACHE_TOKENS
    await client.close()
    await serving.until_free()


@pytest.mark.parametrize("serving", [SessionSettings(most_per_peer=2, most=3)], indirect=True)
async def test_limits_of_one_peer_and_of_all(serving: Serving) -> None:
    small = replace(OPEN, rows=1, max_length=2)
    first, second, third = [await serving.client() for _ in range(3)]
    calls = [await serving.open(first, small) for _ in range(2)]
    with pytest.raises(ResourceLimit, match="of yours"):
        await serving.open(first, small)
    await serving.open(second, small)
    with pytest.raises(ResourceLimit, match="most this server takes"):
        await serving.open(third, small)
    calls[0].end()
    await until(lambda: serving.service.count == 2)
    await serving.open(third, small)


@pytest.mark.parametrize("serving", [SessionSettings(idle_s=0.05)], indirect=True)
async def test_an_idle_session_is_closed(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    with pytest.raises(IdleClosed):
        await call.receive()
    await serving.until_free()


async def test_draining_refuses_newcomers_and_cuts_who_stays(serving: Serving) -> None:
    client = await serving.client()
    call = await serving.open(client)
    draining = asyncio.create_task(serving.service.drain(0.05))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await serving.open(client)
    await draining
    with pytest.raises(ShuttingDown):
        await call.receive()
    await serving.until_free()


async def test_draining_waits_for_who_leaves(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    draining = asyncio.create_task(serving.service.drain(60))
    await step(call, hidden(serving.span, 3), (0, 0, 3))
    call.end()
    async with asyncio.timeout(10):
        await draining
