"""Rotary position embeddings (RoFormer, arXiv 2104.09864): inverse frequencies by type, and the rotation
itself.

Each type is a small dataclass of its own parameters; `ROPES` names them as a checkpoint's config does.
Types whose frequencies depend on the current length (dynamic, longrope) have no row: under a KV cache, keys
rotated earlier would disagree with queries rotated later.

A head's vector is rotated as D/2 complex numbers, that is over *interleaved* pairs (2i, 2i+1): one complex
product for the whole step. Checkpoints that pair (i, i + D/2) have their query and key rows reordered once,
at load, by `interleave_rows`; the product q·k is the same under any order that both share. Knows nothing of
checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

_MIN_POSITIONS = 1024


class Rope(Protocol):
    """What a rope type owes: the frequency of each pair, and the factor on its rotation."""

    @property
    def attention_factor(self) -> float:
        """On cosine and sine alike; 1 but for yarn."""
        ...

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """(D/2,) float32, in radians per position."""
        ...


def _plain(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


@dataclass(frozen=True, slots=True)
class DefaultRope:
    theta: float  # the base b of b^(-2i/D)
    attention_factor: ClassVar[float] = 1.0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        return _plain(self.theta, head_dim)


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""

    theta: float
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        return _plain(self.theta, head_dim) / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1's: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    theta: float
    factor: float
    low_freq_factor: float  # original length ÷ this: wavelengths above are fully interpolated
    high_freq_factor: float  # original length ÷ this: wavelengths below are kept
    original_max_positions: int  # tokens the model was first trained for
    attention_factor: ClassVar[float] = 1.0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        plain = _plain(self.theta, head_dim)
        turns = self.original_max_positions * plain / (2 * math.pi)  # made within the original length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return plain * ((1 - kept) / self.factor + kept)


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN (arXiv 2309.00071 §3): interpolation by a ramp over the pairs, and a factor on the attention
    logits.
    """

    theta: float
    factor: float
    original_max_positions: int  # tokens the model was first trained for
    attention_factor: float
    beta_fast: float  # turns within the original length from which a pair is kept as it is
    beta_slow: float  # turns up to which a pair is fully interpolated
    truncate: bool  # whether the ramp's ends are rounded to whole pairs

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        plain = _plain(self.theta, head_dim)
        low, high = self._pair_at(self.beta_fast, head_dim), self._pair_at(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
        interpolated = ramp.clamp(0, 1)
        return plain / self.factor * interpolated + plain * (1 - interpolated)

    def _pair_at(self, turns: float, head_dim: int) -> float:
        """The (fractional) pair that makes `turns` turns within the original length."""
        position = self.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(position) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class NoRope:
    """For models that know positions by other means; no pair is turned."""

    attention_factor: ClassVar[float] = 1.0

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        return torch.empty(0)


ROPES: dict[str, type[DefaultRope | LinearRope | Llama3Rope | YarnRope]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def rotations(rope: Rope, head_dim: int, start: int, end: int, device: torch.device) -> Tensor:
    """Rotations of the positions [start, end): (end - start, 1, D/2) complex64; the 1 broadcasts over
    heads.
    """
    angles = torch.outer(torch.arange(start, end, dtype=torch.float32), rope.inverse_frequencies(head_dim))
    return torch.polar(torch.tensor(rope.attention_factor).expand_as(angles), angles).unsqueeze(1).to(device)


def rotate_(heads: Tensor, n_rotated: int, rotation: Tensor) -> Tensor:
    """Turn every pair of the first `n_rotated` heads of (T, heads, D) by `rotation` (T, 1, D/2), in float32.

    In place where `heads` is float32 already; give it what nothing else needs.
    """
    exact = heads.float()
    pairs = torch.view_as_complex(exact.view(*heads.shape[:-1], -1, 2))
    pairs.narrow(1, 0, n_rotated).mul_(rotation)
    return exact.to(heads.dtype)


def interleave_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a projection (heads · D, ...) so that pairs (i, i + D/2) become pairs (2i, 2i +
    1).
    """
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


class RotationTable:
    """The rotations of every position met so far, grown by doubling; a step takes views of it."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        self._table = rotations(rope, head_dim, 0, 0, device)

    @torch.inference_mode(False)  # autograd may not save what inference mode made
    def rows(self, start: int, end: int) -> Tensor:
        """(end - start, 1, D/2) for the positions [start, end)."""
        return self.up_to(end)[start:end]

    def up_to(self, end: int) -> Tensor:
        """(`end` or more, 1, D/2), all positions from 0 on."""
        if end > self._table.shape[0]:
            self._grow(end)
        return self._table

    @torch.inference_mode(False)
    def _grow(self, end: int) -> None:
        grown = max(_MIN_POSITIONS, 1 << (end - 1).bit_length())
        more = rotations(self._rope, self._head_dim, self._table.shape[0], grown, self._device)
        self._table = torch.cat((self._table, more))
