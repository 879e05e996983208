"""One DHT peer in a process of its own: `python -m tests.dht.child`, driven by lines of JSON.

stdin   {"do": "join", "addresses": [...]}  {"do": "announce", "name", "value"}  {"do": "find", "name"}
stdout  {"address": ...} once it listens, then one answer per line of input
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.errors import PetaliteError
from petalite.net import Host, Identity, Multiaddr


async def main() -> None:
    identity = Identity.generate()
    client_mode = "--client" in sys.argv
    async with Host(identity) as host:
        listening = [] if client_mode else await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        rules = {"servers": lambda owner, name, value: None}
        async with DhtNode(identity, HostNetwork(host), rules=rules, client_mode=client_mode) as node:
            say({"address": str(listening[0]) if listening else None})
            reader = asyncio.StreamReader()
            loop = asyncio.get_running_loop()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            while line := await reader.readline():
                try:
                    say(await obey(node, json.loads(line)))
                except PetaliteError as error:
                    say({"error": type(error).__name__, "text": str(error)})


async def obey(node: DhtNode, order: dict[str, Any]) -> dict[str, Any]:
    match order:
        case {"do": "join", "addresses": addresses}:
            await node.join([Multiaddr.parse(text) for text in addresses])
            return {"peers": len(node.known_peers())}
        case {"do": "announce", "name": name, "value": value}:
            announcement = await node.announce("servers", name, value.encode(), 60)
            return {"holders": announcement.n_holders}
        case {"do": "find", "name": name}:
            found = await node.find([("servers", name)], timeout_s=10)
            return {"values": sorted(record.value.decode() for record in found["servers", name])}
    raise ValueError(order)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
