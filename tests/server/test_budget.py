"""The budget: never over-promised, first come first served, nothing lost when who waits gives up."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import Busy
from petalite.server.budget import MOST_WAITING, RETRY_S, Budget


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_room_is_taken_and_given_back() -> None:
    budget = Budget(10)
    await budget.reserve(7, wait_s=0)
    with pytest.raises(Busy) as caught:
        await budget.reserve(4, wait_s=0)
    assert caught.value.retry_after_s == RETRY_S
    await budget.reserve(3, wait_s=0)
    assert budget.free_bytes == 0
    budget.release(7)
    await budget.reserve(4, wait_s=0)
    assert budget.free_bytes == 3


async def test_what_can_never_fit_is_said_at_once() -> None:
    with pytest.raises(Busy) as caught:
        await Budget(10).reserve(11, wait_s=60)
    assert caught.value.retry_after_s is None


async def test_the_line_is_first_come_first_served() -> None:
    """A small request does not overtake a large one that came before it."""
    budget = Budget(10)
    await budget.reserve(6, wait_s=0)
    order = []

    async def wait(nbytes: int) -> None:
        await budget.reserve(nbytes, wait_s=60)
        order.append(nbytes)

    waiting = [asyncio.create_task(wait(nbytes)) for nbytes in (8, 1, 2)]
    await turns()
    assert budget.waiting == 3
    with pytest.raises(Busy) as caught:
        await budget.reserve(1, wait_s=0)
    assert caught.value.retry_after_s == RETRY_S * 4
    budget.release(6)
    await turns()
    assert order == [8, 1]
    budget.release(8)
    await asyncio.gather(*waiting)
    assert order == [8, 1, 2]


async def test_who_gives_up_lets_the_next_one_pass() -> None:
    budget = Budget(10)
    await budget.reserve(6, wait_s=0)
    large = asyncio.create_task(budget.reserve(8, wait_s=60))
    small = asyncio.create_task(budget.reserve(4, wait_s=60))
    await turns()
    large.cancel()
    await small
    assert budget.free_bytes == 0
    with pytest.raises(Busy):
        await budget.reserve(1, wait_s=0.001)
    assert budget.waiting == 0


async def test_the_line_has_an_end() -> None:
    budget = Budget(1)
    await budget.reserve(1, wait_s=0)
    waiting = [asyncio.create_task(budget.reserve(1, wait_s=60)) for _ in range(MOST_WAITING)]
    await turns()
    with pytest.raises(Busy):
        await budget.reserve(1, wait_s=60)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert budget.waiting == 0


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6), st.integers(0, 6)), max_size=15))
def test_nothing_is_lost_whoever_comes_and_goes(visits: list[tuple[int, int, int]]) -> None:
    """Visitors of some size stay some turns, or give up after some turns; at the end all is free."""

    async def run() -> None:
        budget = Budget(10)

        async def visit(nbytes: int, stay: int) -> None:
            await budget.reserve(nbytes, wait_s=60)
            assert budget.free_bytes >= 0
            try:
                await turns(stay)
            finally:
                budget.release(nbytes)

        tasks = []
        for nbytes, stay, patience in visits:
            task = asyncio.create_task(visit(nbytes, stay))
            tasks.append(task)
            await turns(1)
            if patience < 2:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.free_bytes == 10
        assert budget.waiting == 0

    asyncio.run(run())
