"""Spans: parsing, containment, and what is left uncovered, checked against sets of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import InvalidArgument
from petalite.swarm.spans import MAX_BLOCKS, Span, describe, uncovered

spans = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


@pytest.mark.parametrize(
    "text", ["", "3", "3:", ":3", "3:3", "5:2", "-1:4", "0:x", "0:8:9", "0:99999", " 0:8"]
)
def test_what_is_not_a_span_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(InvalidArgument, match="span"):
        Span.parse(text)


@given(spans)
def test_text_round_trip(span: Span) -> None:
    assert Span.parse(str(span)) == span
    assert len(span) == len(span.blocks)


@given(spans, spans)
def test_containment_is_that_of_sets(a: Span, b: Span) -> None:
    assert (b in a) == (set(b.blocks) <= set(a.blocks))
    assert all((block in a) == (block in set(a.blocks)) for block in range(45))


@given(spans, st.lists(spans, max_size=6))
def test_uncovered_is_the_set_difference(span: Span, holders: list[Span]) -> None:
    expected = set(span.blocks) - {block for held in holders for block in held.blocks}
    missing = uncovered(span, holders)
    assert [block for part in missing for block in part.blocks] == sorted(expected)
    assert all(a.end < b.start for a, b in itertools.pairwise(missing)), "parts are maximal"


def test_the_bound() -> None:
    assert len(Span(0, MAX_BLOCKS)) == MAX_BLOCKS
    with pytest.raises(InvalidArgument):
        Span(0, MAX_BLOCKS + 1)


def test_describe() -> None:
    assert describe([Span(3, 4)]) == "block 3"
    assert describe([Span(0, 4), Span(9, 12)]) == "blocks 0:4 and 9:12"
