"""From logits to a token: greedy, or temperature, top-k and top-p with a seed.

The random number of a position depends on the seed and the position alone, never on how often or where the
step was computed. So the same seed gives the same text over any chain, and a step repeated after a failure
repeats its choice.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field

import torch

from petalite.errors import InvalidArgument, NotFinite
from petalite.model.compute import is_finite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. The default is greedy."""

    temperature: float = 0.0  # 0: the likeliest token; above: softmax of logits / temperature
    top_k: int = 0  # sample among the k likeliest; 0: all
    top_p: float = 1.0  # among the fewest tokens whose probabilities sum to at least this
    seed: int = field(default_factory=lambda: secrets.randbits(63))  # of every random choice

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgument(f"temperature must be 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k must be 0 (all) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"a seed is a whole number from 0 to 2**64 - 1, found {self.seed}")


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int
    logprob: float  # of the token under the model's own distribution, natural log


def choose(logits: torch.Tensor, sampling: Sampling, position: int) -> Choice:
    """logits (V,) float32 -> the token for `position`. Raises NotFinite where the model gave no numbers."""
    if not is_finite(logits):
        raise NotFinite(f"the logits for position {position} have NaN or Inf; some server computes wrongly")
    token_id = int(logits.argmax()) if sampling.temperature == 0 else _sample(logits, sampling, position)
    return Choice(token_id, float(logits[token_id] - logits.logsumexp(0)))


def _sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Inverse transform sampling over the kept tokens, likeliest first."""
    count = min(sampling.top_k or len(logits), len(logits))
    scores, token_ids = logits.double().topk(count)
    probabilities = (scores / sampling.temperature).softmax(0)
    cumulative = probabilities.cumsum(0)
    if sampling.top_p < 1:
        kept = int(torch.searchsorted(cumulative, sampling.top_p)) + 1
        cumulative = cumulative[: min(kept, count)]
    target = _uniform(sampling.seed, position) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True))
    return int(token_ids[min(index, len(cumulative) - 1)])


def _uniform(seed: int, position: int) -> float:
    """In [0, 1): 53 bits of BLAKE2b over seed and position."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8)
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
