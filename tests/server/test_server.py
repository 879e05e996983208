"""Whole servers on loopback in one process: where they join, how they move, what they say of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

import petalite
from petalite.dht.announcements import Announcement
from petalite.errors import InvalidArgument, ShuttingDown, Unreachable
from petalite.server import loaded
from petalite.server.loaded import ComputeSettings
from petalite.server.memory import MemorySettings
from petalite.server.moving import MoveSettings, look
from petalite.server.node import Node
from petalite.server.server import BlockServer, ServerSettings, _end
from petalite.server.throughput import BlockSpeed
from petalite.swarm.records import ServerRecord, pack, unpack
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.waiting import until

PROMPT = list(range(30))
HALF = MemorySettings(cache_tokens=200, limit_bytes=3 * (200 * 256 + 30_848 * 4) + 4096)  # three blocks
SOON = MoveSettings(check_s=3600.0, claim_s=0.2, drain_s=0.1)


@pytest.fixture(autouse=True)
def _equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placement depends on speed, which must not depend on what else this machine does."""
    monkeypatch.setattr(loaded, "measure", lambda span: BlockSpeed(0.001, 0.001))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_llama(tmp_path / "tiny", num_hidden_layers=6))


class Servers:
    def __init__(self, model: str, stack: AsyncExitStack) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self._stack = stack

    async def start(self, blocks: str | None = None, **changes: Any) -> BlockServer:
        peers = [address for node in self.nodes[:1] for address in node.addresses]
        node = await self._stack.enter_async_context(Node(listen=["/ip4/127.0.0.1/tcp/0"], peers=peers))
        self.nodes.append(node)
        settings = {"memory": HALF, "moving": SOON, "drain_s": 0.1, "compute": ComputeSettings(threads=1)}
        span = Span.parse(blocks) if blocks else None
        return await node.serve(self.model, ServerSettings(blocks=span, **(settings | changes)))


@pytest.fixture
async def servers(model: str) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(model, stack)


async def test_servers_join_where_the_swarm_is_weakest(servers: Servers) -> None:
    first = await servers.start()
    assert (first.span, first.pinned) == (Span(0, 3), False)
    second = await servers.start()
    assert second.span == Span(3, 6)
    pinned = await servers.start("1:3")
    third, fourth = await asyncio.gather(servers.start(), servers.start())
    assert {third.span, fourth.span} == {Span(0, 3), Span(3, 6)}
    await pinned.directory.refresh(timeout_s=5)
    said = {entry.peer: entry.record for entry in pinned.directory.servers}
    assert len(said) == 5
    assert all(record.serving and record.claim is None for record in said.values())
    assert said[pinned.peer_id].pinned
    assert said[first.peer_id].tokens_per_s == pytest.approx(500)  # two of three blocks on average, 1 ms each


async def test_a_move_under_a_live_session_loses_no_token(servers: Servers) -> None:
    """A server of the session's chain moves away after a few tokens; new sessions are refused meanwhile."""
    await servers.start("3:6")
    moving = await servers.start()
    assert moving.span == Span(0, 3)
    async with petalite.Swarm(peers=servers.nodes[0].addresses) as joined:
        model = await joined.model(servers.model)
        expected = (await model.generate(PROMPT, max_new_tokens=40)).text
        text, move = "", None
        async for piece in model.stream(PROMPT, max_new_tokens=40):
            text += piece
            if move is None and len(text) > 5:
                assert moving.sessions.count == 1
                other = await servers.start("0:3")
                move = asyncio.create_task(moving.move(Span(3, 6)))
        assert text == expected
        assert move is not None
        await move
        assert moving.sessions.count == 0
        assert moving.loaded.backend.span.start == 3
        await other.directory.refresh(timeout_s=5)
        spans = {entry.peer: entry.record.span for entry in other.directory.servers}
        assert spans[moving.peer_id] == Span(3, 6)
        assert (await model.generate(PROMPT, max_new_tokens=40)).text == expected


async def test_a_server_goes_where_another_left(servers: Servers) -> None:
    first = await servers.start()
    leaving = await servers.start("3:6")
    third = await servers.start("0:3")
    await look(first, SOON)
    assert first.span == Span(0, 3)
    await leaving.close()
    await look(first, SOON)
    assert first.span == Span(3, 6)
    assert third.span == Span(0, 3)
    assert first.loaded.backend.span.start == 3


