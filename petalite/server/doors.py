"""One-time tokens: who names one is let in to whom it belongs. Either may come first; who comes first waits.

A client invents a token and tells it two servers: the one that will be attached to, and the one that
attaches. Their messages race. Knows tokens and who they open to; not what is behind the door.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from petalite.errors import Refused, ResourceLimit

T = TypeVar("T")

MOST_KNOCKING = 256


class Doors(Generic[T]):
    """Tokens that are expected, and knocks that came before."""

    def __init__(self, patience_s: float = 5.0) -> None:
        self._patience_s = patience_s  # a knock waits so long for its token to be expected
        self._expected: dict[bytes, T] = {}
        self._knocking: dict[bytes, asyncio.Future[T]] = {}

    def expect(self, token: bytes, owner: T) -> None:
        """Let in, once, whoever names `token`."""
        knock = self._knocking.pop(token, None)
        if knock is None or knock.done():
            self._expected[token] = owner
        else:
            knock.set_result(owner)

    def forget(self, owner: T) -> None:
        """Nobody is let in to `owner` any more."""
        for token in [token for token, expecting in self._expected.items() if expecting is owner]:
            del self._expected[token]

    async def knock(self, token: bytes) -> T:
        """The owner that expects `token`, which is used up. Raises Refused if there is none in time."""
        if token in self._expected:
            return self._expected.pop(token)
        if token in self._knocking or len(self._knocking) >= MOST_KNOCKING:
            raise ResourceLimit("too many servers wait at this door; attach again later")
        knock: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._knocking[token] = knock
        try:
            async with asyncio.timeout(self._patience_s):
                return await knock
        except TimeoutError:
            raise Refused(
                "no session expects this token; it may be over, or was attached to already"
            ) from None
        finally:
            self._knocking.pop(token, None)
