"""Sessions over servers in memory, under virtual time: steps, rows, codecs, and the time that they take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from petalite.client import carrying
from petalite.client.session import Session, StepInput
from petalite.client.settings import Routing, SessionSettings
from petalite.errors import InvalidArgument, MissingBlocks, NotFinite, SessionGap, SessionLimit
from petalite.swarm.messages import LAST, NONE
from petalite.swarm.spans import Span
from tests.client.fakes import CLIENT, E, FakeSwarm, peer, reference
from tests.client.runs import (
    BOTH,
    CHAIN,
    SPANS,
    WHOLE,
    messages_of_a_run,
    run,
    session_over,
    tokens,
    until_free,
)
from tests.helpers.memory_net import MemoryCall, MemoryNet


@BOTH
def test_without_failures(pushing: bool) -> None:
    """In a ring, servers push to each other and the client hears from the last alone."""
    sent = messages_of_a_run(pushing)
    between = sum(CLIENT not in pair for pair in sent)
    assert between > 2 * 8 if pushing else between == 0


@BOTH
def test_rows_are_packed_and_recovered_together(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        a, b = tokens(5, 1), tokens(7, 2)
        async with session_over(swarm, rows=2) as session:
            first = await session.step(torch.cat([a[:3], b[:6]]), [(0, 0, 3), (1, 0, 6)], LAST)
            assert torch.equal(first, torch.stack([reference(WHOLE, a)[2], reference(WHOLE, b)[5]]))
            chain = [hop.peer for hop in session.chain]
            swarm.net.kill(chain[0])
            swarm.net.kill(chain[2])
            second = await session.step(torch.cat([b[6:], a[3:]]), [(1, 6, 1), (0, 3, 2)])
            assert torch.equal(second, torch.cat([reference(WHOLE, b)[6:], reference(WHOLE, a)[3:]]))
            at_servers = sum(
                service.kept_bytes for who, service in swarm.services.items() if who in chain[1:2]
            )
            edges = 1 if pushing else len(session.chain)
            assert session.kept_bytes == 4 * 12 * E * edges
            assert at_servers == (4 * 12 * E if pushing else 0)

    run(main())


@BOTH
def test_hops_of_other_codecs_understand_each_other(pushing: bool) -> None:
    async def main() -> torch.Tensor:
        swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)}, pushing=pushing, dtypes={2: torch.bfloat16})
        async with session_over(swarm) as session:
            return await session.step(tokens(2), [(0, 0, 2)])

    assert run(main()).dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("codec", ["f32", "bf16", "q8"])
def test_packing_changes_bytes_on_the_wire_and_nothing_else(
    pushing: bool, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill, also beside the loop, and steps; what travels is less, and every edge has it packed."""
    travelled: list[tuple[str, int]] = []
    send = MemoryCall.send

    async def counting(self: MemoryCall, body: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        travelled.extend((body["codec"], len(buffer)) for buffer in buffers)
        await send(self, body, buffers)

    async def main(wire: str) -> tuple[torch.Tensor, int, set[str]]:
        travelled.clear()
        swarm = FakeSwarm(SPANS, pushing=pushing)
        states = tokens(300).repeat(1, 1)
        chain = Session(swarm, WHOLE, E, max_length=999, settings=SessionSettings(wire=wire))
        async with chain as session:
            outputs = [await session.step(states, [(0, 0, 300)])]
            outputs.append(await session.step(tokens(1), [(0, 300, 1)]))
        return torch.cat(outputs), sum(size for _, size in travelled), {name for name, _ in travelled}

    monkeypatch.setattr(MemoryCall, "send", counting)
    (plain, most, names), (packed, fewer, others) = run(main(codec)), run(main(codec + "+zstd"))
    assert torch.equal(plain, packed) and fewer < most
    assert (names, others) == ({codec}, {codec + "+zstd"})


@BOTH
@pytest.mark.parametrize("packed", ["", "+zstd"], ids=["plain", "packed"])
def test_a_codec_that_loses_is_replayed_to_the_bit(pushing: bool, packed: str) -> None:
    """With q8 on the wire, a session that lost each of its servers once says what an undisturbed one says; as
    long as the chain is cut at the same blocks, since every edge rounds. Packed or not, the same is kept.
    """
    twice = CHAIN | {number + 3: span for number, span in CHAIN.items()}

    async def main(kills: bool) -> torch.Tensor:
        swarm = FakeSwarm(twice, pushing=pushing)
        chain = Session(swarm, WHOLE, E, max_length=99, settings=SessionSettings(wire="q8" + packed))
        async with chain as session:
            outputs = [await session.step(tokens(3), [(0, 0, 3)])]
            for position in range(3, 6):
                if kills:
                    swarm.net.kill(
                        next(hop.peer for hop in session.chain if hop.span.end == 2 * position - 4)
                    )
                outputs.append(await session.step(tokens(1, position), [(0, position, 1)]))
            assert session.kept_bytes == (1 if pushing else len(session.chain)) * 6 * (E + 2)
        return torch.cat(outputs)

    assert torch.equal(run(main(True)), run(main(False)))


@BOTH
def test_a_step_that_is_wrong_in_itself_is_not_tried_for_ever(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            with pytest.raises(NotFinite):
                await session.step(tokens(1) * float("nan"), [(0, 0, 1)])
            assert torch.equal(await session.step(tokens(1), [(0, 0, 1)]), reference(WHOLE, tokens(1))), (
                "the session can go on with better input"
            )

    run(main())


@pytest.mark.parametrize(("ahead_bytes", "trips"), [(1 << 20, 1), (1, 3)], ids=["small parts", "large parts"])
def test_a_prefill_keeps_servers_and_links_at_work(
    ahead_bytes: int, trips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve chunks through three servers, each message on its way for 0.1 s: one after another they take
    twelve trips of 0.4 s over the ring. All are under way at once where they are small; of large ones, as
    many as there are servers, and one.
    """

    async def main() -> float:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.1))
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            began_s = asyncio.get_running_loop().time()
            inputs = [StepInput(tokens(3), [(0, 3 * i, 3)], NONE) for i in range(12)]
            await session.steps(inputs)
            return asyncio.get_running_loop().time() - began_s

    monkeypatch.setattr(carrying, "AHEAD_BYTES", ahead_bytes)
    assert run(main()) == pytest.approx(0.4 * trips)


def test_a_ring_takes_one_way_of_each_edge() -> None:
    """Three servers, 0.1 s for each message: four edges of the ring, against six of the star."""

    async def main(pushing: bool) -> float:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.1), pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            began_s = asyncio.get_running_loop().time()
            await session.step(tokens(1), [(0, 1, 1)])
            return asyncio.get_running_loop().time() - began_s

    assert run(main(True)) == pytest.approx(0.4)
    assert run(main(False)) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("rows", "shape", "error"),
    [
        ([(0, 0, 2)], (3, E), InvalidArgument),
        ([(0, 0, 2)], (2, E + 1), InvalidArgument),
        ([(1, 0, 2)], (2, E), InvalidArgument),
        ([(0, 0, 0)], (0, E), InvalidArgument),
        ([(0, 1, 2)], (2, E), SessionGap),
        ([(0, -1, 2)], (2, E), SessionGap),
        ([(0, 0, 101)], (101, E), SessionLimit),
    ],
)
def test_wrong_steps_are_refused_before_anything_is_sent(
    rows: list[tuple[int, int, int]], shape: tuple[int, int], error: type[Exception]
) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS)
        async with session_over(swarm) as session:
            for _ in range(10):
                await asyncio.sleep(0)
            before = swarm.net.messages
            with pytest.raises(error):
                await session.step(torch.zeros(shape), rows)
            assert swarm.net.messages == before

    run(main())


@BOTH
def test_a_much_better_chain_is_changed_to_when_the_time_is_good(pushing: bool) -> None:
    """One server of everything appears beside three slow ones; the history goes over by a replay."""

    async def main() -> None:
        swarm = FakeSwarm(CHAIN, net=MemoryNet(latency_s=0.2), pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            assert not await session.reconsider()
            swarm.add(9, WHOLE)
            assert await session.reconsider()
            output = await session.step(fed[4:], [(0, 4, 2)])
            assert [hop.peer for hop in session.chain] == [peer(9)]
            assert not swarm.failures
        assert torch.equal(output, reference(WHOLE, fed)[4:])
        await until_free(swarm)

    run(main())


@BOTH
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_server_that_nobody_tells_of_any_more_is_left_if_another_has_its_blocks(
    pushing: bool, hop: int
) -> None:
    """Its record ran out, and it still serves the session."""

    async def main(spans: dict[int, Span]) -> bool:
        swarm = FakeSwarm(spans, pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            await session.step(fed[:4], [(0, 0, 4)])
            gone = session.chain[hop].peer
            swarm.servers[:] = [entry for entry in swarm.servers if entry.peer != gone]
            changed = await session.reconsider()
            assert torch.equal(await session.step(fed[4:], [(0, 4, 2)]), reference(WHOLE, fed)[4:])
            assert changed is (gone not in {one.peer for one in session.chain})
        return changed

    assert run(main(SPANS))
    assert not run(main(CHAIN))


def test_servers_that_are_not_wanted_are_not_used() -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS)
        swarm.outlook.routing = Routing(blocked=frozenset({peer(1), peer(3)}), aim="throughput")
        async with session_over(swarm) as session:
            await session.step(tokens(1), [(0, 0, 1)])
            assert not {peer(1), peer(3)} & {hop.peer for hop in session.chain}
        swarm.outlook.routing = Routing(allowed=frozenset({peer(1)}))
        with pytest.raises(MissingBlocks):
            async with session_over(swarm):
                pass

    run(main())
