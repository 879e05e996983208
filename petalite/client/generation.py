"""Token by token: feed a prompt, choose, feed the choice, until something says stop.

A round feeds the last choice and whatever a draft guesses to come after it, and chooses at each of them; the
guesses that were chosen are as good as computed one by one, and the others are rolled back, which is free.
Knows token ids and hidden states; text is `client.model`'s, hops are the session's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from petalite.client.sampling import Choice, Chooser
from petalite.client.session import Session, StepInput
from petalite.client.speculation import Speculation
from petalite.client.trace import Trace
from petalite.errors import InvalidArgument, PromptTooLong
from petalite.model.compute import ComputeThread
from petalite.model.edges import Edges
from petalite.swarm.messages import ALL, LAST, NONE

STOP, LENGTH = "stop", "length"  # why a generation ended: something said stop, or the limit


@dataclass(frozen=True, slots=True)
class Generation:
    """What `generate` returns."""

    text: str  # without what stopped it
    token_ids: list[int]  # the new ones, those that stopped it included
    logprobs: list[float]  # of each, natural log
    finish_reason: str  # STOP or LENGTH
    trace: Trace = field(repr=False)
    alternatives: list[Mapping[int, float]] = field(default_factory=list, repr=False)  # if asked for


class TokenSession:
    """A session of one row that is fed token ids and remembers them.

    A prompt that begins like what the session holds costs only the rest; that is how a chat goes on.
    """

    def __init__(
        self, session: Session, edges: Edges, thread: ComputeThread, prefix: torch.Tensor | None = None
    ) -> None:
        """`prefix` (P, E) are hidden states before the first token; the session has room for them too."""
        self.session = session
        self._prefix = prefix
        self._before = 0 if prefix is None else len(prefix)
        self.token_ids: list[int] = []  # what the hops' caches hold
        self.speculations: dict[str, Speculation] = {}  # by what was asked for; they live as long as this
        self.generation: object = None  # the latest that began in it
        self._edges = edges
        self._thread = thread

    async def __aenter__(self) -> TokenSession:
        await self.session.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for speculation in self.speculations.values():
            speculation.close()
        await self.session.__aexit__(*exc_info)  # type: ignore[arg-type]

    @property
    def position(self) -> int:
        """How many tokens the session holds."""
        return len(self.token_ids)

    @property
    def max_length(self) -> int:
        return self.session.max_length - self._before

    @property
    def trace(self) -> Trace:
        return self.session.trace

    def rollback(self, position: int) -> None:
        """Forget the tokens at and after `position`. Costs nothing; the next step goes on from there."""
        if not 0 <= position <= len(self.token_ids):
            raise InvalidArgument(f"cannot roll back to {position}: the session holds {self.position} tokens")
        self.session.rollback(self._before + position)
        del self.token_ids[position:]

    async def feed(self, token_ids: Sequence[int], output: str = LAST) -> torch.Tensor:
        """Append tokens, in chunks that follow each other through the chain -> hidden before the final norm:
        (1, E) of the last one, or with ALL (T, E)."""
        if not token_ids:
            raise InvalidArgument("there is nothing to feed; give at least one token")
        self.session.check_idle()
        chunk = self.session.settings.chunk_tokens
        hidden = self._edges.embed(list(token_ids))
        first, inputs = self._before + self.position, list[StepInput]()
        for start in range(self.session.length(), self._before, chunk):
            assert self._prefix is not None
            part = self._prefix[start : start + chunk]
            inputs.append(StepInput(part, [(0, start, len(part))], NONE))
        for start in range(0, len(token_ids), chunk):
            part = hidden[start : start + chunk]
            wanted = output if output == ALL or start + chunk >= len(token_ids) else NONE
            inputs.append(StepInput(part, [(0, first + start, len(part))], wanted))
        try:
            outputs = await self.session.steps(inputs)
            return torch.cat(outputs) if output == ALL else outputs[-1]
        finally:
            # Whatever ended it: so far has every hop come.
            self.token_ids = [*self.token_ids, *token_ids][: max(0, self.session.length() - self._before)]

    async def choose(
        self,
        hidden: torch.Tensor,
        chooser: Chooser,
        text: Sequence[int],
        drafts: Sequence[int] = (),
        stop_ids: Collection[int] = (),
    ) -> list[Choice]:
        """hidden (len(drafts) + 1, E) of the end of `text` and `drafts` -> the tokens that follow `text`: one
        more than there are right drafts, unless one of them stops."""
        return await self._thread.run(self._choose, hidden, chooser, list(text), drafts, stop_ids)

    def _choose(
        self,
        hidden: torch.Tensor,
        chooser: Chooser,
        text: list[int],
        drafts: Sequence[int],
        stop_ids: Collection[int],
    ) -> list[Choice]:
        logits = self._edges.head(hidden)
        choices: list[Choice] = []
        for row, draft in zip(logits, [*drafts, None], strict=True):
            choice = chooser.choose(row, text)
            choices.append(choice)
            if choice.token_id != draft or choice.token_id in stop_ids:
                break
            text.append(choice.token_id)
        return choices


async def generate_tokens(
    session: TokenSession,
    prompt_ids: Sequence[int],
    chooser: Chooser,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    speculation: Speculation | None = None,
) -> AsyncGenerator[Choice, None]:
    """The tokens that follow `prompt_ids`, the stopping one included; at most `max_new_tokens`.

    Raises PromptTooLong where the session has no room for the prompt and one token.
    """
    end = len(prompt_ids) + check_room(len(prompt_ids), session.max_length, max_new_tokens)
    session.session.check_idle()
    own = session.generation = object()

    def check_own() -> None:
        if session.generation is not own:
            raise InvalidArgument("another generation has begun in this session; give each its own")

    session.rollback(min(common_prefix(session.token_ids, prompt_ids), len(prompt_ids) - 1))
    text, drafts = list(prompt_ids), list[int]()
    if session.position:
        await session.session.reconsider()  # a turn's beginning: its prefill hides what a replay takes
        check_own()
    hidden = await session.feed(text[session.position :])
    try:
        while True:
            for choice in await session.choose(hidden, chooser, text, drafts, stop_ids):
                text.append(choice.token_id)
                yield choice
            check_own()
            session.rollback(len(text) - 1)  # of the drafts, those that were right
            if text[-1] in stop_ids or len(text) == end:
                return
            if speculation is None:
                hidden = await session.feed(text[-1:])
            else:
                drafts = await speculation.draft(text, chooser, end - len(text) - 1)
                check_own()
                began_s = speculation.clock()
                hidden = await session.feed([text[-1], *drafts], ALL)
                speculation.observe(1 + len(drafts), speculation.clock() - began_s)
    finally:
        if len(text) > len(prompt_ids) and session.generation is own:
            session.rollback(min(session.position, len(text) - 1))


def check_room(n_prompt: int, max_length: int, max_new_tokens: int) -> int:
    """How many tokens may follow a prompt. Raises InvalidArgument, PromptTooLong."""
    if not n_prompt:
        raise InvalidArgument("the prompt is empty; give at least one token")
    if n_prompt >= max_length:
        raise PromptTooLong(
            f"the prompt has {n_prompt} tokens and the session room for {max_length}, prompt "
            f"and answer together; shorten the prompt or open a longer session"
        )
    return min(max_new_tokens, max_length - n_prompt)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:  # mostly
        return shortest
    return next(index for index in range(shortest) if a[index] != b[index])
