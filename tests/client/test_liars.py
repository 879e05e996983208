"""Servers that answer, and wrongly: whoever lies is replaced, and the outputs are those of honest ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from petalite.client.session import StepInput
from petalite.net.identity import PeerId
from tests.client.fakes import FakeSwarm, reference
from tests.client.runs import BOTH, SPANS, WHOLE, run, session_over, tokens
from tests.helpers.memory_net import MemoryCall, MemoryNet


@BOTH
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_server_that_computes_nonsense_is_replaced(pushing: bool, index: int) -> None:
    """NaN is noticed by whoever it reaches first; who made it and who was fed it are both left alone."""

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            await session.step(tokens(9)[:4], [(0, 0, 4)])
            liar = session.chain[index].peer
            swarm.backends[liar].lies = True
            output = await session.step(tokens(9)[4:], [(0, 4, 5)])
            assert liar not in [hop.peer for hop in session.chain]
        assert torch.equal(output, reference(WHOLE, tokens(9))[4:])

    run(main())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lie_about_one_row_of_a_prefill_is_not_taken_for_another(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts go one after the other, and their answers come in the same turn of the loop."""
    send = MemoryCall.send
    answers = itertools.count()

    async def lying(self: MemoryCall, body: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        if body.get("kind") == "done" and next(answers) == which:
            body = body | {"rows": [9, 0, 2]}
        await send(self, body, buffers)

    async def main() -> None:
        swarm = FakeSwarm({1: WHOLE, 2: WHOLE}, net=MemoryNet(latency_s=0.1))
        texts = [tokens(3, seed) for seed in range(3)]
        expected = [reference(WHOLE, text) for text in texts]
        async with session_over(swarm, rows=3) as session:
            liar = session.chain[0].peer
            prefill = [StepInput(text[:2], [(row, 0, 2)]) for row, text in enumerate(texts)]
            found = await session.steps(prefill)
            assert torch.equal(torch.cat(found), torch.cat([one[:2] for one in expected]))
            rows = [(row, 2, 1) for row in range(3)]
            found = [await session.step(torch.cat([text[2:] for text in texts]), rows)]
            assert torch.equal(torch.cat(found), torch.cat([one[2:] for one in expected]))
            assert swarm.failures == [liar]

    monkeypatch.setattr(MemoryCall, "send", lying)
    run(main())


LIES: dict[str, Callable[[dict[str, Any], list[Any]], tuple[dict[str, Any], list[Any]]]] = {
    "fewer bytes": lambda body, buffers: (body, [buffers[0][:-8]] if buffers else []),
    "no buffer": lambda body, buffers: (body, []),
    "two buffers": lambda body, buffers: (body, buffers * 2),
    "another row": lambda body, buffers: (body | {"rows": [1, 0, 1]}, buffers),
    "another step's number": lambda body, buffers: (body | {"number": body["number"] + 1000}, buffers),
    "an unknown codec": lambda body, buffers: (body | {"codec": "q3"}, buffers),
    "one hop too many": lambda body, buffers: (body | {"hops": body["hops"] * 2}, buffers),
    "an unknown kind": lambda body, buffers: (body | {"kind": "gift"}, buffers),
    "no fields": lambda body, buffers: ({"kind": "done"}, buffers),
}


@BOTH
def test_answers_of_other_steps_are_not_heard(pushing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last server gives each answer three times, one of them with an old epoch, and before it once more
    the answer to the step before; every step gets its own."""
    send = MemoryCall.send
    before: list[tuple[dict[str, Any], list[Any]]] = []

    async def repeating(self: MemoryCall, body: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        if body.get("kind") == "done":
            for old in before[-1:]:
                await send(self, *old)
            before.append((dict(body), list(buffers)))
            await send(self, body | {"epoch": 0}, buffers)
            await send(self, body, buffers)
        await send(self, body, buffers)

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            outputs = [await session.step(tokens(9)[:4], [(0, 0, 4)])]
            outputs += [await session.step(tokens(9)[i : i + 1], [(0, i, 1)]) for i in range(4, 9)]
            assert not swarm.failures
        assert torch.equal(torch.cat(outputs), reference(WHOLE, tokens(9)))

    monkeypatch.setattr(MemoryCall, "send", repeating)
    run(main())


@BOTH
@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_costs_its_server_the_session(
    pushing: bool, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last server lies in every answer, from some step on; another takes its place."""
    send = MemoryCall.send
    liars: set[PeerId] = set()

    async def lying(self: MemoryCall, body: dict[str, Any], buffers: Sequence[Any] = ()) -> None:
        if self.owner in liars and body.get("kind") == "done":
            body, buffers = LIES[lie](dict(body), list(buffers))
        await send(self, body, buffers)

    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        async with session_over(swarm) as session:
            outputs = [await session.step(tokens(9)[:4], [(0, 0, 4)])]
            liars.add(session.chain[-1].peer)
            outputs += [await session.step(tokens(9)[i : i + 1], [(0, i, 1)]) for i in range(4, 9)]
            assert not liars & {hop.peer for hop in session.chain}
            assert set(swarm.failures) >= liars
        assert torch.equal(torch.cat(outputs), reference(WHOLE, tokens(9)))

    monkeypatch.setattr(MemoryCall, "send", lying)
    run(main())
