"""The typed border: round trips of what fits, and a BadMessage that names the field for what does not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import BadMessage, InvalidArgument
from petalite.net.identity import PeerId
from petalite.net.schema import Bounds, decode, encode


@dataclass(frozen=True)
class Inner:
    name: Annotated[str, Bounds(1, 8)]
    weight: float = 1.5


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Bounds(-5, 5)]
    inner: Inner
    peer: PeerId
    data: Annotated[bytes, Bounds(0, 4)] = b""
    flag: bool = False
    maybe: int | None = None
    rows: Annotated[tuple[tuple[int, ...], ...], Bounds(0, 3)] = ()
    others: tuple[Inner, ...] = ()
    best: Inner | None = None


inners = st.builds(Inner, st.text(min_size=1, max_size=8), st.floats(allow_nan=False, allow_infinity=False))
outers = st.builds(
    Outer,
    st.integers(-5, 5),
    inners,
    st.binary(min_size=32, max_size=32).map(PeerId),
    st.binary(max_size=4),
    st.booleans(),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=3).map(tuple),
    st.lists(inners, max_size=3).map(tuple),
    st.none() | inners,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(), child, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, Any] = {"count": 1, "inner": {"name": "a"}, "peer": bytes(32)}


@given(outers)
def test_round_trip_through_msgpack(message: Outer) -> None:
    assert decode(Outer, msgpack.unpackb(msgpack.packb(encode(message)))) == message


@given(st.dictionaries(st.sampled_from([*Outer.__dataclass_fields__, "else"]), values))
def test_any_body_decodes_or_is_bad(body: dict[str, Any]) -> None:
    try:
        message = decode(Outer, {**GOOD, **body})
    except BadMessage as error:
        assert "Outer." in str(error)
    else:
        assert decode(Outer, encode(message)) == message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 6),
        ("count", -6),
        ("count", True),
        ("count", 1.0),
        ("count", "1"),
        ("count", None),
        ("inner", None),
        ("inner", []),
        ("inner", {}),
        ("inner", {"name": ""}),
        ("inner", {"name": "a", "weight": math.nan}),
        ("inner", {"name": "a", "weight": math.inf}),
        ("inner", {"name": "a", "weight": 10**400}),
        ("inner", {"name": "a", "weight": True}),
        ("peer", bytes(31)),
        ("peer", "x" * 32),
        ("data", b"12345"),
        ("data", "text"),
        ("flag", 1),
        ("maybe", "no"),
        ("rows", [[1], [2], [3], [4]]),
        ("rows", [1]),
        ("rows", [["1"]]),
        ("rows", {}),
        ("others", [{"name": 1}]),
        ("best", {"name": "far too long a name"}),
    ],
)
def test_what_does_not_fit_is_named(field: str, value: object) -> None:
    with pytest.raises(BadMessage, match=f"Outer.{field}"):
        decode(Outer, {**GOOD, field: value})


@pytest.mark.parametrize("field", GOOD)
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(BadMessage, match=f"Outer.{field} is missing"):
        decode(Outer, {key: value for key, value in GOOD.items() if key != field})


def test_unknown_keys_are_ignored_and_defaults_need_not_travel() -> None:
    message = decode(Outer, {**GOOD, "of a later version": object()})
    assert message == Outer(1, Inner("a"), PeerId(bytes(32)))
    assert "maybe" not in encode(message)
    assert "best" not in encode(message)


def test_a_class_that_cannot_travel_is_our_own_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        things: dict[str, int]

    with pytest.raises(InvalidArgument, match="things"):
        encode(Odd({}))
    with pytest.raises(InvalidArgument):
        encode(object())
