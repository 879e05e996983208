"""Coroutines and async generators for those who have no loop."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator

import pytest

from petalite.client.loops import LoopThread


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
