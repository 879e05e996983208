"""One session for several at once: whoever comes too early is refused, and nothing is mixed up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from petalite.client.model import AsyncDistributedModel
from petalite.embedded import open_embedded
from petalite.errors import InvalidArgument, SessionLimit
from tests.client.fakes import FakeSwarm, reference
from tests.client.runs import BOTH, SPANS, WHOLE, run, session_over, tokens
from tests.helpers.checkpoints import tiny_llama

ONE, TWO = list(b"The cat sat on the mat"), list(b"The cat ran")


@BOTH
def test_a_second_step_is_refused_and_the_first_goes_on(pushing: bool) -> None:
    async def main() -> None:
        swarm = FakeSwarm(SPANS, pushing=pushing)
        fed = tokens(6)
        async with session_over(swarm) as session:
            first = asyncio.create_task(session.step(fed[:5], [(0, 0, 5)]))
            await asyncio.sleep(0)
            with pytest.raises(InvalidArgument, match="another step"):
                await session.step(tokens(1, 1), [(0, 0, 1)])
            outputs = [await first, await session.step(fed[5:], [(0, 5, 1)])]
        assert torch.equal(torch.cat(outputs), reference(WHOLE, fed))

    run(main())


@pytest_asyncio.fixture
async def model(tmp_path: Path) -> AsyncIterator[AsyncDistributedModel]:
    async with await open_embedded(str(tiny_llama(tmp_path / "tiny"))) as model:
        yield model


async def _ids(model: AsyncDistributedModel, prompt: list[int], count: int, **more: Any) -> list[int]:
    return (await model.generate(prompt, max_new_tokens=count, **more)).token_ids


@pytest.mark.parametrize("turns", range(12))
async def test_of_two_generations_in_one_session_each_is_right_or_refused(
    model: AsyncDistributedModel, turns: int
) -> None:
    """The second begins after any number of turns of the loop; and the session is good for a third."""
    expected = [await _ids(model, prompt, 12) for prompt in (ONE, TWO, ONE)]
    async with model.session(100) as session:
        first = asyncio.create_task(_ids(model, ONE, 12, session=session))
        for _ in range(turns):
            await asyncio.sleep(0)
        second = asyncio.create_task(_ids(model, TWO, 12, session=session))
        found = await asyncio.gather(first, second, return_exceptions=True)
        assert any(isinstance(one, InvalidArgument) for one in found)
        for one, right in zip(found, expected, strict=False):
            assert isinstance(one, InvalidArgument) or one == right
        assert await _ids(model, ONE, 12, session=session) == expected[2]


async def test_a_stream_that_another_generation_followed_cannot_go_on(model: AsyncDistributedModel) -> None:
    """And its closing, late, takes nothing of what the other left."""
    expected = await _ids(model, TWO, 30)
    async with model.session(100) as session:
        async with aclosing(model.stream(ONE, max_new_tokens=12, session=session)) as pieces:
            await anext(pieces)
            async with aclosing(model.stream(TWO, max_new_tokens=30, session=session)) as others:
                await anext(others)
                with pytest.raises(InvalidArgument, match="another generation"):
                    async for _ in pieces:
                        pass
                async for _ in others:
                    pass
        assert session.token_ids == TWO + expected[:-1]


async def test_what_is_refused_is_not_held(model: AsyncDistributedModel) -> None:
    """After a rollback, tokens that do not fit leave the session as it is."""
    expected = (await _ids(model, ONE[:10] + TWO, 5))[:5]
    async with model.session(40) as session:
        await session.feed(ONE)
        session.rollback(10)
        with pytest.raises(SessionLimit):
            await session.feed(TWO * 5)
        assert session.token_ids == ONE[:10]
        assert await _ids(model, ONE[:10] + TWO, 5, session=session) == expected
