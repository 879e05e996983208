"""Beam search: the likeliest text among those that a few rows find together.

Every beam is a row of one session. In each step the beams that go on take one token each; where two go on
from the same one, the second is forked into the row of a beam that ended. Scoring is transformers': the sum
of log probabilities over length to the power of a penalty. Knows token ids and log probabilities.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from petalite.client.arguments import check_numbers, check_whole
from petalite.client.batches import Batch
from petalite.client.generation import check_room
from petalite.client.penalties import Penalties
from petalite.errors import InvalidArgument

MOST_BEAMS = 64
MOST_PENALTY = 10  # of length: as a power of any text's, still a number


@dataclass(frozen=True, slots=True)
class BeamSettings:
    beams: int = 4
    length_penalty: float = 1.0  # above 0 favours long texts, below 0 short ones
    early_stopping: bool = False  # end with as many texts as beams; else once no better one is to be expected

    def __post_init__(self) -> None:
        check_whole(beams=self.beams)
        check_numbers(length_penalty=self.length_penalty)
        if not 2 <= self.beams <= MOST_BEAMS:
            raise InvalidArgument(f"a beam search has 2 to {MOST_BEAMS} beams, found {self.beams}")
        if not abs(self.length_penalty) <= MOST_PENALTY:
            raise InvalidArgument(
                f"length_penalty is a number from {-MOST_PENALTY} to {MOST_PENALTY}, found "
                f"{self.length_penalty}"
            )


@dataclass(frozen=True, slots=True)
class Beam:
    """New tokens, and how likely."""

    token_ids: list[int]
    logprobs: list[float]  # of each token under the model's own distribution
    sum_logprob: float  # after penalties
    row: int = 0  # that holds all but the last token

    def score(self, length_penalty: float) -> float:
        return float(self.sum_logprob / len(self.token_ids) ** length_penalty)


class BeamSearch:
    """What is decided between two steps; computes nothing but sums."""

    def __init__(self, settings: BeamSettings, n_eos: int) -> None:
        self.settings = settings
        self.beams = [Beam([], [], 0.0)]  # that go on, the likeliest first
        self.finished: list[Beam] = []  # as many as beams at most, the best first
        self._kept = max(2, 1 + n_eos) * settings.beams  # so many go on even if every other one ends

    def advance(
        self, scores: torch.Tensor, logprobs: torch.Tensor, stop_ids: Collection[int], is_last: bool
    ) -> None:
        """scores (len(beams), V), log probabilities after penalties, and before them: choose anew."""
        sums = scores.double() + torch.tensor(
            [[beam.sum_logprob] for beam in self.beams], dtype=torch.float64
        )
        best = sums.flatten().topk(min(self._kept, sums.numel()))
        candidates = []
        for total, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token_id = divmod(index, scores.shape[1])
            before = self.beams[parent]
            logprob = float(logprobs[parent, token_id])
            candidates.append(
                Beam([*before.token_ids, token_id], [*before.logprobs, logprob], total, before.row)
            )
        ended = [is_last or beam.token_ids[-1] in stop_ids for beam in candidates]
        for beam, has_ended in list(zip(candidates, ended, strict=True))[: self.settings.beams]:
            if has_ended:  # those further down are only there to go on
                self.finished.append(beam)
        self.finished.sort(key=lambda beam: -beam.score(self.settings.length_penalty))
        del self.finished[self.settings.beams :]
        going_on = [beam for beam, has_ended in zip(candidates, ended, strict=True) if not has_ended]
        self.beams = going_on[: self.settings.beams]

    @property
    def is_over(self) -> bool:
        """Nothing goes on, or nothing better is to be expected."""
        if not self.beams:
            return True
        if len(self.finished) < self.settings.beams:
            return False
        penalty = self.settings.length_penalty
        return self.settings.early_stopping or self.beams[0].score(penalty) <= self.finished[-1].score(
            penalty
        )

    def settle(self) -> list[tuple[int, int]]:
        """Give every beam a row of its own; the forks that this takes."""
        free = [row for row in range(self.settings.beams) if row not in {beam.row for beam in self.beams}]
        taken: set[int] = set()
        settled, forks = [], []
        for beam in self.beams:
            row = beam.row
            if row in taken:
                row = free.pop()
                forks.append((beam.row, row))
            taken.add(row)
            settled.append(Beam(beam.token_ids, beam.logprobs, beam.sum_logprob, row))
        self.beams = settled
        return forks


async def beam_search(
    batch: Batch,
    prompt: Sequence[int],
    settings: BeamSettings,
    penalties: Penalties,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[Beam]:
    """The finished beams, the best first, over a session of as many empty rows as there are beams.

    Raises InvalidArgument, PromptTooLong.
    """
    limit = check_room(len(prompt), batch.max_length, max_new_tokens)
    search = BeamSearch(settings, len(stop_ids))
    hidden = await batch.prefill([prompt])
    for length in range(1, limit + 1):
        texts = [[*prompt, *beam.token_ids] for beam in search.beams]
        scores, logprobs = await batch.log_probabilities(hidden, texts, len(prompt), penalties)
        search.advance(scores, logprobs, stop_ids, is_last=length == limit)
        if search.is_over:
            break
        forks = search.settle()
        places = [(beam.row, len(prompt) + length - 1) for beam in search.beams]
        hidden = await batch.step([beam.token_ids[-1] for beam in search.beams], places, forks)
    return search.finished
