"""Joining and coming back: real hosts on loopback, in one process."""

from __future__ import annotations

import logging
import secrets
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from petalite.errors import Unreachable
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr
from petalite.swarm import peer as peer_module
from petalite.swarm.peer import PeerSettings, SwarmPeer

LISTEN = (Multiaddr.parse("/ip4/127.0.0.1/tcp/0"),)
NOBODY = Multiaddr.parse("/ip4/127.0.0.1/tcp/9").with_peer(Identity.from_seed(b"\x01" * 32).peer_id)


def member(
    *bootstrap: Multiaddr, peers_file: Path | None = None, lan: bool = False, key: bytes | None = None
) -> SwarmPeer:
    return SwarmPeer(Identity.generate(), PeerSettings(LISTEN, bootstrap, key, lan, peers_file))


async def test_after_a_restart_saved_peers_do_for_the_bootstrap(tmp_path: Path) -> None:
    file = tmp_path / "node.peers"
    async with AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(member())
        async with member(*bootstrap.addresses) as other:
            async with member(*bootstrap.addresses, peers_file=file):
                pass
            await stack.aclose()
            async with member(peers_file=file) as again:
                assert other.identity.peer_id in {contact.peer_id for contact in again.dht.known_peers()}


async def test_whoever_was_given_no_address_waits_for_the_peers_it_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bootstrap node that starts before all others is no failure."""
    file = tmp_path / "node.peers"
    file.write_text(f"{NOBODY}\n")
    with caplog.at_level(logging.WARNING):
        async with member(peers_file=file) as alone:
            assert alone.addresses
    assert "alone until somebody comes" in caplog.text


async def test_saved_peers_do_not_hide_that_the_given_ones_are_silent(tmp_path: Path) -> None:
    file = tmp_path / "node.peers"
    file.write_text(f"{NOBODY}\n")
    with pytest.raises(Unreachable, match=str(NOBODY)):
        async with member(NOBODY, peers_file=file):
            pass


async def test_peers_on_one_network_need_no_address() -> None:
    """Real multicast DNS; the key keeps other swarms of this machine out."""
    pytest.importorskip("zeroconf")
    key = secrets.token_bytes(32)
    async with AsyncExitStack() as stack:
        try:
            first = await stack.enter_async_context(member(lan=True, key=key))
        except Unreachable as error:
            pytest.skip(f"no multicast here: {error}")
        client = await stack.enter_async_context(
            SwarmPeer(Identity.generate(), PeerSettings(swarm_key=key, lan=True))
        )
        assert [contact.peer_id for contact in client.dht.known_peers()] == [first.identity.peer_id]


async def test_a_client_that_finds_nobody_on_the_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zeroconf")
    monkeypatch.setattr(peer_module, "_LAN_S", 0.2)
    alone = SwarmPeer(Identity.generate(), PeerSettings(swarm_key=secrets.token_bytes(32), lan=True))
    with pytest.raises(Unreachable, match="local network"):
        async with alone:
            pass
