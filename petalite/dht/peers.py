"""The peers a node knows, and every call it makes: who answered, who is slow, who lied.

Owns the routing table and keeps it honest: a peer enters only after it answered us where it says it is; one
that calls us and claims to serve is pinged back first; one that breaks a rule is forgotten for a while.
Knows no key and no record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from petalite.dht.contacts import (
    MAX_ADDRESSES,
    Contact,
    Scope,
    believable,
    parse_address,
    place_of_host,
    seen_from,
)
from petalite.dht.keys import DhtKey
from petalite.dht.messages import PING, Ping
from petalite.dht.network import Caller, Clock, Network
from petalite.dht.routing_table import RoutingTable, TableSettings
from petalite.errors import (
    BadMessage,
    BadRecord,
    HandshakeFailed,
    NetworkError,
    PetaliteError,
    RemoteProtocolError,
    ShuttingDown,
    UnknownMethod,
)
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.net.schema import decode, encode

logger = logging.getLogger(__name__)

T = TypeVar("T")
Shunned = TypeVar("Shunned", DhtKey, bytes)
Spawn = Callable[[Coroutine[Any, Any, None]], None]
"""Runs a coroutine as a child of the node, until the node closes."""


@dataclass(frozen=True, slots=True)
class CallSettings:
    """How long to wait for peers, and how many strangers to look into."""

    timeout_s: float = 3.0  # the hard deadline of a call
    min_soft_s: float = 0.25  # least wait until another peer is asked as well
    max_soft_s: float = 1.0  # and the longest
    soft_per_rtt: float = 4.0  # the soft deadline, in round trips
    max_verifying: int = 8  # strangers pinged back at once
    distrust_s: float = 600.0  # how long a liar is not dealt with
    silence_s: float = 60.0  # for how long one that did not answer is not tried on another's word
    max_shunned: int = 1024  # of either remembered


class Peers:
    """The routing table and the calls."""

    def __init__(
        self,
        network: Network,
        clock: Clock,
        table: TableSettings,
        settings: CallSettings,
        spawn: Spawn,
        *,
        client_mode: bool,
    ) -> None:
        self.table = RoutingTable(DhtKey.of_peer(network.peer_id), table)
        self._heard_s: float | None = None  # when a peer last answered
        self._network = network
        self._clock = clock
        self._settings = settings
        self._spawn = spawn
        self._client_mode = client_mode
        self._usual_call_s = settings.min_soft_s / settings.soft_per_rtt
        self._own_addresses: tuple[str, ...] = ()
        self._verifying: set[DhtKey] = set()
        self._distrusted: dict[DhtKey, float] = {}  # until when
        self._silent: dict[bytes, float] = {}  # contacts, until when; others will name them for a while yet

    @property
    def own_addresses(self) -> tuple[str, ...]:
        """What we say of ourselves: where we serve; nothing in client mode, so that no table takes us in."""
        if not self._own_addresses and not self._client_mode:
            self.look_around()
        return self._own_addresses

    @property
    def alone(self) -> bool:
        """Whether nobody is known to be alive."""
        return all(entry.failures for entry in self.table)

    def nearest(self, key: DhtKey, count: int) -> list[Contact]:
        """The nearest peers, those that failed last time after all others."""
        return self.table.nearest(key, count, reliable=True)

    # -- calling -----------------------------------------------------------------------------------

    def soft_timeout_s(self, contact: Contact) -> float:
        """How long to wait for this peer before asking another as well."""
        rtt_s = self._network.rtt_s(contact.peer_id)
        expected_s = rtt_s if rtt_s is not None else self._usual_call_s
        settings = self._settings
        return min(max(settings.soft_per_rtt * expected_s, settings.min_soft_s), settings.max_soft_s)

    async def ask(self, contact: Contact, method: str, message: Any, answer: type[T]) -> T:
        """Call a peer and take note of how it went. Raises what the network or the peer raised."""
        started_s = self._clock.time_s()
        try:
            body = await self._network.call(
                contact, method, encode(message), timeout_s=self._settings.timeout_s
            )
            decoded = decode(answer, body)
        except (NetworkError, HandshakeFailed, ShuttingDown, UnknownMethod):
            # Somebody else at that address says nothing about this peer: who told us may have lied.
            self._missed(contact)
            raise
        except (BadMessage, BadRecord, RemoteProtocolError):
            self.distrust(contact)
            raise
        self._reached(contact, started_s)
        return decoded

    async def ping(self, contact: Contact) -> Contact:
        """Ask a peer whether it is there, and where it says it serves.
        Returns it as it is known after that."""
        answer = await self.ask(contact, PING, Ping(self.own_addresses), Ping)
        remote = self._network.remote_address(contact.peer_id)
        claimed = self.believed(contact.peer_id, answer.addresses, remote)
        known = self.located(contact)
        addresses = dict.fromkeys((*known.addresses[:1], *claimed.addresses))
        known = Contact.of(contact.peer_id, tuple(addresses)[:MAX_ADDRESSES])
        if not answer.addresses:
            self.table.remove(contact.node_id)  # it serves no longer
        elif known.node_id in self.table:
            self.table.add(known, self._clock.time_s())
        return known

    async def check(self, contact: Contact) -> bool:
        """Ping a peer for what its answer, or its silence, does to the table. Whether it answered."""
        try:
            await self.ping(contact)
        except PetaliteError as error:
            logger.debug("%s: %s", contact.peer_id.short(), error)
            return False
        return True

    async def dial(self, address: Multiaddr) -> Contact:
        """Reach whoever is at an address."""
        peer_id = await self._network.dial(address, timeout_s=self._settings.timeout_s)
        there = self._network.remote_address(peer_id) or address
        if there.port != address.port:
            there = address  # they called us first, from a port that nobody can call
        text = str(Multiaddr(there.protocol, there.host, there.port))
        return await self.ping(Contact.of(peer_id, (text,)))

    def located(self, contact: Contact) -> Contact:
        """The contact where it was reached, and not where it or others would like it to be."""
        remote = self._network.remote_address(contact.peer_id)
        if remote is None or not contact.addresses:
            return contact
        there = [
            text for text in contact.addresses if (p := parse_address(text)) and p[0].host == remote.host
        ]
        return Contact.of(contact.peer_id, there) if there and there != [*contact.addresses] else contact

    # -- strangers and liars -----------------------------------------------------------------------

    def meet(self, caller: Caller, addresses: Sequence[str]) -> None:
        """A peer called us, and says it serves at these addresses.
        If its bucket has room, it is called back."""
        node_id = DhtKey.of_peer(caller.peer_id)
        if not addresses:
            self.table.remove(node_id)
            return
        if node_id in self.table:
            self.table.seen(node_id, self._clock.time_s())
            return
        if len(self._verifying) >= self._settings.max_verifying or node_id in self._verifying:
            return
        contact = self.believed(caller.peer_id, addresses, caller.address)
        if contact.addresses and not self._is_distrusted(node_id) and self.table.wants(contact):
            self._verify(contact)

    def believed(self, peer_id: PeerId, addresses: Iterable[str], seen: Multiaddr | None) -> Contact:
        """A contact with those of its own claimed addresses that a peer seen there may name."""
        claimed = believable(Contact(peer_id, tuple(seen_from(addresses, seen))), _scope(seen))
        return Contact.of(peer_id, claimed.addresses[:MAX_ADDRESSES])

    def cleaned(self, contacts: Iterable[Contact], teller: Contact) -> list[Contact]:
        """What remains of the contacts that a peer told us: no liars, nobody who did not answer just now, no
        addresses it has no business to tell."""
        scope, now_s = self._scope_of(teller.peer_id), self._clock.time_s()
        if self._distrusted:
            contacts = [c for c in contacts if self._distrusted.get(c.node_id, 0.0) <= now_s]
        if self._silent:
            contacts = [c for c in contacts if self._silent.get(c.encoded, 0.0) <= now_s]
        kept = [believable(contact, scope) for contact in contacts]
        return [contact for contact in kept if contact.addresses]

    def distrust(self, contact: Contact) -> None:
        """It broke a rule: out of the table, and not let in again for a while."""
        logger.info("peer %s broke a rule and is not asked again for a while", contact.peer_id.short())
        self.table.remove(contact.node_id)
        self._shun(self._distrusted, contact.node_id, self._settings.distrust_s)

    def look_around(self) -> None:
        """Take note of where we are ourselves: it is what we tell, and decides whose prefixes are bounded."""
        addresses = tuple(self._network.addresses[:MAX_ADDRESSES])
        self.table.places = tuple(
            parsed[1] for text in addresses if (parsed := parse_address(text)) is not None
        )
        self._own_addresses = () if self._client_mode else addresses

    # -- inside ------------------------------------------------------------------------------------

    def _is_distrusted(self, node_id: DhtKey) -> bool:
        return self._distrusted.get(node_id, 0.0) > self._clock.time_s()

    def _scope_of(self, peer_id: PeerId) -> Scope:
        return _scope(self._network.remote_address(peer_id))

    def _verify(self, contact: Contact) -> None:
        async def verify() -> None:
            try:
                await self.check(contact)
            finally:
                self._verifying.discard(contact.node_id)

        self._verifying.add(contact.node_id)
        self._spawn(verify())

    def _shun(self, shunned: dict[Shunned, float], whom: Shunned, for_s: float) -> None:
        shunned.pop(whom, None)
        shunned[whom] = self._clock.time_s() + for_s
        if len(shunned) > self._settings.max_shunned:
            del shunned[next(iter(shunned))]

    def _missed(self, contact: Contact) -> None:
        now_s = self._clock.time_s()
        entry = self.table.entry(contact.node_id)
        if entry is None or contact.addresses[0] in entry.contact.addresses:
            self.table.failed(contact.node_id, now_s)
        if self._heard_s is not None and now_s - self._heard_s < self._settings.silence_s:
            # It is silent, and not we who are cut off. At this address, that is: see above.
            self._shun(self._silent, contact.encoded, self._settings.silence_s)

    def _reached(self, contact: Contact, started_s: float) -> None:
        now_s = self._clock.time_s()
        self._heard_s = now_s
        self._silent.pop(contact.encoded, None)
        self._usual_call_s += 0.1 * (now_s - started_s - self._usual_call_s)
        if contact.node_id in self.table:
            self.table.seen(contact.node_id, now_s)
            return
        contact = self.located(contact)
        if not self._is_where_it_says(contact):
            return
        oldest = self.table.add(contact, now_s)
        if oldest is not None and oldest.node_id not in self._verifying:
            self._verify(oldest)

    def _is_where_it_says(self, contact: Contact) -> bool:
        # A call over a connection that the peer made to us says nothing of the addresses it claims. On the
        # public Internet one of them must be where it comes from, or ids on one machine could claim to be all
        # over the world.
        remote = self._network.remote_address(contact.peer_id)
        if remote is None or _scope(remote) < Scope.GLOBAL:
            return True
        return any((p := parse_address(text)) and p[0].host == remote.host for text in contact.addresses)


def _scope(address: Multiaddr | None) -> Scope:
    """Who can be where a connection comes from; nothing known counts as the open Internet."""
    place = place_of_host(address) if address is not None else None
    return place.scope if place else Scope.GLOBAL
