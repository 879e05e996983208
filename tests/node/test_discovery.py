"""Processes that find each other with no centre: bootstrap nodes are killed, peers are remembered."""

from __future__ import annotations

import secrets
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from petalite.node.processes import NodeProcess, bootstrap_node, serve_node
from tests.helpers.checkpoints import tiny_llama

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0")


def petalite(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    command = [sys.executable, "-m", "petalite.node", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=4))


@pytest.mark.slow
def test_eight_processes_go_on_without_their_bootstrap(model: str) -> None:
    """Bootstrap and the only server of the last block are killed; a new server of it and a new client join
    through different peers that are left, and the text is the one of a single process."""
    with ExitStack() as stack:
        bootstrap = stack.enter_context(bootstrap_node())
        spans = ("0:2", "1:3", "2:4", "0:1", "0:3")
        servers = [stack.enter_context(serve_node(model, span, [bootstrap.address])) for span in spans]
        assert all(server.address for server in servers)
        bootstrap.kill()
        servers[2].kill()

        newcomer = stack.enter_context(serve_node(model, "3:4", [servers[0].address]))
        assert newcomer.address
        asked = ("generate", model, "--prompt", "A cat", "--max-new-tokens", "8")
        text = petalite(*asked, "--peers", str(servers[4].address))
        assert text == petalite(*asked, "--local")

        status = petalite("status", "--peers", str(servers[3].address))
        assert newcomer.peer_id.short() in status
        assert "nobody serves" not in status


def test_a_restarted_bootstrap_comes_back_to_its_swarm(model: str, tmp_path: Path) -> None:
    """With its identity and the peers it saved, and without any address."""
    again = ("bootstrap", *LISTEN, "--identity", str(tmp_path / "key"))
    with NodeProcess(*again) as first, serve_node(model, "0:4", [first.address]) as server:
        assert server.address
        peer_id = first.peer_id
        assert first.stop() == 0
        with NodeProcess(*again) as second:
            assert second.peer_id == peer_id
            assert second.address != first.address
            assert server.peer_id.short() in petalite("status", "--peers", str(second.address))


def test_on_one_network_no_address_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("zeroconf")
    key = tmp_path / "swarm.key"
    key.write_bytes(secrets.token_bytes(32))
    private = ("--lan", "--swarm-key", str(key))
    with NodeProcess("bootstrap", *LISTEN, *private) as node:
        assert node.address
        assert "peers of the DHT: 1 known" in petalite("status", *private)
