"""Sampling: greedy, the kept set of top-k and top-p by direct enumeration, frequencies against softmax."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalite.client.sampling import Sampling, choose
from petalite.errors import InvalidArgument, NotFinite

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def support(sampling_of, draws: int = 400) -> set[int]:
    return {choose(LOGITS, sampling_of, position).token_id for position in range(draws)}


def test_greedy_takes_the_likeliest_and_reports_its_log_probability() -> None:
    choice = choose(LOGITS, Sampling(), 0)
    assert choice.token_id == 4
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(0)[4]), abs=1e-6)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert support(Sampling(temperature=5.0, top_k=3, seed=1)) == {4, 0, 1}


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    probabilities = LOGITS.softmax(0)
    order = LOGITS.argsort(descending=True).tolist()
    for p in (0.3, 0.6, 0.7, 0.9, 0.999):
        kept, total = set(), 0.0
        for token in order:
            kept.add(token)
            total += float(probabilities[token])
            if total >= p:
                break
        assert support(Sampling(temperature=1.0, top_p=p, seed=2), draws=3000) <= kept
        assert support(Sampling(temperature=1.0, top_p=p, seed=2), draws=3000) >= kept - {3}


def test_frequencies_follow_the_softmax_at_temperature() -> None:
    draws = 20_000
    sampling = Sampling(temperature=1.7, seed=3)
    counts = Counter(choose(LOGITS, sampling, position).token_id for position in range(draws))
    for token, probability in enumerate((LOGITS / 1.7).softmax(0).tolist()):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) < 5 * deviation


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_a_repeated_step_repeats_its_choice(seed: int, position: int) -> None:
    sampling = Sampling(temperature=1.0, seed=seed)
    assert choose(LOGITS, sampling, position) == choose(LOGITS, sampling, position)


def test_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1000)
    one = [choose(logits, Sampling(temperature=1.0, seed=1), n).token_id for n in range(50)]
    two = [choose(logits, Sampling(temperature=1.0, seed=2), n).token_id for n in range(50)]
    assert one != two
    assert len(set(one)) > 40


def test_without_a_seed_two_settings_differ() -> None:
    assert Sampling().seed != Sampling().seed


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_contradictory_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Sampling(**wrong)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NotFinite, match="position 7"):
        choose(torch.tensor([0.0, math.nan]), Sampling(), 7)
