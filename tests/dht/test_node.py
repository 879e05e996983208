"""Whole nodes on a simulated network, in virtual time: the node's own code, no sleeping.

Checked against the truth the simulation knows: which peers are nearest, who is alive, what was said last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.keys import DhtKey
from petalite.dht.messages import FIND
from petalite.dht.node import DhtNode, DhtSettings
from petalite.dht.records import Record
from petalite.errors import BadRecord, DeadlineExceeded, InvalidArgument, ShuttingDown, Unreachable
from petalite.net.identity import Identity, PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.sim.dht import SimSwarm
from petalite.sim.loop import run
from petalite.sim.network import LinkSettings, SimNetwork

NAME = ("servers", b"model/0")
KEY = DhtKey.of(*NAME)


def no_bad_values(owner: PeerId, name: bytes, value: bytes) -> None:
    if value.startswith(b"bad"):
        raise BadRecord("a bad value")


RULES = {"servers": no_bad_values, "models": no_bad_values}


def simulate(
    test: Callable[[SimSwarm], Awaitable[None]], *, link: LinkSettings | None = None, **options: object
) -> None:
    """Run a test in virtual time, on a network of its own; every node is closed after it."""

    async def main() -> None:
        swarm = SimSwarm(SimNetwork(1, link or LinkSettings()), RULES, **options)  # type: ignore[arg-type]
        try:
            await test(swarm)
        finally:
            await swarm.close()

    run(main())


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def values(node: DhtNode, name: tuple[str, bytes] = NAME, **options: int) -> list[bytes]:
    found = await node.find([name], timeout_s=10, **options)
    return sorted(record.value for record in found[name])


def test_a_node_alone_serves_itself():
    async def test(swarm: SimSwarm) -> None:
        (peer,) = await swarm.grow(1)
        assert await values(peer.node) == []
        announcement = await peer.node.announce(*NAME, b"here", 60)
        assert announcement.n_holders == 0
        assert await values(peer.node) == [b"here"]

    simulate(test)


def test_what_one_announces_all_find():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(12)
        await peers[3].node.announce(*NAME, b"three", 60)
        await peers[7].node.announce("servers", "model/0", b"seven", 60)
        for peer in peers:
            assert await values(peer.node) == [b"seven", b"three"]

    simulate(test)


def test_records_go_to_the_truly_nearest():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(200)
        announcement = await peers[0].node.announce(*NAME, b"here", 60)
        assert announcement.n_holders >= 20
        holding = [bool(peer.node.storage.get(KEY, now_s())) for peer in swarm.nearest(KEY, 20)]
        assert holding == [True] * 20

    simulate(test)


def test_a_span_is_announced_and_read_in_one_call_per_peer():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(15)
        names = [("servers", b"model/%d" % segment) for segment in range(10)]
        await asyncio.sleep(10)  # until all know all
        before = [peer.endpoint.calls.total() for peer in peers]
        await peers[0].node.announce_all(dict.fromkeys(names, b"span"), 60)
        assert peers[0].endpoint.calls.total() - before[0] == 14
        found = await peers[1].node.find(names, timeout_s=5)
        assert peers[1].endpoint.calls.total() - before[1] == 14
        for name in names:
            assert [record.value for record in found[name]] == [b"span"]

    simulate(test)


def test_a_name_is_the_same_as_text_and_as_bytes():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(3)
        await peers[0].node.announce("servers", "model/0", b"here", 60)
        found = await peers[1].node.find([("servers", "model/0"), ("servers", b"model/0")], timeout_s=5)
        assert [[record.value for record in records] for records in found.values()] == [[b"here"], [b"here"]]

    simulate(test)


def test_an_announcement_lives_on_and_changes_and_ends():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(8)
        announcement = await peers[0].node.announce(*NAME, b"one", 60)
        await asyncio.sleep(600)  # ten lives
        assert await values(peers[5].node) == [b"one"]
        await announcement.update(b"two")
        assert await values(peers[6].node) == [b"two"]
        await announcement.withdraw()
        assert await values(peers[7].node) == []
        held = peers[4].node.storage.get(KEY, now_s())
        assert [item.record.is_tombstone for item in held] == [True]
        with pytest.raises(InvalidArgument, match="withdrawn"):
            await announcement.update(b"three")
        await asyncio.sleep(200)
        assert await values(peers[7].node) == []

    simulate(test)


def test_an_update_may_move_to_other_names():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(5)
        old, kept, new = (("servers", b"model/%d" % n) for n in range(3))
        announcement = await peers[0].node.announce_all({old: b"a", kept: b"a"}, 60)
        await announcement.update({kept: b"b", new: b"b"})
        assert announcement.entries == {kept: b"b", new: b"b"}
        assert await values(peers[1].node, old) == []
        assert await values(peers[2].node, kept) == [b"b"]
        assert await values(peers[3].node, new) == [b"b"]

    simulate(test)


def test_a_crashed_owner_is_forgotten_after_its_records_life():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(8)
        await peers[0].node.announce(*NAME, b"here", 60)
        await swarm.kill([peers[0]])
        assert await values(peers[1].node) == [b"here"]
        await asyncio.sleep(61)
        assert await values(peers[1].node) == []

    simulate(test)


def test_closing_says_goodbye():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(8)
        await peers[0].node.announce(*NAME, b"here", 3600)
        await peers[0].node.close()
        assert await values(peers[1].node) == []
        with pytest.raises(ShuttingDown):
            await values(peers[0].node)

    simulate(test)


def test_clients_read_and_announce_and_stand_in_nobodys_table():
    async def test(swarm: SimSwarm) -> None:
        servers = await swarm.grow(10)
        clients = await swarm.grow(5, client_mode=True)
        await clients[0].node.announce(*NAME, b"behind NAT", 60)
        assert await values(clients[1].node) == [b"behind NAT"]
        assert await values(servers[3].node) == [b"behind NAT"]
        await asyncio.sleep(900)
        ids = {client.contact.node_id for client in clients}
        for peer in swarm.peers:
            assert not ids & {entry.contact.node_id for entry in peer.node.table}
            assert len(peer.node.table) >= 9

    simulate(test)


def test_reads_keep_the_newest_of_each_owner():
    """One holder is cut off while the value changes; a read that hears it too returns the new one."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(10)
        announcement = await peers[0].node.announce(*NAME, b"old", 3600)
        swarm.network.split({peers[5].contact.peer_id: 1})
        await announcement.update(b"new")
        swarm.network.split({})
        assert [held.record.value for held in peers[5].node.storage.get(KEY, now_s())] == [b"old"]
        for peer in peers:
            assert await values(peer.node) == [b"new"]

    simulate(test)


