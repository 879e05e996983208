"""How much of our time one caller may take. Token buckets, in bounded memory; the time is given."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateSettings:
    """What callers may ask of one node. A key looked up costs 1, a record to be stored 4 (its signature)."""

    per_peer_per_s: float = 200.0  # for one peer id, in the long run
    per_peer_burst: float = 2000.0  # and at once
    per_prefix_factor: float = 8.0  # one public network prefix may take this many peers' worth
    remembered: int = 4096  # callers


class RateLimiter:
    """One token bucket for each caller seen lately; who is not remembered starts with a full one."""

    def __init__(self, per_s: float, burst: float, remembered: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._remembered = remembered
        self._tokens: dict[Hashable, tuple[float, float]] = {}  # (left, at); the longest silent first

    def allow(self, caller: Hashable, cost: float, now_s: float) -> bool:
        """Take `cost` from the caller's bucket if it has as much."""
        left, at_s = self._tokens.pop(caller, (self._burst, now_s))
        left = min(self._burst, left + (now_s - at_s) * self._per_s)
        allowed = left >= cost
        self._tokens[caller] = (left - cost if allowed else left, now_s)
        if len(self._tokens) > self._remembered:
            del self._tokens[next(iter(self._tokens))]
        return allowed
