"""`python -m benchmarks.dht.others ADDRESS N`: N nodes in a process of their own, joined through ADDRESS."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

from benchmarks.dht.loopback import start
from petalite.net import Multiaddr
from petalite.net.loop import new_event_loop


async def serve(address: str, n: int) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(n):
            await start(stack, [Multiaddr.parse(address)])
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2])))
