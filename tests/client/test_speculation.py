"""Speculation changes no token: greedy or sampled, over any drafter, whatever dies. And it knows when to
stop.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import petalite
from petalite.client.drafters import LOOKUP, SHORTEST_MATCH, LookupDrafter, ModelDrafter, load_draft
from petalite.client.generation import TokenSession, generate_tokens
from petalite.client.penalties import Penalties
from petalite.client.sampling import Choice, Chooser, Sampling
from petalite.client.session import Session
from petalite.client.settings import SessionSettings
from petalite.client.speculation import EXPLORE_ROUNDS, MOST_DRAFTS, SIZES, Draft, Pace, Speculation
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.tokenizer import load_tokenizer
from petalite.sim import loop
from petalite.swarm.spans import Span
from tests.client.fakes import E, FakeSwarm
from tests.client.runs import with_a_death, with_each_death
from tests.helpers.checkpoints import tiny_llama

PROMPT = list(b"one two three one two three one two")
# Greedy and sampled, with and without memory of what was said.
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "temperature": 0.7, "seed": 5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[DistributedModel]:
    with petalite.load(str(folder)) as model:
        yield model


class Oracle:
    """Guesses what it was told, wrong at every `wrong`th token."""

    is_free = True

    def __init__(self, truth: Sequence[int], wrong: int) -> None:
        self.truth, self.wrong = list(truth), wrong

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        guesses = self.truth[len(text) : len(text) + count]
        return Draft([guess ^ (not (len(text) + i) % self.wrong) for i, guess in enumerate(guesses)])

    def close(self) -> None:
        pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [1, 2, 3, 7, 1000])
def test_any_drafts_give_the_text_of_none(model: DistributedModel, way: dict[str, Any], wrong: int) -> None:
    plain = model.generate(PROMPT, max_new_tokens=50, **way)
    ticks = itertools.count()  # so that every step takes as long, whatever else the machine does
    oracle = Oracle(PROMPT + plain.token_ids, wrong)
    with model.session(200) as session:
        session.speculations[LOOKUP] = Speculation(oracle, lambda: float(next(ticks)))
        found = model.generate(PROMPT, max_new_tokens=50, speculate=LOOKUP, session=session, **way)
        assert session.token_ids == PROMPT + plain.token_ids[:-1], "only what was right stays"
    assert (found.token_ids, found.text) == (plain.token_ids, plain.text)
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    if wrong == 1000:
        assert len(found.trace.steps) < 15, "right guesses spare trips"


@pytest.mark.parametrize("way", WAYS)
def test_lookup_gives_the_text_of_none(model: DistributedModel, way: dict[str, Any]) -> None:
    plain = model.generate(PROMPT, max_new_tokens=60, **way)
    assert model.generate(PROMPT, max_new_tokens=60, speculate=LOOKUP, **way).token_ids == plain.token_ids


@pytest.mark.parametrize("way", WAYS)
def test_a_draft_model_that_is_the_model_is_always_right(
    model: DistributedModel, folder: Path, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tokens are sampled: both make the same choice of the same random numbers."""
    ticks = itertools.count()  # so that a draft pays, whatever else the machine does
    timed = partial(Speculation, clock=lambda: float(next(ticks)))
    monkeypatch.setattr("petalite.client.model.Speculation", timed)
    plain = model.generate(PROMPT, max_new_tokens=60, **way)
    with model.session(200) as session:
        found = model.generate(PROMPT, max_new_tokens=60, speculate=str(folder), session=session, **way)
        right, all_ = session.speculations[str(folder)].pace._right[0]
        assert right == all_ > 0, "however many were thought to pay"
    assert found.token_ids == plain.token_ids


def test_a_draft_model_of_its_own_mind_changes_nothing(model: DistributedModel, tmp_path: Path) -> None:
    """Another size, another vocabulary size, the same words."""
    draft = tiny_llama(tmp_path / "draft", seed=9, num_hidden_layers=1, hidden_size=32, vocab_size=300)
    smaller = tiny_llama(tmp_path / "smaller", seed=9, num_hidden_layers=1, vocab_size=258)
    for way in WAYS:
        plain = model.generate(PROMPT, max_new_tokens=40, **way)
        for path in (draft, smaller):
            found = model.generate(PROMPT, max_new_tokens=40, speculate=str(path), **way)
            assert found.token_ids == plain.token_ids


def test_a_draft_model_with_other_words_is_refused(model: DistributedModel, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'))
    with pytest.raises(InvalidArgument, match="other"):
        model.generate(PROMPT, speculate=str(other))


def test_stops_and_limits_cut_drafts_short(model: DistributedModel, folder: Path) -> None:
    plain = model.generate(PROMPT, max_new_tokens=40)
    for length in range(1, 12):
        found = model.generate(PROMPT, max_new_tokens=length, speculate=str(folder))
        assert found.token_ids == plain.token_ids[:length]
    for token_id in set(plain.token_ids[:20]):
        expected = model.generate(PROMPT, max_new_tokens=40, stop_ids=[token_id])
        with model.session(200) as session:
            found = model.generate(
                PROMPT, max_new_tokens=40, stop_ids=[token_id], speculate=str(folder), session=session
            )
            assert session.token_ids == PROMPT + expected.token_ids[:-1]
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)


