"""Kept inputs: after any sequence of steps and rollbacks, the replay is what a plain list per row holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalite.swarm.codecs import CODECS
from petalite.swarm.kept import KeptInputs

CODEC = CODECS["bf16"]
HIDDEN = 2
TOKEN_BYTES = 4

# Each step: rows as (row, how far before its end it starts, n_tokens).
steps = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=3),
    max_size=12,
)


@given(steps, st.integers(1, 6))
def test_replay_is_the_model(history: list[list[tuple[int, int, int]]], most_tokens: int) -> None:
    kept = KeptInputs(CODEC, HIDDEN)
    model: dict[int, list[bytes]] = {}
    stamp = 0
    for step in history:
        rows, data = [], b""
        for row, back, n_tokens in step:
            tokens = model.setdefault(row, [])
            position = max(0, len(tokens) - back)
            del tokens[position:]
            for _ in range(n_tokens):
                stamp += 1
                tokens.append(stamp.to_bytes(TOKEN_BYTES, "big"))
            rows.append((row, position, n_tokens))
            data += b"".join(tokens[position:])
        kept.put(rows, memoryview(data))
    assert kept.nbytes == TOKEN_BYTES * sum(map(len, model.values()))
    replayed: dict[int, list[bytes]] = {row: [] for row in model}
    for (row, position, n_tokens), data in kept.replay(most_tokens):
        assert n_tokens <= most_tokens
        assert position == len(replayed[row]) == kept.length(row) - (len(model[row]) - position)
        replayed[row] += [data[i * TOKEN_BYTES : (i + 1) * TOKEN_BYTES] for i in range(n_tokens)]
    assert replayed == model


def test_truncate_to_nothing_and_on() -> None:
    kept = KeptInputs(CODEC, HIDDEN)
    kept.put([(0, 0, 2)], memoryview(b"aaaabbbb"))
    kept.truncate(0, 0)
    assert kept.length(0) == kept.nbytes == 0
    kept.put([(0, 0, 2)], memoryview(b"xxxxyyyy"))
    assert list(kept.replay(8)) == [((0, 0, 2), b"xxxxyyyy")]


def test_a_replay_up_to_lengths() -> None:
    kept = KeptInputs(CODEC, HIDDEN)
    kept.put([(0, 0, 3), (1, 0, 2)], memoryview(b"aaaabbbbccccddddeeee"))
    kept.put([(0, 3, 1)], memoryview(b"ffff"))
    assert list(kept.replay(2, [3, 1])) == [
        ((0, 0, 2), b"aaaabbbb"),
        ((0, 2, 1), b"cccc"),
        ((1, 0, 1), b"dddd"),
    ]
    assert list(kept.replay(9, [0, 0])) == []
