"""Beam search over forked rows: transformers' texts and scores, and the same whatever dies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import petalite
from petalite.client.batches import Batch
from petalite.client.beams import Beam, BeamSettings, beam_search
from petalite.client.penalties import Penalties
from petalite.client.session import Session
from petalite.client.settings import SessionSettings
from petalite.errors import InvalidArgument, PromptTooLong
from petalite.swarm.spans import Span
from tests.client.fakes import E, FakeSwarm
from tests.client.runs import with_a_death, with_each_death
from tests.client.test_speculation import FakeEdges, Here
from tests.helpers.checkpoints import tiny_llama

PROMPT = list(b"The cat sat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tokens end the text, so that beams end at many lengths."""
    return tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny", hidden_size=32, eos_token_id=[7, 11, 13], seed=3
    )


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_texts_are_those_of_transformers(
    folder: Path, beams: int, length_penalty: float, early_stopping: bool
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bias = {7: 2.5, 11: 2.0, 13: 2.0}  # so that they are said at all
    options: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    with petalite.load(str(folder)) as model:
        stop_ids = sorted(model.tokenizer.eos_ids)
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([PROMPT]),
                attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
                num_beams=beams,
                num_return_sequences=beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=0,
                sequence_bias=[[[id], value] for id, value in bias.items()],
                **options,
            )
        found = model.beam_search(
            PROMPT,
            beams=beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            logit_bias=bias,
            **options,
        )
    theirs = []
    for row in expected[:, len(PROMPT) :].tolist():
        end = next((i + 1 for i, id in enumerate(row) if id in stop_ids), len(row))
        theirs.append(row[:end])
    assert [one.token_ids for one in found] == theirs
    assert len({tuple(one.token_ids) for one in found}) == beams


def test_the_best_of_all_texts_is_found_where_beams_hold_all(folder: Path) -> None:
    """Two tokens of any text: exhaustively, by a forward over each."""
    with petalite.load(str(folder)) as model:
        never = dict.fromkeys(model.tokenizer.eos_ids, -1e4)
        best = model.beam_search(PROMPT, beams=64, max_new_tokens=2, length_penalty=0.0, logit_bias=never)[0]
        first = model.logits(torch.tensor([PROMPT]))[0, -1].log_softmax(-1)
        first[list(never)] -= 1e4
        likely = first.topk(64).indices
        after = model.logits(torch.tensor([[*PROMPT, int(id)] for id in likely]))[:, -1].log_softmax(-1)
        after[:, list(never)] -= 1e4
        sums = first[likely][:, None] + after
        row, token_id = divmod(int(sums.argmax()), sums.shape[1])
    assert best.token_ids == [int(likely[row]), token_id]
    assert sum(best.logprobs) == pytest.approx(float(sums.max()), abs=1e-4)


def test_a_death_at_any_message_of_a_beam_search_changes_nothing() -> None:
    spans = {1: Span(0, 2), 2: Span(2, 4), 3: Span(4, 6), 4: Span(0, 3), 5: Span(3, 6)}

    async def search(swarm: FakeSwarm) -> list[Beam]:
        edges: Any = FakeEdges()
        thread: Any = Here()
        settings = SessionSettings(chunk_tokens=3)
        async with Session(swarm, Span(0, 6), E, max_length=40, rows=3, settings=settings) as session:
            batch = Batch(session, edges, thread)
            how = BeamSettings(3, length_penalty=0.5)
            return await beam_search(batch, [0, 1, 2, 0], how, Penalties(), max_new_tokens=8, stop_ids={1})

    expected, messages = with_a_death(spans, search)
    assert len(expected) == 3
    for result in with_each_death(spans, search, messages):
        assert result == expected


def test_searches_that_cannot_work(folder: Path) -> None:
    with petalite.load(str(folder)) as model:
        for wrong in (
            {"beams": 1},
            {"beams": 65},
            {"temperature": 1.0},
            {"speculate": "lookup"},
            {"stop": "x"},
        ):
            with pytest.raises(InvalidArgument, match="beam"):
                model.beam_search(PROMPT, **wrong)
        with pytest.raises(PromptTooLong):
            model.beam_search([1] * 3000)


@pytest.mark.parametrize("penalty", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_a_penalty_that_orders_no_texts_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidArgument, match="length_penalty"):
        BeamSettings(length_penalty=penalty)
