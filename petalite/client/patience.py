"""How long to wait for an answer: learnt from the session's own steps, as TCP learns its time-outs (RFC
6298).

A pure core: times in, times out. Decode steps and prefill tokens are learnt apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalite.swarm.messages import DECODE_TOKENS

LEARN_STEPS = 4  # are known well; before the first of a session the settings' own bound holds
# Fewer steps, or those of a chain that was mended since, say less: so many times what they would allow.
DOUBT = 4.0


@dataclass(frozen=True, slots=True)
class PatienceSettings:
    # The longest a step may take, before and after learning; token_s more for each token.
    step_s: float = 30.0
    token_s: float = 0.25
    least_s: float = 2.0  # no deadline is shorter
    factor: float = 4.0  # a step may take so many times what is usual


@dataclass(slots=True)
class _Learnt:
    before_s: float | None = None  # usual over the chain before this one
    count: int = 0
    mean_s: float = 0.0
    deviation_s: float = 0.0

    def observe(self, seconds: float) -> None:
        if self.count == 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            self.deviation_s += (abs(seconds - self.mean_s) - self.deviation_s) / 4
            self.mean_s += (seconds - self.mean_s) / 8
        self.count += 1

    @property
    def is_enough(self) -> bool:
        return self.count >= LEARN_STEPS

    @property
    def usual_s(self) -> float | None:
        """The mean and four deviations; until this chain is known well, no less than of the one before."""
        if not self.count:
            return self.before_s
        own_s = self.mean_s + 4 * self.deviation_s
        return own_s if self.is_enough else max(own_s, self.before_s or 0.0)


class Patience:
    """Of one session."""

    def __init__(self, settings: PatienceSettings = PatienceSettings()) -> None:
        self.settings = settings
        self._step = _Learnt()  # of one token, or few
        self._token = _Learnt()  # per token, of prefills

    def observe(self, n_tokens: int, seconds: float) -> None:
        if n_tokens <= DECODE_TOKENS:
            self._step.observe(seconds)
        else:
            self._token.observe(seconds / n_tokens)

    def forget(self) -> None:
        """The chain has changed."""
        self._step, self._token = _Learnt(self._step.usual_s), _Learnt(self._token.usual_s)

    def longest_s(self, n_tokens: int) -> float:
        """Whatever has been learnt."""
        return self.settings.step_s + self.settings.token_s * n_tokens

    def timeout_s(self, n_tokens: int) -> float:
        """For the answer to a step of so many tokens."""
        longest_s = self.longest_s(n_tokens)
        # A few tokens, guessed ahead or of several rows, take longer than their share of a prefill, and never
        # longer than as many steps.
        learnt, times = self._step if n_tokens <= DECODE_TOKENS else self._token, n_tokens
        if learnt.usual_s is None:
            return longest_s
        learnt_s = max(self.settings.factor * learnt.usual_s * times, self.settings.least_s)
        return min(learnt_s if learnt.is_enough else DOUBT * learnt_s, longest_s)
