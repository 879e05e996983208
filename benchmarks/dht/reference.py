"""The PyPI package `kademlia` under the same churn: its own code, on virtual UDP with the same latency.

Its nodes have no owners, signatures or lives: the last to set a key wins. So every owner sets its own key
again as often as a petalite server announces, and a read is good when it brings what the living owner set.
Its records are kept by whoever was near when they were set; its calls wait five seconds for the dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from itertools import count
from math import log
from random import Random
from typing import Any

from benchmarks.dht.simulated import LATENCY_S, MEDIAN_SESSION_S, TTL_S, Reads, every_second, few_collections
from petalite.sim.loop import VirtualTimeLoop

N_NODES = 300


class DatagramLoop(VirtualTimeLoop):
    """Virtual time, and datagrams that arrive after the latency wherever somebody listens."""

    def __init__(self) -> None:
        super().__init__()
        self.listening: dict[tuple[str, int], asyncio.DatagramProtocol] = {}

    async def create_datagram_endpoint(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.DatagramProtocol], local_addr: tuple[str, int], **_: Any
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        protocol = protocol_factory()
        transport = _Datagrams(self, local_addr)
        self.listening[local_addr] = protocol
        protocol.connection_made(transport)
        return transport, protocol

    def deliver(self, data: bytes, source: tuple[str, int], target: tuple[str, int]) -> None:
        protocol = self.listening.get(target)
        if protocol is not None:
            protocol.datagram_received(data, source)


class _Datagrams(asyncio.DatagramTransport):
    def __init__(self, loop: DatagramLoop, address: tuple[str, int]) -> None:
        super().__init__()
        self._loop, self._address = loop, address

    def sendto(self, data: bytes, addr: tuple[str, int] | None = None) -> None:  # type: ignore[override]
        assert addr is not None
        if self._address in self._loop.listening:
            self._loop.call_later(LATENCY_S, self._loop.deliver, data, self._address, tuple(addr))

    def close(self) -> None:
        self._loop.listening.pop(self._address, None)


@dataclass(eq=False)
class Peer:
    server: Any  # kademlia.network.Server
    address: tuple[str, int]
    refreshing: asyncio.Task[None] | None = None

    @property
    def key(self) -> str:
        return f"{self.address}"


def churn(minutes: int = 20, owners_share: float = 0.2) -> dict[str, Any]:
    """As `simulated.churn`; empty where the package is not installed."""
    if find_spec("kademlia") is None:
        return {"installed": False}
    logging.getLogger("rpcudp").setLevel(logging.CRITICAL)
    logging.getLogger("kademlia").setLevel(logging.CRITICAL)
    with few_collections(), asyncio.Runner(loop_factory=DatagramLoop) as runner:
        return runner.run(_Churn(Random(1), owners_share).run(minutes))


class _Churn:
    def __init__(self, random: Random, owners_share: float) -> None:
        self.random = random
        self.peers: dict[Peer, None] = {}
        self.owners: dict[Peer, None] = {}
        self._owners_share = owners_share
        self._numbers = count(1)

    async def run(self, minutes: int) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)  # its timeouts trip over calls that were cancelled
        for _ in range(N_NODES):
            await self.join()
        churning = asyncio.create_task(self.replace_for_ever())
        reads = Reads()

        async def read() -> None:
            reader, owner = self.random.choice(list(self.peers)), self.random.choice(list(self.owners))
            before_s = loop.time()
            value = await reader.server.get(owner.key)
            if reader in self.peers and owner in self.owners:
                reads.note(value == owner.key, loop.time() - before_s)

        await every_second(read, MEDIAN_SESSION_S, minutes * 60)
        churning.cancel()
        for peer in list(self.peers):
            self.kill(peer)
        await asyncio.wait([churning])
        return {"installed": True, "nodes": N_NODES, **reads.results}

    async def join(self) -> Peer:
        from kademlia.network import Server

        number = next(self._numbers)
        peer = Peer(Server(), (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1))
        await peer.server.listen(peer.address[1], peer.address[0])
        if self.peers:
            await peer.server.bootstrap([self.random.choice(list(self.peers)).address])
        self.peers[peer] = None
        if self.random.random() < self._owners_share:
            peer.refreshing = asyncio.create_task(self.keep_set(peer))
        return peer

    async def keep_set(self, peer: Peer) -> None:
        while True:
            await peer.server.set(peer.key, peer.key)
            self.owners[peer] = None
            await asyncio.sleep(TTL_S / 3)

    async def replace_for_ever(self) -> None:
        loop, rate = asyncio.get_running_loop(), log(2) / MEDIAN_SESSION_S
        ends = [(loop.time() + self.random.expovariate(rate), n, peer) for n, peer in enumerate(self.peers)]
        heapify(ends)
        async with asyncio.TaskGroup() as joins:
            for number in count(len(ends)):
                end_s, _, peer = heappop(ends)
                await asyncio.sleep(end_s - loop.time())
                self.kill(peer)
                session_s = self.random.expovariate(rate)
                joins.create_task(self._newcomer(ends, loop.time() + session_s, number))

    async def _newcomer(self, ends: list[tuple[float, int, Peer]], end_s: float, number: int) -> None:
        heappush(ends, (end_s, number, await self.join()))

    def kill(self, peer: Peer) -> None:
        peer.server.stop()
        if peer.refreshing is not None:
            peer.refreshing.cancel()
        self.peers.pop(peer, None)
        self.owners.pop(peer, None)
