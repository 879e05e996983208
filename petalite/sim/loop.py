"""An asyncio event loop whose clock jumps: it never waits, it moves the time to whatever is due next.

Code under it runs as it is: tasks, timeouts and sleeps work, and ten virtual minutes take as long as their
computing does. Two runs of the same seeded program take the same steps. What would come from outside
(threads, sockets, signals) cannot wake it; when nothing is due and the program still waits, that is a
deadlock and raises.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from petalite.errors import PetaliteError

T = TypeVar("T")


class Deadlock(PetaliteError):
    """Every task of a simulation waits, and nothing will ever happen."""


class _NoWaiting(selectors.SelectSelector):
    """Where a selector would wait for so long, the time moves on by as much."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(
                "every task waits and nothing is due; a simulation cannot wait for threads or sockets"
            )
        self.now_s += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at time 0."""

    def __init__(self) -> None:
        self._virtual = _NoWaiting()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
