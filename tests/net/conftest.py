"""Every asynchronous test of this room runs on uvloop and on asyncio, and leaves no task behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from petalite.net import Host

from .hosts import Net, echo, echo_stream


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
async def nothing_left_behind() -> AsyncIterator[None]:
    """The test ends with no task but its own."""
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
async def net(nothing_left_behind: None) -> AsyncIterator[Net]:
    async with contextlib.AsyncExitStack() as stack:
        yield Net(stack)


@pytest.fixture
async def two(net: Net) -> tuple[Host, Host]:
    """A caller and a server that echoes."""
    caller, server = await net.host(), await net.host(listen=True)
    server.serve("echo", echo)
    server.serve("stream", echo_stream)
    await caller.connect(server.addresses[0])
    return caller, server