@pytest.mark.parametrize("skews", [(-600, 600), (600, -600), (0, 600), (-600, 0)])
def test_clocks_ten_minutes_off_are_harmless(skews: tuple[int, int]):
    """Owner and holders disagree by up to twenty minutes; records live exactly as long as they should."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        announcement = await peers[0].node.announce(*NAME, b"here", 60)
        assert announcement.n_holders == 5
        for peer in peers:
            assert await values(peer.node) == [b"here"]
        await swarm.kill([peers[0]])
        await asyncio.sleep(58)
        assert await values(peers[1].node) == [b"here"]
        await asyncio.sleep(3)
        assert await values(peers[1].node) == []

    turns = iter([skews[0]] + [skews[1]] * 100)
    simulate(test, skew_s=lambda random: next(turns))


def test_a_clock_an_hour_off_is_refused_and_breaks_nothing():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        announcement = await peers[0].node.announce(*NAME, b"here", 60)
        assert announcement.n_holders == 0
        assert await values(peers[1].node) == []

    turns = iter([3600] + [0] * 100)
    simulate(test, skew_s=lambda random: next(turns))


def test_a_restart_outranks_the_former_life():
    async def test(swarm: SimSwarm) -> None:
        identity = Identity.from_seed(b"\7" * 32)
        await swarm.grow(6)
        first = await swarm.add(identity=identity)
        await first.node.join([swarm.peers[0].address])
        await first.node.announce(*NAME, b"first", 3600)
        await swarm.kill([first])
        second = await swarm.add(identity=identity)
        await second.node.join([swarm.peers[1].address])
        await second.node.announce(*NAME, b"second", 3600)
        assert await values(swarm.peers[2].node) == [b"second"]

    simulate(test)


def test_a_restart_with_an_earlier_clock_overtakes_what_it_left():
    """The sequence is the wall clock's; a clock set back by
    ten minutes signs on from what holders show it."""

    async def test(swarm: SimSwarm) -> None:
        identity = Identity.from_seed(b"\7" * 32)
        await swarm.grow(6)
        first = await swarm.add(identity=identity)
        await first.node.join([swarm.peers[0].address])
        await first.node.announce(*NAME, b"first", 3600)
        await swarm.kill([first])
        second = await swarm.add(identity=identity)
        await second.node.join([swarm.peers[1].address])
        announcement = await second.node.announce(*NAME, b"second", 3600)
        assert announcement.n_holders == 6
        assert await values(swarm.peers[2].node) == [b"second"]

    turns = iter([0] * 6 + [300, -300])
    simulate(test, skew_s=lambda random: next(turns))


# -- joining -----------------------------------------------------------------------------------------


def test_of_several_bootstrap_addresses_one_is_enough():
    async def test(swarm: SimSwarm) -> None:
        (first,) = await swarm.grow(1)
        dead = Multiaddr.parse(f"/ip4/5.6.7.8/tcp/1/p2p/{Identity.generate().peer_id}")
        peer = await swarm.add()
        started_s = now_s()
        await peer.node.join([dead, first.address])
        assert now_s() - started_s < 1.0  # nobody waits for the dead one
        assert [contact.peer_id for contact in peer.node.known_peers()] == [first.contact.peer_id]

    simulate(test)


def test_all_bootstrap_addresses_down_is_one_error_that_names_them():
    async def test(swarm: SimSwarm) -> None:
        ids = [Identity.generate().peer_id for _ in range(3)]
        dead = [Multiaddr.parse(f"/ip4/5.6.7.{n}/tcp/1/p2p/{peer_id}") for n, peer_id in enumerate(ids)]
        peer = await swarm.add()
        with pytest.raises(Unreachable) as caught:
            await peer.node.join(dead)
        assert all(str(address) in str(caught.value) for address in dead)

    simulate(test)


def test_the_wrong_peer_at_a_bootstrap_address_is_named():
    async def test(swarm: SimSwarm) -> None:
        (first,) = await swarm.grow(1)
        other = Identity.generate().peer_id
        peer = await swarm.add()
        with pytest.raises(Unreachable, match=str(first.contact.peer_id)):
            await peer.node.join([first.endpoint.address.with_peer(other)])

    simulate(test)


def test_saved_peers_need_no_bootstrap(tmp_path: Path):
    async def test(swarm: SimSwarm) -> None:
        await swarm.grow(6)
        identity = Identity.from_seed(b"\7" * 32)
        settings = DhtSettings(peers_file=tmp_path / "peers")
        first = await swarm.add(identity=identity, settings=settings)
        await first.node.join([swarm.peers[0].address])
        await first.node.close()
        await swarm.kill([swarm.peers[0]])
        second = await swarm.add(identity=identity, settings=settings)
        await second.node.join([])
        assert len(second.node.known_peers()) == 5

    simulate(test)


def test_a_node_comes_back_by_itself_after_a_total_outage():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        await peers[0].node.announce(*NAME, b"here", 60)
        swarm.network.split({peers[0].contact.peer_id: 1})
        await asyncio.sleep(1200)
        assert await values(peers[3].node) == []
        swarm.network.split({})
        await asyncio.sleep(330)  # the longest wait between two attempts
        assert await values(peers[3].node) == [b"here"]

    simulate(test)


def test_two_nodes_cut_apart_find_each_other_again():
    """The first of a swarm has no bootstrap address to go back to,
    and the second has been forgotten by nobody else."""

    async def test(swarm: SimSwarm) -> None:
        first, second = await swarm.grow(2)
        await second.node.announce(*NAME, b"here", 60)
        swarm.network.split({second.contact.peer_id: 1})
        await asyncio.sleep(3600)
        second.node._upkeep.bootstrap = ()  # it comes from the first alone
        swarm.network.split({})
        await asyncio.sleep(700)
        assert await values(first.node) == [b"here"]

    simulate(test)


def test_a_partition_heals():
    """Two halves live on apart for an hour, each with its own announcements; joined again, all see all."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(40)
        left, right = peers[:20], peers[20:]
        await left[0].node.announce(*NAME, b"left", 60)
        await right[0].node.announce(*NAME, b"right", 60)
        swarm.network.split({peer.contact.peer_id: 1 for peer in right})
        await asyncio.sleep(600)
        assert await values(left[7].node) == [b"left"]
        assert await values(right[7].node) == [b"right"]
        swarm.network.split({})
        await asyncio.sleep(600)
        for peer in (left[3], left[11], right[3], right[11]):
            assert await values(peer.node) == [b"left", b"right"]

    simulate(test)


