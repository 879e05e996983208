"""How much a host takes on and from whom: memory, places for connections, rates, and bans that fade.

Arithmetic over counts and times that are given: knows no socket and reads no clock. Whoever asks here acts on
the answer at once; nothing waits in a line that a stranger could fill.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import TypeVar

from petalite.errors import ErrorCode
from petalite.net.multiaddr import Multiaddr

T = TypeVar("T")

HALF_LIFE_S = 600.0  # in which blame fades to its half
BAN_SCORE = 50.0
VIOLATION = 100.0  # a peer's bytes broke the protocol: one half-life of ban
BAD_HANDSHAKE = 10.0  # of an address; several in a row are a ban
SLOW_HANDSHAKE = 2.0
_REMEMBERED = 4096  # keys in each table; the one longest untouched is forgotten first


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a host takes on. A prefix is an IPv4 address or an IPv6 /56; loopback has no limits."""

    handshakes: int = 256  # under way with peers that dialled us
    handshakes_per_prefix: int = 32
    handshake_s: float = 5.0  # for one, either side
    connections: int = 4096  # that peers dialled
    connections_per_prefix: int = 64
    new_per_prefix_s: float = 5.0  # handshakes begun per second, after a burst of ten times as many
    memory_bytes: int = 0  # for messages under way and data unread; 0: a quarter of the machine's
    peer_memory_bytes: int = 1 << 30  # of that, for one peer


def prefix_of(address: Multiaddr) -> Hashable:
    """What stands for one customer of a provider; None for loopback, which is us."""
    ip = address.ip
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    assert ip is not None
    if ip.is_loopback:
        return None
    return int(ip) >> 72 if isinstance(ip, IPv6Address) else ip


class TokenBucket:
    """A rate with a burst."""

    __slots__ = ("_burst", "_rate", "_tokens", "_updated_at")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate  # per second
        self._tokens = self._burst = burst
        self._updated_at = now

    def take(self, now: float) -> bool:
        """Whether one more is within the rate."""
        self._tokens = min(self._burst, self._tokens + (now - self._updated_at) * self._rate)
        self._updated_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Budget:
    """Bytes that may be set aside; a part of its parent's."""

    __slots__ = ("_limit", "_parent", "used")

    def __init__(self, limit: int = sys.maxsize, parent: Budget | None = None) -> None:
        self._limit, self._parent = limit, parent
        self.used = 0

    def reserve(self, size: int) -> bool:
        """Set bytes aside, all or none; `release` gives them back."""
        if self.used + size > self._limit or (self._parent is not None and not self._parent.reserve(size)):
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        assert size <= self.used
        self.used -= size
        if self._parent is not None:
            self._parent.release(size)

    def close(self) -> None:
        """Release all, and set nothing aside any more."""
        self.release(self.used)
        self._limit = 0


class Reputation:
    """Blame per peer or prefix, which fades; who has too much of it is banned until enough has faded."""

    def __init__(self) -> None:
        self._scores: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def score(self, key: Hashable, now: float) -> float:
        score, at = self._scores.get(key, (0.0, now))
        return score * math.exp2((at - now) / HALF_LIFE_S)

    def blame(self, key: Hashable, points: float, now: float) -> None:
        """Loopback, whose key is None, is never blamed: it is shared by everybody on this machine."""
        if key is not None:
            _remember(self._scores, key, (self.score(key, now) + points, now))

    def ban_s(self, key: Hashable, now: float) -> float:
        """How long the ban still lasts; 0 where there is none."""
        score = self.score(key, now)
        return HALF_LIFE_S * math.log2(score / BAN_SCORE) if score > BAN_SCORE else 0.0


def _remember(table: OrderedDict[Hashable, T], key: Hashable, value: T) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > _REMEMBERED:
        table.popitem(last=False)


class Gate:
    """Who may come in: counts what peers that dialled us have under way."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.reputation = Reputation()
        self.memory = Budget(limits.memory_bytes or _quarter_of_memory())
        self._handshakes: OrderedDict[object, Hashable] = OrderedDict()  # token: prefix, the oldest first
        self._connections: Counter[Hashable] = Counter()
        self._rates: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def knock(self, prefix: Hashable, now: float) -> ErrorCode:
        """Whether a new connection may begin its handshake: OK, or why not."""
        if self.reputation.ban_s(prefix, now):
            return ErrorCode.BANNED
        if prefix is None:
            return ErrorCode.OK
        if list(self._handshakes.values()).count(prefix) >= self.limits.handshakes_per_prefix:
            return ErrorCode.RESOURCE_LIMIT
        rate = self.limits.new_per_prefix_s
        bucket = self._rates.get(prefix) or TokenBucket(rate, 10 * rate, now)
        _remember(self._rates, prefix, bucket)
        return ErrorCode.OK if bucket.take(now) else ErrorCode.RATE_LIMITED

    def begin_handshake(self, token: object, prefix: Hashable) -> object | None:
        """Count one in. When there are too many: the one to end for it, the oldest of whoever has most."""
        evicted = None
        if len(self._handshakes) >= self.limits.handshakes:
            most = Counter(self._handshakes.values()).most_common(1)[0][0]
            evicted = next(token for token, of in self._handshakes.items() if of == most)
            del self._handshakes[evicted]
        self._handshakes[token] = prefix
        return evicted

    def end_handshake(self, token: object) -> None:
        self._handshakes.pop(token, None)

    def enter(self, prefix: Hashable) -> bool:
        """Whether one more connection may stay; it is then counted until `leave`."""
        most = math.inf if prefix is None else self.limits.connections_per_prefix
        if self._connections.total() >= self.limits.connections or self._connections[prefix] >= most:
            return False
        self._connections[prefix] += 1
        return True

    def leave(self, prefix: Hashable) -> None:
        self._connections[prefix] -= 1
        self._connections += Counter()  # forgets zeros


def _quarter_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):  # not on every system
        return 1 << 30
