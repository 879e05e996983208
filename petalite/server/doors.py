"""One-time tokens: who names one is let in to whom it belongs. Either may come first; who comes first waits.

A client invents a token and tells it two servers: the one that will be attached to, and the one that
attaches. Their messages race. Knows tokens and who they open to; not what is behind the door.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

from petalite.errors import Refused, ResourceLimit

T = TypeVar("T")

MOST_KNOCKING = 256
MOST_OF_ONE = 64  # of them, one peer's


class Doors(Generic[T]):
    """Tokens that are expected, and knocks that came before."""

    def __init__(self, patience_s: float = 5.0) -> None:
        self._patience_s = patience_s  # a knock waits so long for its token to be expected
        self._expected: dict[bytes, T] = {}
        self._knocking: dict[bytes, asyncio.Future[T]] = {}
        self._of: Counter[Hashable] = Counter()  # knocks, by who knocks

    def expect(self, token: bytes, owner: T) -> None:
        """Let in to `owner`, once, whoever names `token`, and nobody who names one from before."""
        self.forget(owner)
        knock = self._knocking.pop(token, None)
        if knock is None or knock.done():
            self._expected[token] = owner
        else:
            knock.set_result(owner)

    def forget(self, owner: T) -> None:
        """Nobody is let in to `owner` any more."""
        for token in [token for token, expecting in self._expected.items() if expecting is owner]:
            del self._expected[token]

    async def knock(self, token: bytes, who: Hashable) -> T:
        """The owner that expects `token`, which is used up. Raises Refused if there is none in time, and
        ResourceLimit where `who`, or everybody, knocks too much.
        """
        if token in self._expected:
            return self._expected.pop(token)
        crowded = len(self._knocking) >= MOST_KNOCKING or self._of[who] >= MOST_OF_ONE
        if token in self._knocking or crowded:
            raise ResourceLimit("too many servers wait at this door; attach again later")
        knock: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._knocking[token] = knock
        self._of[who] += 1
        try:
            async with asyncio.timeout(self._patience_s):
                return await knock
        except TimeoutError:
            raise Refused(
                "no session expects this token; it may be over, or was attached to already"
            ) from None
        finally:
            self._of[who] -= 1
            self._of += Counter()  # which leaves out those at zero
            self._knocking.pop(token, None)
