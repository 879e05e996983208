"""A ring's edge between two sessions of one server: what is pushed is handed over, not sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from petalite.errors import ConnectionLost, ErrorCode
from petalite.net.messages import Buffer, Message
from petalite.net.streams import Priority


class Pushed(Protocol):
    """A session that another one pushes to."""

    def take_place(self, source: Onward) -> None:
        """From now on `source` is the predecessor. Raises ConnectionLost where all is over."""
        ...

    async def push(self, source: Onward, message: Message) -> None:
        """Waits for room. Raises ConnectionLost once `source` is not the predecessor any more."""
        ...

    def let_go(self, source: Onward) -> None:
        """`source` pushes no more; a push of its that waits for room is given up."""
        ...


class Onward(Protocol):
    """What a session pushes into: a call to another server, or this."""

    priority: Priority

    async def send(self, body: Mapping[str, Any], buffers: Sequence[Buffer]) -> None: ...

    def cancel(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        """Give up; a send under way raises what `code` stands for, or that the connection is lost."""
        ...


class LocalEdge:
    """Implements `Onward` into a session of the same process."""

    def __init__(self, target: Pushed) -> None:
        self.priority = Priority.INTERACTIVE
        self._target: Pushed | None = target
        target.take_place(self)

    async def send(self, body: Mapping[str, Any], buffers: Sequence[Buffer]) -> None:
        if self._target is None:
            raise ConnectionLost("the session after this one is over, or has another predecessor")
        await self._target.push(self, Message(body, buffers))

    def cancel(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.let_go(self)
