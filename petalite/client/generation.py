"""Token by token: feed a prompt, choose, feed the choice, until something says stop.

Knows token ids and hidden states; text is `client.model`'s, hops are the session's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field

import torch

from petalite.client.sampling import Choice, Sampling, choose
from petalite.client.session import Session
from petalite.client.trace import Trace
from petalite.errors import InvalidArgument, PromptTooLong
from petalite.model.compute import ComputeThread
from petalite.model.edges import Edges
from petalite.swarm.messages import LAST

STOP, LENGTH = "stop", "length"  # why a generation ended: an end-of-sequence token, or the limit


@dataclass(frozen=True, slots=True)
class Generation:
    """What `generate` returns."""

    text: str
    token_ids: list[int]  # the new ones, the end-of-sequence token included
    logprobs: list[float]  # of each, natural log
    finish_reason: str  # STOP or LENGTH
    trace: Trace = field(repr=False)


class TokenSession:
    """A session of one row that is fed token ids and remembers them.

    A prompt that begins like what the session holds costs only the rest; that is how a chat goes on.
    """

    def __init__(self, session: Session, edges: Edges, thread: ComputeThread) -> None:
        self.session = session
        self.token_ids: list[int] = []  # what the hops' caches hold
        self._edges = edges
        self._thread = thread

    async def __aenter__(self) -> TokenSession:
        await self.session.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.session.__aexit__(*exc_info)  # type: ignore[arg-type]

    @property
    def position(self) -> int:
        """How many tokens the session holds."""
        return len(self.token_ids)

    @property
    def max_length(self) -> int:
        return self.session.max_length

    @property
    def trace(self) -> Trace:
        return self.session.trace

    def rollback(self, position: int) -> None:
        """Forget the tokens at and after `position`. Costs nothing; the next step goes on from there."""
        if not 0 <= position <= len(self.token_ids):
            raise InvalidArgument(f"cannot roll back to {position}: the session holds {self.position} tokens")
        del self.token_ids[position:]

    async def feed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Append tokens, in chunks -> hidden (1, E) of the last one, before the final norm."""
        if not token_ids:
            raise InvalidArgument("there is nothing to feed; give at least one token")
        chunk = self.session.settings.chunk_tokens
        for start in range(0, len(token_ids), chunk):
            part = list(token_ids[start : start + chunk])
            hidden = self._edges.embed(torch.tensor(part))
            output = await self.session.step(hidden, [(0, self.position, len(part))], LAST)
            self.token_ids += part
        return output

    async def choose(self, hidden: torch.Tensor, sampling: Sampling) -> Choice:
        """hidden (1, E) -> the token for the next position."""
        return await self._thread.run(self._choose, hidden, sampling, self.position)

    def _choose(self, hidden: torch.Tensor, sampling: Sampling, position: int) -> Choice:
        return choose(self._edges.head(hidden)[0], sampling, position)


async def generate_tokens(
    session: TokenSession,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> AsyncGenerator[Choice, None]:
    """The tokens that follow `prompt_ids`, the stopping one included; at most `max_new_tokens`.

    Raises PromptTooLong where the session has no room for the prompt and one token.
    """
    if not prompt_ids:
        raise InvalidArgument("the prompt is empty; give at least one token")
    if len(prompt_ids) >= session.max_length:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids)} tokens and the session room for {session.max_length}, prompt "
            f"and answer together; shorten the prompt or open a longer session"
        )
    limit = min(max_new_tokens, session.max_length - len(prompt_ids))
    session.rollback(min(_common_prefix(session.token_ids, prompt_ids), len(prompt_ids) - 1))
    hidden = await session.feed(prompt_ids[session.position :])
    for count in range(1, limit + 1):
        choice = await session.choose(hidden, sampling)
        yield choice
        if choice.token_id in stop_ids or count == limit:
            return
        hidden = await session.feed([choice.token_id])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
