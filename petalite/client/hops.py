"""What a session needs of the outside: servers to choose from, and an open session at each.

Two kinds stand behind it: servers of a swarm, reached through RPC (`client.servers`), and the blocks of
this very process (`petalite.embedded`). A session does not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from petalite.client.adapters import AdapterSource
from petalite.client.settings import TrainingSettings
from petalite.errors import PetaliteError
from petalite.net.identity import PeerId
from petalite.swarm.codecs import Codec
from petalite.swarm.messages import FromClient, Progress, StepDone, Successor
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from petalite.swarm.training import SpanTraining


@dataclass(frozen=True, slots=True)
class Answer:
    """A hop's answer to a step: the outputs asked for, in the codec that `done` names."""

    done: StepDone
    data: memoryview


@dataclass(frozen=True, slots=True)
class Opening:
    """What a session asks of one hop."""

    rows: int
    max_length: int
    token: bytes | None  # of whoever may push to it; None: the client alone
    successor: Successor | None  # whom it pushes to; None: it answers the client
    wait_s: float = 0.0  # in line, where there is no room now
    codec: str | None = None  # of its answers and pushes; None: one that loses nothing
    adapter: AdapterSource | None = None  # a LoRA for every step


@dataclass(frozen=True, slots=True)
class Wanted:
    """What servers are to be able to do with their blocks."""

    training_tokens: int = 0  # in one training call
    adapter: bytes | None = None  # the digest of a LoRA that they hold by themselves

    @property
    def condition(self) -> str:
        """For people, after "no server holds …"."""
        training = f"take training calls of {self.training_tokens} tokens" if self.training_tokens else ""
        adapter = f"hold the adapter {self.adapter.hex()[:12]}" if self.adapter else ""
        named = " and ".join(filter(None, (training, adapter)))
        return f" (of those that {named})" if named else ""


NOTHING_MORE = Wanted()


class Listener(Protocol):
    """Who hears of what happens at an open hop, on the event loop."""

    def answered(self, answer: Answer) -> None: ...

    def link_down(self, epoch: int, reason: str) -> None:
        """The hop cannot push to its successor."""
        ...

    def lost(self, error: PetaliteError) -> None:
        """The session there is over; said once, and nothing after it."""
        ...


class OpenHop(Protocol):
    """A session that one hop has reserved room for."""

    @property
    def codec(self) -> Codec:
        """What it answers in and is best sent."""
        ...

    async def send(self, message: FromClient, data: memoryview | None = None) -> None:
        """Steps leave in the order of the calls. Raises NetworkError or RemoteError."""
        ...

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of messages that have not left yet, and of one that has not come whole: while they change,
        something moves.
        """
        ...

    async def probe(self) -> Progress:
        """Ask how far it is."""
        ...

    def close(self) -> None:
        """Let the hop free everything; waits for nothing, so it also serves while being cancelled."""
        ...


class Servers(Protocol):
    """Where a session gets its hops from, and whom it tells how they fared."""

    @property
    def pushing(self) -> bool:
        """Whether hops push to each other (the ring), or every edge passes the client (the star)."""
        ...

    @property
    def model_id(self) -> str: ...

    async def plan(
        self,
        span: Span,
        *,
        fresh: bool,
        timeout_s: float,
        replayed_tokens: int = 0,
        wanted: Wanted = NOTHING_MORE,
    ) -> list[Hop]:
        """A chain over `span`, to begin with a replay of so many tokens; drawn by speed where training is
        wanted. Raises MissingBlocks if none exists until the time is up.
        """
        ...

    async def is_much_better_than(self, chain: Sequence[Hop], history_tokens: int) -> bool:
        """Whether to change to another chain, at the price of a replay of so many tokens."""
        ...

    async def bring(self, hop: Hop, adapter: AdapterSource) -> None:
        """Send the hop what it lacks of a LoRA, however long that takes as long as it goes on."""
        ...

    async def open(self, hop: Hop, opening: Opening, listener: Listener) -> OpenHop: ...

    def training(self, peer: PeerId, settings: TrainingSettings) -> SpanTraining:
        """The training calls of one server."""
        ...

    def failed(self, peer: PeerId, error: Exception) -> None: ...

    def succeeded(self, peer: PeerId) -> None: ...
