"""Finding peers on the local network by multicast DNS, without any address to begin with (RFC 6762, RFC
6763).

Off unless asked for (`--lan`): it tells everybody on the network that petalite runs here. What is found is
dialled like any other address and has to prove who it is; in a private swarm, that it has the key. Needs the
packages `zeroconf` and `ifaddr`, which are loaded only here.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self

from petalite.dht.contacts import MAX_ADDRESSES
from petalite.dht.node import DhtNode
from petalite.errors import InvalidAddress, InvalidArgument, PetaliteError, Unreachable
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

_SERVICE = "_petalite._tcp.local."
_MAX_WAITING = 64  # services seen and not looked into yet; more are met through the DHT
_LOOKING_AT_ONCE = 4
_ANSWER_MS = 3000  # to wait for a service to say where it is


class LanDiscovery:
    """An async context manager: inside it, this node is announced on the local network, and joins whom it
    finds there.

    A node in client mode finds and is not announced. `interfaces` are IP addresses; None means all. Entering
    raises Unreachable where there is no multicast.
    """

    def __init__(self, node: DhtNode, *, interfaces: Sequence[str] | None = None) -> None:
        try:
            self._asyncio: Any = importlib.import_module("zeroconf.asyncio")
            self._error: type[Exception] = importlib.import_module("zeroconf").Error
            self._adapters: Any = importlib.import_module("ifaddr").get_adapters
        except ImportError:
            raise InvalidArgument(
                "finding peers on the local network needs the package zeroconf; "
                "run: pip install 'petalite[lan]'"
            ) from None
        self.met = asyncio.Event()  # set once a peer found here was reached
        self._node = node
        self._interfaces = interfaces
        self._found: asyncio.Queue[str] = asyncio.Queue(_MAX_WAITING)
        self._zeroconf: Any = None
        self._work: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        options = {} if self._interfaces is None else {"interfaces": list(self._interfaces)}
        try:
            self._zeroconf = self._asyncio.AsyncZeroconf(**options)
        except OSError as error:
            raise Unreachable(
                f"no multicast on this network ({error.strerror or error}); join with --peers ADDRESS"
            ) from error
        self._work = asyncio.create_task(self._run(), name="lan discovery")
        self._work.add_done_callback(_tell_why)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._work is not None
        self._work.cancel()
        await asyncio.wait([self._work])
        await self._zeroconf.async_close()

    async def _run(self) -> None:
        own = self._own_service()
        if own is not None:
            await self._zeroconf.async_register_service(own, allow_name_change=True)
        browser = self._asyncio.AsyncServiceBrowser(
            self._zeroconf.zeroconf, _SERVICE, handlers=[self._on_change]
        )
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_LOOKING_AT_ONCE):
                    group.create_task(self._look_into_found())
        finally:
            await browser.async_cancel()

    def _own_service(self) -> Any:
        """What is announced: our peer id, and every address of ours that others on the network may reach."""
        listening = [Multiaddr.parse(text) for text in self._node.addresses]
        if not listening:
            return None
        port, name = listening[0].port, str(self._node.peer_id)
        hosts = dict.fromkeys(
            host for address in listening if address.port == port for host in self._hosts(address)
        )
        return self._asyncio.AsyncServiceInfo(
            _SERVICE, f"{name}.{_SERVICE}", parsed_addresses=list(hosts), port=port, properties={"id": name}
        )

    def _hosts(self, address: Multiaddr) -> Iterator[str]:
        """The IP addresses meant: for one that stands for every interface, those of the interfaces."""
        if address.ip is None or not address.ip.is_unspecified:
            yield address.host
            return
        for adapter in self._adapters():
            for own in adapter.ips:
                host = own.ip if own.is_IPv4 else own.ip[0]
                if own.is_IPv4 == (address.protocol == "ip4") and not ip_address(host).is_loopback:
                    yield host

    def _on_change(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        if state_change.name != "Removed" and not self._found.full():
            self._found.put_nowait(name)

    async def _look_into_found(self) -> None:
        while True:
            name = await self._found.get()
            for address in await self._ask_for_addresses(name):
                if await self._met(address):
                    break

    async def _ask_for_addresses(self, name: str) -> list[Multiaddr]:
        try:
            info = self._asyncio.AsyncServiceInfo(_SERVICE, name)
            answered = await info.async_request(self._zeroconf.zeroconf, _ANSWER_MS)
        except (self._error, ValueError) as error:
            logger.info("passing over %r on the local network: %s", name[:80], error)
            return []
        return _addresses(info) if answered else []

    async def _met(self, address: Multiaddr) -> bool:
        if address.peer_id == self._node.peer_id:
            return True
        try:
            await self._node.meet(address)
        except PetaliteError as error:
            logger.info("a peer on the local network does not answer at %s: %s", address, error)
            return False
        self.met.set()
        return True


def _tell_why(work: asyncio.Task[None]) -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        logger.error("peers on the local network are no longer looked for", exc_info=error)


def _addresses(info: Any) -> list[Multiaddr]:
    """Where a service says it is; nothing when it does not say who it is."""
    try:
        peer_id = PeerId.parse((info.properties.get(b"id") or b"").decode())
        hosts = [ip_address(text.partition("%")[0]) for text in info.parsed_addresses()[:MAX_ADDRESSES]]
    except (InvalidAddress, UnicodeDecodeError, ValueError):
        return []
    if not info.port:
        return []
    return [Multiaddr(f"ip{host.version}", str(host), info.port, peer_id) for host in hosts]
