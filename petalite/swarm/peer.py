"""A peer of a swarm: a host that others reach and a DHT node on it, opened and closed together. Loads no
torch.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from petalite.dht.net_adapter import HostNetwork
from petalite.dht.node import DhtNode
from petalite.errors import InvalidArgument
from petalite.net.host import Host
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.swarm.records import NAMESPACES

_LOOPBACK = {"ip4": "127.0.0.1", "ip6": "::1"}


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """How to take part. A peer that listens nowhere is a client: it reads the DHT and holds nothing of it."""

    listen: tuple[Multiaddr, ...] = ()
    bootstrap: tuple[Multiaddr, ...] = ()  # peers to join through; none: the first node of a new swarm
    swarm_key: bytes | None = None  # 32 bytes, of a private swarm


class SwarmPeer:
    """An async context manager; entering listens and joins, or raises Unreachable naming every address."""

    def __init__(self, identity: Identity, settings: PeerSettings) -> None:
        self.identity = identity
        self.settings = settings
        self.host = Host(identity, swarm_key=settings.swarm_key)
        self._network = HostNetwork(self.host)
        self.dht = DhtNode(identity, self._network, rules=NAMESPACES, client_mode=not settings.listen)
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> SwarmPeer:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.host)
            await self.host.listen(self.settings.listen)
            await stack.enter_async_context(self.dht)
            await self.dht.join(self.settings.bootstrap)
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

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
