"""An event loop for those who have none: coroutines are handed to a thread and waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from petalite.net.loop import new_event_loop

T = TypeVar("T")
CANCEL_S = 5.0  # how long an interrupt waits for what it cancelled


class LoopThread:
    """An event loop in a thread of its own; coroutines are handed to it and waited for."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="petalite-loop", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return its result. An interrupt here cancels it there, and waits for its end."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(CANCEL_S)
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an async generator, which is closed when the iteration here ends, early or not."""
        # An interrupt can come after an item was asked for and before anybody waits for it.
        one_at_a_time = asyncio.Lock()

        async def next_item() -> T:
            async with one_at_a_time:
                return await anext(source)

        async def close() -> None:
            async with one_at_a_time:
                await source.aclose()

        try:
            while True:
                try:
                    yield self.run(next_item())
                except StopAsyncIteration:
                    return
        finally:
            if not self.closed:  # the loop's end closed the source
                self.run(close())

    def close(self) -> None:
        """Stop the loop and its thread. A second call does nothing."""
        if not self.closed:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
