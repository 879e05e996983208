"""What is done to logits before anything is chosen: bias by token, and penalties for what was said before.

Knows token ids and logits; knows nothing of chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from petalite.client.arguments import check_numbers, check_whole
from petalite.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Penalties:
    """The default changes nothing."""

    repetition: float = 1.0  # divides (above 0) or multiplies (below) the logits of tokens in the whole text
    presence: float = 0.0  # subtracted from the logits of tokens that were generated
    frequency: float = 0.0  # the same, as often as each was generated
    bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # added, by token id

    def __post_init__(self) -> None:
        check_numbers(
            repetition_penalty=self.repetition,
            presence_penalty=self.presence,
            frequency_penalty=self.frequency,
        )
        if not (math.isfinite(self.repetition) and self.repetition > 0):
            raise InvalidArgument(f"repetition_penalty must be above 0 (1: none), found {self.repetition}")
        for name in ("presence", "frequency"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidArgument(
                    f"{name}_penalty must be a number (0: none), found {getattr(self, name)}"
                )
        for token_id, value in self.bias.items():
            check_whole(**{"a token of logit_bias": token_id})
            check_numbers(**{f"the logit_bias of token {token_id}": value})
            if token_id < 0 or not math.isfinite(value):
                raise InvalidArgument(
                    f"logit_bias maps token ids to numbers, found {token_id}: {value}; to rule a token out, "
                    f"use -1e4"
                )

    def check(self, vocab_size: int) -> None:
        """Raises InvalidArgument where a token of the bias is not one of the model's."""
        beyond = [token_id for token_id in self.bias if token_id >= vocab_size]
        if beyond:
            raise InvalidArgument(
                f"logit_bias names token {beyond[0]}, the model's vocabulary ends at {vocab_size - 1}"
            )

    def apply(self, logits: torch.Tensor, prompt: Sequence[int], generated: Sequence[int]) -> torch.Tensor:
        """logits (V,) for the token after `prompt` and `generated` -> new logits, or the same where nothing
        is to be done."""
        repeats = self.repetition != 1.0 and (prompt or generated)
        if not (self.bias or repeats or ((self.presence or self.frequency) and generated)):
            return logits
        logits = logits.clone()
        if self.bias:
            logits[torch.tensor(list(self.bias))] += torch.tensor(list(self.bias.values()))
        if repeats:
            said = torch.tensor(list({*prompt, *generated}))
            found = logits[said]
            logits[said] = torch.where(found > 0, found / self.repetition, found * self.repetition)
        if (self.presence or self.frequency) and generated:
            counts = Counter(generated)
            times = torch.tensor(list(counts.values()))
            logits[torch.tensor(list(counts))] -= self.presence + self.frequency * times
        return logits
