"""Credit: how far a peer may send ahead of being read, and how that grows with the link.

A window's limit is an absolute offset (RFC 9000 §4), so it never shrinks and a repeated grant is harmless.
Knows offsets and times; knows neither streams nor frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """How much a peer may send ahead of being read, and how many streams it may have open."""

    stream_bytes: int = 256 * 1024  # per stream, to begin with
    connection_bytes: int = 1024 * 1024  # all streams together, to begin with
    streams: int = 256  # opened by the peer and not over
    max_stream_bytes: int = 16 * 1024 * 1024  # what a stream's window may grow to
    max_connection_bytes: int = 32 * 1024 * 1024  # what the connection's window may grow to
    allowance_bytes: int = 16 * 1024 * 1024  # unread bytes for which the connection still gives credit


class Window:
    """What one receiver grants. `reserve` sets memory aside for growth, and may refuse."""

    __slots__ = ("_granted_at", "_most", "_reserve", "due_at", "limit", "size")

    def __init__(
        self, size: int, most: int, now: float, reserve: Callable[[int], bool] | None = None
    ) -> None:
        self.size = self.limit = size
        self.due_at = size - (size >> 1)  # how much must be read before more is granted: half a window
        self._most = max(size, most)
        self._granted_at = now
        self._reserve = reserve

    def grant(self, read: int, now: float, rtt_s: float) -> int:
        """The new limit, when `read` bytes are read."""
        # Half a window used up within two round trips: the window is what holds the sender back.
        if now - self._granted_at < 2 * rtt_s:
            growth = min(2 * self.size, self._most) - self.size
            if growth and (self._reserve is None or self._reserve(growth)):
                self.size += growth
        self._granted_at = now
        self.limit = read + self.size
        self.due_at = self.limit - (self.size >> 1)
        return self.limit
