"""What happened in a session, for people and benchmarks: where time went, and what was replaced."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from petalite.net.identity import PeerId
from petalite.swarm.spans import Span

KEPT_STEPS = 4096  # older steps are forgotten


@dataclass(frozen=True, slots=True)
class HopTiming:
    """One step at one hop: seconds as the client saw them, and the hop's own account."""

    peer: PeerId
    span: Span
    total_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """One hop replaced."""

    span: Span
    lost: PeerId
    replacements: tuple[PeerId, ...]
    replayed_tokens: int
    seconds: float  # from noticing the failure until the replacement could take the repeated step
    cause: str


@dataclass(slots=True)
class Trace:
    """Of one session, oldest first."""

    steps: deque[tuple[HopTiming, ...]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    recoveries: list[Recovery] = field(default_factory=list)
