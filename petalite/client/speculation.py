"""How many tokens to guess ahead, and whether at all: speculative decoding (arXiv 2211.17192) by measurement.

A drafter guesses what comes next; one step through the chain computes the last token and all guesses, and
what would have been chosen anyway decides how many were right. So speculation changes no token, greedy or
sampled, only how many a trip brings. What pays is learnt from the run itself: the seconds of steps by their
size, the seconds of drafting, and how often guesses were right. Knows token ids and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from petalite.client.sampling import Chooser
from petalite.swarm.messages import DECODE_TOKENS

MOST_DRAFTS = DECODE_TOKENS - 1  # a step of more is a prefill to servers, and stands behind decodes
SIZES = (0, 1, 3, 7, MOST_DRAFTS)  # drafts in a round
FORGET = 0.95  # weight of what is known of right and wrong guesses, with each new one
RECENT = 0.2  # weight of a new time among the old ones
OUTLIER = 3.0  # a time counts as at most this often the usual one: a server was replaced meanwhile
UNKNOWN_GROWTH = 0.2  # of a step of one token: what each more is thought to add before any was tried
EXPLORE_ROUNDS = 32  # so often something is tried that did not seem to pay


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses, and a kind of guesses that tend to be right equally often."""

    token_ids: list[int]
    kind: int = 0


class Drafter(Protocol):
    """Guesses what follows a text. Wrong guesses cost time and nothing else."""

    is_free: bool  # guessing takes no time to speak of

    async def draft(self, text: Sequence[int], chooser: Chooser, count: int) -> Draft:
        """At most `count` tokens."""
        ...

    def close(self) -> None: ...


class Pace:
    """What was measured, and what follows from it."""

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}  # by tokens in a step
        self._draft_s = 0.0  # for each token
        self._right: dict[int, tuple[float, float]] = {}  # by kind: right guesses, and all; old ones fade

    def observe_step(self, n_tokens: int, seconds: float) -> None:
        if self._step_s:  # also a first time is compared with what was expected
            seconds = min(seconds, OUTLIER * self.step_s(n_tokens))
        self._step_s[n_tokens] = _blend(self._step_s.get(n_tokens), seconds)

    def observe_drafting(self, n_tokens: int, seconds: float) -> None:
        self._draft_s = _blend(self._draft_s or None, seconds / n_tokens)

    def observe_guesses(self, kind: int, guesses: Sequence[int], truth: Sequence[int]) -> None:
        """Compare until the first wrong one; what stands behind it was no fair guess."""
        for guess, true in zip(guesses, truth, strict=False):
            right, all_ = self._right.get(kind, (0.0, 0.0))
            self._right[kind] = right * FORGET + (guess == true), all_ * FORGET + 1
            if guess != true:
                return

    def acceptance(self, kind: int) -> float:
        """How likely a guess is right, if those before it were. At first little is expected: a free guess
        shows unsent whether it would have been right, and one that is sent in vain costs time."""
        right, all_ = self._right.get(kind, (0.0, 0.0))
        return (right + 0.4) / (all_ + 2.0)

    def step_s(self, n_tokens: int) -> float:
        """What a step of so many tokens takes: as measured, between measured sizes in proportion, beyond them
        growing as they do."""
        known = self._step_s
        if n_tokens in known or not known:
            return known.get(n_tokens, 0.0)
        below = max((size for size in known if size < n_tokens), default=None)
        above = min((size for size in known if size > n_tokens), default=None)
        if below is None:
            return known[above or n_tokens]
        if above is None:
            least = min(known)
            growth_s = UNKNOWN_GROWTH * known[least]
            if below > least:
                growth_s = max(0.0, known[below] - known[least]) / (below - least)
            return known[below] + growth_s * (n_tokens - below)
        share = (n_tokens - below) / (above - below)
        return known[below] * (1 - share) + known[above] * share

    def best(self, kind: int, most: int) -> int:
        """How many drafts, of at most `most`, bring the most tokens a second; 0 where none pays, or before it
        is known what a step without any takes."""
        right = self.acceptance(kind)
        if 1 not in self._step_s:
            return 0

        def rate(count: int) -> float:
            tokens = sum(right**guess for guess in range(count + 1))
            seconds = self.step_s(count + 1) + count * self._draft_s
            return tokens / seconds

        return max((size for size in {*SIZES, most} if size <= most), key=lambda size: (rate(size), -size))


class Speculation:
    """Of one session: a drafter, and the pace that suits it here."""

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.perf_counter) -> None:
        self.pace = Pace()
        self.clock = clock
        self._drafter = drafter
        self._draft = Draft([])
        self._text_length = 0  # what the latest draft was made for
        self._idle_rounds = 0
        self._has_read = False  # the drafter has seen the text so far, as its first draft makes it

    async def draft(self, text: Sequence[int], chooser: Chooser, most: int) -> list[int]:
        """What to send along with the last token of `text`: up to `most` guesses, often none."""
        self.pace.observe_guesses(self._draft.kind, self._draft.token_ids, text[self._text_length :])
        self._draft, self._text_length = Draft([]), len(text)
        most = min(most, MOST_DRAFTS)
        if most <= 0:
            return []
        if self._drafter.is_free:
            # Guesses that are not sent show all the same how often they would have been right.
            self._draft = await self._drafter.draft(text, chooser, MOST_DRAFTS)
            count = self._count(self._draft.kind, min(most, len(self._draft.token_ids)))
            return self._draft.token_ids[:count]
        count = self._count(0, most)
        if count:
            began_s = self.clock()
            self._draft = await self._drafter.draft(text, chooser, count)
            # To read a whole prompt, once, is no part of what a guess costs.
            if self._draft.token_ids and self._has_read:
                self.pace.observe_drafting(len(self._draft.token_ids), self.clock() - began_s)
            self._has_read = True
        return self._draft.token_ids

    def observe(self, n_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.pace.observe_step(n_tokens, seconds)

    def close(self) -> None:
        self._drafter.close()

    def _count(self, kind: int, most: int) -> int:
        count = self.pace.best(kind, most)
        self._idle_rounds = 0 if count else self._idle_rounds + (most > 0)
        if self._idle_rounds > EXPLORE_ROUNDS:
            self._idle_rounds = 0
            return min(1, most)
        return count


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + RECENT * (new - old)
