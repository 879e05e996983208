"""Sampling: against transformers' logits processors, direct enumeration, and softmax frequencies."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from petalite.client.options import Options
from petalite.client.penalties import Penalties
from petalite.client.sampling import Chooser, Sampling, gumbel_noise, kept_tokens
from petalite.errors import InvalidArgument, NotFinite

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draw(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    return Chooser(sampling).choose(logits, [0] * position).token_id


def support(sampling: Sampling, draws: int = 400) -> set[int]:
    return {draw(LOGITS, sampling, position) for position in range(draws)}


def test_greedy_takes_the_likeliest_and_reports_its_log_probability() -> None:
    choice = Chooser().choose(LOGITS, [])
    assert choice.token_id == 4
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(0)[4]), abs=1e-6)
    assert choice.alternatives == {}


def test_alternatives_are_the_likeliest_under_the_models_own_distribution() -> None:
    """Whatever bias and temperature made of the choice."""
    chooser = Chooser(Sampling(temperature=3.0, seed=1), Penalties(bias={3: 100.0}), n_alternatives=2)
    choice = chooser.choose(LOGITS, [])
    expected = LOGITS.log_softmax(0)
    assert choice.token_id == 3
    assert choice.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    assert list(choice.alternatives) == [4, 0]
    assert list(choice.alternatives.values()) == pytest.approx([float(expected[4]), float(expected[0])])


@examples(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 50, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition=st.sampled_from([1.0, 0.7, 1.3]),
    bias=st.dictionaries(st.integers(0, 99), st.floats(-5, 5), max_size=3),
)
def test_the_distribution_is_that_of_transformers(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    """transformers' processors and warpers, in the order in which its `generate` puts them."""
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(100, generator=generator) * 3
    text = torch.randint(0, 100, (12,), generator=generator)
    processors: list[Any] = []
    if bias:
        processors.append(theirs.SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()]))
    if repetition != 1.0:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(repetition))
    processors.append(theirs.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(theirs.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(theirs.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(theirs.MinPLogitsWarper(min_p))
    expected = logits.double()[None]
    for processor in processors:
        expected = processor(text[None], expected)

    scores = Penalties(repetition=repetition, bias=bias).apply(logits, text[:7].tolist(), text[7:].tolist())
    token_ids, kept = kept_tokens(scores, Sampling(temperature, top_k, top_p, min_p, seed=0))
    ours = torch.zeros(100, dtype=torch.float64)
    ours[token_ids] = kept.softmax(0)
    torch.testing.assert_close(ours, expected[0].softmax(0), atol=1e-6, rtol=1e-5)


@given(st.lists(st.integers(0, 4), max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_what_was_generated(
    generated: list[int], presence: float, frequency: float
) -> None:
    """Less frequency × count, and less presence where count > 0: OpenAI's formula, who brought them in."""
    scores = Penalties(presence=presence, frequency=frequency).apply(LOGITS, [0, 0, 1, 4], generated)
    for token, logit in enumerate(LOGITS.tolist()):
        count = generated.count(token)
        assert float(scores[token]) == pytest.approx(
            logit - frequency * count - presence * (count > 0), abs=1e-5
        )
    assert torch.equal(LOGITS, torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])), (
        "the model's logits stay as they are"
    )


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
        found = support(Sampling(temperature=1.0, top_p=p, seed=2), draws=2000)
        assert kept - {3} <= found <= kept


@examples(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 12), st.floats(0.01, 0.999), st.integers(0, 2**31))
def test_top_p_keeps_what_a_sort_of_all_keeps(n_tokens: int, spread: float, p: float, seed: int) -> None:
    """Also where more tokens are kept than are looked at first."""
    scores = torch.randn(n_tokens, generator=torch.Generator().manual_seed(seed)) * spread
    token_ids, kept = kept_tokens(scores, Sampling(temperature=1.0, top_p=p))
    ordered = scores.double().sort(descending=True).values
    sums = ordered.softmax(0).cumsum(0)
    n_kept = min(1 + int((sums < p).sum()), n_tokens)
    assert abs(len(token_ids) - n_kept) <= 1  # the two add up in different orders
    assert torch.equal(kept, ordered[: len(kept)] - ordered[0])
    assert torch.equal(scores[token_ids].double() - ordered[0], kept)


def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest() -> None:
    """e^-1 and e^-2 of the likeliest are the next two."""
    assert support(Sampling(temperature=1.0, min_p=0.36, seed=2)) == {4, 0}
    assert support(Sampling(temperature=1.0, min_p=0.13, seed=2)) == {4, 0, 1}


def test_frequencies_follow_the_softmax_at_temperature() -> None:
    draws = 20_000
    sampling = Sampling(temperature=1.7, seed=3)
    counts = Counter(
        int((LOGITS.double() / 1.7 + gumbel_noise(3, position, torch.arange(5))).argmax())
        for position in range(draws)
    )
    for token, probability in enumerate((LOGITS / 1.7).softmax(0).tolist()):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) < 5 * deviation
    assert [draw(LOGITS, sampling, position) for position in range(50)] == [
        int((LOGITS.double() / 1.7 + gumbel_noise(3, position, torch.arange(5))).argmax())
        for position in range(50)
    ]


@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-30, 1e-307, 5e-324])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, more: dict[str, Any]) -> None:
    logits = torch.linspace(-3, 9, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    chooser = Chooser(Sampling(temperature, seed=1, **more))
    assert chooser.choose(logits, [1, 2]).token_id == int(logits.argmax())


def test_the_noise_is_standard_gumbel_over_tokens_positions_and_seeds() -> None:
    """Mean Euler's constant, variance π²/6; neighbours uncorrelated along each axis."""
    ids = torch.arange(2000)
    noise = torch.stack([gumbel_noise(seed, position, ids) for seed in (0, 1) for position in range(50)])
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    centred = noise - noise.mean()
    for shifted in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[50:] * centred[:50],
    ):
        assert abs(float(shifted.mean())) < 0.03


