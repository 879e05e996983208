"""Hosts that tests share: closed with the test, and two that echo."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from petalite.net import Call, Host, HostSettings, Identity, Message, Multiaddr

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


class Net:
    """Hosts that are closed with the test."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.stack = stack

    async def host(
        self, settings: HostSettings | None = None, *, listen: bool = False, **options: Any
    ) -> Host:
        identity = options.pop("identity", None) or Identity.generate()
        host = await self.stack.enter_async_context(Host(identity, settings, **options))
        if listen:
            await host.listen([LOOPBACK])
        return host


async def echo(call: Call) -> Message:
    return Message(call.request.body, call.request.buffers)


async def echo_stream(call: Call) -> None:
    while (message := await call.receive()) is not None:
        await call.send(message.body, message.buffers)


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let the loop run until it holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Watched:
    """A handler that waits for ever and says how it ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[type[BaseException]] = asyncio.get_running_loop().create_future()

    async def __call__(self, call: Call) -> None:
        self.started.set()
        try:
            await self.wait(call)
        except BaseException as error:
            self.ended.set_result(type(error))
            raise

    async def wait(self, call: Call) -> None:
        await asyncio.Event().wait()
