"""Servers that share a board of announcements, under virtual time: who joins and moves where, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from petalite.net.identity import PeerId
from petalite.server import moving
from petalite.server.moving import MoveSettings, join, keep_placed, look
from petalite.sim.loop import VirtualTimeLoop
from petalite.swarm.placement import Holding, MoveCost
from petalite.swarm.spans import Span

N_BLOCKS = 12
QUICK = MoveSettings(check_s=60.0, claim_s=5.0)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


Board = dict[PeerId, Holding]


@dataclass
class FakeServer:
    """Announces at once, and loads for a minute."""

    number: int
    board: Board
    speed: float = 10.0
    moves: list[Span] = field(default_factory=list)
    prepared: Span | None = None
    n_blocks: int = N_BLOCKS

    @property
    def peer_id(self) -> PeerId:
        return peer(self.number)

    async def holdings(self) -> list[Holding]:
        await asyncio.sleep(0.1)
        return list(self.board.values())

    async def claim(self, span: Span | None) -> None:
        await asyncio.sleep(0.1)
        own = self.board.get(self.peer_id)
        if own is not None and own.serving:
            self.board[self.peer_id] = replace(own, claim=span)
        else:
            assert span is not None
            self.board[self.peer_id] = Holding(self.peer_id, span, self.speed, serving=False, claim=span)

    async def prepare(self, span: Span) -> None:
        self.prepared = span

    async def move(self, span: Span) -> None:
        assert self.prepared == span
        self.moves.append(span)
        self.serve(span, serving=False)
        await asyncio.sleep(60.0)
        self.serve(span)

    def serve(self, span: Span, *, serving: bool = True) -> FakeServer:
        self.board[self.peer_id] = Holding(self.peer_id, span, self.speed, serving)
        return self

    def cost(self) -> MoveCost:
        return MoveCost(60.0)


@pytest.fixture(autouse=True)
def _plans_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread knows nothing of virtual time."""

    async def at_once(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(moving, "aside", at_once)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def test_servers_that_start_at_once_take_different_blocks() -> None:
    async def main() -> Board:
        board: Board = {}
        FakeServer(9, board, speed=1.0).serve(Span(0, 12))
        joining = [FakeServer(number, board) for number in range(3)]
        spans = await asyncio.gather(*(join(server, 4, QUICK) for server in joining))
        assert sorted(spans) == [Span(0, 4), Span(4, 8), Span(8, 12)]
        return board

    run(main())


def test_the_first_server_waits_for_nobody() -> None:
    async def main() -> float:
        began_s = asyncio.get_running_loop().time()
        assert await join(FakeServer(0, {}), 4, QUICK) == Span(0, 4)
        return asyncio.get_running_loop().time() - began_s

    assert run(main()) < 1.0


def test_of_those_that_could_fill_a_gap_one_does() -> None:
    """Three look in the same moment, each on the same news."""

    async def main() -> None:
        board: Board = {}
        servers = [FakeServer(number, board).serve(Span(0, 4)) for number in range(3)]
        FakeServer(3, board).serve(Span(8, 12))
        await asyncio.gather(*(look(server, QUICK) for server in servers))
        assert sorted(move for server in servers for move in server.moves) == [Span(4, 8)]
        assert all(holding.claim is None for holding in board.values())

    run(main())


def test_a_swarm_left_alone_covers_its_gap_and_settles() -> None:
    """Twenty checks each. Every block that was served is served at every moment."""

    async def main() -> None:
        board: Board = {}
        spans = [Span(0, 4)] * 4 + [Span(8, 12)] * 3
        servers = [FakeServer(number, board).serve(span) for number, span in enumerate(spans)]
        tasks = [asyncio.create_task(keep_placed(server, QUICK)) for server in servers]
        covered = {*range(4), *range(8, 12)}
        for _ in range(1200):
            await asyncio.sleep(1.0)
            served = {block for one in board.values() if one.serving for block in one.span.blocks}
            assert covered <= served
            covered |= served
        assert covered == set(range(N_BLOCKS))
        assert sum(len(server.moves) for server in servers) <= 3
        for task in tasks:
            task.cancel()

    run(main())


def test_a_claim_is_taken_back_if_the_server_is_stopped_before_it_moves() -> None:
    async def main() -> None:
        board: Board = {}
        servers = [FakeServer(number, board).serve(Span(0, 8)) for number in range(2)]
        task = asyncio.create_task(look(servers[0], QUICK))
        await asyncio.sleep(1.0)
        assert board[peer(0)].claim is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert board[peer(0)].claim is None
        assert servers[0].moves == []

    run(main())
