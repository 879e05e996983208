"""What `generate` and `stream` take beside the prompt, and what is made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from petalite.client.arguments import check_whole
from petalite.client.penalties import Penalties
from petalite.client.sampling import Chooser, Sampling
from petalite.client.stopping import StopTexts
from petalite.errors import InvalidArgument

NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As users name them. Raises InvalidArgument for values that cannot work, alone or together."""

    max_new_tokens: int = 256  # at most so many
    # How to choose; the default is greedy. See `Sampling`.
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: another one each time
    # What is done to the logits before. See `Penalties`.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: NO_BIAS)
    # When to end, beside the model's own end of text.
    stop: str | Sequence[str] = ()  # texts, which are not given out
    stop_ids: Collection[int] = ()  # token ids, whose text is not given out
    # What else is wanted.
    logprobs: int = 0  # of so many of the likeliest tokens at each position, beside the chosen one's
    speculate: str | None = None  # "lookup", or a small checkpoint with the same tokenizer

    def __post_init__(self) -> None:
        check_whole(max_new_tokens=self.max_new_tokens)
        if self.max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be 1 or more, found {self.max_new_tokens}")
        self.stop_texts()
        self.chooser(0)

    def chooser(self, n_prompt: int) -> Chooser:
        """For the tokens that follow a prompt of so many. Without a seed, each is another."""
        seeded = {} if self.seed is None else {"seed": self.seed}
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, **seeded)
        penalties = Penalties(
            self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.logit_bias
        )
        return Chooser(sampling, penalties, n_prompt, self.logprobs)

    def as_keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def stop_texts(self) -> StopTexts:
        return StopTexts([self.stop] if isinstance(self.stop, str) else self.stop)
