"""What happened in a session, for people and benchmarks: where time went, and what was replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from petalite.net.identity import PeerId
from petalite.swarm.messages import HopReport
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

# What is older is forgotten.
KEPT_STEPS = 4096
KEPT_RECOVERIES = 256


@dataclass(frozen=True, slots=True)
class HopTiming:
    """One hop's own account of one step."""

    peer: PeerId
    span: Span
    queue_s: float
    compute_s: float
    nbytes: int = 0  # of hidden states that came to it


@dataclass(slots=True)  # not frozen: that is slower, and there is one for every step
class StepTiming:
    """One step through the chain. What `total_s` has beyond the hops' accounts, links and software took."""

    n_tokens: int
    total_s: float  # as the client saw it
    chain: Sequence[Hop]
    reports: Sequence[HopReport]  # of its hops

    @property
    def hops(self) -> tuple[HopTiming, ...]:
        return tuple(
            HopTiming(hop.peer, hop.span, report.queue_ms / 1e3, report.compute_ms / 1e3, report.nbytes)
            for hop, report in zip(self.chain, self.reports, strict=True)
        )

    @property
    def links_s(self) -> float:
        return self.total_s - sum(hop.queue_s + hop.compute_s for hop in self.hops)


@dataclass(frozen=True, slots=True)
class Recovery:
    """Hops replaced."""

    span: Span
    lost: tuple[PeerId, ...]
    replacements: tuple[PeerId, ...]
    replayed_tokens: int
    seconds: float  # from noticing the failure until the replacement could take the repeated step
    cause: str


@dataclass(slots=True)
class Trace:
    """Of one session, oldest first."""

    steps: deque[StepTiming] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    recoveries: deque[Recovery] = field(default_factory=lambda: deque(maxlen=KEPT_RECOVERIES))
