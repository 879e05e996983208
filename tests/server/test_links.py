"""What a server believes of its links: bytes that came, and not those that should have."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.messages import Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.server.links import METHOD, Links
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
