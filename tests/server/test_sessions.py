"""The RPC `session` over real sockets on loopback: right results, and a code for everything that is wrong."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import zstandard

from petalite.errors import (
    BadMessage,
    BadTensor,
    Busy,
    Cancelled,
    IdleClosed,
    NotFinite,
    PetaliteError,
    RateLimited,
    ResourceLimit,
    SessionGap,
    SessionLimit,
    ShuttingDown,
    WrongModel,
    WrongSpan,
)
from petalite.model.cache import Segment
from petalite.model.span import BlockSpan
from petalite.net.credit import Windows
from petalite.net.rpc import Call
from petalite.server import session
from petalite.server.sessions import SessionSettings
from petalite.swarm.codecs import session_codec
from petalite.swarm.messages import OpenSession, Step, StepDone, write
from tests.helpers.waiting import until
from tests.server.serving import CACHE_TOKENS, F32, OPEN, Serving, heard, hidden, step


@pytest.mark.parametrize("large_bytes", [session.LARGE_BYTES, 0])
async def test_steps_equal_the_span_itself(
    serving: Serving, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows, packed and rolled back, against the span's own forward over a cache of its own; coded in the
    event loop, and aside as large steps are.
    """
    monkeypatch.setattr(session, "LARGE_BYTES", large_bytes)
    call = await serving.open(await serving.client())
    cache = serving.span.new_cache()
    rows = [cache.open_row(16, 1, 4) for _ in range(2)]
    for triples in ([(0, 0, 5), (1, 0, 3)], [(1, 3, 1), (0, 5, 1)], [(0, 4, 2)], [(1, 0, 6)]):
        states = hidden(serving.span, sum(n for _, _, n in triples), seed=len(triples))
        segments = [Segment(rows[row], position, n) for row, position, n in triples]
        expected = serving.span.forward(states, segments, cache, start=1, end=4)
        assert torch.equal(await step(call, states, *triples), expected)


