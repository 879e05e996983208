"""A peer of the DHT: joins, announces, finds, and serves others unless it is a client only.

    async with DhtNode(identity, network, rules=rules) as node:
        await node.join(bootstrap)
        announcement = await node.announce("servers", "model/0", value, ttl_s=120)
        records = await node.find([("servers", b"model/0")], timeout_s=10)

Everything the node does runs under one task group that ends with it. The logic stands in the modules beside
this one; here it is put together. Knows no socket: calls go through a `Network`, the time comes from a
`Clock`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

from petalite.dht.announcements import Announcement, Name, Publisher
from petalite.dht.contacts import Contact
from petalite.dht.keys import KEY_BITS, DhtKey
from petalite.dht.limits import RateSettings
from petalite.dht.lookup import Lookup, LookupSettings
from petalite.dht.network import Clock, Network, SystemClock
from petalite.dht.peers import CallSettings, Peers
from petalite.dht.queries import Queries
from petalite.dht.records import NamespaceRules, Record, RecordChecker
from petalite.dht.routing_table import RoutingTable, TableSettings
from petalite.dht.service import Service
from petalite.dht.storage import Storage, StorageSettings
from petalite.dht.upkeep import Upkeep, UpkeepSettings
from petalite.errors import DeadlineExceeded, InvalidArgument, PetaliteError, ShuttingDown, Unreachable
from petalite.net.identity import Identity, PeerId
from petalite.net.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

MAX_OWNERS = 512  # records of one name that a read returns
_FAREWELL_S = 2.0  # how long closing may take to withdraw what is announced


@dataclass(frozen=True, slots=True)
class DhtSettings:
    """One part for each concern."""

    table: TableSettings = field(default_factory=TableSettings)  # whom we keep
    storage: StorageSettings = field(default_factory=StorageSettings)  # what we hold for others
    lookup: LookupSettings = field(default_factory=LookupSettings)  # how we search
    calls: CallSettings = field(default_factory=CallSettings)  # how long we wait for peers
    rates: RateSettings = field(default_factory=RateSettings)  # what others may ask of us
    upkeep: UpkeepSettings = field(default_factory=UpkeepSettings)  # what we do at rest
    peers_file: Path | None = None  # where known peers are saved between lives


@dataclass(slots=True)
class _Running:
    """The one task that everything runs under."""

    task: asyncio.Task[None]
    group: asyncio.TaskGroup
    announcements: list[Announcement] = field(default_factory=list)


class DhtNode:
    """See the module's first lines. `checker` may be shared by the nodes of a process;
    `random` makes a simulation repeatable."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        *,
        rules: NamespaceRules,
        settings: DhtSettings = DhtSettings(),
        clock: Clock | None = None,
        client_mode: bool = False,
        checker: RecordChecker | None = None,
        random: Random | None = None,
    ) -> None:
        if identity.peer_id != network.peer_id:
            raise InvalidArgument(f"the network is {network.peer_id}'s, the identity {identity.peer_id}'s")
        self.client_mode = client_mode
        self.settings = settings
        self._network = network
        self._clock = clock = clock or SystemClock()
        self._random = random = random or Random()
        self.storage = Storage(settings.storage)
        self._peers = Peers(
            network, clock, settings.table, settings.calls, self._spawn, client_mode=client_mode
        )
        checker = checker or RecordChecker(rules)
        self._queries = Queries(self._peers, checker, clock, settings.lookup, self._spawn)
        self._publisher = Publisher(identity, self._queries, self.storage, clock, random)
        self._service = Service(
            self._peers, self.storage, checker, clock, random, settings.rates, settings.table.k
        )
        self._upkeep = Upkeep(
            self._peers,
            self._queries,
            self.storage,
            clock,
            random,
            settings.upkeep,
            self._spawn,
            settings.peers_file,
        )
        self._running: _Running | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serve, and look after ourselves. Called by whatever is called first."""
        async with self._starting:
            if self._closed:
                raise ShuttingDown("the DHT node is closed; make a new one")
            if self._running is None:
                await self._start()

    async def close(self, *, withdraw: bool = True) -> None:
        """Withdraw what is announced, save the peers, end every task. May be called twice."""
        self._closed = True
        async with self._starting:
            running = self._running
        if running is None:
            return
        if withdraw:
            await self._farewell(running.announcements)
        self._running = None
        self._upkeep.save()
        running.task.cancel()
        await asyncio.wait([running.task])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def join(self, bootstrap: Sequence[Multiaddr] = ()) -> None:
        """Become part of the swarm that these addresses, or the peers saved earlier, belong to; a first node
        has neither.

        Raises Unreachable, naming every address and why, when none answers. The addresses are kept, to come
        back through."""
        await self.start()
        self._upkeep.bootstrap = tuple(bootstrap)
        await self._upkeep.join()

    async def meet(self, address: Multiaddr) -> None:
        """Reach a peer found by other means than the DHT's own.
        Raises Unreachable, WrongPeer and their like."""
        await self.start()
        await self._upkeep.meet(address)

    # -- records -----------------------------------------------------------------------------------

    async def announce(self, namespace: str, name: bytes | str, value: bytes, ttl_s: int) -> Announcement:
        """Publish a value under a name and keep it published. Returns when it stands; `n_holders` says with
        how many peers. While nobody else is there, it stands here, and goes out once somebody comes."""
        return await self.announce_all({(namespace, _bytes(name)): value}, ttl_s)

    async def announce_all(self, entries: Mapping[Name, bytes], ttl_s: int) -> Announcement:
        """Publish several values together, in one call to each peer, and keep them published."""
        await self.start()
        assert self._running is not None
        kept = self._running.announcements
        announcement = Announcement(self._publisher, entries, ttl_s)
        await announcement.publish()
        self._spawn(self._keep(announcement, kept))
        kept.append(announcement)
        return announcement

    def sign(self, namespace: str, name: bytes | str, value: bytes, ttl_s: int) -> Record:
        """A record of ours, newer than all before, for `store`."""
        return self._publisher.sign((namespace, _bytes(name)), value, ttl_s)

    async def store(self, *records: Record) -> int:
        """Store records of ours once, without keeping them alive.
        How many other peers hold the least held of them."""
        await self.start()
        by_key = {record.key: record for record in records}
        placement = await self._publisher.put(by_key)
        if by_key and not placement.answered and len(self.table):
            raise Unreachable(f"none of {len(self.table)} known peers took the records")
        return min((len(placement.holders.get(key, {})) for key in by_key), default=0)

    async def find(
        self,
        keys: Sequence[tuple[str, bytes | str]],
        *,
        timeout_s: float,
        holders: int | None = None,
        paths: int | None = None,
    ) -> dict[tuple[str, bytes | str], list[Record]]:
        """The live records under each `(namespace, name)`, the newest of each owner, in random order; at most
        MAX_OWNERS.

        By default every one of the k nearest peers is heard. `holders` stops each of the `paths` disjoint
        paths once so many peers gave records: sooner, and perhaps not all of them or not the newest. Own
        records count. Where there is no time left, what was found until then is returned. Raises
        DeadlineExceeded or Unreachable when that is nothing at all and most paths had no answer: then nobody
        can say that there is nothing."""
        await self.start()
        names = {(namespace, name): DhtKey.of(namespace, name) for namespace, name in keys}
        places = dict.fromkeys(names.values())
        now_s = self._clock.time_s()
        records = {held.data: held.record for key in places for held in self.storage.get(key, now_s)}
        lookup: Lookup | None = None
        try:
            async with asyncio.timeout(timeout_s):
                settings = self._queries.settings_for(paths=paths, holders=holders)
                lookup = await self._queries.find(places, settings, records)
        except TimeoutError:
            pass
        newest = self._newest(places, records.values())
        found = {name: newest[key] for name, key in names.items()}
        if not any(found.values()):
            self._check_absence(lookup, timeout_s)
        return found

    # -- what the node knows -----------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self._network.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others are told we serve; none in client mode."""
        return self._peers.own_addresses

    @property
    def table(self) -> RoutingTable:
        """Whom we know."""
        return self._peers.table

    def known_peers(self) -> list[Contact]:
        """The routing table, the nearest to us last."""
        return [entry.contact for entry in self.table]

    @property
    def swarm_size(self) -> float:
        """How many peers serve the DHT, us included: counted while they are few, else guessed from how near
        our nearest are."""
        distance = self.table.neighbour_distance()
        if distance is None:
            return len(self.table) + (not self.client_mode)
        return self.table.settings.k * 2.0**KEY_BITS / distance

    # -- inside ------------------------------------------------------------------------------------

    @staticmethod
    async def _farewell(announcements: list[Announcement]) -> None:
        try:
            async with asyncio.timeout(_FAREWELL_S), asyncio.TaskGroup() as group:
                for announcement in list(announcements):
                    group.create_task(announcement.withdraw())
        except TimeoutError:
            logger.info("closing before everybody heard that we leave; our records will expire")

    async def _start(self) -> None:
        group, entered = asyncio.TaskGroup(), asyncio.Event()

        async def supervise() -> None:
            async with group:
                entered.set()
                await asyncio.get_running_loop().create_future()  # until cancelled, and the group with it

        task = asyncio.create_task(supervise(), name="dht node")
        try:
            await entered.wait()
        except asyncio.CancelledError:
            task.cancel()
            raise
        self._running = _Running(task, group)
        self._peers.look_around()
        if not self.client_mode:
            self._service.serve(self._network)
        self._spawn(self._upkeep.run(self._came_back))

    @staticmethod
    async def _keep(announcement: Announcement, kept: list[Announcement]) -> None:
        try:
            await announcement.run()
        finally:
            kept.remove(announcement)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._running is None:
            work.close()
            raise ShuttingDown("the DHT node is closed")
        self._running.group.create_task(_guarded(work))

    def _came_back(self) -> None:
        if self._running is not None:
            for announcement in self._running.announcements:
                announcement.hurry()

    def _newest(self, keys: Iterable[DhtKey], records: Iterable[Record]) -> dict[DhtKey, list[Record]]:
        """Of each owner under each key; of very many, a random part."""
        newest: dict[DhtKey, dict[bytes, Record]] = {key: {} for key in keys}
        for record in records:
            of_key = newest[record.key]
            known = of_key.get(record.owner.public_key)
            if known is None or known.rank < record.rank:
                of_key[record.owner.public_key] = record
        found = {}
        for key, of_key in newest.items():
            live = [record for record in of_key.values() if not record.is_tombstone]
            found[key] = self._random.sample(live, min(len(live), MAX_OWNERS))
        return found

    def _check_absence(self, lookup: Lookup | None, timeout_s: float) -> None:
        if lookup is None:
            raise DeadlineExceeded(
                f"nothing was found within {timeout_s:g} s; allow more time or check the network"
            )
        if not all(search.absent or search.holders for search in lookup.searches.values()):
            raise Unreachable(
                f"nothing was found, and too few of {len(self.table)} known peers answered to say "
                "that there is nothing"
            )


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    """One exchange with a peer: what goes wrong in it is told, and takes nothing else down."""
    try:
        await work
    except PetaliteError as error:
        logger.debug("%s", error)
    except Exception:
        logger.exception("a bug in the DHT; please report it")


def _bytes(name: bytes | str) -> bytes:
    return name.encode() if isinstance(name, str) else name
