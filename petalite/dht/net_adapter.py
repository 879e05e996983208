"""The DHT's view of a `Host`: the one place where the two rooms touch."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from petalite.dht.contacts import Contact, parse_address
from petalite.dht.network import Caller, Handler
from petalite.errors import InvalidArgument
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.link import Link
from petalite.net.methods import MethodPolicy
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.net.streams import Priority

# Bodies only, and no more at once than a flood of them may cost.
_POLICY = MethodPolicy(max_message_bytes=0, max_buffers=0, max_concurrent=256, priority=Priority.INTERACTIVE)
# Where a packet to the Internet would go: asking for the route to it sends nothing (RFC 5737, RFC 3849).
_OUTSIDE = {"ip4": (socket.AF_INET, "192.0.2.1"), "ip6": (socket.AF_INET6, "2001:db8::1")}


class HostNetwork:
    """A `petalite.dht.network.Network` over a host; the host stays its owner's to close."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._links: WeakValueDictionary[PeerId, Link] = WeakValueDictionary()

    @property
    def peer_id(self) -> PeerId:
        return self._host.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the host listens. One that listens on every interface is named as it is, which tells each
        peer to take the address it sees us at, and by the address that the machine has towards the
        Internet."""
        texts: dict[str, None] = {}
        for address in self._host.addresses:
            place = replace(address, peer_id=None)
            texts[str(place)] = None
            if place.ip is not None and place.ip.is_unspecified:
                own = _own_host(place.protocol)
                if own is not None:
                    texts[str(replace(place, host=own))] = None
        return tuple(texts)

    def serve(self, method: str, handler: Handler) -> None:
        async def answer(call: Call) -> Mapping[str, Any]:
            return await handler(Caller(call.peer, call.remote_address), call.request.body)

        self._host.serve(method, answer, policy=_POLICY)

    async def call(
        self, contact: Contact, method: str, body: Mapping[str, Any], *, timeout_s: float
    ) -> Mapping[str, Any]:
        if not self._host.is_connected(contact.peer_id):
            known = [parsed[0] for text in contact.addresses if (parsed := parse_address(text)) is not None]
            self._host.book.add(contact.peer_id, known)
        started_s = asyncio.get_running_loop().time()
        link = await self._link(contact.peer_id, timeout_s)
        left_s = max(0.0, timeout_s - (asyncio.get_running_loop().time() - started_s))
        answer = await self._host.call(
            link.peer, method, body, timeout_s=left_s, priority=Priority.INTERACTIVE
        )
        return answer.body

    async def dial(self, address: Multiaddr, *, timeout_s: float) -> PeerId:
        if address.peer_id is None:
            raise InvalidArgument(f"{address} does not say who is there; append /p2p/ and the peer's id")
        await self._link(address, timeout_s)
        return address.peer_id

    def remote_address(self, peer_id: PeerId) -> Multiaddr | None:
        link = self._links.get(peer_id)
        return None if link is None or link.closed else link.remote_address

    def rtt_s(self, peer_id: PeerId) -> float | None:
        return self._host.rtt_s(peer_id)

    async def _link(self, peer: PeerId | Multiaddr, timeout_s: float) -> Link:
        link = await self._host.connect(peer, timeout_s=timeout_s)
        self._links[link.peer] = link
        return link


def _own_host(protocol: str) -> str | None:
    """The address that this machine's packets to the Internet would come from."""
    family, outside = _OUTSIDE[protocol]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((outside, 9))
        except OSError:
            return None  # no route
        host: str = sock.getsockname()[0]
        return host