def test_a_talk_goes_on_with_its_drafter(model: DistributedModel, folder: Path) -> None:
    """The draft's cache follows roll-backs and other prompts."""
    for speculate in (LOOKUP, str(folder)):
        with model.session(400) as session:
            for prompt in (PROMPT, [*PROMPT, 5, 6], PROMPT[:10], PROMPT[:10] + PROMPT):
                expected = model.generate(prompt, max_new_tokens=20).token_ids
                options = {"max_new_tokens": 20, "speculate": speculate, "session": session}
                assert model.generate(prompt, **options).token_ids == expected
            assert list(session.speculations) == [speculate]


async def test_a_drafter_closed_in_the_middle_of_a_draft_leaves_no_row(folder: Path) -> None:
    """As it is where a generation is cancelled meanwhile."""
    thread = ComputeThread()
    draft_model = await load_draft(str(folder), load_tokenizer(Checkpoint.open(folder)), 260, thread)
    drafter, begun, go_on = ModelDrafter(draft_model, 50), threading.Event(), threading.Event()

    class Slow(Chooser):
        def choose(self, logits: torch.Tensor, text: Sequence[int]) -> Choice:
            begun.set()
            go_on.wait()
            return Choice(1, 0.0)

    draft = asyncio.create_task(drafter.draft([1, 2, 3], Slow(), 5))
    await asyncio.to_thread(begun.wait)
    draft.cancel()
    await asyncio.wait([draft])
    drafter.close()
    go_on.set()
    assert not await thread.run(lambda: draft_model.cache._rows)
    thread.close()


# -- over a chain that breaks ------------------------------------------------------------------------------


class FakeEdges:
    """Three words: short enough a vocabulary that a random text repeats itself."""

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[id, 7 * id + 1] for id in ids], dtype=torch.float32)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = (hidden[:, :1] * torch.tensor([1.0, 5.0, 3.0]) + hidden[:, 1:]) % 11
        return mixed + torch.tensor([6.0, 0.0, 0.0])  # and one is said mostly


class Here:
    """The compute thread without a thread."""

    async def run(self, function: Any, *args: Any) -> Any:
        return function(*args)


async def over_fakes(swarm: FakeSwarm, drafts: bool) -> list[int]:
    session = Session(swarm, Span(0, 6), E, max_length=80, settings=SessionSettings(chunk_tokens=16))
    edges: Any = FakeEdges()
    thread: Any = Here()
    async with TokenSession(session, edges, thread) as tokens:
        ticks = itertools.count()  # so that every step takes as long
        speculation = Speculation(LookupDrafter(), lambda: float(next(ticks))) if drafts else None
        choices = generate_tokens(
            tokens,
            [0, 1, 2, 0, 1],
            Chooser(Sampling(temperature=1.0, seed=1)),
            max_new_tokens=30,
            stop_ids=(),
            speculation=speculation,
        )
        return [choice.token_id async for choice in choices]


def test_a_death_at_any_message_of_a_speculative_run_changes_nothing() -> None:
    spans = {1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6), 4: Span(0, 3), 5: Span(3, 6)}

    plain, long = with_a_death(spans, partial(over_fakes, drafts=False))
    speculative, short = with_a_death(spans, partial(over_fakes, drafts=True))
    assert speculative == plain
    assert short < 0.8 * long
    for result in with_each_death(spans, partial(over_fakes, drafts=True), short):
        assert result == plain


def test_cancelling_at_any_point_frees_every_hop() -> None:
    """After n turns of the loop, for every n until the run completes."""

    async def main(turns: int) -> bool:
        swarm = FakeSwarm({1: Span(0, 3), 2: Span(3, 6)})
        task = asyncio.create_task(over_fakes(swarm, drafts=True))
        for _ in range(turns):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        await asyncio.wait([task])
        for _ in range(100):
            await asyncio.sleep(swarm.net.latency_s)
        assert swarm.open_rows() == 0
        return finished

    turns = 0
    while not loop.run(main(turns)):
        turns += 1
    assert turns > 50


# -- lookup ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=20))
def test_lookup_finds_what_a_search_of_every_place_finds(first: list[int], more: list[int]) -> None:
    """After any history of texts asked about; by brute force over all earlier places."""
    drafter: Any = LookupDrafter()
    for text in (first, first + more, more + first):
        draft = loop.run(drafter.draft(text, Chooser(), 5))
        lengths = {}
        for place in range(1, len(text)):
            length = 0
            while length < place and text[place - length - 1] == text[len(text) - length - 1]:
                length += 1
            lengths[place] = length
        best = max(lengths.values(), default=0)
        if best < SHORTEST_MATCH:
            assert draft.token_ids == []
        elif sum(length >= SHORTEST_MATCH for length in lengths.values()) <= 16 and best <= 32:
            place = max(place for place, length in lengths.items() if length == best)
            assert draft.token_ids == text[place : place + 5]


