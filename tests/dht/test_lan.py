"""Real multicast DNS on the loopback interface, where there is zeroconf and the system lets us."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

import pytest

from petalite.dht.lan import LanDiscovery
from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.errors import InvalidArgument
from petalite.net import Host, Identity, Multiaddr, PeerId

RULES = {"servers": lambda owner, name, value: None}


async def node_on_lan(
    stack: AsyncExitStack, *, client_mode: bool = False, met: asyncio.Queue[PeerId] | None = None
) -> DhtNode:
    """One more node; it puts whom it has met into the queue."""
    identity = Identity.generate()
    host = await stack.enter_async_context(Host(identity))
    if not client_mode:
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
    node = DhtNode(identity, HostNetwork(host), rules=RULES, client_mode=client_mode)
    await stack.enter_async_context(node)
    meet = node.meet

    async def meet_and_tell(address: Multiaddr) -> None:
        await meet(address)
        if met is not None and address.peer_id is not None:
            met.put_nowait(address.peer_id)

    node.meet = meet_and_tell  # type: ignore[method-assign]
    await stack.enter_async_context(LanDiscovery(node, interfaces=["127.0.0.1"]))
    return node


async def test_nodes_on_one_network_find_each_other_without_any_address():
    pytest.importorskip("zeroconf")
    async with AsyncExitStack() as stack:
        try:
            first = await node_on_lan(stack)
        except OSError as error:
            pytest.skip(f"no multicast here: {error}")
        second = await node_on_lan(stack)
        met: asyncio.Queue[PeerId] = asyncio.Queue()
        client = await node_on_lan(stack, client_mode=True, met=met)
        await first.announce("servers", "m", b"here", 60)
        async with asyncio.timeout(30):
            missing = {first.peer_id, second.peer_id}
            while missing:
                missing.discard(await met.get())
        assert client.peer_id not in {peer.peer_id for peer in (*first.known_peers(), *second.known_peers())}
        found = await client.find([("servers", "m")], timeout_s=5)
        assert [record.value for record in found["servers", "m"]] == [b"here"]


async def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    monkeypatch.setitem(sys.modules, "zeroconf.asyncio", None)
    async with AsyncExitStack() as stack:
        with pytest.raises(InvalidArgument, match=r"pip install 'petalite\[lan\]'"):
            await node_on_lan(stack)
