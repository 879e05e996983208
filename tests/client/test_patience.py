"""Deadlines: generous before anything is known, then a multiple of what is usual, never below the floor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalite.client.patience import DOUBT, LEARN_STEPS, Patience, PatienceSettings


def test_before_learning_the_settings_hold() -> None:
    patience = Patience(PatienceSettings(step_s=30, token_s=0.5))
    assert patience.timeout_s(1) == 30.5
    assert patience.timeout_s(100) == 80


def test_steady_steps_are_waited_for_a_few_times_as_long() -> None:
    patience = Patience(PatienceSettings(least_s=0.1, factor=4))
    for _ in range(100):
        patience.observe(1, 0.5)
    assert 2.0 <= patience.timeout_s(1) < 2.2, "the deviation has gone; four times the mean is left"
    for _ in range(100):
        patience.observe(200, 20.0)
    assert 80 <= patience.timeout_s(200) < 90


def test_one_step_says_something_and_is_doubted() -> None:
    """A replay of a long text is not waited for as if nothing were known of its prompt's prefill."""
    patience = Patience(PatienceSettings(step_s=30, token_s=0.25))
    patience.observe(100, 0.1)
    assert patience.timeout_s(2000) == 2000 * 0.001 * 3 * 4 * DOUBT
    assert patience.timeout_s(1) == 30.25, "nothing is known of steps"
    patience.observe(1, 0.5)
    assert patience.timeout_s(1) == 0.5 * 3 * 4 * DOUBT


def test_a_mended_chain_is_judged_by_the_one_before_and_more_mildly() -> None:
    patience = Patience(PatienceSettings(least_s=0.1, factor=4))
    patience.forget()
    assert patience.timeout_s(1) == 30.25, "there was none before"
    for _ in range(100):
        patience.observe(1, 0.5)
    for _ in range(2):  # mended twice, without a step between
        patience.forget()
        assert 8.0 <= patience.timeout_s(1) < 8.8
        assert patience.timeout_s(100) == 55, "nothing is known of prefills"
    for _ in range(LEARN_STEPS):
        patience.observe(1, 1.0)
    assert 4.0 <= patience.timeout_s(1) < 12.0


def test_a_few_tokens_get_the_time_of_as_many_steps() -> None:
    """Not their share of a prefill: over slow links that is less than one step takes."""
    patience = Patience(PatienceSettings(least_s=0.1))
    for _ in range(100):
        patience.observe(500, 5.0)
        patience.observe(1, 1.0)
    assert patience.timeout_s(4) >= 4.0
    for _ in range(100):
        patience.observe(4, 1.5)
    assert 3.0 <= patience.timeout_s(500) <= 40.0, "and prefills are still judged by prefills"


@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 64]), st.floats(0, 50)), max_size=50), st.integers(1, 500)
)
def test_bounds(steps: list[tuple[int, float]], n_tokens: int) -> None:
    settings = PatienceSettings()
    patience = Patience(settings)
    for n, seconds in steps:
        patience.observe(n, seconds)
    longest = settings.step_s + settings.token_s * n_tokens
    assert min(settings.least_s, longest) <= patience.timeout_s(n_tokens) <= longest


def test_a_usual_step_is_never_late() -> None:
    """Of times that vary by half, none is over the deadline learnt from those before."""
    patience = Patience(PatienceSettings(least_s=0.0))
    for index in range(200):
        seconds = 1.0 + 0.5 * ((index * 7919) % 100) / 100
        if index > LEARN_STEPS:
            assert seconds < patience.timeout_s(1)
        patience.observe(1, seconds)
