"""Joining: the chosen span holds the weakest block, and repeated joins cover the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import InvalidArgument
from petalite.swarm.placement import join_span
from petalite.swarm.spans import Span, uncovered


def test_an_empty_swarm_is_joined_at_its_beginning() -> None:
    assert join_span([], 30, 8) == Span(0, 8)


def test_the_gap_is_filled() -> None:
    held = [(Span(0, 8), 100.0), (Span(20, 30), 50.0)]
    assert join_span(held, 30, 12) == Span(8, 20)


def test_the_weakest_stretch_is_strengthened() -> None:
    held = [(Span(0, 10), 100.0), (Span(10, 20), 10.0), (Span(20, 30), 50.0)]
    assert join_span(held, 30, 10) == Span(10, 20)


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(1, 8), st.floats(1, 100)), max_size=8),
    st.integers(1, 12),
)
def test_no_other_start_has_a_weaker_sorted_profile(rows: list[tuple[int, int, float]], length: int) -> None:
    """The paper's rule restated by brute force."""
    held = [(Span(start, start + size), speed) for start, size, speed in rows]

    def profile(start: int) -> list[float]:
        blocks = range(start, start + length)
        return sorted(sum(speed for span, speed in held if block in span) for block in blocks)

    best = min(profile(start) for start in range(20 - length + 1))
    assert profile(join_span(held, 20, length).start) == pytest.approx(best)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_joins_cover_the_model_before_they_double_it(lengths: list[int]) -> None:
    held: list[tuple[Span, float]] = []
    for length in lengths:
        gaps = uncovered(Span(0, 10), [span for span, _ in held])
        joined = join_span(held, 10, length)
        if gaps:
            assert any(block in gap for gap in gaps for block in joined.blocks)
        held.append((joined, 1.0))


def test_more_blocks_than_the_model_has() -> None:
    with pytest.raises(InvalidArgument, match="12 blocks does not fit a model of 10"):
        join_span([], 10, 12)
