"""One thread that does a process's tensor work, so that its event loop never waits for arithmetic.

Work runs in the order it was asked for, one piece at a time; what only this thread touches needs no lock. One
thread also means one pool of intra-op threads: torch keeps a pool per calling thread, and two would fight for
the same cores. Knows nothing of blocks or sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from petalite.errors import ShuttingDown

P = ParamSpec("P")
R = TypeVar("R")


class ComputeThread:
    """Runs functions on its thread for coroutines of any one loop. Close it when its owner goes."""

    def __init__(self, name: str = "petalite-compute") -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.closed = False

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Queue `function` and await its result. Cancelling the wait also unqueues it, if it has not begun.

        Raises ShuttingDown once the thread is closed.
        """
        if self.closed:
            raise ShuttingDown("what computed this was closed")
        return asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Refuse new work and let go; what runs now finishes by itself."""
        self.closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
