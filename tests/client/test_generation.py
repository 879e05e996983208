"""Generation over a tiny random model in this process: what ends a text, what comes back with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import petalite
from petalite.client.settings import SessionSettings
from petalite.client.sync import DistributedModel
from petalite.embedded import open_embedded
from petalite.errors import InvalidArgument, PromptTooLong
from tests.helpers.checkpoints import tiny_llama

PROMPT = list(b"The cat sat on the mat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistributedModel]:
    with petalite.load(str(tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))) as model:
        yield model


def test_a_stop_text_ends_the_text_before_it_in_stream_and_generate(model: DistributedModel) -> None:
    whole = model.generate(PROMPT, max_new_tokens=40)
    assert whole.finish_reason == "length"
    for start in range(5, 25):
        stop = whole.text[start : start + 3]
        expected = whole.text[: whole.text.index(stop)]
        stopped = model.generate(PROMPT, max_new_tokens=40, stop=[stop, "never said"])
        assert (stopped.text, stopped.finish_reason) == (expected, "stop")
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        assert "".join(model.stream(PROMPT, max_new_tokens=40, stop=stop)) == expected


def test_a_stop_id_ends_the_text_without_its_own(model: DistributedModel) -> None:
    whole = model.generate(PROMPT, max_new_tokens=20)
    stop_id = whole.token_ids[9]
    first = whole.token_ids.index(stop_id)
    stopped = model.generate(PROMPT, max_new_tokens=20, stop_ids=[stop_id])
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert whole.text.startswith(stopped.text)
    assert len(stopped.text) < len(whole.text)


def test_after_a_stop_the_session_goes_on_as_from_the_beginning(model: DistributedModel) -> None:
    whole = model.generate(PROMPT, max_new_tokens=20)
    with model.session(100) as session:
        cut = model.generate(PROMPT, max_new_tokens=20, stop=whole.text[4:7], session=session)
        assert session.token_ids == PROMPT + cut.token_ids[:-1]
        steps = len(session.trace.steps)
        rest = model.generate(PROMPT + cut.token_ids, max_new_tokens=5, session=session)
        assert len(session.trace.steps) - steps == 5, "the prompt was there but for its last token"
    assert rest.token_ids == whole.token_ids[len(cut.token_ids) :][:5]


def test_logprobs_are_those_of_a_forward_over_the_whole_text(model: DistributedModel) -> None:
    found = model.generate(PROMPT, max_new_tokens=8, logprobs=3)
    text = torch.tensor([PROMPT + found.token_ids])
    expected = model.logits(text)[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    for index, token_id in enumerate(found.token_ids):
        best = expected[index].topk(3)
        assert found.logprobs[index] == pytest.approx(float(expected[index, token_id]), abs=1e-4)
        assert list(found.alternatives[index]) == best.indices.tolist()
        assert list(found.alternatives[index].values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        assert next(iter(found.alternatives[index])) == token_id


def test_bias_and_penalties_reach_the_text(model: DistributedModel) -> None:
    assert model.generate(PROMPT, max_new_tokens=5, logit_bias={65: 1e4}).token_ids == [65] * 5
    heavy = model.generate(PROMPT, max_new_tokens=30, frequency_penalty=100.0).token_ids
    assert len(set(heavy)) == 30, "nothing is said twice"
    never = model.generate(PROMPT, max_new_tokens=30, repetition_penalty=1e6).token_ids
    assert not set(never) & set(PROMPT)


def test_a_prompt_goes_to_the_chain_in_chunks_and_only_the_last_answers(tmp_path: Path) -> None:
    """With chunks of 4 tokens the text is the same, and the trace has one step for each."""
    folder = str(tiny_llama(tmp_path / "tiny"))
    with petalite.load(folder, settings=SessionSettings(chunk_tokens=4)) as model:
        found = model.generate(PROMPT, max_new_tokens=6)
    with petalite.load(folder) as model:
        assert found.token_ids == model.generate(PROMPT, max_new_tokens=6).token_ids
    assert [step.n_tokens for step in found.trace.steps] == [4, 4, 4, 4, 4, 2, 1, 1, 1, 1, 1]


def test_prompts_that_cannot_work(model: DistributedModel) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        model.generate([])
    with pytest.raises(InvalidArgument, match="logit_bias"):
        model.generate(PROMPT, logit_bias={260: 1.0})
    with model.session(10) as session, pytest.raises(PromptTooLong, match="22 tokens"):
        model.generate(PROMPT, session=session)
    with pytest.raises(InvalidArgument, match="found 0"):
        model.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(InvalidArgument, match="found 0"), model.session(0):
        pass
    with pytest.raises(TypeError, match="temprature"):
        model.generate(PROMPT, temprature=1.0)


@pytest.mark.parametrize("chunk_tokens", [0, 4097])
def test_chunks_that_no_server_takes_are_refused(chunk_tokens: int) -> None:
    with pytest.raises(InvalidArgument, match="chunk_tokens"):
        SessionSettings(chunk_tokens=chunk_tokens)


async def test_a_closed_model_says_so_at_once(tmp_path: Path) -> None:
    model = await open_embedded(str(tiny_llama(tmp_path / "tiny")))
    await model.close()
    for late in (
        model.generate(PROMPT),
        model.generate_batch([PROMPT]),
        model.logits(torch.tensor([PROMPT])),
    ):
        with pytest.raises(InvalidArgument, match="closed"):
            await late