def test_the_noise_of_a_token_does_not_depend_on_the_others() -> None:
    """So a cut by top-k or top-p changes nobody's luck."""
    every = gumbel_noise(7, 9, torch.arange(1000))
    some = torch.tensor([999, 3, 500])
    assert torch.equal(gumbel_noise(7, 9, some), every[some])


@pytest.mark.parametrize(("seed", "position", "token"), [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**20, 151_935)])
def test_the_noise_by_plain_integers(seed: int, position: int, token: int) -> None:
    """The same numbers from Python's unbounded integers: they are the same on every machine."""
    key = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8)
    mask = (1 << 64) - 1
    mixed = (int.from_bytes(key.digest(), "little") + token * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & mask
    mixed ^= mixed >> 31
    expected = -math.log(-math.log(((mixed >> 11) + 0.5) * 2.0**-53))
    assert float(gumbel_noise(seed, position, torch.tensor([token]))) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**10))
def test_a_repeated_step_repeats_its_choice(seed: int, position: int) -> None:
    sampling = Sampling(temperature=1.0, seed=seed)
    assert draw(LOGITS, sampling, position) == draw(LOGITS, sampling, position)


def test_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1000)
    one = [draw(logits, Sampling(temperature=1.0, seed=1), n) for n in range(50)]
    two = [draw(logits, Sampling(temperature=1.0, seed=2), n) for n in range(50)]
    assert one != two
    assert len(set(one)) > 40


def test_without_a_seed_two_settings_differ() -> None:
    assert Sampling().seed != Sampling().seed


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"top_k": 5}, "temperature above 0"),
        ({"top_p": 0.9}, "temperature above 0"),
        ({"min_p": 0.1}, "temperature above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 101}, "100"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 65}, "64"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number, found 2.5"),
        ({"temperature": 1.0, "top_k": 2.0}, "top_k is a whole number, found 2.0"),
        ({"temperature": 1.0, "seed": 0.5}, "seed is a whole number, found 0.5"),
        ({"temperature": "1"}, "temperature is a number, found '1'"),
        ({"presence_penalty": None}, "presence_penalty is a number, found None"),
        ({"logit_bias": {1.5: 1.0}}, "a whole number, found 1.5"),
        ({"logit_bias": {1: "1"}}, "logit_bias of token 1 is a number"),
        ({"logprobs": 1.5}, "logprobs is a whole number, found 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        Options(**wrong)


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="token 7"):
        Penalties(bias={1: 1.0, 7: 1.0}).check(7)


@pytest.mark.parametrize("make", [Sampling, lambda: Sampling(temperature=1.0)])
def test_logits_that_are_no_numbers_are_refused(make: Callable[[], Sampling]) -> None:
    with pytest.raises(NotFinite, match="position 7"):
        draw(torch.tensor([0.0, math.nan]), make(), 7)
