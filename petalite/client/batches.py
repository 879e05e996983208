"""Several prompts at once: rows of one session, each as long as it is, each ending by itself.

Prompts are packed into steps of a chunk's size; after that, a step has one token of every row that goes on.
Knows token ids and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from petalite.client.generation import check_room
from petalite.client.penalties import Penalties
from petalite.client.sampling import Choice, Chooser
from petalite.client.session import Session, StepInput
from petalite.errors import InvalidArgument, NotFinite
from petalite.model.compute import ComputeThread, is_finite
from petalite.model.edges import Edges
from petalite.swarm.kept import Row
from petalite.swarm.messages import ALL, LAST


class Batch:
    """Rows of a session that are fed token ids."""

    def __init__(self, session: Session, edges: Edges, thread: ComputeThread) -> None:
        self._session = session
        self._edges = edges
        self._thread = thread

    @property
    def max_length(self) -> int:
        return self._session.max_length

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Chooser],
        max_new_tokens: int,
        take: Callable[[int, Choice], bool],
    ) -> None:
        """Give `take` each token that follows a prompt, with its row; where it says False, that row ends.

        Raises InvalidArgument, PromptTooLong.
        """
        texts = [list(prompt) for prompt in prompts]
        longest = self._session.max_length
        ends = [len(text) + check_room(len(text), longest, max_new_tokens) for text in texts]
        hidden = await self.prefill(texts)
        live = list(range(len(texts)))
        while live:
            choices = await self._thread.run(self._choose, hidden, [(choosers[r], texts[r]) for r in live])
            going_on = []
            for row, choice in zip(live, choices, strict=True):
                texts[row].append(choice.token_id)
                if take(row, choice) and len(texts[row]) < ends[row]:
                    going_on.append(row)
            live = going_on
            if live:
                places = [(row, len(texts[row]) - 1) for row in live]
                hidden = await self.step([texts[row][-1] for row in live], places)

    async def prefill(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Feed texts (B rows) into empty rows -> hidden (B, E) of each one's last token."""
        steps = pack([len(text) for text in texts], self._session.settings.chunk_tokens)
        inputs = []
        for rows in steps:
            ids = [token for row, start, count in rows for token in texts[row][start : start + count]]
            inputs.append(StepInput(self._edges.embed(ids), rows, LAST))
        last: dict[int, torch.Tensor] = {}
        for rows, output in zip(steps, await self._session.steps(inputs), strict=True):
            last |= {row: hidden for (row, _, _), hidden in zip(rows, output, strict=True)}
        return torch.stack([last[row] for row in range(len(texts))])

    async def step(
        self,
        token_ids: Sequence[int],
        places: Sequence[tuple[int, int]],
        forks: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor:
        """One token for each (row, position) -> hidden, one for each. See `Session.step` for forks."""
        rows = [(row, position, 1) for row, position in places]
        return await self._session.step(self._edges.embed(token_ids), rows, ALL, forks)

    async def log_probabilities(
        self, hidden: torch.Tensor, texts: Sequence[Sequence[int]], n_prompt: int, penalties: Penalties
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, E) at the end of `texts` -> (B, V) each: log probabilities after penalties, and before.

        Raises NotFinite.
        """
        return await self._thread.run(self._log_probabilities, hidden, texts, n_prompt, penalties)

    def _log_probabilities(
        self, hidden: torch.Tensor, texts: Sequence[Sequence[int]], n_prompt: int, penalties: Penalties
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = self._edges.head(hidden).log_softmax(-1)
        if not is_finite(logprobs):
            raise NotFinite("the logits have NaN or Inf; some server computes wrongly")
        rows = [
            penalties.apply(row, text[:n_prompt], text[n_prompt:])
            for row, text in zip(logprobs, texts, strict=True)
        ]
        return torch.stack(rows), logprobs

    def _choose(self, hidden: torch.Tensor, deciding: Sequence[tuple[Chooser, list[int]]]) -> list[Choice]:
        logits = self._edges.head(hidden)
        return [chooser.choose(row, text) for row, (chooser, text) in zip(logits, deciding, strict=True)]


def pack(lengths: Sequence[int], most_tokens: int) -> list[list[Row]]:
    """Rows of these lengths as steps of at most `most_tokens`, in order, no row twice in a step."""
    if not all(lengths):
        raise InvalidArgument("a prompt is empty; give at least one token")
    steps: list[list[Row]] = []
    room = 0
    for row, length in enumerate(lengths):
        position = 0
        while position < length:
            if not room:
                steps.append([])
                room = most_tokens
            count = min(room, length - position)
            steps[-1].append((row, position, count))
            position, room = position + count, room - count
    return steps
