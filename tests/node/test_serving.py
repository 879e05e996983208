"""Servers as processes: they find their blocks, say what matters once, and leave in the time they state."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import petalite
from petalite.model.checkpoint import Checkpoint
from petalite.model.hashing import write_manifest
from petalite.node.processes import NodeProcess, bootstrap_node, serve_node
from tests.helpers.checkpoints import tiny_llama

LISTEN = ("--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1")
THREE_BLOCKS_GIB = 3.5 * (1000 * 256 + 30_848 * 4) / 2**30  # keys and values of 1,000 tokens, and weights
DRAIN_S = 10.0
FAREWELL_S = 5.0


@pytest.mark.slow
def test_servers_without_blocks_cover_the_model_and_sigterm_ends_one_in_time(tmp_path: Path) -> None:
    """The one that is told to leave has a session open, which goes on elsewhere without losing a token."""
    model = str(tiny_llama(tmp_path / "tiny", num_hidden_layers=6))
    fitting = ("--memory", f"{THREE_BLOCKS_GIB:.6f}", "--cache-tokens", "1000", "--device", "cpu")
    prompt = list(range(30))
    with petalite.load(model) as alone:
        expected = alone.generate(prompt, max_new_tokens=24).token_ids
    with ExitStack() as stack:
        bootstrap = stack.enter_context(bootstrap_node())
        found = []
        for _ in range(2):
            server = stack.enter_context(serve_node(model, "auto", [bootstrap.address], *fitting))
            assert server.address
            found.append(next(line.split()[1] for line in server.lines if line.startswith("  blocks")))
        assert sorted(found) == ["0:3", "3:6"]
        leaving = stack.enter_context(serve_node(model, "0:6", [bootstrap.address], "--max-sessions", "2"))
        assert leaving.address
        said = len(leaving.lines)
        joined = stack.enter_context(petalite.load(model, peers=[bootstrap.address]))
        with joined.session(100) as session:
            stopped_s = None
            for _ in joined.stream(prompt, max_new_tokens=24, session=session):
                if stopped_s is None:
                    began_s = time.monotonic()
                    assert leaving.stop(signal.SIGTERM) == 0
                    stopped_s = time.monotonic() - began_s
            assert session.token_ids[len(prompt) :] == expected[:-1]
        assert stopped_s is not None
        assert stopped_s < DRAIN_S + FAREWELL_S
        assert list(leaving.lines)[said:] == ["SIGTERM: leaving the swarm"]


@pytest.mark.slow
def test_servers_fetch_a_model_that_they_were_only_told_the_id_of(tmp_path: Path) -> None:
    """From the one that has the folder, and once that is killed from each other. A new life of one that had
    all it needs asks nobody.
    """
    folder = tiny_llama(tmp_path / "tiny", num_hidden_layers=6)
    write_manifest(Checkpoint.open(folder))
    model_id = Checkpoint.open(folder).model_id()
    prompt = list(range(30))
    with petalite.load(str(folder)) as alone:
        expected = alone.generate(prompt, max_new_tokens=8).token_ids
    with ExitStack() as stack:
        bootstrap = stack.enter_context(bootstrap_node())
        peers = ("--peers", str(bootstrap.address))

        def fetching(number: int, blocks: str, *joining: str) -> NodeProcess:
            environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / str(number))}
            command = ("serve", model_id, "--blocks", blocks, *joining, *LISTEN)
            return stack.enter_context(NodeProcess(*command, environment=environment))

        first = stack.enter_context(serve_node(str(folder), "0:6", [bootstrap.address]))
        assert first.address
        second = fetching(2, "0:4", *peers)
        assert second.address
        third = fetching(3, "3:6", *peers)
        assert third.address
        first.kill()
        fourth = fetching(4, "2:5", *peers)
        assert fourth.address
        with petalite.load(str(folder), peers=[bootstrap.address]) as joined:
            assert joined.generate(prompt, max_new_tokens=8).token_ids == expected
        assert second.stop() == 0
        assert fetching(2, "0:4", "--new-swarm").address
