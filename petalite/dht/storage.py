"""What a node holds for others, within bounds that one owner, one network prefix or one key cannot exhaust.

A record's life is counted here, on our own clock, from when it came; storing the same one again does not
prolong it. What was replaced, withdrawn or has expired cannot be put back by replaying it: its sequence is
remembered for as long as `issued_at` would let it in.

Fairness is by group: the network prefix (/16 or /48) the record came from, or the owner itself where prefixes
say nothing (a private network). When a bound that all share is reached, the largest group gives way to a
smaller one, and a newcomer of the largest is refused: so a flood drowns itself, not others.

Knows bytes and times given to it; knows no peer and no signature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from petalite.dht.keys import DhtKey
from petalite.dht.records import CLOCK_TOLERANCE_S, Record

_OVERHEAD_BYTES = 400  # what one held record costs beside its own bytes, in this process


class Outcome(Enum):
    """What became of a record offered to a storage."""

    STORED = 0
    UNCHANGED = 1  # held already; its life goes on as it was
    STALE = 2  # a newer one is held, or was
    NO_ROOM = 3  # the owner's, its prefix's or the key's share is used up
    REFUSED = 4  # its namespace, schema, life or date
    TOO_FAR = 5  # from the key: others are nearer


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """Bounds of one node's storage; each record counts its bytes and 400 more."""

    total_bytes: int = 16 << 20  # all records
    per_group_bytes: int = 2 << 20  # of one network prefix
    per_owner_bytes: int = 256 << 10  # of one owner
    per_owner_records: int = 128  # of one owner: a node near none of an honest owner's keys holds few
    per_key_records: int = 1024  # owners under one key
    per_key_group_records: int = 64  # of one network prefix under one key
    remembered: int = 20_000  # sequences of records no longer held


_Rank = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class Held:
    """One record in storage."""

    data: bytes  # as it came
    record: Record
    group: bytes  # the prefix it came from, or its owner
    expires_s: float  # on the clock of this storage's caller

    @property
    def cost_bytes(self) -> int:
        return len(self.data) + _OVERHEAD_BYTES


@dataclass(slots=True)
class _Share:
    """What one group or owner has of the storage; the longest held record first."""

    held: dict[tuple[DhtKey, bytes], Held] = field(default_factory=dict)
    nbytes: int = 0


