"""One-time tokens: whoever comes first waits, each opens once, and nobody's knocking keeps others out."""

from __future__ import annotations

import asyncio

import pytest

from petalite.errors import Refused, ResourceLimit
from petalite.server.doors import MOST_OF_ONE, Doors


def token(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def test_either_may_come_first_and_a_token_opens_once() -> None:
    doors: Doors[str] = Doors(patience_s=0.05)
    doors.expect(token(1), "early")
    assert await doors.knock(token(1), "peer") == "early"
    knocking = asyncio.create_task(doors.knock(token(2), "peer"))
    await asyncio.sleep(0)
    doors.expect(token(2), "late")
    assert await knocking == "late"
    for used in (token(1), token(2)):
        with pytest.raises(Refused):
            await doors.knock(used, "peer")


async def test_an_owner_expects_one_token_at_a_time() -> None:
    """However many a client names for one session, the last alone is kept."""
    doors: Doors[str] = Doors(patience_s=0.05)
    doors.expect(token(1), "other")
    for number in range(2, 1000):
        doors.expect(token(number), "owner")
    assert len(doors._expected) == 2
    with pytest.raises(Refused):
        await doors.knock(token(2), "peer")
    assert await doors.knock(token(999), "peer") == "owner"
    assert await doors.knock(token(1), "peer") == "other"


async def test_one_peer_that_knocks_much_keeps_nobody_out() -> None:
    doors: Doors[str] = Doors(patience_s=5)
    flood = [asyncio.create_task(doors.knock(token(number), "flood")) for number in range(MOST_OF_ONE)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceLimit):
        await doors.knock(token(MOST_OF_ONE), "flood")
    knocking = asyncio.create_task(doors.knock(token(1 << 60), "other"))
    await asyncio.sleep(0)
    doors.expect(token(1 << 60), "owner")
    assert await knocking == "owner"
    for task in flood:
        task.cancel()
    await asyncio.wait(flood)
    assert not doors._of
    assert not doors._knocking


async def test_a_token_of_somebody_elses_knock_is_refused() -> None:
    doors: Doors[str] = Doors(patience_s=5)
    knocking = asyncio.create_task(doors.knock(token(1), "first"))
    await asyncio.sleep(0)
    with pytest.raises(ResourceLimit):
        await doors.knock(token(1), "second")
    doors.expect(token(1), "owner")
    assert await knocking == "owner"