async def test_blocks_that_cannot_be_loaded_any_more_end_the_server(servers: Servers) -> None:
    """The model folder is gone when the server wants to move, and so are the blocks it had."""
    watching = await servers.start("0:6", memory=MemorySettings(cache_tokens=200))
    moving = await servers.start()
    (Path(servers.model) / "model.safetensors").unlink()
    with pytest.raises(petalite.errors.InvalidCheckpoint):
        await moving.move(Span(3, 6))
    assert isinstance(moving.failed.exception(), petalite.errors.InvalidCheckpoint)
    await watching.directory.refresh(timeout_s=5)
    assert [entry.peer for entry in watching.directory.servers] == [watching.peer_id]


async def test_a_move_that_cannot_be_announced_is_none(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is served then is what is said to be."""
    await servers.start("3:6")
    moving = await servers.start()
    with monkeypatch.context() as patched:
        patched.setattr(Announcement, "update", AsyncMock(side_effect=Unreachable("nobody answered")))
        with pytest.raises(Unreachable):
            await moving.move(Span(3, 6))
    record = moving._record()
    assert (record.span, record.serving, record.claim) == (Span(0, 3), True, None)
    async with petalite.Swarm(peers=servers.nodes[0].addresses) as joined:
        model = await joined.model(servers.model)
        assert (await model.generate(PROMPT, max_new_tokens=2)).token_ids
    await moving.move(Span(3, 6))
    assert moving.loaded.backend.span.start == 3


async def test_what_ends_by_mistake_ends_the_server(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalite.server.moving.look", AsyncMock(side_effect=ZeroDivisionError))
    server = await servers.start(moving=replace(SOON, check_s=0.01))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(server.failed, 30)
    with pytest.raises(ZeroDivisionError):
        await server.close()


async def test_links_to_the_servers_of_the_next_block_are_measured(servers: Servers) -> None:
    first, second = await servers.start("0:3"), await servers.start("3:6")
    await first.directory.refresh(timeout_s=5)
    await first.links.look(first.span, first.directory.servers)
    assert [link.peer for link in first.links.to] == [second.peer_id]
    assert first.links.bytes_per_s is not None
    assert first.links.bytes_per_s > 1e6
    record = unpack(ServerRecord, pack(first._record()))
    assert record.links == first.links.to


async def test_what_does_not_fit_is_refused(servers: Servers) -> None:
    with pytest.raises(InvalidArgument, match="--memory"):
        await servers.start(memory=MemorySettings(limit_bytes=1 << 20, cache_tokens=1 << 20))
    with pytest.raises(InvalidArgument, match="--memory allows"):
        await servers.start("0:6", memory=HALF)
    with pytest.raises(InvalidArgument, match="device 'tpu'"):
        await servers.start(compute=ComputeSettings(device="tpu"))
    with pytest.raises(InvalidArgument, match="'int9'; choose none, int8, nf4"):
        await servers.start(compute=ComputeSettings(quant="int9"))


async def test_leaving_takes_no_longer_than_it_says(servers: Servers) -> None:
    """With a session open that does not end by itself."""
    first = await servers.start("0:6", memory=MemorySettings(cache_tokens=200), drain_s=0.3)
    async with petalite.Swarm(peers=first.peer.addresses) as joined:
        model = await joined.model(servers.model)
        session = model.session(100)
        async with session:
            await model.generate(PROMPT, max_new_tokens=2, session=session)
            await until(lambda: first.sessions.count == 1)
            assert first._record().sessions == 1
            async with asyncio.timeout(0.3 + 5.0):
                await first.close()
            assert first.sessions.count == 0
    with pytest.raises(ShuttingDown):
        await first._load(Span(0, 1))


async def test_leaving_with_a_claim_takes_no_longer_either(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is not taken back first, from peers that are silent: all that it announced is withdrawn."""
    first, leaving = await servers.start(), await servers.start("3:6")
    await servers.start("0:3")
    await leaving.close()
    claimed = asyncio.Event()

    async def prepare(span: Span) -> None:
        claimed.set()

    async def silence(*_: object) -> None:
        await asyncio.sleep(60.0)

    monkeypatch.setattr(first, "prepare", prepare)
    looking = first._spawn(look(first, replace(SOON, claim_s=60.0)))
    first._closing.push_async_callback(_end, looking)
    await claimed.wait()
    monkeypatch.setattr(Announcement, "update", silence)
    async with asyncio.timeout(0.1 + 5.0) as deadline:
        await first.close()
    assert not deadline.expired()
    assert looking.cancelled()


async def test_who_gives_up_waiting_for_a_task_to_end_is_not_held() -> None:
    """The task takes its time over being cancelled; its end is waited for, but not against one's own."""

    async def slow() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60.0)

    task = asyncio.create_task(slow())
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await _end(task)
    task.cancel()
    await asyncio.wait([task])
