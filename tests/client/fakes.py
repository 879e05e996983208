"""A swarm in memory: the real sessions of client and servers, over blocks of exact arithmetic.

Whole numbers below 2^20 in float32, so results are exact, and any lost, doubled or reordered input shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from petalite.client.servers import SwarmServers
from petalite.client.settings import RING, STAR, Routing
from petalite.errors import NotFinite, SessionGap
from petalite.model.cache import Segment
from petalite.net.identity import PeerId
from petalite.server.backend import Rows, Timing
from petalite.server.sessions import SessionService
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import ServerRecord
from petalite.swarm.spans import Span
from tests.helpers.memory_net import MemoryNet

E = 2
MODULUS = 9973.0
MODEL_ID = "fake@0"


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


CLIENT = peer(0)


def block_forward(block: int, history: torch.Tensor) -> torch.Tensor:
    """history (S, E) of one row -> (S, E): each token's output depends on its whole prefix, in order."""
    weights = torch.arange(1, len(history) + 1, dtype=torch.float64).unsqueeze(1)
    mixed = (history.double() * (weights + block)).cumsum(0) + 31 * block
    return (mixed % MODULUS).float()


def reference(span: Span, history: torch.Tensor) -> torch.Tensor:
    """What any chain over `span` must give for a row fed with `history`."""
    for block in span.blocks:
        history = block_forward(block, history)
    return history


class FakeBackend:
    """Rows are the histories that they were fed. `stuck` computes nothing until it is not; `lies` makes NaN
    of everything; a token takes `token_s`.
    """

    def __init__(self, span: Span, dtype: torch.dtype) -> None:
        config = SimpleNamespace(hidden_size=E)
        self.span: Any = SimpleNamespace(start=span.start, end=span.end, dtype=dtype, config=config)
        self.rows: dict[int, torch.Tensor] = {}
        self.lies = False
        self.token_s = 0.0
        self._goes = asyncio.Event()
        self._goes.set()

    @property
    def stuck(self) -> bool:
        return not self._goes.is_set()

    @stuck.setter
    def stuck(self, stuck: bool) -> None:
        if stuck:
            self._goes.clear()
        else:
            self._goes.set()

    async def open_rows(self, count: int, max_length: int, start: int, end: int, **_: Any) -> Rows:
        numbers = [max(self.rows, default=-1) + 1 + i for i in range(count)]
        self.rows.update({number: torch.zeros(0, E) for number in numbers})
        return Rows(numbers, 0)

    def held_tokens(self, rows: Rows) -> int:
        return sum(len(self.rows[number]) for number in rows.numbers)

    async def fork(self, forks: Sequence[tuple[int, int]]) -> None:
        await asyncio.sleep(0)
        for source, target in forks:
            self.rows[target] = self.rows[source].clone()

    def drop_rows(self, rows: Rows) -> None:
        for number in rows.numbers:
            del self.rows[number]

    async def step(
        self, hidden: torch.Tensor, segments: Sequence[Segment], start: int, end: int, **_: Any
    ) -> tuple[torch.Tensor, Timing]:
        await asyncio.sleep(0)
        await self._goes.wait()
        if not torch.isfinite(hidden).all():
            raise NotFinite("the hidden states that came in have NaN or Inf")
        outputs, offset = [], 0
        for segment in segments:
            history = self.rows[segment.row]
            if segment.position > len(history):
                raise SessionGap(f"{segment.position} > {len(history)}")
            fed = history[: segment.position]
            for tokens in (
                hidden[offset : offset + segment.n_tokens].float().split(1 if self.token_s else 4096)
            ):
                if self.token_s:
                    await asyncio.sleep(self.token_s)
                self.rows[segment.row] = fed = torch.cat([fed, tokens])
            offset += segment.n_tokens
            outputs.append(reference(Span(start, end), fed)[segment.position :])
        output = torch.cat(outputs)
        return (output * float("nan") if self.lies else output), Timing(0.0, 0.0)


class FakeSwarm(SwarmServers):
    """Servers by number with their spans; the client is number 0."""

    model_id = MODEL_ID  # it is its own directory

    def __init__(
        self,
        spans: dict[int, Span],
        *,
        net: MemoryNet | None = None,
        pushing: bool = True,
        dtypes: dict[int, torch.dtype] | None = None,
    ) -> None:
        self.net = net or MemoryNet()
        self.backends: dict[PeerId, FakeBackend] = {}
        self.services: dict[PeerId, SessionService] = {}
        self.failures: list[PeerId] = []
        self.servers: list[ServerEntry] = []
        self.age_s = 0.0
        super().__init__(self.net.host(CLIENT), self, None, Routing(RING if pushing else STAR))  # type: ignore[arg-type]
        for number, span in spans.items():
            self.add(number, span, (dtypes or {}).get(number, torch.float32))

    def add(self, number: int, span: Span, dtype: torch.dtype = torch.float32) -> None:
        """A server more, which the next look at the directory finds."""
        who = peer(number)
        backend = self.backends[who] = FakeBackend(span, dtype)
        host: Any = self.net.host(who)
        fake: Any = backend
        self.services[who] = SessionService(fake, MODEL_ID, host, _resolve)
        record = ServerRecord(span.start, span.end, (), "float32", "none", 10.0, 1000, "0")
        self.servers.append(ServerEntry(who, record))

    def grow(self, number: int, span: Span) -> None:
        """A server holds more blocks than before."""
        config = self.backends[peer(number)].span
        config.start, config.end = span.start, span.end
        self.servers[:] = [entry for entry in self.servers if entry.peer != peer(number)]
        record = ServerRecord(span.start, span.end, (), "float32", "none", 10.0, 1000, "0")
        self.servers.append(ServerEntry(peer(number), record))

    async def refresh(self, *, timeout_s: float) -> None:
        """The dead are not found any more."""
        await asyncio.sleep(self.net.latency_s)
        self.servers[:] = [entry for entry in self.servers if entry.peer not in self.net.dead]

    def failed(self, peer: PeerId, error: Exception) -> None:
        self.failures.append(peer)
        super().failed(peer, error)

    def open_rows(self) -> int:
        """Cache rows held at servers that live."""
        return sum(len(backend.rows) for who, backend in self.backends.items() if who not in self.net.dead)


async def _resolve(peer: PeerId) -> None:
    """Everybody is known here."""
