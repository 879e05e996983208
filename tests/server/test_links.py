"""What a server believes of its links: bytes that came, and not those that should have."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

from petalite.errors import Unreachable
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.messages import Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.server.links import CALL_S, METHOD, MOST_MEASURED, Links
from petalite.sim.loop import run
from petalite.swarm.records import MAX_LINKS
from petalite.swarm.spans import Span

NEXT: Any = SimpleNamespace(serving=True, span=Span(4, 8))


async def test_who_gives_less_back_than_it_should_is_not_measured_by_it() -> None:
    """It would look twice as fast."""
    async with AsyncExitStack() as stack:
        liar, measuring = [await stack.enter_async_context(Host(Identity.generate())) for _ in range(2)]
        (address,) = await liar.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])

        async def nothing(call: Call) -> Message:
            return Message({}, [b""])

        liar.serve(METHOD, nothing)
        links = Links(measuring)
        entry: Any = SimpleNamespace(peer=liar.peer_id, record=NEXT, addresses=[address])
        await links.look(Span(0, 4), [entry])
        assert links.bytes_per_s is None
        assert [(link.peer, link.bytes_per_s) for link in links.to] == [(liar.peer_id, 0.0)]


def test_neighbours_that_let_one_wait_do_so_at_the_same_time() -> None:
    """It cannot announce itself meanwhile. Only those that bytes are exchanged with are asked in turn."""

    async def silence(*_: object, timeout_s: float, **__: object) -> None:
        await asyncio.sleep(timeout_s)
        raise Unreachable("nobody answered")

    async def main() -> float:
        host: Any = SimpleNamespace(
            serve=lambda *_, **__: None,
            book=SimpleNamespace(add=lambda *_: None),
            peer_id=None,
            call=silence,
            connect=silence,
            is_connected=lambda _: False,
            rtt_s=lambda _: None,
        )
        near: Any = [
            SimpleNamespace(peer=Identity.generate().peer_id, record=NEXT, addresses=[])
            for _ in range(MAX_LINKS)
        ]
        await Links(host).look(Span(0, 4), near)
        return asyncio.get_running_loop().time()

    assert run(main()) <= MOST_MEASURED * CALL_S + 1.0