class Storage:
    """Records by key and owner."""

    def __init__(self, settings: StorageSettings = StorageSettings()) -> None:
        self.settings = settings
        self.nbytes = 0  # what the records held cost
        self._keys: dict[DhtKey, dict[bytes, Held]] = {}
        self._groups: dict[bytes, _Share] = {}
        self._owners: dict[bytes, _Share] = {}
        self._floors: dict[tuple[DhtKey, bytes], tuple[_Rank, float]] = {}

    def __len__(self) -> int:
        return sum(len(share.held) for share in self._owners.values())

    # -- writing -----------------------------------------------------------------------------------

    def refusal(
        self, data: bytes, record: Record, now_s: float, group: bytes | None = None
    ) -> Outcome | None:
        """Why `put` would not store this record, as far as its owner and its group alone decide: a cheap
        question to ask before checking a signature. None: it may."""
        limits, key, owner_key = self.settings, record.key, record.owner.public_key
        held = self._live(key, owner_key, now_s)
        if held is not None:
            if held.data == data:
                return Outcome.UNCHANGED
            if held.record.rank >= record.rank:
                return Outcome.STALE
        floor = self._floors.get((key, owner_key))
        if floor is not None and now_s < floor[1] and floor[0] >= record.rank:
            return Outcome.STALE
        new = self._held(data, record, now_s, group)
        owner, of_group = self._owners.get(owner_key, _NOTHING), self._groups.get(new.group, _NOTHING)
        freed = held.cost_bytes if held else 0
        freed_in_group = freed if held and held.group == new.group else 0
        if (
            len(owner.held) + (held is None) > limits.per_owner_records
            or owner.nbytes + new.cost_bytes - freed > limits.per_owner_bytes
            or of_group.nbytes + new.cost_bytes - freed_in_group > limits.per_group_bytes
        ):
            return Outcome.NO_ROOM
        return None

    def put(self, data: bytes, record: Record, now_s: float, group: bytes | None = None) -> Outcome:
        """Offer a checked record. `group` is the prefix it came from;
        None where it came from a private network."""
        refusal = self.refusal(data, record, now_s, group)
        if refusal is not None:
            return refusal
        key, owner = record.key, record.owner.public_key
        new, held = self._held(data, record, now_s, group), self._live(key, owner, now_s)
        leaving = [held] if held is not None else []
        if not (self._room_under(key, new, leaving) and self._room_in_all(new, leaving)):
            return Outcome.NO_ROOM
        for gone in leaving:
            self._drop(gone, now_s)
        self._keys.setdefault(key, {})[owner] = new
        for shares, name in ((self._groups, new.group), (self._owners, owner)):
            share = shares.setdefault(name, _Share())
            share.held[key, owner] = new
            share.nbytes += new.cost_bytes
        self.nbytes += new.cost_bytes
        return Outcome.STORED

    def sweep(self, now_s: float) -> None:
        """Drop what has expired. Reading never shows it anyway; this gives back its memory."""
        for key in list(self._keys):
            for held in [held for held in self._keys[key].values() if held.expires_s <= now_s]:
                self._drop(held, now_s)
        for name in [name for name, floor in self._floors.items() if floor[1] <= now_s]:
            del self._floors[name]

    # -- reading -----------------------------------------------------------------------------------

    def get(self, key: DhtKey, now_s: float) -> list[Held]:
        """Every live record under the key, tombstones too."""
        return [held for held in self._keys.get(key, {}).values() if held.expires_s > now_s]

    def standing(self, record: Record, now_s: float) -> Held | None:
        """The live record of the same owner and name."""
        return self._live(record.key, record.owner.public_key, now_s)

    def sample(
        self, keys: Iterable[DhtKey], now_s: float, max_bytes: int, random: Random
    ) -> dict[DhtKey, list[Held]]:
        """Live records of each key, in all at most `max_bytes`: all of them,
        or as many random ones of each as fit in turn."""
        left = {key: self.get(key, now_s) for key in keys}
        if sum(len(item.data) for held in left.values() for item in held) <= max_bytes:
            return left
        for held in left.values():
            random.shuffle(held)
        chosen: dict[DhtKey, list[Held]] = {key: [] for key in left}
        while any(left.values()):
            for key, held in left.items():
                if not held:
                    continue
                max_bytes -= len(held[-1].data)
                if max_bytes < 0:
                    return chosen
                chosen[key].append(held.pop())
        return chosen

    # -- inside ------------------------------------------------------------------------------------

    def _live(self, key: DhtKey, owner: bytes, now_s: float) -> Held | None:
        held = self._keys.get(key, {}).get(owner)
        if held is not None and held.expires_s <= now_s:
            self._drop(held, now_s)
            return None
        return held

    @staticmethod
    def _held(data: bytes, record: Record, now_s: float, group: bytes | None) -> Held:
        return Held(
            data, record, group if group is not None else record.owner.public_key, now_s + record.ttl_s
        )

    def _room_under(self, key: DhtKey, new: Held, leaving: list[Held]) -> bool:
        """Whether there is room once those `leaving` have gone, of whom this adds one if need be."""
        others = [other for other in self._keys.get(key, {}).values() if other not in leaving]
        of_group = sum(other.group == new.group for other in others)
        if of_group >= self.settings.per_key_group_records:
            return False
        if len(others) < self.settings.per_key_records:
            return True
        largest, size = Counter(other.group for other in others).most_common(1)[0]
        if size <= of_group + 1:
            return False
        leaving.append(next(other for other in others if other.group == largest))
        return True

    def _room_in_all(self, new: Held, leaving: list[Held]) -> bool:
        """The same, of whom this adds as many as need be."""
        excess = self.nbytes + new.cost_bytes - self.settings.total_bytes
        excess -= sum(gone.cost_bytes for gone in leaving)
        if excess <= 0:
            return True
        left = {name: share.nbytes for name, share in self._groups.items()}
        for gone in leaving:
            left[gone.group] -= gone.cost_bytes
        while excess > 0:
            largest = max(left, key=left.__getitem__)
            if largest == new.group or left[largest] <= left.get(new.group, 0) + new.cost_bytes:
                return False
            victim = next(held for held in self._groups[largest].held.values() if held not in leaving)
            leaving.append(victim)
            left[largest] -= victim.cost_bytes
            excess -= victim.cost_bytes
        return True

    def _drop(self, held: Held, now_s: float) -> None:
        key, owner = held.record.key, held.record.owner.public_key
        of_key = self._keys[key]
        del of_key[owner]
        if not of_key:
            del self._keys[key]
        for shares, name in ((self._groups, held.group), (self._owners, owner)):
            share = shares[name]
            del share.held[key, owner]
            share.nbytes -= held.cost_bytes
            if not share.held:
                del shares[name]
        self.nbytes -= held.cost_bytes
        # Its issued_at was within the tolerance when it came, so it is let in for at most twice that and its
        # life from now.
        self._floors.pop((key, owner), None)
        self._floors[key, owner] = held.record.rank, now_s + 2 * CLOCK_TOLERANCE_S + held.record.ttl_s
        if len(self._floors) > self.settings.remembered:
            del self._floors[next(iter(self._floors))]


_NOTHING = _Share()