async def test_a_large_step_that_lies_about_its_size_ends_its_session(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is found on the compute thread, and said as anywhere else."""
    monkeypatch.setattr(session, "LARGE_BYTES", 0)
    call = await serving.open(await serving.client())
    await call.send(write(Step(((0, 0, 2),), "f32", 4)), [F32.encode(STATES)[:-1]])
    with pytest.raises(BadTensor):
        await call.receive()
    await serving.until_free()


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
        (replace(OPEN, codec="q8+lz4"), BadTensor),
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
PACKED = session_codec("f32+zstd")
NAMELESS = zstandard.ZstdCompressor(write_content_size=False)
WRONG_STEPS = {
    "row": (Step(((2, 0, 2),), "f32", 4), [F32.encode(STATES)], BadMessage),
    "no tokens": (Step(((0, 0, 0),), "f32", 4), [F32.encode(STATES)], BadMessage),
    "row twice": (Step(((0, 0, 1), (0, 1, 1)), "f32", 4), [F32.encode(STATES)], BadMessage),
    "too many tokens": (Step(((0, 0, 5000),), "f32", 4), [F32.encode(STATES)], BadMessage),
    "gap": (Step(((0, 1, 2),), "f32", 4), [F32.encode(STATES)], SessionGap),
    "beyond what was opened": (Step(((0, 0, 17),), "f32", 4), [F32.encode(torch.ones(17, 64))], SessionLimit),
    "no buffer": (Step(((0, 0, 2),), "f32", 4), [], BadMessage),
    "two buffers": (Step(((0, 0, 2),), "f32", 4), [F32.encode(STATES)] * 2, BadMessage),
    "fewer states": (Step(((0, 0, 3),), "f32", 4), [F32.encode(STATES)], BadTensor),
    "not a whole token": (Step(((0, 0, 2),), "f32", 4), [F32.encode(STATES)[:-1]], BadTensor),
    "empty": (Step(((0, 0, 2),), "f32", 4), [b""], BadTensor),
    "what unpacks to more": (Step(((0, 0, 2),), "f32+zstd", 4), [PACKED.pack(bytes(1 << 24))], BadTensor),
    "what says no size": (Step(((0, 0, 2),), "f32+zstd", 4), [NAMELESS.compress(bytes(512))], BadTensor),
    "not packed": (Step(((0, 0, 2),), "f32+zstd", 4), [F32.encode(STATES)], BadTensor),
    "packed and not said": (Step(((0, 0, 2),), "f32", 4), [PACKED.pack(F32.encode(STATES))], BadTensor),
    "codec": (Step(((0, 0, 2),), "q3", 4), [F32.encode(STATES)], BadTensor),
    "output": (Step(((0, 0, 2),), "f32", 4, "some"), [F32.encode(STATES)], BadMessage),
    "ends before this hop": (Step(((0, 0, 2),), "f32", 3), [F32.encode(STATES)], BadMessage),
    "ends at a hop that nobody named": (Step(((0, 0, 2),), "f32", 9), [F32.encode(STATES)], BadMessage),
    "NaN": (Step(((0, 0, 2),), "f32", 4), [F32.encode(STATES * math.nan)], NotFinite),
    "Inf": (Step(((0, 0, 2),), "f32", 4), [F32.encode(STATES * math.inf)], NotFinite),
}


@pytest.mark.parametrize("case", WRONG_STEPS)
async def test_a_wrong_step_ends_its_session_and_no_other(serving: Serving, case: str) -> None:
    wrong, buffers, error = WRONG_STEPS[case]
    client = await serving.client()
    bystander = await serving.open(client)
    before = await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    call = await serving.open(client, replace(OPEN, max_length=16))
    await call.send(write(wrong), buffers)
    with pytest.raises(error):
        await call.receive()
    await until(lambda: serving.service.count == 1)
    assert torch.equal(await step(bystander, hidden(serving.span, 3), (0, 0, 3)), before)
    bystander.end()
    await serving.until_free()


async def test_a_device_without_memory_for_one_session_serves_the_others(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of seven tokens raise what torch raises then; they were packed with another session's."""
    client = await serving.client()
    bystander, call = await serving.open(client), await serving.open(client)
    before = await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    forward = BlockSpan.forward

    def out_of_memory(span: BlockSpan, states: torch.Tensor, segments: Any, *args: Any, **kwargs: Any) -> Any:
        if any(segment.n_tokens == 7 for segment in segments):
            raise torch.OutOfMemoryError("no memory")
        return forward(span, states, segments, *args, **kwargs)

    monkeypatch.setattr(BlockSpan, "forward", out_of_memory)
    await call.send(write(Step(((0, 0, 7),), "f32", 4)), [F32.encode(hidden(serving.span, 7))])
    again = await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    with pytest.raises(PetaliteError, match="the handler failed"):
        await call.receive()
    assert torch.equal(again, before)
    await until(lambda: serving.service.count == 1)
    bystander.end()
    await serving.until_free()


async def test_after_a_move_other_blocks_are_served(serving: Serving) -> None:
    client = await serving.client()
    await serving.service.drain(0.0)
    serving.service.suspend()
    with pytest.raises(ShuttingDown):
        await serving.open(client)
    serving.service.resume(serving.backend)
    await step(await serving.open(client), hidden(serving.span, 3), (0, 0, 3))


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


@pytest.mark.parametrize("serving", [SessionSettings(longest_s=0.3)], indirect=True)
async def test_a_session_ends_with_its_time_however_busy(serving: Serving) -> None:
    call = await serving.open(await serving.client())
    with pytest.raises(IdleClosed, match="longest"):
        while True:
            await step(call, hidden(serving.span, 1), (0, 0, 1))
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
    assert not draining.done()
    call.end()
    async with asyncio.timeout(10):
        await draining


async def test_a_client_that_sends_ahead_without_end_is_cut(serving: Serving) -> None:
    """It sends steps and reads no answer; what waits here is bounded, and another session goes on."""
    client = await serving.client()
    bystander = await serving.open(client)
    call = await serving.open(client)
    states = F32.encode(hidden(serving.span, 16))
    with pytest.raises((ResourceLimit, Cancelled)):
        while True:
            await call.send(write(Step(((0, 0, 16),), "f32", 4)), [states])
    await step(bystander, hidden(serving.span, 3), (0, 0, 3))
    bystander.end()
    call.end()
    await serving.until_free()


@pytest.mark.parametrize("serving", [SessionSettings(waiting_bytes=1)], indirect=True)
async def test_a_client_whose_steps_are_large_is_held_back_and_not_cut(serving: Serving) -> None:
    """Sixteen at once, where one may wait beside the one that is computed: all are answered, in order."""
    call = await serving.open(await serving.client())
    states = hidden(serving.span, 16)
    for position in range(16):
        data = F32.encode(states[position : position + 1])
        await call.send(write(Step(((0, position, 1),), "f32", 4, number=position)), [data])
    done = [(await heard(call))[0] for _ in range(16)]
    assert [one.number for one in done if isinstance(one, StepDone)] == list(range(16))
    call.end()
    await serving.until_free()
    assert serving.service._waiting.nbytes == 0


@pytest.mark.parametrize("serving", [SessionSettings(idle_s=0.3)], indirect=True)
async def test_a_client_that_sends_steps_and_never_reads_is_closed(serving: Serving) -> None:
    """Its window holds one answer; the next ones wait for it to read, but not for ever."""
    client, other = await serving.client(Windows(stream_bytes=4096)), await serving.client()
    call = await serving.open(client)
    states = F32.encode(hidden(serving.span, 16))
    for _ in range(8):
        await call.send(write(Step(((0, 0, 16),), "f32", 4)), [states])
    await serving.until_free()
    with pytest.raises(IdleClosed):
        for _ in range(8):
            await call.receive()
    await step(await serving.open(other), hidden(serving.span, 3), (0, 0, 3))


async def test_a_thousand_openings_of_one_peer(serving: Serving) -> None:
    """A few are let in, the others are refused with a code; another peer still gets its session, and all of
    the budget comes back.
    """
    flood, other = await serving.client(), await serving.client()
    small = replace(OPEN, rows=1, max_length=1)
    opened = await asyncio.gather(*(serving.open(flood, small) for _ in range(1000)), return_exceptions=True)
    calls = [call for call in opened if isinstance(call, Call)]
    refusals = {type(error) for error in opened if not isinstance(error, Call)}
    assert 0 < len(calls) <= SessionSettings().most_per_peer
    assert refusals <= {ResourceLimit, Busy, RateLimited}, refusals
    await serving.open(other, replace(OPEN, rows=1, max_length=16))
    for host in (flood, other):
        await host.close()
    await serving.until_free()
