"""The typed border: round trips of what fits, and a BadMessage that names the field for what does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht import messages as dht
from petalite.errors import BadMessage
from petalite.net import handshake
from petalite.net.identity import PeerId
from petalite.net.schema import between, decode, encode, length
from petalite.server import links
from petalite.swarm import messages as swarm
from petalite.swarm import records, training, weights

BY_HAND = {swarm.Step, swarm.StepDone}  # written and read without the schema


@dataclass(frozen=True)
class Inner:
    name: Annotated[str, length(1, 8)]
    weight: Annotated[float, between(-1e300, 1e300)] = 1.5


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, between(-5, 5)]
    inner: Inner
    peer: PeerId
    data: Annotated[bytes, length(0, 4)] = b""
    flag: bool = False
    maybe: int | None = None
    rows: Annotated[tuple[tuple[int, ...], ...], length(0, 3)] = ()
    others: tuple[Inner, ...] = ()
    best: Inner | None = None


inners = st.builds(Inner, st.text(min_size=1, max_size=8), st.floats(-1e300, 1e300))
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
        assert str(error).startswith("Outer: ")
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
    with pytest.raises(BadMessage, match=rf"^Outer: .*\$\.{field}"):
        decode(Outer, {**GOOD, field: value})


@pytest.mark.parametrize("field", GOOD)
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(BadMessage, match=f"^Outer: .*missing required field `{field}`"):
        decode(Outer, {key: value for key, value in GOOD.items() if key != field})


def test_unknown_keys_are_ignored_and_defaults_need_not_travel() -> None:
    message = decode(Outer, {**GOOD, "of a later version": object()})
    assert message == Outer(1, Inner("a"), PeerId(bytes(32)))


MESSAGES = [
    value
    for room in (dht, handshake, links, swarm, records, training, weights)
    for value in vars(room).values()
    if is_dataclass(value) and value.__module__ == room.__name__ and value not in BY_HAND
]


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_every_number_of_every_message_is_bounded_or_whole(message: type) -> None:
    """NaN and infinity are within no bounds; without any, a float may be either."""

    def check(kind: msgspec.inspect.Type) -> None:
        assert not isinstance(kind, msgspec.inspect.FloatType) or (
            kind.ge is not None and kind.le is not None
        )
        for part in getattr(kind, "types", (getattr(kind, "item_type", None),)):
            if part is not None:
                check(part)

    (info,) = msgspec.inspect.multi_type_info([message])
    assert isinstance(info, msgspec.inspect.DataclassType)
    for field in info.fields:
        check(field.type)
