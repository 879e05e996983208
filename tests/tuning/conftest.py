"""A tiny model over three servers in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from petalite.client.sync import DistributedModel
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama
from tests.tuning.places import open_over

N_BLOCKS = 6
SPANS = (Span(0, 2), Span(2, 3), Span(3, 6))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=N_BLOCKS)


@pytest.fixture(scope="session")
def model(folder: Path) -> Iterator[DistributedModel]:
    with open_over(folder, SPANS) as model:
        yield model
