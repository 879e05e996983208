"""The calls of one service that are under way, and how they end together before blocks are unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from petalite.errors import ShuttingDown
from petalite.net.identity import PeerId
from petalite.net.rpc import Call


class OpenCalls:
    """None is taken while it drains, until `resume`."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._draining = False

    def __len__(self) -> int:
        return len(self._calls)

    def of(self, peer: PeerId) -> int:
        """How many are one peer's."""
        return sum(call.peer == peer for call in self._calls)

    def check_open(self) -> None:
        """Raises ShuttingDown while it drains."""
        if self._draining:
            raise ShuttingDown("these blocks are leaving this server; ask another")

    @contextmanager
    def entered(self, call: Call) -> Iterator[None]:
        """One call, from its beginning to its end. Raises ShuttingDown."""
        self.check_open()
        self._calls.add(call)
        self._none_open.clear()
        try:
            yield
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._none_open.set()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls and wait for those under way; what outlasts `timeout_s` is cut with a code."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            for call in list(self._calls):
                call.cancel(ShuttingDown.code)
            await self._none_open.wait()

    def check_drained(self) -> None:
        assert self._draining
        assert not self._calls

    def resume(self) -> None:
        """Take new calls again."""
        self._draining = False
