"""Where a successor listens, that a session names: whoever opens sessions can make a server look, so looks at
the DHT are shared and spaced.
"""

from __future__ import annotations

import asyncio
import math

from petalite.errors import Unreachable
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.swarm.directory import Directory

LOOK_S = 10.0  # at most, for a look
SPACING_S = 1.0  # between two


class Resolver:
    """Over one model's directory."""

    def __init__(self, host: Host, directory: Directory) -> None:
        self._host = host
        self._directory = directory
        self._looking = asyncio.Lock()
        self._began_s = -math.inf  # the latest look

    async def __call__(self, peer: PeerId) -> None:
        """See to it that the host's book knows a server of this model. Raises Unreachable, NetworkError."""
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        if self._knows(peer):
            return
        async with self._looking:
            if self._began_s < asked_s and not self._knows(peer):
                await asyncio.sleep(self._began_s + SPACING_S - loop.time())
                self._began_s = loop.time()
                await self._directory.refresh(timeout_s=LOOK_S)
        if not self._knows(peer):
            raise Unreachable(f"{peer.short()} announces no blocks of {self._directory.model_id}")

    def _knows(self, peer: PeerId) -> bool:
        for entry in self._directory.servers:
            if entry.peer == peer:
                self._host.book.add(peer, entry.addresses)
                return True
        return False
