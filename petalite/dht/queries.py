"""Drives a lookup with real calls: reads that collect records, writes that place them.

The lookup decides whom to ask; this asks, checks what comes back, and waits for no longer than the lookup
wants. A call that outlives its lookup ends by its own deadline, and the table still learns from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.lookup import Answer, Lookup, LookupSettings, Query
from petalite.dht.messages import (
    FIND,
    MAX_RECORDS_BYTES,
    MAX_RECORDS_PER_STORE,
    STORE,
    Find,
    FindAnswer,
    Found,
    Store,
    StoreAnswer,
    unpack_nearest,
)
from petalite.dht.network import Clock
from petalite.dht.peers import Peers, Spawn
from petalite.dht.records import Record, RecordChecker
from petalite.dht.storage import Outcome
from petalite.errors import BadMessage, BadRecord, ForgedRecord, PetaliteError

logger = logging.getLogger(__name__)

Ask = Callable[[Query], Awaitable[Mapping[DhtKey, Answer]]]
# A peer within so many times our k-th neighbour's distance of a key is likely among the k nearest to it: it
# is sent the record with the question, which saves the second round.
_LIKELY = 2
_OUTCOMES = {outcome.value: outcome for outcome in Outcome}
_LONGEST_S = 30.0  # any lookup; what it has found by then has to do


@dataclass(slots=True)
class Placement:
    """Records of ours on their way to their holders."""

    records: Mapping[DhtKey, Record]
    data: dict[DhtKey, bytes] = field(init=False)  # the same, encoded
    holders: dict[DhtKey, dict[DhtKey, Contact]] = field(default_factory=dict)  # by key, then by peer
    answered: int = 0  # peers that took part
    refused: Counter[Outcome] = field(default_factory=Counter)  # outcomes of those that did not store
    newer: list[Record] = field(default_factory=list)  # of our own, that stood in the way

    def __post_init__(self) -> None:
        self.data = {key: record.encode() for key, record in self.records.items()}

    def took(self, key: DhtKey, contact: Contact) -> None:
        self.holders.setdefault(key, {})[contact.node_id] = contact


class Queries:
    """Lookups of one node."""

    def __init__(
        self, peers: Peers, checker: RecordChecker, clock: Clock, settings: LookupSettings, spawn: Spawn
    ) -> None:
        self._peers = peers
        self._checker = checker
        self._clock = clock
        self.settings = settings
        self._spawn = spawn

    def settings_for(self, *, paths: int | None = None, holders: int | None = None) -> LookupSettings:
        """The node's settings for a read: over its paths, and if need be again; or over just so many."""
        return replace(
            self.settings, paths=paths or self.settings.paths, again=paths is None, holders=holders
        )

    # -- reading -----------------------------------------------------------------------------------

    async def find(
        self, keys: Iterable[DhtKey], settings: LookupSettings, records: dict[bytes, Record] | None = None
    ) -> Lookup:
        """Look keys up. Every good record met is added to `records`, also while the lookup goes on."""
        lookup = self._lookup(keys, settings)

        async def ask(query: Query) -> Mapping[DhtKey, Answer]:
            return await self._find_at(query.contact, query.keys, records)

        await self._drive(lookup, ask)
        return lookup

    async def _find_at(
        self, contact: Contact, keys: Sequence[DhtKey], records: dict[bytes, Record] | None
    ) -> dict[DhtKey, Answer]:
        request = Find(tuple(key.digest for key in keys), self._peers.own_addresses)
        answer = await self._peers.ask(contact, FIND, request, FindAnswer)
        answers = self._answers(contact, keys, answer.peers, answer.found)
        for key, found in zip(keys, answer.found, strict=True):
            good = self._good_records(contact, key, found)
            if records is not None:
                records.update(good)
            answers[key] = Answer(answers[key].contacts, holds=bool(good))
        return answers

    def _answers(
        self, contact: Contact, keys: Sequence[DhtKey], peers: Sequence[bytes], found: Sequence[Found]
    ) -> dict[DhtKey, Answer]:
        try:
            nearest = unpack_nearest(peers, found, len(keys))
        except PetaliteError:
            self._peers.distrust(contact)
            raise
        return {
            key: Answer(self._peers.cleaned(near, contact)) for key, near in zip(keys, nearest, strict=True)
        }

    def _good_records(self, contact: Contact, key: DhtKey, found: Found) -> dict[bytes, Record]:
        """The records that may be believed. One for another key or with a wrong signature discredits who gave
        it; one that is merely too old, or of a schema we do not know, is passed over."""
        good = {}
        unix_s = self._clock.unix_s()
        for data in found.records:
            try:
                record = self._checker.check(data, unix_s)
                if record.key != key:
                    raise ForgedRecord("a record under a key that is not its own")
            except ForgedRecord:
                self._peers.distrust(contact)
                raise
            except BadRecord as error:
                logger.debug("passing over a record from %s: %s", contact.peer_id.short(), error)
            else:
                good[data] = record
        return good

    # -- writing -----------------------------------------------------------------------------------

    async def store(self, records: Mapping[DhtKey, Record]) -> Placement:
        """Put each record at the k nearest peers to its key."""
        placement = Placement(records)
        offered: dict[DhtKey, set[DhtKey]] = {key: set() for key in records}
        reach = self._peers.table.neighbour_distance()

        async def ask(query: Query) -> Mapping[DhtKey, Answer]:
            node_id = query.contact.node_id
            likely = [key for key in query.keys if reach is None or node_id ^ key <= _LIKELY * reach]
            others = [key for key in query.keys if key not in likely]
            for key in likely:
                offered[key].add(node_id)
            answers = await self._store_at(query.contact, likely, placement) if likely else {}
            if others:
                answers |= await self._find_at(query.contact, others, None)
            return answers

        # Nothing tells a lookup for a place to store that liars took all its paths, so it gets twice as many.
        lookup = self._lookup(records, replace(self.settings, paths=2 * self.settings.paths))
        await self._drive(lookup, ask)
        left: dict[DhtKey, tuple[Contact, list[DhtKey]]] = {}
        for key, search in lookup.searches.items():
            for contact in search.nearest:
                if contact.node_id not in offered[key]:
                    left.setdefault(contact.node_id, (contact, []))[1].append(key)
        await self._store_at_all(left.values(), placement)
        return placement

    async def store_again(
        self, records: Mapping[DhtKey, Record], holders: Mapping[DhtKey, Mapping[DhtKey, Contact]]
    ) -> Placement:
        """Put records where they were put before, without looking for peers that came nearer since."""
        placement = Placement(records)
        at: dict[DhtKey, tuple[Contact, list[DhtKey]]] = {}
        for key in records:
            for node_id, contact in holders.get(key, {}).items():
                at.setdefault(node_id, (contact, []))[1].append(key)
        await self._store_at_all(at.values(), placement)
        return placement

    async def _store_at_all(self, at: Iterable[tuple[Contact, list[DhtKey]]], placement: Placement) -> None:
        room = asyncio.Semaphore(self.settings.max_in_flight)

        async def store(contact: Contact, keys: list[DhtKey]) -> None:
            async with room:
                try:
                    await self._store_at(contact, keys, placement, nearest=False)
                except PetaliteError as error:
                    logger.debug("%s does not store: %s", contact.peer_id.short(), error)

        async with asyncio.TaskGroup() as group:
            for contact, keys in at:
                group.create_task(store(contact, keys))

    async def _store_at(
        self,
        contact: Contact,
        keys: Sequence[DhtKey],
        placement: Placement,
        *,
        nearest: bool = True,
    ) -> dict[DhtKey, Answer]:
        answers: dict[DhtKey, Answer] = {}
        for batch in _batches(keys, placement.data):
            data = tuple([placement.data[key] for key in batch])
            request = Store(data, nearest, self._peers.own_addresses)
            answer = await self._peers.ask(contact, STORE, request, StoreAnswer)
            if len(answer.outcomes) != len(batch):
                self._peers.distrust(contact)
                raise BadMessage(f"{len(answer.outcomes)} outcomes of {len(batch)} records")
            answers |= self._answers(contact, batch, answer.peers, answer.found)
            for key, number, found in zip(batch, answer.outcomes, answer.found, strict=True):
                outcome = _OUTCOMES.get(number, Outcome.REFUSED)
                if outcome in (Outcome.STORED, Outcome.UNCHANGED):
                    placement.took(key, contact)
                    continue
                placement.refused[outcome] += 1
                if outcome is Outcome.STALE:
                    newer = self._good_records(contact, key, found)
                    placement.newer += [r for r in newer.values() if r.owner == placement.records[key].owner]
        placement.answered += 1
        return answers

    # -- inside ------------------------------------------------------------------------------------

    def _lookup(self, keys: Iterable[DhtKey], settings: LookupSettings) -> Lookup:
        now_s, table = self._clock.time_s(), self._peers.table
        seeds = {}
        for key in keys:
            table.refreshed(key, now_s)
            seeds[key] = self._peers.nearest(key, settings.k)
        return Lookup(seeds, table.own_id, settings, self._peers.soft_timeout_s)

    async def _drive(self, lookup: Lookup, ask: Ask) -> None:
        changed = asyncio.Event()

        async def put(query: Query) -> None:
            try:
                answers = await ask(query)
            except PetaliteError as error:
                logger.debug("%s: %s", query.contact.peer_id.short(), error)
                lookup.failed(query)
            except BaseException:
                lookup.failed(query)  # a bug or the end of the node; the lookup must not wait for it
                raise
            else:
                lookup.answered(query, self._peers.located(query.contact), answers)
            finally:
                changed.set()

        end_s = self._clock.time_s() + _LONGEST_S
        while True:
            now_s = self._clock.time_s()
            while (query := lookup.next_query(now_s)) is not None:
                self._spawn(put(query))
            if lookup.done or now_s >= end_s:
                return
            changed.clear()
            wakeup_s = min(end_s, lookup.wakeup_s or end_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wakeup_s - now_s)):
                    await changed.wait()


def _batches(keys: Sequence[DhtKey], data: Mapping[DhtKey, bytes]) -> Iterable[list[DhtKey]]:
    """As many keys together as one message holds."""
    batch: list[DhtKey] = []
    nbytes = 0
    for key in keys:
        size = len(data[key])
        if batch and (len(batch) == MAX_RECORDS_PER_STORE or nbytes + size > MAX_RECORDS_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(key)
        nbytes += size
    if batch:
        yield batch
