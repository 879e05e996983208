"""Looks at the DHT on behalf of whoever opens sessions: few, whatever is asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from petalite.errors import Unreachable
from petalite.net.identity import PeerId
from petalite.server.resolving import SPACING_S, Resolver
from petalite.sim import loop
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import ServerRecord

RECORD = ServerRecord(0, 2, ("/ip4/127.0.0.1/tcp/9",), "float32", "none", 1.0, 1, "0")


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


class Directory:
    """Tells of servers that were announced before a look began."""

    model_id = "toy@0"

    def __init__(self) -> None:
        self.servers: list[ServerEntry] = []
        self.announced: list[int] = []
        self.looks_s: list[float] = []

    async def refresh(self, *, timeout_s: float) -> None:
        self.looks_s.append(asyncio.get_running_loop().time())
        found = [ServerEntry(peer(number), RECORD) for number in self.announced]
        await asyncio.sleep(0.3)
        self.servers = found


class Book(dict[PeerId, Any]):
    def add(self, who: PeerId, addresses: Any) -> None:
        self[who] = addresses


class Host:
    def __init__(self) -> None:
        self.book = Book()


def resolver() -> tuple[Any, Directory, Host]:
    host, directory = Host(), Directory()
    place: Any = Resolver(host, directory)  # type: ignore[arg-type]
    return place, directory, host


def test_who_is_known_costs_no_look() -> None:
    async def main() -> None:
        resolve, directory, host = resolver()
        directory.announced = [1, 2]
        await resolve(peer(1))
        await resolve(peer(2))
        assert len(directory.looks_s) == 1 and host.book.keys() == {peer(1), peer(2)}

    loop.run(main())


def test_a_hundred_strangers_share_a_look_and_looks_are_spaced() -> None:
    async def main() -> None:
        resolve, directory, _host = resolver()
        directory.announced = [3]
        asked = [resolve(peer(number)) for number in range(100)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [Unreachable] * 3 + [type(None)] + [Unreachable] * 96
        assert len(directory.looks_s) == 1
        for _ in range(3):
            with pytest.raises(Unreachable, match="announces no blocks"):
                await resolve(peer(200))
        first, *others = directory.looks_s
        assert others == pytest.approx([first + SPACING_S * i for i in (1, 2, 3)])

    loop.run(main())


def test_who_asks_during_a_look_gets_one_that_began_later() -> None:
    """It may have been announced since."""

    async def main() -> None:
        resolve, directory, _ = resolver()
        asking = asyncio.create_task(resolve(peer(1)))
        await asyncio.sleep(0.1)
        directory.announced = [2]
        await resolve(peer(2))
        with pytest.raises(Unreachable):
            await asking
        assert len(directory.looks_s) == 2

    loop.run(main())
