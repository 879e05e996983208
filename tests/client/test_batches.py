"""Batches of ragged prompts: each row says what it says alone, ends by itself, and survives what a chain
does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import petalite
from petalite.client.batches import Batch, pack
from petalite.client.sampling import Chooser, Sampling
from petalite.client.session import Session
from petalite.client.settings import SessionSettings
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument, PromptTooLong
from petalite.swarm.spans import Span
from tests.client.fakes import E, FakeSwarm
from tests.client.runs import with_a_death, with_each_death
from tests.client.test_speculation import FakeEdges, Here
from tests.helpers.checkpoints import tiny_llama

PROMPTS = [list(b"a"), list(b"The cat sat on the mat. " * 3), list(b"one two"), list(b"x" * 17)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistributedModel]:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    with petalite.load(str(folder), settings=SessionSettings(chunk_tokens=32)) as model:
        yield model


@pytest.mark.parametrize("way", [{}, {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.1}])
def test_a_batch_says_what_its_prompts_say_one_by_one(model: DistributedModel, way: dict[str, Any]) -> None:
    alone = [model.generate(prompt, max_new_tokens=20, **way) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, max_new_tokens=20, **way)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]


def test_rows_end_by_themselves(model: DistributedModel) -> None:
    """By a stop id or a stop text, at different lengths; the steps get narrower."""
    free = model.generate_batch(PROMPTS, max_new_tokens=20)
    stop, stop_id = free[0].text[3:6], free[1].token_ids[9]
    options: dict[str, Any] = {"max_new_tokens": 20, "stop": stop, "stop_ids": [stop_id]}
    alone = [model.generate(prompt, **options) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, **options)
    assert [(one.text, one.token_ids, one.finish_reason) for one in together] == [
        (one.text, one.token_ids, one.finish_reason) for one in alone
    ]
    assert len({len(one.token_ids) for one in together}) > 1
    widths = [step.n_tokens for step in together[0].trace.steps][-18:]
    assert widths == sorted(widths, reverse=True) and widths[-1] < len(PROMPTS)


def test_more_prompts_than_a_session_has_rows(
    model: DistributedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalite.client.model.MAX_ROWS", 3)
    found = model.generate_batch(PROMPTS, max_new_tokens=4)
    assert [one.token_ids for one in found] == [
        model.generate(prompt, max_new_tokens=4).token_ids for prompt in PROMPTS
    ]
    assert model.generate_batch([]) == []


def test_without_a_seed_rows_differ(model: DistributedModel) -> None:
    one, two = model.generate_batch([PROMPTS[0]] * 2, max_new_tokens=20, temperature=2.0)
    assert one.token_ids != two.token_ids


def test_batches_that_cannot_work(model: DistributedModel) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        model.generate_batch([PROMPTS[0], []])
    with pytest.raises(PromptTooLong):
        model.generate_batch([PROMPTS[0], [1] * 5000])
    with pytest.raises(InvalidArgument, match="speculate"):
        model.generate_batch(PROMPTS, speculate="lookup")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 20))
def test_packing(lengths: list[int], most: int) -> None:
    """Every token once and in order, steps full but for the last, no row twice in one."""
    steps = pack(lengths, most)
    seen = dict.fromkeys(range(len(lengths)), 0)
    for step in steps:
        assert len({row for row, _, _ in step}) == len(step)
        for row, position, count in step:
            assert position == seen[row] and count > 0
            seen[row] += count
    assert list(seen.values()) == lengths
    assert all(sum(count for _, _, count in step) == most for step in steps[:-1])


def test_a_death_at_any_message_of_a_batch_changes_nothing() -> None:
    spans = {1: Span(0, 3), 2: Span(3, 6), 3: Span(0, 2), 4: Span(2, 6)}
    prompts = [[0, 1, 2, 0], [1], [2, 2, 1, 0, 1, 2, 0]]

    async def batch(swarm: FakeSwarm) -> list[list[int]]:
        edges: Any = FakeEdges()
        thread: Any = Here()
        found: list[list[int]] = [[] for _ in prompts]

        def take(row: int, choice: Any) -> bool:
            found[row].append(choice.token_id)
            return len(found[row]) < 3 + 2 * row

        settings = SessionSettings(chunk_tokens=3)
        async with Session(swarm, Span(0, 6), E, max_length=20, rows=3, settings=settings) as session:
            choosers = [Chooser(Sampling(temperature=1.0, seed=1))] * 3
            await Batch(session, edges, thread).generate(prompts, choosers, 10, take)
        return found

    expected, messages = with_a_death(spans, batch)
    assert [len(row) for row in expected] == [3, 5, 7]
    for result in with_each_death(spans, batch, messages):
        assert result == expected


async def test_cancelling_a_batch(tmp_path: Any) -> None:
    """It frees its rows: the next one runs."""
    from petalite.embedded import open_embedded

    async with await open_embedded(str(tiny_llama(tmp_path / "tiny"))) as model:
        task = asyncio.create_task(model.generate_batch(PROMPTS, max_new_tokens=500))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        [found] = await model.generate_batch(PROMPTS[:1], max_new_tokens=3)
        assert len(found.token_ids) == 3
        assert torch.isfinite(torch.tensor(found.logprobs)).all()
