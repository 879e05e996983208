"""A time limit on one thing after another, for the price of one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Patience:
    """What lasts longer than `seconds` is acted against. The timer stays when something ends in time, as
    almost everything does: to set and cancel one for each costs more than to look, when it fires, what is
    under way.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._act: tuple[Callable[..., None], tuple[Any, ...]] | None = None
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def until(self, act: Callable[..., None], *args: Any) -> Patience:
        """As a context manager: call `act` where its body takes too long. One body at a time."""
        loop = asyncio.get_running_loop()
        self._act, self._due_s = (act, args), loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(self._due_s, self._look, self._due_s)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._act = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, now_s: float) -> None:
        self._timer = None
        if self._act is None:
            return
        if self._due_s > now_s:
            self._timer = asyncio.get_running_loop().call_at(self._due_s, self._look, self._due_s)
            return
        (act, args), self._act = self._act, None
        act(*args)
