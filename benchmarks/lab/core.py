"""The lab's network as arithmetic: when each packet comes out where, and which are lost.

Every host hangs on the middle of the network by one link, the same in both directions; a packet crosses its
sender's and its receiver's, so delays add up and the narrower one holds it back. A link is a queue with a
bound, a rate, a delay and loss. Sans I/O: takes packets and times, gives packets and times, and everything
random comes from one seed. Knows no device and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Any

_FIRST_ADDRESS = 10 << 24 | 77 << 16 | 1  # 10.77.0.1
PREFIX_BITS = 16


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host and its link; each figure holds for either direction."""

    name: str
    delay_s: float = 0.0  # one way, host to middle: between two hosts a round trip is twice the sum of theirs
    jitter_s: float = 0.0  # at most so much more, evenly at random; packets keep their order
    rate_bits_s: float = math.inf  # of whole IP packets
    queue_s: float = 0.1  # who would wait longer for the rate is dropped
    loss: float = 0.0  # share of packets

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s, self.queue_s) < 0 or not self.rate_bits_s > 0:
            raise ValueError(f"{self}: times are not negative, and a rate is above 0")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"{self}: loss is a share, 0 to 1")


@dataclass(slots=True)
class Counts:
    """What became of the packets that a host sent, or that were sent to it, on its own link."""

    passed: int = 0
    passed_bytes: int = 0
    lost: int = 0  # by chance
    overflowed: int = 0  # out of a full queue
    cut: int = 0  # while the link was cut


@dataclass(slots=True)
class _Direction:
    """One way over a link."""

    free_at: float = -math.inf  # when the rate lets the next packet begin
    last_at: float = -math.inf  # when the packet before comes out
    counts: Counts = field(default_factory=Counts)

    def cross(self, link: HostSpec, size: int, now: float, random: Random) -> float | None:
        """When a packet of `size` bytes that enters now comes out; None: never."""
        counts = self.counts
        if link.loss and random.random() < link.loss:
            counts.lost += 1
            return None
        begins_at = max(now, self.free_at)
        if begins_at - now > link.queue_s:
            counts.overflowed += 1
            return None
        counts.passed += 1
        counts.passed_bytes += size
        self.free_at = begins_at + size * 8 / link.rate_bits_s
        jitter_s = random.random() * link.jitter_s if link.jitter_s else 0.0
        self.last_at = max(self.last_at, self.free_at + link.delay_s + jitter_s)
        return self.last_at


class Network:
    """Hosts are numbered in the order given; host n has the address 10.77.0.1 + n."""

    def __init__(self, hosts: Iterable[HostSpec], seed: int = 0) -> None:
        self.links = list(hosts)
        self._out = [_Direction() for _ in self.links]
        self._in = [_Direction() for _ in self.links]
        self._cut: set[int] = set()
        self._random = Random(seed)
        # (when, the number of the event, whether the receiver's link is crossed too, sender, receiver,
        # packet)
        self._events: list[tuple[float, int, bool, int, int, bytes]] = []
        self._number = 0

    def change(self, host: int, **changes: Any) -> None:
        """Give the host's link other figures, for packets that enter it from now on."""
        self.links[host] = HostSpec(**(asdict(self.links[host]) | changes))

    def cut(self, host: int) -> None:
        """Nothing passes the host's link any more, nor what is on it now."""
        self._cut.add(host)

    def heal(self, host: int) -> None:
        self._cut.discard(host)

    def counts(self, host: int) -> dict[str, Any]:
        return {"sent": asdict(self._out[host].counts), "received": asdict(self._in[host].counts)}

    def __len__(self) -> int:
        """How many packets are on their way."""
        return len(self._events)

    @property
    def next_at(self) -> float:
        """When `advance` has something to do."""
        return self._events[0][0] if self._events else math.inf

    def send(self, host: int, packet: bytes, now: float) -> None:
        """The host sent an IP packet. Only IPv4 to a host of this network goes anywhere."""
        receiver = int.from_bytes(packet[16:20], "big") - _FIRST_ADDRESS
        if packet[0] >> 4 != 4 or not 0 <= receiver < len(self.links):
            return
        out = self._out[host]
        if host in self._cut:
            out.counts.cut += 1
            return
        at = out.cross(self.links[host], len(packet), now, self._random)
        if at is not None:
            self._push(at, False, host, receiver, packet)

    def advance(self, now: float) -> list[tuple[int, bytes]]:
        """Who gets which packets, up to now, in their order."""
        arrived, events = [], self._events
        while events and events[0][0] <= now:
            at, _, crossed, sender, receiver, packet = heappop(events)
            if self._cut and (receiver in self._cut or sender in self._cut):
                self._in[receiver].counts.cut += 1
            elif crossed:
                arrived.append((receiver, packet))
            else:
                out_at = self._in[receiver].cross(self.links[receiver], len(packet), at, self._random)
                if out_at is not None:
                    self._push(out_at, True, sender, receiver, packet)
        return arrived

    def _push(self, at: float, crossed: bool, sender: int, receiver: int, packet: bytes) -> None:
        self._number += 1
        heappush(self._events, (at, self._number, crossed, sender, receiver, packet))


def address_of(host: int) -> str:
    """The host's IPv4 address."""
    return ".".join(str(byte) for byte in (_FIRST_ADDRESS + host).to_bytes(4, "big"))
