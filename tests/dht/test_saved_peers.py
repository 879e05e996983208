"""What is written is read back by `Multiaddr.parse`, the parser of every other address."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalite.dht.contacts import Contact
from petalite.dht.saved_peers import MAX_SAVED, load_peers, save_peers
from petalite.net.identity import Identity
from petalite.net.multiaddr import Multiaddr

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 6)]


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = tmp_path / "deep" / "peers"
    save_peers(path, [Contact(peer, (f"/ip4/5.6.7.{n}/tcp/1",)) for n, peer in enumerate(PEERS)])
    expected = [Multiaddr.parse(f"/ip4/5.6.7.{n}/tcp/1/p2p/{peer}") for n, peer in enumerate(PEERS)]
    assert load_peers(path) == expected
    assert [file.name for file in path.parent.iterdir()] == ["peers"]


def test_no_file_is_no_peers(tmp_path: Path):
    assert load_peers(tmp_path / "peers") == []


def test_a_damaged_file_gives_what_can_be_read(tmp_path: Path):
    path = tmp_path / "peers"
    good = f"/ip4/5.6.7.8/tcp/1/p2p/{PEERS[0]}"
    path.write_bytes(b"\xff\xfe\0garbage\n" + good.encode() + b"\n/ip4/5.6.7")
    assert load_peers(path) == [Multiaddr.parse(good)]


def test_a_huge_file_is_read_in_part(tmp_path: Path):
    path = tmp_path / "peers"
    path.write_text("\n".join(f"/ip4/5.6.7.8/tcp/{n}/p2p/{PEERS[0]}" for n in range(1, 5000)))
    assert len(load_peers(path)) == MAX_SAVED


def test_a_place_that_cannot_be_written_is_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    save_peers(tmp_path / "file" / "peers", [Contact(PEERS[0], ("/ip4/5.6.7.8/tcp/1",))])
    assert "cannot save peers" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
