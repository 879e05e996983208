"""Which peers failed lately: bans that grow with each failure in a row and fade with time.

Knows peers and times; decides nothing about chains. A ban is a penalty in seconds that routing adds, not an
exclusion, so the last holder of a block is still used.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalite.net.identity import PeerId

PENALTY_S = 1000.0  # outweighs any real route, and still orders routes that all hold a banned peer


@dataclass(frozen=True, slots=True)
class BanSettings:
    first_s: float = 15.0  # ban after one failure, seconds; doubles with each further one in a row
    longest_s: float = 600.0  # no ban is longer, seconds


@dataclass(slots=True)
class _Standing:
    failures: int
    until_s: float


class Bans:
    """Failures by peer. Times are the caller's monotonic clock, in seconds."""

    def __init__(self, settings: BanSettings = BanSettings()) -> None:
        self._settings = settings
        self._standings: dict[PeerId, _Standing] = {}

    def failed(self, peer: PeerId, now_s: float) -> float:
        """Count a failure that is the peer's own; returns how long it is banned, in seconds."""
        self._forget_faded(now_s)
        standing = self._standings.setdefault(peer, _Standing(0, now_s))
        ban_s = min(self._settings.first_s * 2.0 ** min(standing.failures, 32), self._settings.longest_s)
        standing.failures += 1
        standing.until_s = now_s + ban_s
        return ban_s

    def succeeded(self, peer: PeerId) -> None:
        self._standings.pop(peer, None)

    def penalty_s(self, peer: PeerId, now_s: float) -> float:
        """What routing adds for this peer: PENALTY_S while banned (more after more failures), else 0."""
        standing = self._standings.get(peer)
        return PENALTY_S * standing.failures if standing is not None and now_s < standing.until_s else 0.0

    def _forget_faded(self, now_s: float) -> None:
        """A peer that behaved for the longest ban after its own ran out starts anew."""
        horizon_s = now_s - self._settings.longest_s
        for peer in [peer for peer, standing in self._standings.items() if standing.until_s < horizon_s]:
            del self._standings[peer]
