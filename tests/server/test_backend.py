"""The backend: packed with strangers or alone, whole or in chunks, a step is what the bare span computes."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petalite.errors import Busy, DeadlineExceeded, NotFinite, SessionGap, ShuttingDown
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.span import BlockSpan, load_span
from petalite.server.backend import Backend, Rows
from petalite.server.scheduler import SchedulerSettings
from petalite.server.session import Session
from petalite.server.steps import cut, wanted_outputs
from tests.helpers.checkpoints import tiny_llama

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # a packed product may sum in another order


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    return load_span(Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny"))), 0, 3)


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.close()


@pytest.fixture
async def backend(span: BlockSpan, thread: ComputeThread) -> AsyncIterator[Backend]:
    yield Backend(
        span, cache_tokens=500, thread=thread, settings=SchedulerSettings(target_s=0.0, least_chunk_tokens=5)
    )


def hidden(n_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(seed))


def alone(span: BlockSpan, fed: torch.Tensor, start: int = 0, end: int = 3) -> torch.Tensor:
    cache = span.new_cache()
    row = cache.open_row(100, start, end)
    return span.forward(fed, [Segment(row, 0, len(fed))], cache, start=start, end=end)


async def run_session(backend: Backend, seed: int, lengths: list[int]) -> torch.Tensor:
    rows = await backend.open_rows(1, sum(lengths), 0, 3)
    fed, position, outputs = hidden(sum(lengths), seed), 0, []
    for n_tokens in lengths:
        segment = Segment(rows.numbers[0], position, n_tokens)
        output, _ = await backend.step(fed[position : position + n_tokens], [segment], 0, 3, peer=seed)
        outputs.append(output)
        position += n_tokens
    backend.drop_rows(rows)
    return torch.cat(outputs)


class Elsewhere(torch.Tensor):
    """As if on a device."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