def test_a_swarm_on_one_public_campus_works():
    """Everybody has a public address in one /16, which bounds
    made against crowds of one prefix must not break."""

    async def test(swarm: SimSwarm) -> None:
        first = await swarm.add(address="/ip4/50.60.0.1/tcp/1")
        peers = [first]
        for number in range(1, 40):
            peer = await swarm.add(address=f"/ip4/50.60.{number}.1/tcp/1")
            await peer.node.join([first.address])
            peers.append(peer)
        outsider = await swarm.add(client_mode=True)
        await outsider.node.join([first.address])
        announcement = await peers[20].node.announce(*NAME, b"here", 60)
        assert announcement.n_holders >= 20
        await asyncio.sleep(300)
        for reader in (*peers, outsider):
            assert await values(reader.node) == [b"here"]

    simulate(test)


# -- reading under difficulties ----------------------------------------------------------------------


def test_most_peers_dying_at_once_leaves_records_readable():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(300)
        await peers[0].node.announce(*NAME, b"here", 600)
        await swarm.kill(swarm.random.sample(peers[1:], 90))
        for peer in swarm.random.sample(swarm.peers, 20):
            assert await values(peer.node) == [b"here"]

    simulate(test)


def test_a_lossy_slow_network_still_works():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(20)
        await peers[0].node.announce(*NAME, b"here", 60)
        await asyncio.sleep(60)
        for peer in peers:
            assert await values(peer.node) == [b"here"]

    simulate(test, link=LinkSettings(latency_s=0.3, jitter_s=0.2, loss=0.02, bandwidth_bytes_s=100_000))


