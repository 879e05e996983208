"""Memory promised to sessions and training calls: reserved when they begin, given back when they end, with
a line of who waits.

First come, first served: a large request at the head of the line is not overtaken by small ones, or it
would wait for ever. Knows bytes and waiters; not what the memory is for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from petalite.errors import Busy

MOST_WAITING = 64
RETRY_S = 5.0  # what those are told who find no room, times how many are before them


@dataclass(slots=True, eq=False)
class _Waiter:
    nbytes: int
    granted: asyncio.Future[None]


class Budget:
    """`total` bytes to promise. `what` is promised them, in words."""

    def __init__(self, total_bytes: int, what: str = "the session") -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0
        self.reclaim: Callable[[int], None] = lambda nbytes: (
            None
        )  # asked to release so much, if it can be spared
        self._what = what
        self._line: deque[_Waiter] = deque()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.reserved_bytes

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    async def reserve(self, nbytes: int, wait_s: float) -> None:
        """Promise `nbytes`, after at most `wait_s` in line. Raises Busy, saying when to try again."""
        if nbytes > self.total_bytes:
            raise Busy(
                f"{self._what} needs {nbytes >> 20} MiB of cache, all of this server's is "
                f"{self.total_bytes >> 20} MiB; ask for fewer tokens or rows",
            )
        if nbytes > self.free_bytes:
            self.reclaim(nbytes - self.free_bytes)
        if not self._line and nbytes <= self.free_bytes:
            self.reserved_bytes += nbytes
            return
        if wait_s <= 0 or len(self._line) >= MOST_WAITING:
            raise self._busy(nbytes)
        waiter = _Waiter(nbytes, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        try:
            async with asyncio.timeout(wait_s):
                await waiter.granted
        except BaseException as error:
            if waiter in self._line:
                self._line.remove(waiter)
                self._grant()
            elif waiter.granted.done() and not waiter.granted.cancelled():
                self.release(nbytes)  # granted in the very moment of giving up
            if isinstance(error, TimeoutError):
                raise self._busy(nbytes) from None
            raise

    def take(self, nbytes: int) -> None:
        """Promise what is free, without a wait."""
        assert nbytes <= self.free_bytes
        self.reserved_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Give back what was promised."""
        self.reserved_bytes -= nbytes
        assert self.reserved_bytes >= 0
        self._grant()

    def _grant(self) -> None:
        while self._line and self._line[0].nbytes <= self.free_bytes:
            waiter = self._line.popleft()
            if not waiter.granted.cancelled():
                self.reserved_bytes += waiter.nbytes
                waiter.granted.set_result(None)

    def _busy(self, nbytes: int) -> Busy:
        return Busy(
            f"{self._what} needs {nbytes >> 20} MiB of cache, {self.free_bytes >> 20} MiB are free and "
            f"{len(self._line)} wait; try again later or elsewhere",
            retry_after_s=RETRY_S * (1 + len(self._line)),
        )