async def test_what_the_event_loop_encodes_is_no_device_s(
    backend: Backend, span: BlockSpan, thread: ComputeThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for the next pass. What is long stays there, for the thread to encode."""
    forward = span.forward
    monkeypatch.setattr(span, "forward", lambda *a, **k: forward(*a, **k).as_subclass(Elsewhere))
    rows = await backend.open_rows(2, 100, 0, 3)
    short, long = (Segment(rows.numbers[0], 0, 2), Segment(rows.numbers[1], 0, 30))
    (decoded, _), (prefilled, _) = await asyncio.gather(
        backend.step(hidden(2, 0), [short], 0, 3), backend.step(hidden(30, 1), [long], 0, 3)
    )
    assert type(decoded) is torch.Tensor and type(prefilled) is Elsewhere
    encoded_on = []

    def encode(states: torch.Tensor) -> bytearray:
        encoded_on.append(threading.current_thread() is threading.main_thread())
        return bytearray()

    session: Any = SimpleNamespace(_backend=backend, codec=SimpleNamespace(encode=encode))
    for output in (decoded, prefilled[-1:]):
        await Session._encoded(session, output)
    assert encoded_on == [True, False]


async def test_many_sessions_at_once_get_what_each_would_alone(backend: Backend, span: BlockSpan) -> None:
    """Prefills in chunks of five, decode steps packed, all interleaved as they come."""
    shapes = [[23, 1, 1, 1], [1] * 8, [40, 2, 1], [7, 1, 16, 1]]
    results = await asyncio.gather(*(run_session(backend, seed, shape) for seed, shape in enumerate(shapes)))
    for seed, (shape, result) in enumerate(zip(shapes, results, strict=True)):
        torch.testing.assert_close(result, alone(span, hidden(sum(shape), seed)), **TOLERANCE)
    assert backend.free_tokens() == 500
    assert backend.waiting_tokens == 0


async def test_who_gives_up_in_a_pass_is_not_waited_for(backend: Backend) -> None:
    """Nor is anything kept of it."""
    rows = await backend.open_rows(1, 50, 0, 3)
    step = asyncio.create_task(backend.step(hidden(5, 0), [Segment(rows.numbers[0], 0, 5)], 0, 3))
    await asyncio.sleep(0)
    step.cancel()
    await asyncio.wait([step])
    backend.drop_rows(rows)
    await backend.aside(int)
    await asyncio.sleep(0)
    assert not backend._computing
    assert not backend._gathering._answered


async def test_memory_that_was_promised_and_is_not_given(backend: Backend, monkeypatch) -> None:
    """The second of three rows finds none: the caller hears Busy, and the first one's went back."""
    open_row, opened = backend._cache.open_row, []

    def runs_out(*args: int) -> int:
        if len(opened) == 1:
            raise MemoryError("no more")
        opened.append(open_row(*args))
        return opened[-1]

    monkeypatch.setattr(backend._cache, "open_row", runs_out)
    with pytest.raises(Busy, match="no more"):
        await backend.open_rows(3, 20, 0, 3)
    await backend.aside(int)
    assert backend._cache.rows == 0
    assert backend.free_tokens() == 500


async def test_rows_that_are_opened_while_their_caller_gives_up_are_dropped(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_row, begun, let_go = backend._cache.open_row, threading.Event(), threading.Event()

    def slow(*args: int) -> int:
        begun.set()
        assert let_go.wait(30)
        return open_row(*args)

    monkeypatch.setattr(backend._cache, "open_row", slow)
    opening = asyncio.create_task(backend.open_rows(2, 20, 0, 3))
    await asyncio.to_thread(begun.wait, 30)
    opening.cancel()
    await asyncio.wait([opening])
    let_go.set()
    await backend.aside(int)
    assert backend._cache.rows == 0
    assert backend.free_tokens() == 500


async def test_ready_steps_share_a_pass(backend: Backend, span: BlockSpan, monkeypatch) -> None:
    passes: list[int] = []
    forward = span.forward

    def counting(packed: torch.Tensor, segments: list[Segment], cache, **blocks) -> torch.Tensor:
        passes.append(len(segments))
        return forward(packed, segments, cache, **blocks)

    monkeypatch.setattr(span, "forward", counting)
    rows = [await backend.open_rows(1, 9, 0, 3) for _ in range(6)]
    steps = (backend.step(hidden(1, 0), [Segment(one.numbers[0], 0, 1)], 0, 3) for one in rows)
    await asyncio.gather(*steps)
    assert passes == [1, 5], "the first finds the device idle, the others wait together"


async def test_a_quick_pass_runs_on_the_loop(
    backend: Backend, span: BlockSpan, thread: ComputeThread, monkeypatch
) -> None:
    """Once it is known to be quick, with nothing else on the thread, and once in a turn of the loop."""
    monkeypatch.setattr("petalite.server.backend.HERE_S", 1e9)
    here: list[bool] = []
    forward = span.forward

    def watched(*args: object, **kwargs: object) -> torch.Tensor:
        here.append(threading.current_thread() is threading.main_thread())
        return forward(*args, **kwargs)

    monkeypatch.setattr(span, "forward", watched)
    rows = await backend.open_rows(1, 9, 0, 3)

    async def step(position: int) -> bool:
        """Whether it ran on the loop."""
        await backend.step(hidden(1, position), [Segment(rows.numbers[0], position, 1)], 0, 3)
        return here.pop()

    assert not await step(0)  # nobody knows how long the first one takes
    await asyncio.sleep(0)
    assert await step(1)
    assert not await step(2)  # in the same turn

    await asyncio.sleep(0)
    gate = threading.Event()
    backend.aside(gate.wait)
    asked = asyncio.ensure_future(step(3))
    await asyncio.sleep(0)
    gate.set()
    assert not await asked

    monkeypatch.setattr("petalite.server.backend.HERE_S", 0.0)
    assert not await step(4)


async def test_sub_spans_are_passes_of_their_own(backend: Backend, span: BlockSpan) -> None:
    async def over(start: int, end: int) -> torch.Tensor:
        rows = await backend.open_rows(1, 9, start, end)
        return (await backend.step(hidden(4, 1), [Segment(rows.numbers[0], 0, 4)], start, end))[0]

    results = await asyncio.gather(over(0, 3), over(1, 2), over(0, 2))
    for (start, end), result in zip([(0, 3), (1, 2), (0, 2)], results, strict=True):
        torch.testing.assert_close(result, alone(span, hidden(4, 1), start, end), **TOLERANCE)


async def test_a_step_that_fails_fails_alone(backend: Backend, span: BlockSpan) -> None:
    """A gap and a NaN, packed with two good steps."""
    rows = [await backend.open_rows(1, 9, 0, 3) for _ in range(5)]
    numbers = [one.numbers[0] for one in rows]
    blocker = backend.step(hidden(1, 9), [Segment(numbers[4], 0, 1)], 0, 3)
    results = await asyncio.gather(
        blocker,
        backend.step(hidden(2, 0), [Segment(numbers[0], 0, 2)], 0, 3),
        backend.step(hidden(2, 0), [Segment(numbers[1], 1, 2)], 0, 3),
        backend.step(hidden(2, 0) * math.nan, [Segment(numbers[2], 0, 2)], 0, 3),
        backend.step(hidden(2, 1), [Segment(numbers[3], 0, 2)], 0, 3),
        return_exceptions=True,
    )
    torch.testing.assert_close(results[1][0], alone(span, hidden(2, 0)), **TOLERANCE)
    assert isinstance(results[2], SessionGap)
    assert isinstance(results[3], NotFinite)
    assert "came in" in str(results[3])
    torch.testing.assert_close(results[4][0], alone(span, hidden(2, 1)), **TOLERANCE)


async def test_a_step_nobody_waits_for_is_not_run(backend: Backend) -> None:
    rows = await backend.open_rows(2, 90, 0, 3)
    first = asyncio.create_task(backend.step(hidden(60, 0), [Segment(rows.numbers[0], 0, 60)], 0, 3))
    second = asyncio.create_task(backend.step(hidden(60, 0), [Segment(rows.numbers[1], 0, 60)], 0, 3))
    await asyncio.sleep(0)
    second.cancel()
    await first
    assert backend.waiting_tokens == 0


async def test_a_step_that_waits_too_long_says_so(backend: Backend) -> None:
    rows = await backend.open_rows(2, 90, 0, 3)
    first = asyncio.create_task(backend.step(hidden(60, 0), [Segment(rows.numbers[0], 0, 60)], 0, 3))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        await backend.step(hidden(1, 0), [Segment(rows.numbers[1], 0, 1)], 0, 3, timeout_s=0)
    await first


async def test_closing_the_thread_answers_everybody(backend: Backend, thread: ComputeThread) -> None:
    rows: Rows = await backend.open_rows(2, 90, 0, 3)
    steps = [
        asyncio.create_task(backend.step(hidden(60, 0), [Segment(number, 0, 60)], 0, 3))
        for number in rows.numbers
    ]
    await asyncio.sleep(0)
    thread.close()
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert all(isinstance(result, ShuttingDown) for result in results)
    backend.drop_rows(rows)
    assert backend.free_tokens() == 500


def test_cutting_segments() -> None:
    segments = [Segment(0, 5, 3), Segment(1, 0, 1), Segment(2, 7, 4)]
    assert cut(segments, 0, 8) == segments
    assert cut(segments, 2, 3) == [Segment(0, 7, 1), Segment(1, 0, 1), Segment(2, 7, 1)]
    assert cut(segments, 5, 2) == [Segment(2, 8, 2)]
    pieces = [piece for skip in range(8) for piece in cut(segments, skip, 1)]
    assert [(piece.row, piece.position) for piece in pieces] == [
        (0, 5), (0, 6), (0, 7), (1, 0), (2, 7), (2, 8), (2, 9), (2, 10)
    ]  # fmt: skip


def test_wanted_outputs() -> None:
    output, rows = torch.arange(14.0).view(7, 2), [(0, 0, 4), (1, 5, 1), (2, 0, 2)]
    assert wanted_outputs(output, rows, "all") is output
    assert torch.equal(wanted_outputs(output, rows, "last"), output[[3, 4, 6]])
    assert wanted_outputs(output, rows, "none").shape == (0, 2)
