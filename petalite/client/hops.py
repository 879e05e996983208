"""What a session needs of the outside: servers to choose from, and an open session at each.

Two kinds stand behind it: servers of a swarm, reached through RPC (`client.servers`), and the blocks of
this very process (`petalite.embedded`). A session does not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from petalite.client.kept import Row
from petalite.net.identity import PeerId
from petalite.swarm.codecs import Codec
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span


@dataclass(frozen=True, slots=True)
class Reply:
    """A hop's answer to a step: the outputs asked for, in its codec, and its own account of the time."""

    data: memoryview
    queue_s: float
    compute_s: float


class OpenHop(Protocol):
    """A session that one hop has reserved room for."""

    @property
    def codec(self) -> Codec: ...

    async def step(self, rows: Sequence[Row], data: memoryview, output: str) -> Reply: ...

    def close(self) -> None:
        """Let the hop free everything; waits for nothing, so it also serves while being cancelled."""
        ...


class Servers(Protocol):
    """Where a session gets its hops from, and whom it tells how they fared."""

    async def plan(self, span: Span, *, fresh: bool, timeout_s: float) -> list[Hop]:
        """A chain over `span`. Raises MissingBlocks if none exists until the time is up."""
        ...

    async def open(self, hop: Hop, *, rows: int, max_length: int) -> OpenHop: ...

    def failed(self, peer: PeerId, error: Exception) -> None: ...

    def succeeded(self, peer: PeerId) -> None: ...
