"""What waits for one worker: bounded in items and bytes, and emptied at once when it has become worthless."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Waiting:
    """What waits in several inboxes together."""

    most_bytes: int
    nbytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.nbytes >= self.most_bytes


class Inbox(Generic[T]):
    """One reader; writers either find room or wait for it."""

    def __init__(self, most_items: int, most_bytes: int, together: Waiting) -> None:
        self._most_items = most_items
        self._most_bytes = most_bytes
        self._together = together
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()  # for writers
        self._reader: asyncio.Future[None] | None = None  # waits for an item

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        """Whether another item has to wait. One item is always taken, however large and whatever waits
        elsewhere: its reader makes room for the next.
        """
        much = self._bytes >= self._most_bytes or self._together.is_full
        return len(self._items) >= self._most_items or (much and bool(self._items))

    async def room(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Wait until it is not full, or its writer is not `wanted` any more; `wake` when that may be so."""
        while self.is_full and wanted():
            self._changed.clear()
            await self._changed.wait()

    def put(self, item: T, nbytes: int = 0) -> None:
        """The writer has seen to it that there is room, or that the reader must have this all the same."""
        self._items.append((item, nbytes))
        self._bytes += nbytes
        self._together.nbytes += nbytes
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> T:
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item, nbytes = self._items.popleft()
        self._bytes -= nbytes
        self._together.nbytes -= nbytes
        self._changed.set()
        return item

    def fail(self, error: Exception) -> None:
        """Raise it in the reader, if it waits."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_exception(error)

    def clear(self) -> None:
        self._items.clear()
        self._together.nbytes -= self._bytes
        self._bytes = 0
        self.wake()

    def wake(self) -> None:
        """Have writers that wait here look again."""
        self._changed.set()
