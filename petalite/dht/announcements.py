"""Publishing: what we say of ourselves, kept alive until we take it back.

An announcement is signed anew and stored again at a third of its life, jittered so that a swarm started at
once does not stay in step. Most times it goes straight to the peers that hold it; once a life, and whenever
too many of those are gone, the nearest peers are looked up again. Taking it back leaves tombstones, so that
nobody dials a server that has said goodbye.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from random import Random

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.network import Clock
from petalite.dht.queries import Placement, Queries
from petalite.dht.records import Record
from petalite.dht.storage import Storage
from petalite.errors import InvalidArgument, NetworkError, PetaliteError
from petalite.net.identity import Identity

logger = logging.getLogger(__name__)

Name = tuple[str, bytes]
"""(namespace, name)."""

_LIVES_PER_LOOKUP = 3  # announcements, of which the first looks the holders up
# Long lives are announced no more rarely: the peers that hold them leave sooner than they end.
_MAX_INTERVAL_S = 900.0
_RETRY_S = 5.0  # after an announcement that reached nobody


class Publisher:
    """Signs our records and puts them: at the peers nearest to their keys, and in our own storage."""

    def __init__(
        self, identity: Identity, queries: Queries, storage: Storage, clock: Clock, random: Random
    ) -> None:
        self.clock = clock
        self.random = random
        self._identity = identity
        self._queries = queries
        self._storage = storage
        self._sequence = 0

    def sign(self, name: Name, value: bytes, ttl_s: int) -> Record:
        """A record that outranks all we signed before, in this life and,
        as long as the clock goes on, in earlier ones."""
        unix_s = self.clock.unix_s()
        self._sequence = max(self._sequence + 1, int(unix_s * 1000))
        return Record.sign(
            self._identity, *name, value, sequence=self._sequence, issued_at=int(unix_s), ttl_s=ttl_s
        )

    async def put(
        self, records: Mapping[DhtKey, Record], at: Mapping[DhtKey, Mapping[DhtKey, Contact]] | None = None
    ) -> Placement:
        """Store records of ours; `at` the peers that hold them already, or at the nearest."""
        for record in records.values():
            if record.owner != self._identity.peer_id:
                raise InvalidArgument(f"only {record.owner} itself can store its records")
            self._storage.put(record.encode(), record, self.clock.time_s())
        if at is not None:
            return await self._queries.store_again(records, at)
        return await self._queries.store(records)

    def overtake(self, newer: list[Record]) -> None:
        """Sign on from beyond these: a former life of ours, with a faster clock, has left them."""
        self._sequence = max([self._sequence, *(record.sequence for record in newer)])


class Announcement:
    """Values of ours under some names, announced again until withdrawn. Made by `DhtNode.announce`."""

    def __init__(self, publisher: Publisher, entries: Mapping[Name, bytes], ttl_s: int) -> None:
        self._publisher = publisher
        self._entries = dict(entries)
        self._ttl_s = ttl_s
        self._holders: dict[DhtKey, dict[DhtKey, Contact]] = {}
        self._publications = 0
        self._lock = asyncio.Lock()  # one publication at a time, so that sequences arrive in order
        self._wake = asyncio.Event()
        self._withdrawn = False

    @property
    def entries(self) -> dict[Name, bytes]:
        """What is announced."""
        return dict(self._entries)

    @property
    def n_holders(self) -> int:
        """How many other peers hold the least held of its records."""
        keys = [DhtKey.of(*name) for name in self._entries]
        return min((len(self._holders.get(key, {})) for key in keys), default=0)

    async def update(self, value: bytes | Mapping[Name, bytes]) -> None:
        """Say something else: one value under all its names, or other names and values;
        names left out are withdrawn."""
        async with self._lock:
            if self._withdrawn:
                raise InvalidArgument("the announcement was withdrawn; make a new one")
            entries = dict.fromkeys(self._entries, value) if isinstance(value, bytes) else dict(value)
            self._sign({name: (value, self._ttl_s) for name, value in entries.items()})  # or raise now
            new = any(name not in self._entries for name in entries)
            await self._bury([name for name in self._entries if name not in entries])
            self._entries = entries
            await self._publish(look=new or not self._holders)

    async def withdraw(self) -> None:
        """Take it back. Whoever holds it then holds a tombstone,
        for as long as the record would have lived. Cancelled, it leaves the record to expire."""
        self._withdrawn = True
        self._wake.set()
        async with self._lock:
            await self._bury(list(self._entries))
            self._entries = {}

    def hurry(self) -> None:
        """Announce again soon: the network came back."""
        self._publications = 0
        self._wake.set()

    async def run(self) -> None:
        """Announce until withdrawn. The node runs this as its own task."""
        while not self._withdrawn:
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._wake.wait()
                if not self._withdrawn:
                    await self._publisher.clock.sleep(self._publisher.random.uniform(0.0, 1.0))
            except TimeoutError:
                pass
            self._wake.clear()
            async with self._lock:
                if not self._withdrawn:
                    try:
                        await self._publish(look=self._publications % _LIVES_PER_LOOKUP == 0)
                    except NetworkError as error:
                        logger.warning("announcing again reached nobody: %s", error)

    async def publish(self) -> None:
        """The first time."""
        async with self._lock:
            await self._publish(look=True)

    def _pause_s(self) -> float:
        interval_s = min(self._ttl_s / 3, _MAX_INTERVAL_S)
        if not self._holders:
            interval_s = min(interval_s, _RETRY_S)
        return interval_s * self._publisher.random.uniform(0.85, 1.0)

    async def _publish(self, *, look: bool) -> None:
        self._publications += 1
        before = self._holders
        placement = await self._put(
            {name: (value, self._ttl_s) for name, value in self._entries.items()}, look
        )
        self._holders = placement.holders
        if placement.answered and not self._holders:
            reasons = ", ".join(f"{outcome.name} × {n}" for outcome, n in placement.refused.items())
            logger.warning("no peer holds what we announce (%s); check this machine's clock", reasons)
        kept = sum(len(holders) for holders in self._holders.values())
        if not look and kept < 0.75 * sum(len(holders) for holders in before.values()):
            self._publications = 0  # too many have left: look for others the next time

    async def _put(self, values: Mapping[Name, tuple[bytes, int]], look: bool) -> Placement:
        """Sign and store; once more where a former life of ours has left something newer."""
        placement = await self._sign_and_put(values, look)
        if placement.newer:
            self._publisher.overtake(placement.newer)
            placement = await self._sign_and_put(values, look)
        return placement

    async def _sign_and_put(self, values: Mapping[Name, tuple[bytes, int]], look: bool) -> Placement:
        return await self._publisher.put(self._sign(values), None if look else self._holders)

    def _sign(self, values: Mapping[Name, tuple[bytes, int]]) -> dict[DhtKey, Record]:
        return {DhtKey.of(*name): self._publisher.sign(name, *value) for name, value in values.items()}

    async def _bury(self, names: list[Name]) -> None:
        if names:
            try:
                await self._put(dict.fromkeys(names, (b"", self._ttl_s)), look=False)
            except PetaliteError as error:
                logger.info("%d records are left to expire: %s", len(names), error)
        for name in names:
            self._holders.pop(DhtKey.of(*name), None)
