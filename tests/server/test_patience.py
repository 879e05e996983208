"""One timer for many limits: it acts when something lasts, and on nothing that has ended in time."""

from __future__ import annotations

import asyncio

from petalite.server.patience import Patience
from petalite.sim import loop


def test_what_lasts_is_acted_against_once_and_when_it_is_due() -> None:
    async def main() -> None:
        clock, acted = asyncio.get_running_loop().time, list[tuple[str, float]]()
        patience, began_s = Patience(10.0), clock()

        def act(what: str) -> None:
            acted.append((what, clock() - began_s))

        for what, seconds in (("quick", 4.0), ("slow", 25.0), ("again", 9.0), ("last", 11.0)):
            with patience.until(act, what):
                await asyncio.sleep(seconds)
        assert acted == [("slow", 14.0), ("last", 48.0)]
        with patience.until(act, "closed"):
            patience.close()
            await asyncio.sleep(60)
        assert len(acted) == 2

    loop.run(main())
