"""Two ways to guess what follows a text: look it up in the text itself, or ask a small model of the same
words.

A small model chooses by the same rules and the same random numbers as the large one, so where both agree
about the probabilities they make the same choice, also when sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalite.client.generation import common_prefix
from petalite.client.sampling import Chooser
from petalite.client.speculation import Draft
from petalite.errors import InvalidArgument
from petalite.model.cache import KVCache, Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.edges import Edges, load_edges
from petalite.model.span import BlockSpan, load_span
from petalite.model.tokenizer import Tokenizer, load_tokenizer

LOOKUP = "lookup"
SHORTEST_MATCH = 2  # tokens
LONGEST_MATCH = 32  # longer ones are as good as this
CANDIDATES = 16  # earlier places that are compared, the latest ones
PREFILL_TOKENS = 512  # of the small model, in one forward


class LookupDrafter:
    """What followed when the text last said the same. Good at quotes, edits of code, and loops."""

    is_free = True

    def __init__(self) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # where each pair of tokens ends

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        """The tokens after the longest earlier match of the text's end, the latest of those; its kind is how
        long the match is."""
        self._learn(text)
        length, place = self._longest_match()
        if length < SHORTEST_MATCH:
            return Draft([])
        return Draft(self._text[place : place + count], length.bit_length())

    def close(self) -> None:
        """Nothing is held."""

    def _learn(self, text: Sequence[int]) -> None:
        known = common_prefix(self._text, text)
        if known < len(self._text):
            self._text, self._places, known = [], {}, 0
        self._text.extend(text[known:])
        for end in range(max(known + 1, SHORTEST_MATCH), len(text) + 1):
            self._places.setdefault(tuple(self._text[end - SHORTEST_MATCH : end]), []).append(end)

    def _longest_match(self) -> tuple[int, int]:
        """How many tokens before the end stood earlier too, and where that ended."""
        text, end = self._text, len(self._text)
        best = (0, 0)
        places = self._places.get(tuple(text[end - SHORTEST_MATCH :]), [])
        for place in reversed(places[-CANDIDATES - 1 : -1]):
            length = SHORTEST_MATCH
            while length < min(LONGEST_MATCH, place) and text[place - length - 1] == text[end - length - 1]:
                length += 1
            if length > best[0]:
                best = (length, place)
        return best


class DraftModel:
    """A small model in this process, whose words are those of the large one. Used by one thread."""

    def __init__(self, edges: Edges, blocks: BlockSpan, thread: ComputeThread, vocab_size: int) -> None:
        self.edges = edges
        self.blocks = blocks
        self.thread = thread
        self.vocab_size = vocab_size  # of the large one
        self.cache: KVCache = blocks.new_cache()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (1, E) -> logits (V,) over the large model's vocabulary. Checkpoints pad theirs to different
        sizes; no padding is ever chosen."""
        logits = self.edges.head(hidden)[0, : self.vocab_size]
        missing = self.vocab_size - len(logits)
        return torch.cat([logits, logits.min().expand(missing)]) if missing else logits


async def load_draft(
    path_or_repo: str, tokenizer: Tokenizer, vocab_size: int, thread: ComputeThread
) -> DraftModel:
    """A checkpoint to draft for a model with this tokenizer. Raises InvalidArgument where its words differ,
    and what loading a checkpoint raises."""

    def load() -> DraftModel:
        checkpoint = Checkpoint.open(path_or_repo)
        if not load_tokenizer(checkpoint).has_same_ids(tokenizer):
            raise InvalidArgument(
                f"{path_or_repo} cannot draft for this model: its tokenizer gives other ids; choose a small "
                f"model of the same family"
            )
        dtype = compute_dtype(checkpoint, AUTO)
        edges = load_edges(checkpoint, dtype=dtype)
        blocks = load_span(checkpoint, 0, checkpoint.config.n_blocks, dtype=dtype)
        return DraftModel(edges, blocks, thread, vocab_size)

    return await thread.run(load)


class ModelDrafter:
    """A draft model's guesses for one session, over a cache row of its own."""

    is_free = False

    def __init__(self, model: DraftModel, max_length: int) -> None:
        self._model = model
        self._max_length = min(max_length, model.edges.config.max_position_embeddings)
        self._row: int | None = None
        self._cached: list[int] = []

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        return await self._model.thread.run(self._draft, list(text), chooser, count)

    def close(self) -> None:
        if not self._model.thread.closed:
            self._model.thread.run(self._drop)  # after a draft that nobody waits for any more

    def _drop(self) -> None:
        row, self._row = self._row, None
        if row is not None:
            self._model.cache.drop(row)

    def _draft(self, text: list[int], chooser: Chooser, count: int) -> Draft:
        drafts: list[int] = []
        for _ in range(min(count, self._max_length - len(text) + 1)):
            hidden = self._feed(text)
            if hidden is None:
                break
            drafts.append(chooser.choose(self._model.logits(hidden), text).token_id)
            text.append(drafts[-1])
        return Draft(drafts)

    def _feed(self, text: list[int]) -> torch.Tensor | None:
        """hidden (1, E) at the end of `text`; None where it has a token unknown to the small model."""
        model = self._model
        if self._row is None:
            self._row = model.cache.open_row(self._max_length)
        start = min(common_prefix(self._cached, text), len(text) - 1)
        if max(text[start:]) >= model.edges.config.vocab_size:
            return None
        del self._cached[start:]
        for first in range(start, len(text), PREFILL_TOKENS):
            part = text[first : first + PREFILL_TOKENS]
            segment = Segment(self._row, first, len(part))
            hidden = model.blocks.forward(model.edges.embed(part), [segment], model.cache)
            self._cached += part
        return hidden[-1:]
