"""The compute thread: in order, off the loop, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import torch

from petalite.errors import ShuttingDown
from petalite.model.compute import ComputeThread, is_finite, use_threads


async def test_work_runs_in_order_on_one_other_thread() -> None:
    thread = ComputeThread("of its own")
    seen: list[tuple[int, str]] = []
    await asyncio.gather(
        *(thread.run(lambda i=i: seen.append((i, threading.current_thread().name))) for i in range(50))
    )
    assert seen == [(i, "of its own") for i in range(50)]
    thread.close()


async def test_an_error_is_raised_where_the_work_is_awaited() -> None:
    thread = ComputeThread()
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    assert await thread.run(int, "7") == 7
    thread.close()


async def test_cancelled_work_that_has_not_begun_never_runs() -> None:
    thread = ComputeThread()
    gate = threading.Event()
    first = thread.run(gate.wait)
    ran: list[int] = []
    second = thread.run(ran.append, 1)
    second.cancel()
    gate.set()
    await first
    await thread.run(lambda: None)
    assert not ran
    thread.close()


async def test_closing_cancels_what_waits_and_lets_the_running_end() -> None:
    thread = ComputeThread()
    gate, begun = threading.Event(), threading.Event()

    def running() -> str:
        begun.set()
        gate.wait()
        return "ended"

    first, second = thread.run(running), thread.run(lambda: None)
    await asyncio.to_thread(begun.wait)
    thread.close()
    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(ShuttingDown):
        thread.run(lambda: None)
    gate.set()
    assert await first == "ended"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite(dtype: torch.dtype) -> None:
    """Sums that overflow are looked at twice; NaN and Inf anywhere are found."""
    fine = torch.full((3, 50), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(fine)
    assert is_finite(torch.zeros(0, 4, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = torch.ones(3, 50, dtype=dtype)
        broken[1, 7] = bad
        assert not is_finite(broken)


async def test_threads_are_at_most_the_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    thread = ComputeThread()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    try:
        for wanted, given in ((1, 1), (2, 2), (64, 2), (None, 2), (1, 1), (None, 1)):
            await thread.run(use_threads, wanted)
            assert await thread.run(torch.get_num_threads) == given
    finally:
        thread.close()
        torch.set_num_threads(before)


def test_a_process_ends_in_peace_while_its_thread_computes() -> None:
    code = """
import asyncio, torch
from petalite.model.compute import ComputeThread
torch.set_num_threads(1)  # two that wait for each other on busy cores take longer than there is
thread = ComputeThread()
async def main():
    one = torch.randn(64, 64)
    first, second = (thread.run(lambda: [one @ one is one for _ in range(10000)]) for _ in range(2))
    await first
asyncio.run(main())
thread.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
