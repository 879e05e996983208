"""An event loop for those who have none: coroutines are handed to a thread and waited for."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar
from weakref import WeakSet

from petalite.errors import InvalidArgument
from petalite.net.loop import new_event_loop

T = TypeVar("T")
CANCEL_S = 5.0  # how long an interrupt waits for what it cancelled


class LoopThread:
    """An event loop in a thread of its own; coroutines are handed to it and waited for."""

    def __init__(self) -> None:
        self.closed = False
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="petalite-loop", daemon=True)
        self._thread.start()
        self._handing = threading.Lock()  # nothing is handed to a loop that is closed
        _open.add(self)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return its result. An interrupt here cancels it there, and waits for its end.

        Raises InvalidArgument where the loop is closed, or is meanwhile.
        """
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        with self._handing:
            if self.closed:
                coroutine.close()
                raise InvalidArgument("this was closed; load the model anew")
            future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            if not self.closed:
                raise
            raise InvalidArgument("this was closed while something was under way") from None
        except BaseException:
            if future.cancel():
                ended.wait(CANCEL_S)
            raise

    def finish(self, closing: Coroutine[Any, Any, None]) -> None:
        """Run what closes something, in whatever thread it is left: garbage is collected in the loop's own
        too, which cannot wait. A loop that was closed closed all that it had.
        """
        if self.closed:
            closing.close()
        elif threading.current_thread() is self._thread:
            asyncio.run_coroutine_threadsafe(closing, self._loop)
        else:
            self.run(closing)

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
            self.finish(close())

    def close(self) -> None:
        """Stop the loop and its thread, and end what is under way there. A second call does nothing."""
        with self._handing:
            if self.closed:
                return
            self.closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(_end_all())
        self._loop.close()


async def _end_all() -> None:
    """Of this loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CANCEL_S)
    await asyncio.get_running_loop().shutdown_asyncgens()


_open: WeakSet[LoopThread] = WeakSet()


@atexit.register
def _close_all() -> None:
    """When modules go, the loop's thread is gone, and an iteration that ends there would wait for it."""
    for loop in list(_open):
        loop.close()
