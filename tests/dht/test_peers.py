"""The peers' book-keeping against a network of one line:
everybody answers, over connections they made themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.messages import Ping
from petalite.dht.network import Caller
from petalite.dht.peers import CallSettings, Peers
from petalite.dht.routing_table import TableSettings
from petalite.errors import BadMessage, ConnectionLost, PetaliteError, RateLimited, UnknownMethod, WrongPeer
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.net.schema import encode
from tests.dht.helpers import contact


class OneLine:
    """A network on which every peer answers a ping with the addresses set, or fails as set."""

    def __init__(self) -> None:
        self.peer_id = PeerId(bytes(32))
        self.addresses = ("/ip4/1.1.1.1/tcp/1",)
        self.claims: tuple[str, ...] = ()
        self.remote: dict[PeerId, Multiaddr] = {}
        self.error: PetaliteError | None = None
        self.rtt: float | None = None
        self.calls: list[PeerId] = []

    async def call(self, contact: Contact, method: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        self.calls.append(contact.peer_id)
        if self.error is not None:
            raise self.error
        return encode(Ping(self.claims or contact.addresses))

    async def dial(self, address: Multiaddr, *, timeout_s: float) -> PeerId:
        assert address.peer_id is not None
        return address.peer_id

    def serve(self, method: str, handler: Any) -> None: ...

    def remote_address(self, peer_id: PeerId) -> Multiaddr | None:
        return self.remote.get(peer_id)

    def rtt_s(self, peer_id: PeerId) -> float | None:
        return self.rtt


class StoppedClock:
    now_s = 0.0

    def time_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None: ...


class Bench:
    """Peers whose background work is run when the test says."""

    def __init__(self, **options: bool) -> None:
        self.network, self.clock = OneLine(), StoppedClock()
        self.work: list[Coroutine[Any, Any, None]] = []
        self.peers = Peers(
            self.network,
            self.clock,
            TableSettings(),
            CallSettings(),
            self.work.append,
            client_mode=options.get("client_mode", False),
        )
        self.peers.look_around()

    def settle(self) -> None:
        async def all_work() -> None:
            while self.work:
                await self.work.pop(0)

        asyncio.run(all_work())

    def seen_at(self, peer: Contact, address: str) -> Caller:
        self.network.remote[peer.peer_id] = Multiaddr.parse(address)
        return Caller(peer.peer_id, Multiaddr.parse(address))


@pytest.fixture
def bench() -> Bench:
    return Bench()


PEER = contact(1)


def test_a_stranger_is_called_back_before_it_enters(bench: Bench):
    bench.peers.meet(bench.seen_at(PEER, PEER.addresses[0]), PEER.addresses)
    assert PEER.node_id not in bench.peers.table
    bench.settle()
    assert bench.network.calls == [PEER.peer_id]
    assert PEER.node_id in bench.peers.table


def test_one_that_answers_over_its_own_connection_must_be_where_it_says(bench: Bench):
    """Ids on one public machine, each claiming to be somewhere else: none gets in by claims alone."""
    for number in range(30):
        peer = contact(number)
        bench.peers.meet(bench.seen_at(peer, "/ip4/66.6.6.6/tcp/50000"), peer.addresses)
        bench.settle()
    assert len(bench.network.calls) == 30
    assert len(bench.peers.table) == 0


def test_on_a_private_network_a_peer_may_have_another_address_than_it_is_seen_at(bench: Bench):
    peer = Contact(PEER.peer_id, ("/ip4/192.168.1.5/tcp/9",))
    bench.peers.meet(bench.seen_at(peer, "/ip4/127.0.0.1/tcp/50000"), peer.addresses)
    bench.settle()
    assert peer.node_id in bench.peers.table


def test_strangers_looked_into_at_once_are_bounded(bench: Bench):
    for number in range(100):
        peer = contact(number)
        bench.peers.meet(bench.seen_at(peer, peer.addresses[0]), peer.addresses)
    assert len(bench.work) == CallSettings().max_verifying
    bench.settle()
    bench.peers.meet(bench.seen_at(contact(200), contact(200).addresses[0]), contact(200).addresses)
    assert len(bench.work) == 1
    bench.settle()


def test_who_listens_everywhere_is_where_we_see_it(bench: Bench):
    bench.network.claims = ("/ip4/0.0.0.0/tcp/9",)
    bench.peers.meet(bench.seen_at(PEER, "/ip4/5.6.7.8/tcp/50000"), ("/ip4/0.0.0.0/tcp/9",))
    bench.settle()
    assert [entry.contact.addresses for entry in bench.peers.table] == [("/ip4/5.6.7.8/tcp/9",)]


def test_a_dialled_peer_is_known_by_the_address_that_worked(bench: Bench):
    """It called us before, from a port that nobody can call."""
    bench.network.remote[PEER.peer_id] = Multiaddr.parse("/ip4/5.6.7.8/tcp/50000")
    bench.network.claims = ("/ip4/10.0.0.9/tcp/9", "/ip4/5.6.7.9/tcp/9")
    address = Multiaddr.parse("/ip4/5.6.7.8/tcp/9").with_peer(PEER.peer_id)
    known = asyncio.run(bench.peers.dial(address))
    assert known.addresses == ("/ip4/5.6.7.8/tcp/9", "/ip4/5.6.7.9/tcp/9")
    assert [entry.contact for entry in bench.peers.table] == [known]


@pytest.mark.parametrize(
    ("error", "failures", "trusted"),
    [
        (ConnectionLost("gone"), 1, True),
        (UnknownMethod("a client"), 1, True),
        (RateLimited("slow down"), 0, True),
        (BadMessage("junk"), None, False),
    ],
)
def test_what_each_error_does_to_a_peer(
    bench: Bench, error: PetaliteError, failures: int | None, trusted: bool
):
    bench.network.remote[PEER.peer_id] = Multiaddr.parse(PEER.addresses[0])
    asyncio.run(bench.peers.check(PEER))
    bench.network.error = error
    asyncio.run(bench.peers.check(PEER))
    entry = bench.peers.table.entry(PEER.node_id)
    assert (entry.failures if entry else None) == failures
    bench.clock.now_s = CallSettings().silence_s
    assert bool(bench.peers.cleaned([PEER], contact(2))) is trusted


def test_one_that_did_not_answer_is_not_tried_again_on_others_word(bench: Bench):
    """Unless nobody answers: then it is we who are cut off, and no word on them."""
    bench.network.error = ConnectionLost("gone")
    asyncio.run(bench.peers.check(PEER))
    assert bench.peers.cleaned([PEER], contact(2)) == [PEER]
    bench.network.error = None
    asyncio.run(bench.peers.check(contact(3)))
    bench.network.error = ConnectionLost("gone")
    asyncio.run(bench.peers.check(PEER))
    assert bench.peers.cleaned([PEER], contact(2)) == []
    bench.network.error = None
    asyncio.run(bench.peers.check(PEER))
    assert bench.peers.cleaned([PEER], contact(2)) == [PEER]


@pytest.mark.parametrize("error", [ConnectionLost("nobody"), WrongPeer("somebody else")])
def test_failing_at_a_false_address_is_not_held_against_a_peer(bench: Bench, error: PetaliteError):
    """Whoever names an honest peer at a wrong address must not get it dropped, shunned or distrusted."""
    bench.network.remote[PEER.peer_id] = Multiaddr.parse(PEER.addresses[0])
    asyncio.run(bench.peers.check(PEER))
    bench.network.error = error
    asyncio.run(bench.peers.check(Contact(PEER.peer_id, ("/ip4/9.9.9.9/tcp/9",))))
    entry = bench.peers.table.entry(PEER.node_id)
    assert entry is not None
    assert entry.failures == 0
    assert bench.peers.cleaned([PEER], contact(2)) == [PEER]


def test_a_peer_is_kept_at_the_address_that_it_was_reached_at(bench: Bench):
    bench.network.remote[PEER.peer_id] = Multiaddr.parse(PEER.addresses[0])
    told = Contact(PEER.peer_id, ("/ip4/9.9.9.9/tcp/9", PEER.addresses[0]))
    assert bench.peers.located(told).addresses == PEER.addresses


def test_a_liar_is_not_dealt_with_for_a_while(bench: Bench):
    bench.peers.distrust(PEER)
    bench.peers.meet(bench.seen_at(PEER, PEER.addresses[0]), PEER.addresses)
    assert not bench.work
    assert bench.peers.cleaned([PEER, contact(3)], contact(2)) == [contact(3)]
    bench.clock.now_s = CallSettings().distrust_s
    bench.peers.meet(bench.seen_at(PEER, PEER.addresses[0]), PEER.addresses)
    bench.settle()
    assert PEER.node_id in bench.peers.table


def test_liars_remembered_are_bounded(bench: Bench):
    for number in range(3000):
        bench.peers.distrust(contact(number))
    assert len(bench.peers._distrusted) == CallSettings().max_shunned


@pytest.mark.parametrize(("rtt_s", "wait_s"), [(None, 0.25), (0.001, 0.25), (0.1, 0.4), (2.0, 1.0)])
def test_the_soft_deadline_is_a_few_round_trips_within_bounds(
    bench: Bench, rtt_s: float | None, wait_s: float
):
    bench.network.rtt = rtt_s
    assert bench.peers.soft_timeout_s(PEER) == wait_s


def test_a_client_says_nothing_of_where_it_is():
    assert Bench(client_mode=True).peers.own_addresses == ()
    assert Bench().peers.own_addresses == ("/ip4/1.1.1.1/tcp/1",)


def test_nobody_alive_is_being_alone(bench: Bench):
    assert bench.peers.alone
    bench.network.remote[PEER.peer_id] = Multiaddr.parse(PEER.addresses[0])
    asyncio.run(bench.peers.check(PEER))
    assert not bench.peers.alone
    bench.peers.table.failed(DhtKey.of_peer(PEER.peer_id), 0.0)
    assert bench.peers.alone
