"""Every asynchronous test of this room runs on uvloop and on asyncio, and leaves no task behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from petalite.net import Host, MethodPolicy

from .hostile import PROMPT
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


@pytest.fixture
async def host(net: Net) -> AsyncIterator[Host]:
    """One to be attacked; a good peer, connected all along, is served before and after."""
    host = await net.host(PROMPT, listen=True)
    host.serve("echo", echo)
    host.serve("small", echo, policy=MethodPolicy(max_message_bytes=1000))
    good = await net.host()
    await good.call(host.addresses[0], "echo", {"before": 1}, timeout_s=5)
    yield host
    reply = await good.call(host.peer_id, "echo", {"after": 1}, [bytes(100_000)], timeout_s=5)
    assert reply.body == {"after": 1}
    newcomer = await net.host()
    await newcomer.call(host.addresses[0], "echo", {"new": 1}, timeout_s=5)
