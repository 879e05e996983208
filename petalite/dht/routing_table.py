"""Kademlia's routing table: which peers we keep, and who makes room for whom.

Bucket i holds up to k peers that share exactly i leading bits with us, least recently seen first, and as many
candidates waiting to replace them. A peer is added only once it was reached (the caller's promise); a full
bucket keeps its old peers for as long as they answer (Maymounkov and Mazières, "Kademlia", IPTPS 2002, §2.2),
so a flood of new ids displaces nobody. Peers of one network prefix can fill neither a bucket nor the table.

Knows ids, addresses' prefixes and times; knows neither sockets nor records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

from petalite.dht.contacts import Contact, Place, Scope
from petalite.dht.keys import KEY_BITS, DhtKey

# Strangers are called back until so many wait for a place in a full bucket; who is met otherwise waits as
# well.
_WAITING_WANTED = 4


@dataclass(frozen=True, slots=True)
class TableSettings:
    """How many peers a table keeps, and how patient it is with them."""

    k: int = 20  # peers per bucket
    per_prefix_in_bucket: int = 2  # peers of one /16 (IPv4) or /48 (IPv6) in a bucket
    per_prefix_in_table: int = 8  # and in the whole table
    max_failures: int = 3  # calls in a row without an answer until a peer is dropped
    fresh_s: float = 120.0  # a peer heard from within this time need not be asked whether it still lives


@dataclass(slots=True)
class Entry:
    """One kept peer."""

    contact: Contact
    seen_s: float  # when it last answered or called us
    failures: int = 0  # unanswered calls since then


@dataclass(slots=True)
class Bucket:
    """Peers at one distance range; both dicts are ordered, the least recently seen first."""

    entries: dict[DhtKey, Entry] = field(default_factory=dict)
    waiting: dict[DhtKey, Contact] = field(default_factory=dict)
    refreshed_s: float = -inf  # when a lookup last went there


class RoutingTable:
    """The peers we know, by distance. `places` are our own addresses':
    they decide who is exempt from diversity."""

    def __init__(
        self, own_id: DhtKey, settings: TableSettings = TableSettings(), places: Iterable[Place] = ()
    ) -> None:
        self.own_id = own_id
        self.settings = settings
        self.places = tuple(places)
        self._buckets: dict[int, Bucket] = {}
        self._reach: int | None = None  # to our k-th nearest peer, as of when it was last asked for
        self._changed = False  # since then
        self._prefixes: Counter[bytes] = Counter()  # of all entries; only `_enter` and `_leave` touch it

    # -- reading -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets.values())

    def __contains__(self, node_id: DhtKey) -> bool:
        return self.entry(node_id) is not None

    def __iter__(self) -> Iterator[Entry]:
        for index in sorted(self._buckets):
            yield from self._buckets[index].entries.values()

    def entry(self, node_id: DhtKey) -> Entry | None:
        bucket = self._buckets.get(self.own_id.shared_bits(node_id))
        return bucket.entries.get(node_id) if bucket else None

    def nearest(self, target: DhtKey, count: int, *, reliable: bool = False) -> list[Contact]:
        """Up to `count` peers, nearest to `target` first; with `reliable`, those that failed last time only
        after all others.

        Those in the target's own bucket are nearer than all in deeper buckets, which are nearer than those in
        each shallower one; so few need sorting.
        """
        home = self.own_id.shared_bits(target)
        deeper = [index for index in self._buckets if index > home]
        shallower = sorted((index for index in self._buckets if index < home), reverse=True)
        found: list[Contact] = []
        doubtful: list[Contact] = []
        for indices in ([home], deeper, *([index] for index in shallower)):
            group = [e for i in indices if i in self._buckets for e in self._buckets[i].entries.values()]
            group.sort(key=lambda entry: entry.contact.node_id ^ target)
            for entry in group:
                (doubtful if reliable and entry.failures else found).append(entry.contact)
            if len(found) >= count:
                break
        return (found + doubtful)[:count]

    def neighbour_distance(self) -> int | None:
        """Distance to our k-th nearest peer: about that from any key to its k-th nearest.
        None with fewer than k peers."""
        if self._changed:
            near = self.nearest(self.own_id, self.settings.k)
            self._reach = near[-1].node_id ^ self.own_id if len(near) == self.settings.k else None
            self._changed = False
        return self._reach

    # -- peers come and go -------------------------------------------------------------------------

    def wants(self, contact: Contact) -> bool:
        """Whether it is worth reaching this stranger: it is not us,
        not known, and its bucket has room for it."""
        if contact.node_id == self.own_id or contact.node_id in self:
            return False
        bucket = self._buckets.get(self.own_id.shared_bits(contact.node_id))
        if bucket is not None and len(bucket.entries) >= self.settings.k:
            return len(bucket.waiting) < _WAITING_WANTED or self._doubtful(bucket) is not None
        return self._diverse(contact, bucket)

    def add(self, contact: Contact, now_s: float) -> Contact | None:
        """Take in a peer that was just reached. Where its bucket is full it waits; the peer returned is then
        to be pinged: `seen` or `failed` with the outcome decides who stays."""
        if contact.node_id == self.own_id:
            return None
        bucket = self._buckets.setdefault(self.own_id.shared_bits(contact.node_id), Bucket())
        entry = self._leave(bucket, contact.node_id)
        if entry is not None:
            moved = entry.contact.place != contact.place and not self._diverse(contact, bucket)
            self._enter(bucket, Entry(entry.contact if moved else contact, now_s))
            return None
        if not self._diverse(contact, bucket):
            return None
        if len(bucket.entries) < self.settings.k:
            bucket.waiting.pop(contact.node_id, None)
            self._enter(bucket, Entry(contact, now_s))
            return None
        self._wait(bucket, contact)
        doubtful = self._doubtful(bucket)
        if doubtful is not None:
            self._replace(bucket, doubtful, now_s)
            return None
        oldest = next(iter(bucket.entries.values()))
        return oldest.contact if now_s - oldest.seen_s > self.settings.fresh_s else None

    def seen(self, node_id: DhtKey, now_s: float) -> None:
        """The peer answered or called: it moves to the fresh end of its bucket."""
        bucket = self._buckets.get(self.own_id.shared_bits(node_id))
        entry = bucket.entries.pop(node_id, None) if bucket else None
        if bucket is not None and entry is not None:
            entry.seen_s, entry.failures = now_s, 0
            bucket.entries[node_id] = entry

    def failed(self, node_id: DhtKey, now_s: float) -> None:
        """The peer did not answer. It gives way at once to one that waits, else after `max_failures`."""
        bucket = self._buckets.get(self.own_id.shared_bits(node_id))
        if bucket is None:
            return
        bucket.waiting.pop(node_id, None)
        entry = bucket.entries.get(node_id)
        if entry is None:
            return
        entry.failures += 1
        if bucket.waiting:
            self._replace(bucket, entry, now_s)
        elif entry.failures >= self.settings.max_failures:
            self._leave(bucket, node_id)

    def remove(self, node_id: DhtKey) -> None:
        """Forget a peer that lied."""
        bucket = self._buckets.get(self.own_id.shared_bits(node_id))
        if bucket is not None:
            self._leave(bucket, node_id)
            bucket.waiting.pop(node_id, None)

    # -- upkeep ------------------------------------------------------------------------------------

    def refreshed(self, target: DhtKey, now_s: float) -> None:
        """A lookup for `target` was made."""
        self._buckets.setdefault(self.own_id.shared_bits(target), Bucket()).refreshed_s = now_s

    def stale_buckets(self, now_s: float, older_than_s: float) -> list[int]:
        """Buckets in which no lookup was made for so long, as numbers of shared bits; down to our nearest
        peer's only, as those beneath are empty for want of peers."""
        depth = max((i for i, bucket in self._buckets.items() if bucket.entries), default=-1)
        never = Bucket()
        indices = range(min(depth + 1, KEY_BITS))
        return [i for i in indices if now_s - self._buckets.get(i, never).refreshed_s >= older_than_s]

    def unseen(self, now_s: float, for_s: float) -> list[Contact]:
        """Peers not heard from for so long, the longest first: they are to be pinged."""
        quiet = [entry for entry in self if now_s - entry.seen_s >= for_s or entry.failures]
        return [entry.contact for entry in sorted(quiet, key=lambda entry: entry.seen_s)]

    # -- inside ------------------------------------------------------------------------------------

    def _wait(self, bucket: Bucket, contact: Contact) -> None:
        bucket.waiting.pop(contact.node_id, None)
        bucket.waiting[contact.node_id] = contact
        if len(bucket.waiting) > self.settings.k:
            del bucket.waiting[next(iter(bucket.waiting))]

    def _doubtful(self, bucket: Bucket) -> Entry | None:
        return next((entry for entry in bucket.entries.values() if entry.failures), None)

    def _replace(self, bucket: Bucket, loser: Entry, now_s: float) -> None:
        # The latest comer is the likeliest to live still. It enters as not heard from, so upkeep asks it
        # before long.
        self._leave(bucket, loser.contact.node_id)
        for node_id in reversed(list(bucket.waiting)):
            contact = bucket.waiting.pop(node_id)
            if self._diverse(contact, bucket):
                self._enter(bucket, Entry(contact, now_s - self.settings.fresh_s))
                return
        self._enter(bucket, loser)  # after all: nobody else may have its place

    def _diverse(self, contact: Contact, bucket: Bucket | None) -> bool:
        """Whether there is room for one more peer of this prefix."""
        place = contact.place
        if place is None:
            return True
        if place.scope < Scope.GLOBAL and all(own.scope < Scope.GLOBAL for own in self.places):
            return True  # a private swarm on a LAN has one prefix
        in_bucket, in_table = self.settings.per_prefix_in_bucket, self.settings.per_prefix_in_table
        if any(own.prefix == place.prefix for own in self.places):
            in_bucket, in_table = self.settings.k // 2, KEY_BITS * self.settings.k  # our own campus or cloud
        if self._prefixes[place.prefix] >= in_table:
            return False
        others = (entry.contact.place for entry in bucket.entries.values()) if bucket else ()
        return sum(other is not None and other.prefix == place.prefix for other in others) < in_bucket

    def _enter(self, bucket: Bucket, entry: Entry) -> None:
        bucket.entries[entry.contact.node_id] = entry
        self._changed = True
        if entry.contact.place is not None:
            self._prefixes[entry.contact.place.prefix] += 1

    def _leave(self, bucket: Bucket, node_id: DhtKey) -> Entry | None:
        entry = bucket.entries.pop(node_id, None)
        self._changed = True
        if entry is not None and entry.contact.place is not None:
            prefix = entry.contact.place.prefix
            self._prefixes[prefix] -= 1
            if not self._prefixes[prefix]:
                del self._prefixes[prefix]
        return entry
