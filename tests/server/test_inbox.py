"""What waits for a session's worker: bounded in each inbox and in all, never so that nothing goes on."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from petalite.server.inbox import Inbox, Waiting


async def test_a_writer_waits_for_the_reader() -> None:
    inbox: Inbox[str] = Inbox(2, 100, Waiting(1000))
    inbox.put("a", 60)
    assert not inbox.is_full
    inbox.put("b", 60)
    assert inbox.is_full
    writing = asyncio.create_task(inbox.room())
    await asyncio.sleep(0)
    assert not writing.done()
    assert await inbox.get() == "a"
    await writing


async def test_a_writer_that_is_not_wanted_any_more_goes_on() -> None:
    inbox: Inbox[str] = Inbox(1, 100, Waiting(1000))
    inbox.put("a")
    wanted = True
    writing = asyncio.create_task(inbox.room(lambda: wanted))
    await asyncio.sleep(0)
    assert not writing.done()
    wanted = False
    inbox.wake()
    async with asyncio.timeout(10):
        await writing
    assert inbox.is_full


def test_what_waits_in_all_is_bounded_and_each_takes_one() -> None:
    """A second inbox takes nothing beside what it has while the first one holds all there is."""
    together = Waiting(100)
    first, second = Inbox[str](32, 1000, together), Inbox[str](32, 1000, together)
    first.put("a", 100)
    assert not second.is_full
    second.put("b", 10)
    assert second.is_full
    assert first.is_full
    first.clear()
    assert not second.is_full


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["put", "get", "clear"]), st.integers(0, 50)),
        max_size=40,
    )
)
def test_the_sum_is_that_of_what_waits(events: list[tuple[int, str, int]]) -> None:
    together = Waiting(100)
    inboxes = [Inbox[int](4, 60, together) for _ in range(3)]
    held: list[list[int]] = [[], [], []]

    async def run() -> None:
        for number, event, nbytes in events:
            inbox, sizes = inboxes[number], held[number]
            if event == "put" and not inbox.is_full:
                inbox.put(nbytes, nbytes)
                sizes.append(nbytes)
            elif event == "get" and sizes:
                assert await inbox.get() == sizes.pop(0)
            elif event == "clear":
                inbox.clear()
                sizes.clear()
            assert together.nbytes == sum(map(sum, held))

    asyncio.run(run())
