"""A product of weights in 16 bits that keeps float32's sums: for logits, which a sampler compares.

torch rounds what comes out of a bfloat16 product to bfloat16, 256 steps between one power of two and the
next: of the likeliest tokens several are then equal. A float32 copy of a head of 128,000 tokens would take
twice its memory, so some rows at a time are widened. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from petalite.kernels.frozen import FrozenLinear

_CHUNK_VALUES = 1 << 22  # of weights in float32 at a time, 16 MiB


class WideLinear(FrozenLinear):
    """x (T, K) float32 → (T, N) float32, on every device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._n_rows = max(1, _CHUNK_VALUES // max(weight.shape[1], 1))
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        x = x.float()
        y = torch.cat([linear(x, rows.float()) for rows in torch.split(self._weight, self._n_rows)], dim=1)
        return y if self._bias is None else y.add_(self._bias)

    def dense(self) -> Tensor:
        return self._weight
