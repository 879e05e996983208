"""Text by tuned models: what a session carries, a prompt or a LoRA, gives the text of forwards without a
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import petalite
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument, PromptTooLong
from petalite.tuning import Adapter, Between, DeepPrompts, Lora, PromptTuning, Tuned

PROMPT = list(b"Once upon a time")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[DistributedModel]:
    """Everything in one process, sessions too."""
    with petalite.load(str(folder)) as model:
        yield model


def jittered(module: Tuned) -> Tuned:
    with torch.no_grad():
        for one in module.parameters():
            one.normal_(generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda model: PromptTuning(model, 5),
        lambda model: Lora(model, 4, targets=("value", "down"), blocks=slice(1, 5)),
    ],
    ids=["prompt", "lora"],
)
def test_a_session_gives_the_text_of_no_cache(alone: DistributedModel, make: object) -> None:
    module = jittered(make(alone))  # type: ignore[operator]
    expected = Tuned.generate(module, PROMPT, max_new_tokens=12)
    found = module.generate(PROMPT, max_new_tokens=12)
    assert found.token_ids == expected.token_ids != alone.generate(PROMPT, max_new_tokens=12).token_ids
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-3, atol=1e-3)
    guessed = module.generate(PROMPT, max_new_tokens=12, speculate="lookup")
    assert guessed.token_ids == expected.token_ids


def test_a_talk_goes_on_behind_a_prefix(alone: DistributedModel) -> None:
    tuned = jittered(PromptTuning(alone, 5))
    whole = tuned.generate(PROMPT, max_new_tokens=10).token_ids
    with alone.session(64, prefix=tuned.get_parameter("prompt")) as session:
        first = alone.generate(PROMPT, max_new_tokens=4, session=session)
        assert session.max_length == 64 and session.session.length() == 5 + session.position
        second = alone.generate([*PROMPT, *first.token_ids], max_new_tokens=6, session=session)
        assert first.token_ids + second.token_ids == whole
        session.rollback(3)
        again = alone.generate(PROMPT, max_new_tokens=10, session=session)
        assert again.token_ids == whole
        assert {step.n_tokens for step in session.trace.steps} >= {5, 1}


@pytest.mark.parametrize(
    "make",
    [lambda model: DeepPrompts(model, 3), lambda model: Between(model, {2: Adapter(64, 4)})],
    ids=["deep", "between"],
)
def test_what_no_session_carries_generates_too(alone: DistributedModel, make: object) -> None:
    module = jittered(make(alone))  # type: ignore[operator]
    text, ids = module.generate(PROMPT, max_new_tokens=5), list(PROMPT)
    for token in text.token_ids:
        with torch.no_grad():
            assert token == int(module(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert module.generate(PROMPT, max_new_tokens=5, temperature=1.0, seed=1).token_ids != text.token_ids


def test_what_cannot_be(alone: DistributedModel) -> None:
    prefix = torch.zeros(5, 64)
    with alone.session(32) as session, pytest.raises(InvalidArgument, match="session"):
        alone.generate(PROMPT, session=session, prefix=prefix)
    with pytest.raises(InvalidArgument, match="shape"):
        alone.generate(PROMPT, prefix=torch.zeros(5, 63))
    with pytest.raises(InvalidArgument, match="max_length"), alone.session(2048, prefix=prefix):
        pass
    with pytest.raises(InvalidArgument, match="speculate"):
        DeepPrompts(alone, 2).generate(PROMPT, speculate="lookup")
    with pytest.raises(PromptTooLong):
        DeepPrompts(alone, 2).generate([])
