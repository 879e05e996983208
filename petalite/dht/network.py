"""What the DHT needs of the world: calls to peers, and the time. Small enough that a simulation offers the
same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from petalite.dht.contacts import Contact
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `peer_id` is proved by the connection,
    `address` is where it comes from (no port it listens on)."""

    peer_id: PeerId
    address: Multiaddr | None


Handler = Callable[[Caller, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class Network(Protocol):
    """Authenticated calls between peers. Whatever fails raises from petalite.errors."""

    @property
    def peer_id(self) -> PeerId:
        """Ours."""

    @property
    def addresses(self) -> Sequence[str]:
        """Where others can dial us, as multiaddr texts without our peer id; may change as we learn."""

    def serve(self, method: str, handler: Handler) -> None:
        """Answer calls to `method` with what `handler` returns;
        what it raises from petalite.errors goes to the caller."""

    async def call(
        self, contact: Contact, method: str, body: Mapping[str, Any], *, timeout_s: float
    ) -> Mapping[str, Any]:
        """One call and its answer, over a connection that stands or is made now."""

    async def dial(self, address: Multiaddr, *, timeout_s: float) -> PeerId:
        """Connect to an address; who answered there."""

    def remote_address(self, peer_id: PeerId) -> Multiaddr | None:
        """Where the peer we are connected to is; None when we are not."""

    def rtt_s(self, peer_id: PeerId) -> float | None:
        """The measured round trip to a connected peer."""


class Clock(Protocol):
    """The time. Monotonic for all that is decided here; the wall clock only to date records."""

    def time_s(self) -> float:
        """Monotonic seconds: the running event loop's."""

    def unix_s(self) -> float:
        """Seconds since 1970, as this machine believes."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The machine's clock."""

    def time_s(self) -> float:
        return asyncio.get_running_loop().time()

    def unix_s(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
