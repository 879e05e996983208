"""From logits to a token: bias and penalties, then greedy, or temperature, top-k, top-p and min-p with a
seed.

In this order, which is that of transformers where it has them: logit bias; repetition penalty; presence and
frequency penalties; temperature; top-k; top-p; min-p.

What is random about a token depends on the seed, its position and its id alone, never on how often, where or
together with what the step was computed. So the same seed gives the same text over any chain, a step repeated
after a failure repeats its choice, and a draft that guessed it is right or wrong whatever the draft was.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from petalite.client.arguments import check_numbers, check_whole
from petalite.client.penalties import Penalties
from petalite.errors import InvalidArgument, NotFinite
from petalite.model.compute import is_finite

NUCLEUS = 256  # tokens that are looked at first for top_p; eight times as many until they suffice
MOST_ALTERNATIVES = 100  # that a token's log probabilities may be given of


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. The default is greedy."""

    temperature: float = 0.0  # 0: the likeliest token; above: softmax of logits / temperature
    top_k: int = 0  # sample among the k likeliest; 0: all
    top_p: float = 1.0  # among the fewest tokens whose probabilities sum to at least this
    min_p: float = 0.0  # among those at least this times as likely as the likeliest
    seed: int = field(default_factory=lambda: secrets.randbits(63))  # of every random choice

    def __post_init__(self) -> None:
        check_numbers(temperature=self.temperature, top_p=self.top_p, min_p=self.min_p)
        check_whole(top_k=self.top_k, seed=self.seed)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgument(f"temperature must be 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k must be 0 (all) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InvalidArgument(f"min_p must be from 0 (all) to 1, found {self.min_p}")
        if not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"a seed is a whole number from 0 to 2**64 - 1, found {self.seed}")
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise InvalidArgument(
                "top_k, top_p and min_p say among which tokens to sample, and temperature 0 samples none; "
                "give a temperature above 0, or leave them out"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int
    logprob: float  # of the token under the model's own distribution, natural log
    alternatives: Mapping[int, float] = field(
        default_factory=lambda: MappingProxyType({})
    )  # the same of the likeliest tokens, likeliest first, as many as were asked for


@dataclass(frozen=True, slots=True)
class Chooser:
    """Everything that decides about the tokens that follow one prompt."""

    sampling: Sampling = field(default_factory=Sampling)
    penalties: Penalties = field(default_factory=Penalties)
    n_prompt: int = 0  # tokens of the text that were given, not chosen
    n_alternatives: int = 0  # to report with each choice

    def __post_init__(self) -> None:
        check_whole(logprobs=self.n_alternatives)
        if not 0 <= self.n_alternatives <= MOST_ALTERNATIVES:
            raise InvalidArgument(
                f"alternatives with their logprobs are given for up to {MOST_ALTERNATIVES} tokens, "
                f"found {self.n_alternatives}"
            )

    def choose(self, logits: torch.Tensor, text: Sequence[int]) -> Choice:
        """logits (V,) float32 -> the token that follows the token ids `text`.

        Raises NotFinite where the model gave no numbers.
        """
        if not is_finite(logits):
            raise NotFinite(
                f"the logits for position {len(text)} have NaN or Inf; some server computes wrongly"
            )
        scores = self.penalties.apply(logits, text[: self.n_prompt], text[self.n_prompt :])
        if self.sampling.temperature == 0:
            token_id = int(scores.argmax())
        else:
            token_id = _sample(scores, self.sampling, len(text))
        total = float(logits.logsumexp(0))
        alternatives = {}
        if self.n_alternatives:
            best = logits.topk(min(self.n_alternatives, len(logits)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            alternatives = {id: logit - total for id, logit in pairs}
        return Choice(token_id, float(logits[token_id]) - total, MappingProxyType(alternatives))


def kept_tokens(scores: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (V,) -> ids (N,) of the tokens to sample among, and their log probabilities less a constant."""
    # Less the largest, as a temperature that is next to nothing makes Inf of anything above 0.
    scores = (scores.double() - scores.max()) / sampling.temperature
    token_ids = torch.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        scores, token_ids = scores.topk(sampling.top_k)
    if sampling.top_p < 1:
        scores, kept = _nucleus(scores, sampling.top_p)
        token_ids = token_ids[kept]
    if sampling.min_p > 0:
        kept = scores >= scores.max() + math.log(sampling.min_p)
        scores, token_ids = scores[kept], token_ids[kept]
    return token_ids, scores


def _nucleus(scores: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (V,) -> the fewest of them whose probabilities sum to `top_p`, the largest first, and where they
    stood. To sort them all would take longer than most heads; mostly a few hundred are enough."""
    total = scores.logsumexp(0)
    count = NUCLEUS
    while True:
        best, ranks = scores.topk(min(count, len(scores)))
        sums = (best - total).exp().cumsum(0)
        if count >= len(scores) or sums[-1] >= top_p:
            n_kept = 1 + int((sums[:-1] < top_p).sum())
            return best[:n_kept], ranks[:n_kept]
        count *= 8


def _sample(scores: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The Gumbel-max trick: the largest log probability plus noise is a sample of the softmax."""
    token_ids, scores = kept_tokens(scores, sampling)
    return int(token_ids[(scores + gumbel_noise(sampling.seed, position, token_ids)).argmax()])


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Independent standard Gumbel numbers, float64, for each token id (N,), of nothing but the arguments."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8)
    key = int.from_bytes(digest.digest(), "little", signed=True)
    bits = _shift(_mixed(token_ids * _signed(0x9E3779B97F4A7C15) + key), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    return -(-uniform.log()).log()


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); int64 wraps as it should."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
