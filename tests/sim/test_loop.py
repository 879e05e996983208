"""Virtual time against the rules of real time: what is due first comes first,
and nothing before it is due."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.sim.loop import Deadlock, run


def test_an_hour_takes_no_time():
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    started_s = time.monotonic()
    assert run(main()) == pytest.approx(3600)
    assert time.monotonic() - started_s < 10


@given(st.lists(st.floats(0, 1000), max_size=30))
def test_sleepers_wake_in_order_and_on_time(delays: list[float]):
    woken: list[tuple[float, float]] = []

    async def sleeper(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        woken.append((delay_s, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(*map(sleeper, delays))

    run(main())
    assert [delay_s for delay_s, _ in woken] == sorted(delays)
    assert all(at_s == pytest.approx(delay_s, abs=1e-6) for delay_s, at_s in woken)


def test_timeouts_expire_in_virtual_time():
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(10)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(5)


def test_waiting_for_what_never_comes_is_a_deadlock():
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run(main())
