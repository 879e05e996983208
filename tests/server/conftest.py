"""What tests of sessions share: a few blocks, and a server of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan, load_span
from petalite.server.sessions import SessionSettings
from tests.helpers.checkpoints import tiny_llama
from tests.server.serving import Serving


@pytest.fixture(scope="module")
def span(tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=5)
    return load_span(Checkpoint.open(folder), 1, 5)


@pytest.fixture
async def serving(span: BlockSpan, request: pytest.FixtureRequest) -> AsyncIterator[Serving]:
    async with AsyncExitStack() as stack:
        serving = Serving(span, stack, getattr(request, "param", SessionSettings()))
        await serving.listen()
        yield serving