# -- pace --------------------------------------------------------------------------------------------------


def paced(base_s: float, token_s: float, right: float, draft_s: float = 0.0, rounds: int = 300) -> list[int]:
    """Drafts a round, where a step takes base + token × size and each guess is right with that chance."""
    pace, chance, counts = Pace(), random.Random(0), []
    pace.observe_step(1, base_s + token_s)
    for _ in range(rounds):
        count = pace.best(0, MOST_DRAFTS)
        counts.append(count)
        if draft_s and count:
            pace.observe_drafting(count, count * draft_s)
        pace.observe_step(count + 1, base_s + token_s * (count + 1))
        guesses = [int(chance.random() < right) for _ in range(count)]
        pace.observe_guesses(0, guesses or [int(chance.random() < right)], [1] * (count + 1))
    return counts[-100:]


def test_far_servers_and_good_guesses_make_long_drafts() -> None:
    assert set(paced(0.2, 0.002, 0.97)) == {MOST_DRAFTS}


def test_what_never_pays_is_not_done() -> None:
    """A guess that is right one time in twenty, where a token more costs half a step."""
    assert set(paced(0.01, 0.01, 0.05)) == {0}
    assert set(paced(0.02, 0.0002, 0.6, draft_s=0.05)) == {0}, "or where drafting takes longer than the step"


def test_between_them_drafts_are_short() -> None:
    counts = paced(0.05, 0.01, 0.6)
    assert 0 < sum(counts) / len(counts) < 5


@given(
    st.dictionaries(st.integers(1, 16), st.floats(0.001, 10), max_size=6),
    st.integers(0, 40),
    st.lists(st.booleans(), max_size=30),
)
def test_pace_stays_within_its_bounds(times: dict[int, float], most: int, right: list[bool]) -> None:
    pace = Pace()
    for n_tokens, seconds in times.items():
        pace.observe_step(n_tokens, seconds)
    for one in right:
        pace.observe_guesses(0, [1], [int(one)])
    assert 0 <= pace.best(0, most) <= most
    assert 0 < pace.acceptance(0) < 1
    if times:
        for n_tokens in range(min(times), max(times) + 1):
            assert 0.001 * 0.999 <= pace.step_s(n_tokens) <= max(times.values()) * 1.001


def test_guesses_behind_a_wrong_one_do_not_count() -> None:
    one, two = Pace(), Pace()
    one.observe_guesses(0, [1, 2, 3, 4], [1, 9, 3, 4])
    two.observe_guesses(0, [1, 2], [1, 9])
    assert one.acceptance(0) == two.acceptance(0)


def test_a_step_that_met_a_failure_counts_as_little() -> None:
    pace = Pace()
    pace.observe_step(1, 0.1)
    pace.observe_step(1, 30.0)
    assert pace.step_s(1) < 0.2


class Wrong:
    """Always wrong, and slow to say."""

    is_free = False
    asked = 0

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        self.asked += 1
        return Draft([1] * count)

    def close(self) -> None:
        pass


class Right:
    """Always right; its first draft reads a long prompt."""

    is_free = False

    def __init__(self) -> None:
        self.now_s = 0.0

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        self.now_s += 10.0 if not self.now_s else 0.0
        self.now_s += 0.01 * count
        return Draft([0] * count)

    def close(self) -> None:
        pass


def test_what_a_drafter_reads_first_is_no_part_of_a_guess() -> None:
    async def main() -> list[int]:
        drafter = Right()
        speculation, text, sizes = Speculation(drafter, lambda: drafter.now_s), [0], []
        for _ in range(2 * EXPLORE_ROUNDS):
            drafts = await speculation.draft(text, Chooser(), 8)
            speculation.observe(1 + len(drafts), 0.25)
            text += [0] * (1 + len(drafts))
            sizes.append(len(drafts))
        return sizes

    assert asyncio.run(main())[-1] >= 4


def test_a_bad_drafter_is_asked_again_now_and_then() -> None:
    async def main() -> int:
        drafter = Wrong()
        speculation, text = Speculation(drafter), [0]
        for _ in range(10 * EXPLORE_ROUNDS):
            drafts = await speculation.draft(text, Chooser(), 10)
            speculation.observe(1 + len(drafts), 0.01 * (1 + len(drafts)))
            text.append(0)
        return drafter.asked

    assert 9 <= loop.run(main()) <= 40


def test_sizes_are_those_of_decode_steps() -> None:
    assert SIZES[0] == 0
    assert SIZES[-1] == MOST_DRAFTS == 15


def test_penalties_see_the_drafts_before_a_draft() -> None:
    """The second of two equal guesses is judged with the first one said."""
    chooser = Chooser(penalties=Penalties(frequency=5.0))
    logits = torch.tensor([3.0, 1.0])
    assert [chooser.choose(logits, []).token_id, chooser.choose(logits, [0]).token_id] == [0, 1]
