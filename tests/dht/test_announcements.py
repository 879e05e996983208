"""Announcements that are changed, given up and cut off: what stands in the swarm after that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from petalite.dht.records import MAX_VALUE_BYTES
from petalite.errors import InvalidArgument
from petalite.sim.dht import SimPeer, SimSwarm
from tests.dht.test_node import NAME, simulate, values

OTHER = ("servers", b"model/1")


def silence(peers: Iterable[SimPeer], *, up: bool = False) -> None:
    for peer in peers:
        peer.endpoint.up = up


def test_what_cannot_be_said_leaves_what_was_said_before():
    """A value that nobody would take is refused, and the one before lives on for ten lives."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(5)
        announcement = await peers[0].node.announce(*NAME, b"one", 60)
        for wrong in (bytes(MAX_VALUE_BYTES + 1), {NAME: b"two", ("", b"nowhere"): b"three"}):
            with pytest.raises(InvalidArgument):
                await announcement.update(wrong)
        assert announcement.entries == {NAME: b"one"}
        await asyncio.sleep(600)
        assert await values(peers[3].node) == [b"one"]

    simulate(test)


def test_a_withdrawal_that_is_given_up_is_not_announced_again():
    """It waits behind an update whose peers are silent; who withdraws does not wait for them."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        announcement = await peers[0].node.announce(*NAME, b"one", 60)
        silence(peers[1:])
        updating = asyncio.create_task(announcement.update(b"two"))
        await asyncio.sleep(0.5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await announcement.withdraw()
        silence(peers[1:], up=True)
        await updating
        await asyncio.sleep(120)
        assert await values(peers[3].node) == []

    simulate(test)


def test_an_update_that_is_cut_off_has_left_no_name_behind():
    """It was to leave one, whose holders were silent; what withdraws all withdraws that too."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(6)
        announcement = await peers[0].node.announce(*NAME, b"one", 60)
        silence(peers[1:])
        updating = asyncio.create_task(announcement.update({OTHER: b"two"}))
        await asyncio.sleep(0.5)
        updating.cancel()
        silence(peers[1:], up=True)
        with pytest.raises(asyncio.CancelledError):
            await updating
        await announcement.withdraw()
        await swarm.kill(peers[:1])
        assert await values(peers[3].node) == []

    simulate(test)


def test_holders_that_have_all_left_are_replaced_at_once():
    """Announced for an hour, it is stored again after a quarter of one; where nobody takes it any more, the
    nearest are looked for within seconds."""

    async def test(swarm: SimSwarm) -> None:
        peers = await swarm.grow(4)
        announcement = await peers[0].node.announce(*NAME, b"here", 3600)
        await swarm.kill(peers[1:])
        newcomers = [await swarm.add() for _ in range(3)]
        for newcomer in newcomers:
            await newcomer.node.join([peers[0].address])
        await asyncio.sleep(920)
        assert announcement.n_holders == 3

    simulate(test)