def test_nobody_answering_is_told_apart_from_nothing_found():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        await swarm.kill(peers[1:])
        with pytest.raises(Unreachable, match="too few of 5 known peers answered"):
            await peers[0].node.find([NAME], timeout_s=10)
        with pytest.raises(DeadlineExceeded, match="within 1 s"):
            await peers[0].node.find([NAME], timeout_s=1)

    simulate(test)


def test_a_read_cut_short_returns_what_it_has():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        await peers[0].node.announce(*NAME, b"here", 600)
        await swarm.kill(peers[1:])
        found = await peers[0].node.find([NAME, ("servers", b"other")], timeout_s=0.5)
        assert [record.value for record in found[NAME]] == [b"here"]
        assert found[("servers", b"other")] == []

    simulate(test)


def test_early_stop_is_a_few_calls():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.populate(300)
        await peers[0].node.announce(*NAME, b"here", 600)
        for peer in peers[50:70]:
            before = peer.endpoint.calls[FIND]
            assert await values(peer.node, holders=1, paths=1) == [b"here"]
            assert peer.endpoint.calls[FIND] - before <= 12

    simulate(test)


# -- what is refused at home -------------------------------------------------------------------------


def test_only_own_records_can_be_stored():
    async def test(swarm: SimSwarm) -> None:
        (peer,) = await swarm.grow(1)
        foreign = Record.sign(Identity.generate(), *NAME, b"x", sequence=1, issued_at=1_750_000_000, ttl_s=60)
        with pytest.raises(InvalidArgument, match=r"only .* itself"):
            await peer.node.store(foreign)

    simulate(test)


def test_store_once_counts_holders_and_lets_it_expire():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        node = peers[0].node
        assert await node.store(node.sign(*NAME, b"x", 60), node.sign("models", b"m", b"y", 60)) == 5
        assert await values(peers[1].node) == [b"x"]
        await asyncio.sleep(61)
        assert await values(peers[1].node) == []

    simulate(test)


def test_the_swarms_size_is_counted_or_guessed():
    async def test(swarm: SimSwarm) -> None:
        few = await swarm.grow(3)
        client = (await swarm.grow(1, client_mode=True))[0]
        await asyncio.sleep(10)
        assert [peer.node.swarm_size for peer in (*few, client)] == [3, 3, 3, 3]
        many = await swarm.populate(500)
        assert 250 < many[0].node.swarm_size < 1000

    simulate(test)


def test_the_identity_must_be_the_networks():
    async def test(swarm: SimSwarm) -> None:
        endpoint = swarm.network.endpoint(Identity.generate().peer_id, "/ip4/5.6.7.8/tcp/1")
        with pytest.raises(InvalidArgument):
            DhtNode(Identity.generate(), endpoint, rules=RULES)

    simulate(test)


def test_two_runs_of_one_seed_are_the_same():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(15)
        await peers[0].node.announce(*NAME, b"here", 60)
        await asyncio.sleep(300)
        traffic = swarm.network.traffic
        seen.append((traffic.calls, traffic.messages, traffic.bytes, now_s()))

    seen: list[tuple[int, int, int, float]] = []
    for _ in range(2):
        simulate(test, link=LinkSettings(jitter_s=0.05, loss=0.01))
    assert seen[0] == seen[1]


def test_contacts_keep_the_address_they_were_reached_at():
    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(3)
        await asyncio.sleep(10)
        known = {contact.peer_id: contact for contact in peers[0].node.known_peers()}
        assert known[peers[2].contact.peer_id] == Contact(
            peers[2].contact.peer_id, peers[2].endpoint.addresses
        )

    simulate(test)
