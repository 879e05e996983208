"""Coroutines and async generators for those who have no loop."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import petalite
from petalite.client.loops import LoopThread
from petalite.errors import InvalidArgument
from tests.helpers.checkpoints import tiny_llama


class Source:
    """Counts, and knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(3):
                yield number
        finally:
            self.closed = True


def test_an_iteration_that_ends_early_closes_its_source() -> None:
    thread, source = LoopThread(), Source()
    numbers = thread.iterate(source.numbers())
    assert next(numbers) == 0
    del numbers
    gc.collect()
    assert source.closed
    assert list(thread.iterate(Source().numbers())) == [0, 1, 2]
    thread.close()
    thread.close()


@pytest.mark.filterwarnings("error")
def test_an_iteration_may_outlive_its_loop() -> None:
    """As that of a generation does which an interrupt ends: its model closes first, its frame goes last."""
    thread, source = LoopThread(), Source()
    numbers = thread.iterate(source.numbers())
    assert next(numbers) == 0
    thread.close()
    assert source.closed
    del numbers
    gc.collect()


@pytest.mark.filterwarnings("error")
def test_who_waits_is_told_when_the_loop_closes() -> None:
    """One thread's call is under way when another closes; and one comes too late."""
    thread, begun = LoopThread(), threading.Event()

    async def for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as others:
        waiting = others.submit(lambda: thread.run(for_ever()))
        begun.wait()
        thread.close()
        with pytest.raises(InvalidArgument, match="closed while"):
            waiting.result(5)
    with pytest.raises(InvalidArgument, match="was closed"):
        thread.run(for_ever())


def test_a_process_ends_with_an_iteration_half_way() -> None:
    """Its frame goes when the module does, long after the loop's thread."""
    script = """
from petalite.client.loops import LoopThread

async def numbers():
    try:
        for number in range(3):
            yield number
    finally:
        print("closed")

loop = LoopThread()
iteration = loop.iterate(numbers())
print(next(iteration))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\nclosed\n", "")


def test_an_iteration_may_be_collected_in_the_thread_of_its_loop() -> None:
    """As garbage is that refers to itself: by whichever thread comes by."""
    thread, source = LoopThread(), Source()
    cycle: list[object] = [thread.iterate(source.numbers())]
    cycle.append(cycle)
    assert next(cycle[0]) == 0  # type: ignore[call-overload]
    del cycle

    async def collect() -> int:
        return gc.collect()

    with ThreadPoolExecutor(1) as others:
        others.submit(lambda: thread.run(collect())).result(5)
    thread.close()
    assert source.closed


def test_a_session_may_be_left_after_its_model_was_closed(tmp_path: Path) -> None:
    model = petalite.load(str(tiny_llama(tmp_path / "tiny")))
    with model.session(50) as session, model.blocks[:].session(50) as blocks:
        model.generate([1, 2, 3], max_new_tokens=2, session=session)
        blocks(torch.zeros(1, 1, model.config.hidden_size))
        model.close()
    with pytest.raises(InvalidArgument, match="was closed"):
        model.generate([1, 2, 3])
