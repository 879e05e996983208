"""Replays are judged by progress: who is stuck in one is replaced soon, who is slow is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from petalite.client.session import Session
from petalite.net.identity import PeerId
from petalite.swarm.spans import Span
from tests.client.fakes import FakeSwarm, peer, reference
from tests.client.runs import BOTH, CHAIN, SPANS, WHOLE, run, session_over, tokens, until_free

N = 600
FED = tokens(N + 1)


async def filled(session: Session) -> None:
    """So many tokens in small steps, of which nothing is learnt about a replay's."""
    for position in range(0, N, 15):
        await session.step(FED[position : position + 15], [(0, position, 15)])


async def seconds_of_a_step(session: Session) -> float:
    """The next one, whose outputs are right."""
    clock = asyncio.get_running_loop().time
    began_s = clock()
    output = await session.step(FED[N:], [(0, N, 1)])
    assert torch.equal(output, reference(WHOLE, FED)[N:])
    return clock() - began_s


def recovered(swarm: FakeSwarm, hop: int, spoil: Callable[[PeerId], None], n_spoilt: int) -> float:
    """How long a step takes before which the hop dies; the first holders of its blocks that a session opens
    at then are spoilt.
    """

    async def main() -> float:
        async with session_over(swarm, max_length=N + 1) as session:
            await filled(session)
            victim = session.chain[hop]
            spoilt: list[PeerId] = []
            plan = swarm.plan

            async def spoiling(span: Span, **how: object) -> object:
                hops = await plan(span, **how)  # type: ignore[arg-type]
                for one in hops[-1:]:
                    if len(spoilt) < n_spoilt and one.peer not in spoilt:
                        spoilt.append(one.peer)
                        spoil(one.peer)
                return hops

            swarm.plan = spoiling  # type: ignore[method-assign,assignment]
            swarm.net.kill(victim.peer)
            took_s = await seconds_of_a_step(session)
            assert set(swarm.failures) == {victim.peer, *spoilt}
            assert not {hop.peer for hop in session.chain} & set(spoilt)
        await until_free(swarm)
        return took_s

    return run(main())


@BOTH
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_replacements_stuck_in_the_replay_are_replaced_soon(pushing: bool, hop: int) -> None:
    """Two of them, one after the other. A step of so many tokens would have 180 s."""
    spans = SPANS | {number + 10: CHAIN[hop + 1] for number in range(3)}
    swarm = FakeSwarm(spans, pushing=pushing)

    def spoil(who: PeerId) -> None:
        swarm.backends[who].stuck = True

    assert recovered(swarm, hop, spoil, 2) < 2 * 15.0


@BOTH
def test_of_two_in_a_row_the_stuck_one_is_replaced(pushing: bool) -> None:
    """It is the second; the first has all that it can take of the replay."""
    spans = CHAIN | {5: Span(2, 3), 6: Span(3, 4), 7: Span(3, 4)}
    swarm = FakeSwarm(spans, pushing=pushing)

    def spoil(who: PeerId) -> None:
        swarm.backends[who].stuck = True

    assert recovered(swarm, 1, spoil, 1) < 15.0


@BOTH
@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_slow_replacement_that_comes_further_stays(pushing: bool, hop: int) -> None:
    """A hundred seconds for what took none before, five of them for each small step of the client's."""

    async def main() -> None:
        swarm = FakeSwarm(CHAIN, pushing=pushing)
        async with session_over(swarm, max_length=N + 1) as session:
            await filled(session)
            await session.step(FED[N - 100 : N], [(0, N - 100, 100)])  # prefills are known to be quick
            swarm.add(9, CHAIN[hop + 1])
            swarm.backends[peer(9)].token_s = 0.16
            victim = session.chain[hop].peer
            swarm.net.kill(victim)
            assert 0.16 * N < await seconds_of_a_step(session) < 0.17 * N
            assert swarm.failures == [victim]

    run(main())


@BOTH
def test_who_only_ever_shows_a_little_is_replaced_in_the_end(pushing: bool) -> None:
    """A token every seven seconds; what a session waits for a prefill of as many tokens ends it."""

    async def main() -> None:
        swarm = FakeSwarm(CHAIN, pushing=pushing)
        async with session_over(swarm, max_length=N + 1) as session:
            await filled(session)
            swarm.add(9, CHAIN[2])
            swarm.backends[peer(9)].token_s = 7.0
            swarm.net.kill(session.chain[1].peer)
            asyncio.get_running_loop().call_later(20.0, swarm.add, 10, CHAIN[2])
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(Exception, match="came no further"):  # recovery_s is over by then
                await seconds_of_a_step(session)
            assert 180.0 <= asyncio.get_running_loop().time() - began_s < 190.0
            await seconds_of_a_step(session)

    run(main())
