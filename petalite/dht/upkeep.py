"""What a node does when nobody asks it anything: join, keep its table alive, come back after an outage.

At rest it pings peers it has not heard from for long, a few at a time, looks up a random key in a bucket
where no lookup went for long, drops expired records, and saves its peers. Now and then it tries an address it
once knew and has lost: so two halves of a swarm that were cut apart find each other again. When nobody
answers any more, it goes back to all such addresses, ever more slowly, until somebody does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.network import Clock
from petalite.dht.peers import Peers, Spawn
from petalite.dht.queries import Queries
from petalite.dht.saved_peers import MAX_SAVED, load_peers, save_peers
from petalite.dht.storage import Storage
from petalite.errors import PetaliteError, Unreachable
from petalite.net.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

_DIALS_AT_ONCE = 16
_REJOIN_MIN_S = 5.0
# After a ping answered and one not: in balance when one in twelve peers turns out to be gone.
_PROBE_LATER, _PROBE_SOONER = 1.02, 0.8
_MAX_REMEMBERED = 64  # peers once met; one more every `reunite_s`, so they go back hours


@dataclass(frozen=True, slots=True)
class UpkeepSettings:
    """How often a node looks after itself."""

    tick_s: float = 15.0  # between two looks at what is due, jittered
    probe_min_s: float = 60.0  # a peer silent for so long is pinged, where peers often turn out to be gone
    probe_max_s: float = 900.0  # and for so long, where they hardly ever do
    probes_per_tick: int = 10  # at most
    refresh_s: float = 1800.0  # a bucket without a lookup for so long gets one
    save_s: float = 300.0  # between two savings of the peers
    reunite_s: float = 300.0  # between two tries of a peer that was lost
    rejoin_max_s: float = 300.0  # the longest wait between two attempts to come back


class Upkeep:
    """The node's own doings."""

    def __init__(
        self,
        peers: Peers,
        queries: Queries,
        storage: Storage,
        clock: Clock,
        random: Random,
        settings: UpkeepSettings,
        spawn: Spawn,
        peers_file: Path | None = None,
    ) -> None:
        self.bootstrap: tuple[Multiaddr, ...] = ()
        self._peers = peers
        self._queries = queries
        self._storage = storage
        self._clock = clock
        self._random = random
        self._settings = settings
        self._spawn = spawn
        self._peers_file = peers_file
        self._probe_after_s = settings.probe_max_s
        self._saved_s = 0.0
        self._reunited_s = 0.0
        self._remembered: dict[DhtKey, Multiaddr] = {}  # the longest ago first

    # -- joining -----------------------------------------------------------------------------------

    async def join(self) -> None:
        """Reach anybody, then look up our own id, which makes us known to our neighbours and them to us.

        Raises Unreachable when nobody answers; with nobody to ask there is nothing to do.
        """
        saved = load_peers(self._peers_file) if self._peers_file is not None else []
        silent = [_address(entry.contact) for entry in self._peers.table]
        known = list(dict.fromkeys((*saved, *self._remembered.values(), *silent)))
        self._random.shuffle(known)
        if not self.bootstrap and not known:
            return
        failures = await self._reach_any(dict.fromkeys((*self.bootstrap, *known)))
        if failures is not None:
            told = "; ".join(f"{address}: {failures[address]}" for address in self.bootstrap)
            also = f"; nor did any of {len(known)} peers known from before" if known else ""
            raise Unreachable(f"none of the peers to join through answered: {told or 'none given'}{also}")
        await self._find_neighbours()

    async def meet(self, address: Multiaddr) -> None:
        """Reach the peer there; one we did not know may know a whole swarm that we did not."""
        known = len(self._peers.table)
        await self._peers.dial(address)
        if len(self._peers.table) > known:
            await self._find_neighbours()

    async def _find_neighbours(self) -> None:
        await self._queries.find([self._peers.table.own_id], self._queries.settings)

    async def _reach_any(self, addresses: Collection[Multiaddr]) -> dict[Multiaddr, str] | None:
        """Dial all; None once the first answers (the others go on), or why each did not."""
        outcomes: asyncio.Queue[tuple[Multiaddr, str | None]] = asyncio.Queue()
        room = asyncio.Semaphore(_DIALS_AT_ONCE)

        async def reach(address: Multiaddr) -> None:
            failure: str | None = "this node closed"
            try:
                async with room:
                    await self._peers.dial(address)
                failure = None
            except PetaliteError as error:
                failure = str(error)
            finally:
                outcomes.put_nowait((address, failure))

        for address in addresses:
            self._spawn(reach(address))
        failures: dict[Multiaddr, str] = {}
        for _ in addresses:
            address, failure = await outcomes.get()
            if failure is None:
                return None
            failures[address] = failure
        return failures

    # -- at rest -----------------------------------------------------------------------------------

    async def run(self, came_back: Callable[[], None]) -> None:
        """Until the node closes. `came_back` is called when an outage has ended."""
        wait_s = 0.0
        while True:
            await self._clock.sleep(self._settings.tick_s * self._random.uniform(0.75, 1.25))
            self._peers.look_around()
            self._storage.sweep(self._clock.time_s())
            try:
                if self._peers.alone:
                    wait_s = await self._come_back(wait_s, came_back)
                else:
                    wait_s = 0.0
                    await self._tick()
            except PetaliteError as error:
                logger.debug("upkeep: %s", error)

    def save(self) -> None:
        """Write the peers to disk: those that answer first, and of them those heard from last."""
        if self._peers_file is None or not len(self._peers.table):
            return
        entries = sorted(self._peers.table, key=lambda entry: (entry.failures, -entry.seen_s))
        save_peers(self._peers_file, [entry.contact for entry in entries[: 2 * MAX_SAVED]])
        self._saved_s = self._clock.time_s()

    async def _tick(self) -> None:
        now_s, settings = self._clock.time_s(), self._settings
        for contact in self._peers.table.unseen(now_s, self._probe_after_s)[: settings.probes_per_tick]:
            self._spawn(self._probe(contact))
        if self._peers_file is not None and now_s - self._saved_s >= settings.save_s:
            self.save()
        if now_s - self._reunited_s >= settings.reunite_s * self._random.uniform(0.5, 1.0):
            self._reunited_s = now_s
            await self._reunite()
        stale = self._peers.table.stale_buckets(now_s, settings.refresh_s)
        if stale:
            await self._refresh(self._random.choice(stale))

    async def _probe(self, contact: Contact) -> None:
        change = _PROBE_LATER if await self._peers.check(contact) else _PROBE_SOONER
        after_s = min(self._probe_after_s * change, self._settings.probe_max_s)
        self._probe_after_s = max(after_s, self._settings.probe_min_s)

    async def _refresh(self, bucket: int) -> None:
        target = DhtKey.random(self._random, self._peers.table.own_id, bucket)
        await self._queries.find([target], self._queries.settings_for(paths=1))

    async def _reunite(self) -> None:
        """Remember one of the peers there are, and try one there was."""
        entries = list(self._peers.table)
        if entries:
            contact = self._random.choice(entries).contact
            self._remembered.pop(contact.node_id, None)
            self._remembered[contact.node_id] = _address(contact)
            if len(self._remembered) > _MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
        known = {entry.contact.peer_id for entry in entries}
        lost = [a for a in (*self.bootstrap, *self._remembered.values()) if a.peer_id not in known]
        if lost:
            await self.meet(self._random.choice(lost))

    async def _come_back(self, wait_s: float, came_back: Callable[[], None]) -> float:
        """One attempt; the wait before the next, should it have failed."""
        settings = self._settings
        await self._clock.sleep(wait_s * self._random.uniform(0.5, 1.0))
        try:
            await self.join()
        except Unreachable as error:
            logger.info("still alone: %s", error)
            return min(max(2 * wait_s, _REJOIN_MIN_S), settings.rejoin_max_s)
        if not self._peers.alone:
            logger.info("back among %d peers", len(self._peers.table))
            came_back()
        return 0.0


def _address(contact: Contact) -> Multiaddr:
    return Multiaddr.parse(contact.addresses[0]).with_peer(contact.peer_id)
