"""What is measured once is kept, and what is announced follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
from petalite.server.throughput import BlockSpeed, measure, measured_once, speed_key, tokens_per_s
from tests.helpers.checkpoints import tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6))


def test_real_blocks_are_measured_by_token_and_block(checkpoint: Checkpoint) -> None:
    speed = measure(load_span(checkpoint, 1, 6))
    assert 0 < speed.prefill_s < speed.decode_s < 1.0


def test_kept_under_its_key_and_measured_again_if_the_file_is_not_ours(tmp_path: Path) -> None:
    calls: list[BlockSpeed] = []

    def measured() -> BlockSpeed:
        calls.append(BlockSpeed(0.5, 0.25 / (1 + len(calls))))
        return calls[-1]

    folder = tmp_path / "speed"
    first = measured_once(folder, "a", measured)
    assert measured_once(folder, "a", measured) == first
    assert measured_once(folder, "b", measured) != first
    assert len(calls) == 2
    for broken in ("", "[]", '{"decode_s": -1, "prefill_s": 1}', '{"decode_s": "x", "prefill_s": 1}'):
        (folder / "a.json").write_text(broken)
        assert measured_once(folder, "a", measured) == calls[-1]
    assert len(calls) == 6
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    speed = BlockSpeed(0.5, 0.25)
    assert measured_once(tmp_path / "file", "a", lambda: speed) == speed


def test_the_key_tells_formats_apart_and_spans_not(checkpoint: Checkpoint) -> None:
    keys = [
        speed_key(checkpoint, load_span(checkpoint, 0, 1), "none"),
        speed_key(checkpoint, load_span(checkpoint, 2, 5), "none"),
        speed_key(checkpoint, load_span(checkpoint, 0, 1, quant="int8"), "int8"),
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("network", "expected"),
    [(None, 1000 / 2.5), (1e9, 1000 / 2.5), (100_000.0, 100.0)],
)
def test_the_slower_of_compute_and_network(network: float | None, expected: float) -> None:
    """Of four blocks a request uses 2.5 on average; 1 ms a token and block; 1,000 bytes a token."""
    assert tokens_per_s(BlockSpeed(0.01, 0.001), 4, 1000, network) == pytest.approx(expected)
