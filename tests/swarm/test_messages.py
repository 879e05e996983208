"""Steps and their answers as bodies: what is written is read, and nothing else is."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import BadMessage
from petalite.swarm.messages import (
    FROM_CLIENT,
    FROM_SERVER,
    MAX_COUNT,
    MAX_LENGTH,
    MAX_ROWS,
    HopReport,
    Probe,
    Step,
    StepDone,
    read,
    write,
)

places = st.integers(0, MAX_LENGTH)
rows = st.lists(st.tuples(places, places, places), min_size=1, max_size=4).map(tuple)
times = st.floats(0, 1e9)
hops = st.lists(st.builds(HopReport, times, times, st.integers(0, 2**40)), max_size=3).map(tuple)
counts = st.integers(0, MAX_COUNT)
pairs = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=3).map(tuple)
steps = st.builds(
    Step, rows, st.text(max_size=8), st.integers(0, 1024), st.text(max_size=8), counts, counts, hops, pairs
)
answers = st.builds(StepDone, rows, st.text(max_size=8), counts, counts, hops.filter(len))


@given(st.one_of(steps, answers))
def test_what_is_written_is_read(message: Step | StepDone) -> None:
    body = msgpack.unpackb(msgpack.packb(write(message)))
    assert read(FROM_CLIENT | FROM_SERVER, body) == message


def test_defaults_may_be_left_out_and_what_is_unknown_is_passed_over() -> None:
    body = {"kind": "step", "rows": [0, 5, 1], "codec": "f32", "stop": 4, "later": True}
    assert read(FROM_CLIENT, body) == Step(((0, 5, 1),), "f32", 4)
    assert read(FROM_CLIENT, {"kind": "probe"}) == Probe()


STEP = {"kind": "step", "rows": [0, 5, 1], "codec": "f32", "stop": 4}
DONE = {"kind": "done", "rows": [0, 5, 1], "codec": "f32", "number": 1, "epoch": 0, "hops": [0.1, 0.2, 3]}
WRONG: list[dict[str, Any]] = [
    *({"rows": bad} for bad in (None, [], [0, 5], [[0, 5, 1]], [0, -1, 1], [0, 5, True], [0, 5.0, 1], "abc")),
    {"rows": [0, 0, MAX_LENGTH + 1]},
    {"rows": [0, 0, 1] * (MAX_ROWS + 1)},
    *(
        {"hops": bad}
        for bad in ([1.0], [1.0, -1.0, 0], [math.nan, 0, 0], [0, math.inf, 0], {"a": 1}, [[0, 0, 0]])
    ),
    *({"hops": [0.0, math.nan, 0]}, {"hops": [True, 0, 0]}, {"hops": ["0", 0, 0]}),
    *({"codec": bad} for bad in (None, 1, b"f32")),
    *({"number": bad} for bad in (-1, MAX_COUNT + 1, 1.0, True, "1")),
    *({"epoch": bad} for bad in (-1, MAX_COUNT + 1, 1.0, True, "1")),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("body", [STEP, DONE], ids=["step", "done"])
def test_what_is_no_step_and_no_answer(body: dict[str, Any], wrong: dict[str, Any]) -> None:
    assert read(FROM_CLIENT | FROM_SERVER, body)
    with pytest.raises(BadMessage):
        read(FROM_CLIENT | FROM_SERVER, body | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": -1},
        {"stop": None},
        {"stop": 1.0},
        {"output": 1},
        {"forks": [0]},
        {"forks": [0, 256]},
        {"forks": 3},
    ],
    ids=str,
)
def test_what_is_no_step(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadMessage):
        read(FROM_CLIENT, STEP | wrong)


def test_an_answer_is_somebodys() -> None:
    with pytest.raises(BadMessage):
        read(FROM_SERVER, DONE | {"hops": []})
