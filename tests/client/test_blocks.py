"""Blocks as torch modules: any sub-range, in a session and out of one, is the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import petalite
from petalite.client.settings import SessionSettings
from petalite.client.sync import DistributedModel
from petalite.errors import InvalidArgument, SessionGap
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
from tests.helpers.checkpoints import tiny_llama

N_BLOCKS, E = 5, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[DistributedModel]:
    with petalite.load(str(folder), settings=SessionSettings(chunk_tokens=8)) as model:
        yield model


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, 10, E, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("start", "end"), [(0, 5), (0, 1), (2, 4), (4, 5)])
def test_any_range_is_that_span_called_directly(
    model: DistributedModel, folder: Path, hidden: torch.Tensor, start: int, end: int
) -> None:
    span = load_span(Checkpoint.open(folder), start, end)
    expected = torch.stack([span.forward_stateless(row[None])[0] for row in hidden])
    torch.testing.assert_close(model.blocks[start:end](hidden), expected, atol=1e-4, rtol=1e-4)
    with model.blocks[start:end].session(max_length=12, rows=3) as session:
        parts = [session(hidden[:, :4]), session(hidden[:, 4:5]), session(hidden[:, 5:])]
        assert session.position == 10
        assert {timing.span.end for step in session.trace.steps for timing in step.hops} == {end}
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_parts_put_together_are_the_whole(model: DistributedModel, hidden: torch.Tensor) -> None:
    module = torch.nn.Sequential(model.blocks[:2], model.blocks[2], model.blocks[-2:])
    torch.testing.assert_close(module(hidden), model.blocks[:](hidden), atol=1e-4, rtol=1e-4)
    assert not list(module.parameters())
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(
        model.head(model.blocks[:](model.embed(ids))), model.logits(ids), atol=1e-4, rtol=1e-4
    )


def test_a_session_rolls_back(model: DistributedModel, hidden: torch.Tensor) -> None:
    with model.blocks[1:3].session(max_length=20, rows=3) as session:
        expected = session(hidden)
        session.position = 3
        torch.testing.assert_close(session(hidden[:, 3:]), expected[:, 3:], atol=1e-4, rtol=1e-4)
        session.position = 15
        with pytest.raises(SessionGap):
            session(hidden)


def test_more_rows_than_one_session_takes(model: DistributedModel) -> None:
    many = torch.randn(70, 2, E)
    found = model.blocks[0:1](many)
    torch.testing.assert_close(found[65:], model.blocks[0:1](many[65:]), atol=1e-4, rtol=1e-4)


def test_what_no_module_can_be_made_of(model: DistributedModel, hidden: torch.Tensor) -> None:
    assert len(model.blocks) == N_BLOCKS
    for which in (slice(2, 2), slice(0, 4, 2), slice(4, 0, -1)):
        with pytest.raises(InvalidArgument, match="consecutive"):
            model.blocks[which]
    with pytest.raises(IndexError):
        model.blocks[N_BLOCKS]
    for wrong in (hidden[0], hidden[:, :, 1:], hidden[:0]):
        with pytest.raises(InvalidArgument, match="shape"):
            model.blocks[0:2](wrong)
    with model.blocks[0:2].session(max_length=20, rows=3) as session:
        with pytest.raises(InvalidArgument, match="gradient"):
            session(hidden.requires_grad_())
        with torch.no_grad():
            session(hidden)
    with pytest.raises(InvalidArgument, match="rows"), model.blocks[0:2].session(max_length=5, rows=1000):
        pass


def test_the_trace_is_of_the_latest_session(model: DistributedModel) -> None:
    model.generate([1, 2, 3], max_new_tokens=4)
    assert [step.n_tokens for step in model.trace().steps] == [3, 1, 1, 1]
    assert all(step.hops[0].compute_s > 0 for step in model.trace().steps)
