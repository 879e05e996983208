"""Real sockets on loopback: several nodes in one process,
then eight processes, of which the bootstrap is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.errors import InvalidArgument, UnknownMethod, Unreachable
from petalite.net import Host, Identity, Multiaddr

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
RULES = {"servers": lambda owner, name, value: None}


@asynccontextmanager
async def real_node(listen: str = "/ip4/127.0.0.1/tcp/0", *, client_mode: bool = False) -> AsyncIterator[Any]:
    """A started node, and where it can be joined through."""
    identity = Identity.generate()
    async with Host(identity) as host:
        addresses = [] if client_mode else await host.listen([Multiaddr.parse(listen)])
        async with DhtNode(identity, HostNetwork(host), rules=RULES, client_mode=client_mode) as node:
            yield node, addresses


async def test_nodes_on_real_sockets_find_each_others_records():
    async with AsyncExitStack() as stack:
        first, addresses = await stack.enter_async_context(real_node())
        await first.join([])
        nodes = [first]
        for _ in range(7):
            node, _ = await stack.enter_async_context(real_node())
            await node.join(addresses)
            nodes.append(node)
        client, _ = await stack.enter_async_context(real_node(client_mode=True))
        await client.join(addresses)
        announcement = await nodes[2].announce("servers", "model/0", b"two", 60)
        assert announcement.n_holders == 7
        await nodes[5].announce("servers", "model/0", b"five", 60)
        for reader in (*nodes, client):
            found = await reader.find([("servers", "model/0")], timeout_s=5)
            assert sorted(record.value for record in found["servers", "model/0"]) == [b"five", b"two"]
        await nodes[2].close()
        found = await client.find([("servers", "model/0")], timeout_s=5)
        assert [record.value for record in found["servers", "model/0"]] == [b"five"]


async def test_a_node_that_listens_on_every_interface_is_reached_where_it_is_seen():
    async with AsyncExitStack() as stack:
        first, _ = await stack.enter_async_context(real_node("/ip4/0.0.0.0/tcp/0"))
        (everywhere,) = [a for a in first._network._host.addresses if a.host == "0.0.0.0"]
        address = Multiaddr("ip4", "127.0.0.1", everywhere.port, everywhere.peer_id)
        second, _ = await stack.enter_async_context(real_node("/ip4/0.0.0.0/tcp/0"))
        await second.join([address])
        third, _ = await stack.enter_async_context(real_node())
        await third.join([address])
        known = {contact.peer_id: contact for contact in third.known_peers()}
        host = second._network._host
        assert known[host.peer_id].addresses[0] == f"/ip4/127.0.0.1/tcp/{host.addresses[0].port}"


async def test_a_client_serves_nothing():
    async with real_node() as (server, addresses), real_node(client_mode=True) as (client, _):
        await client.join(addresses)
        network = server._network
        with pytest.raises(UnknownMethod):
            await network.call(Contact(client._network.peer_id, ()), "dht.ping", {}, timeout_s=2)
        assert server.known_peers() == []


async def test_bootstrap_addresses_without_a_peer_or_with_nobody_there():
    async with real_node() as (node, _):
        with pytest.raises(InvalidArgument, match="/p2p/"):
            await HostNetwork(node._network._host).dial(Multiaddr.parse("/ip4/127.0.0.1/tcp/1"), timeout_s=1)
        nobody = Multiaddr("ip4", "127.0.0.1", 1, Identity.generate().peer_id)
        with pytest.raises(Unreachable, match=r"/ip4/127\.0\.0\.1/tcp/1"):
            await node.join([nobody])


class Child:
    """A peer in another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ""

    @classmethod
    async def start(cls, *arguments: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.dht.child",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        child = cls(process)
        child.address = (await child.hear())["address"]
        return child

    async def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            answer: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return answer

    async def order(self, do: str, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        return await self.hear()

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


async def test_eight_processes_outlive_their_bootstrap():
    children: list[Child] = []
    try:
        bootstrap = await Child.start()
        children.append(bootstrap)
        children += await asyncio.gather(*(Child.start() for _ in range(5)))
        servers = children[1:]
        for server in servers:
            assert await server.order("join", addresses=[bootstrap.address]) != {}
        await servers[0].order("announce", name="model/0", value="old server")

        await bootstrap.kill()

        newcomer = await Child.start()
        children.append(newcomer)
        gone = await newcomer.order("join", addresses=[bootstrap.address])
        assert gone["error"] == "Unreachable"
        assert bootstrap.address in gone["text"]
        await newcomer.order("join", addresses=[bootstrap.address, servers[3].address])
        announced = await newcomer.order("announce", name="model/0", value="new server")
        assert announced["holders"] >= 5

        client = await Child.start("--client")
        children.append(client)
        await client.order("join", addresses=[servers[4].address])
        found = await client.order("find", name="model/0")
        assert found == {"values": ["new server", "old server"]}
        assert len(children) == 8
    finally:
        await asyncio.gather(*(child.kill() for child in children))
