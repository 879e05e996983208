"""A swarm of fakes: hops whose arithmetic depends on everything a row was fed, killed on a schedule.

Whole numbers below 2^20 in float32, so results are exact and any lost, doubled or reordered input shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from petalite.client.hops import Reply
from petalite.client.kept import Row
from petalite.errors import ConnectionLost, SessionGap, Unreachable
from petalite.net.identity import PeerId
from petalite.swarm.codecs import CODECS, Codec
from petalite.swarm.messages import LAST, NONE
from petalite.swarm.routing import Candidate, Hop, find_chain
from petalite.swarm.spans import Span

E = 2
MODULUS = 9973.0


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


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


@dataclass
class FakeHop:
    swarm: FakeSwarm
    hop: Hop
    codec: Codec = CODECS["f32"]
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    closed: bool = False

    async def step(self, rows: Sequence[Row], data: memoryview, output: str) -> Reply:
        if self.closed:
            raise ConnectionLost("closed")
        self.swarm.call(self.hop.peer, "before")
        hidden, offset, outputs = self.codec.decode(data, E), 0, []
        for row, position, n_tokens in rows:
            history = self.rows.get(row, torch.zeros(0, E))
            if position > len(history):
                raise SessionGap(f"{position} > {len(history)}")
            fed = torch.cat([history[:position], hidden[offset : offset + n_tokens]])
            self.rows[row] = fed
            offset += n_tokens
            out = reference(self.hop.span, fed)[position:]
            outputs.append(out[-1:] if output == LAST else out)
        self.swarm.call(self.hop.peer, "after")
        wire = bytearray() if output == NONE else self.codec.encode(torch.cat(outputs))
        return Reply(memoryview(wire), 0.0, 0.0)

    def close(self) -> None:
        self.closed = True
        self.swarm.open_hops.discard(id(self))


@dataclass
class FakeSwarm:
    """Servers by number with spans; `dies(call number, peer)` decides at each call whether the peer dies
    there.
    """

    spans: dict[int, Span]
    dies: Callable[[int, PeerId], bool] = lambda number, peer: False
    dead: set[PeerId] = field(default_factory=set)
    open_hops: set[int] = field(default_factory=set)
    failures: list[PeerId] = field(default_factory=list)
    plans: int = 0
    codecs: dict[int, Codec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()

    def call(self, who: PeerId, moment: str) -> None:
        if who not in self.dead and self.dies(next(self._numbers), who):
            self.dead.add(who)
        if who in self.dead:
            raise ConnectionLost(f"{who.short()} died {moment} computing")

    async def plan(self, span: Span, *, fresh: bool, timeout_s: float) -> list[Hop]:
        self.plans += 1
        alive = [
            Candidate(peer(number), held, 0.01)
            for number, held in self.spans.items()
            if not fresh or peer(number) not in self.dead
        ]
        return find_chain(alive, span, lambda a, b: 1.0)

    async def open(self, hop: Hop, *, rows: int, max_length: int) -> FakeHop:
        if hop.peer in self.dead:
            raise Unreachable(f"{hop.peer.short()} is dead")
        self.call(hop.peer, "opening")
        number = int.from_bytes(hop.peer.public_key, "big")
        opened = FakeHop(self, hop, self.codecs.get(number, CODECS["f32"]))
        self.open_hops.add(id(opened))
        return opened

    def failed(self, who: PeerId, error: Exception) -> None:
        self.failures.append(who)

    def succeeded(self, who: PeerId) -> None:
        pass
