"""A peer of a swarm: a host that others reach and a DHT node on it, opened and closed together. Loads no
torch.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from petalite.dht.lan import LanDiscovery
from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode, DhtSettings
from petalite.errors import InvalidArgument, Unreachable
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.swarm.records import NAMESPACES

logger = logging.getLogger(__name__)

_LAN_S = 5.0  # to hear from somebody on the local network
_LOOPBACK = {"ip4": "127.0.0.1", "ip6": "::1"}


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """How to take part. A peer that listens nowhere is a client: it reads the DHT and holds nothing of it."""

    listen: tuple[Multiaddr, ...] = ()
    bootstrap: tuple[Multiaddr, ...] = ()  # peers to join through; none: the first node of a new swarm
    swarm_key: bytes | None = None  # 32 bytes, of a private swarm
    lan: bool = False  # also look for peers on the local network, and be found there
    peers_file: Path | None = None  # where known peers are saved, to join through after a restart


class SwarmPeer:
    """An async context manager; entering listens and joins, or raises Unreachable naming every address.

    A peer that listens needs nobody's answer where it was given no address to join through: those it saved
    earlier, and those on the local network, may be gone or still to come.
    """

    def __init__(self, identity: Identity, settings: PeerSettings) -> None:
        self.identity = identity
        self.settings = settings
        self.host = Host(identity, swarm_key=settings.swarm_key)
        self._network = HostNetwork(self.host)
        self.dht = DhtNode(
            identity,
            self._network,
            rules=NAMESPACES,
            settings=DhtSettings(peers_file=settings.peers_file),
            client_mode=not settings.listen,
        )
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> SwarmPeer:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.host)
            await self.host.listen(self.settings.listen)
            await stack.enter_async_context(self.dht)
            lan = await stack.enter_async_context(LanDiscovery(self.dht)) if self.settings.lan else None
            await self._join(lan)
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

    async def _join(self, lan: LanDiscovery | None) -> None:
        failure: Unreachable | None = None
        try:
            await self.dht.join(self.settings.bootstrap)
        except Unreachable as error:
            failure = error
        if lan is not None and not len(self.dht.table):
            try:
                async with asyncio.timeout(_LAN_S):
                    await lan.met.wait()
                failure = None
            except TimeoutError:
                failure = failure or Unreachable(f"nobody on the local network answered within {_LAN_S:g} s")
        if failure is not None:
            if self.settings.bootstrap or self.dht.client_mode:
                raise failure
            logger.warning("alone until somebody comes: %s", failure)

    @property
    def addresses(self) -> list[Multiaddr]:
        """Where others can dial us, with our peer id. For one that listens on every interface: the address
        that the machine has towards the Internet, or loopback where it has none."""
        known = [Multiaddr.parse(text).with_peer(self.identity.peer_id) for text in self._network.addresses]
        concrete = [address for address in known if address.ip is None or not address.ip.is_unspecified]
        return concrete or [replace(address, host=_LOOPBACK[address.protocol]) for address in known]


def load_swarm_key(path: Path) -> bytes:
    """The key of a private swarm: a file of 32 bytes, or of their 64 hexadecimal digits."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"cannot read the swarm key {path}: {error.strerror or error}") from error
    if len(data) == 32:
        return data
    try:
        key = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise InvalidArgument(
            f"{path} is no swarm key: expected 32 bytes or 64 hexadecimal digits, found {len(data)} bytes; "
            f"make one with: head -c 32 /dev/urandom > {path}"
        )
    return key
