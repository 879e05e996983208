"""RMSNorm (arXiv 1910.07467) in as few kernels as torch allows: four, where `F.rms_norm` on a CPU
dispatches eight.

At decode each kernel costs its dispatch and little else, more so between weights that sweep the caches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RmsNorm:
    """x ↦ x / √(mean(x²) + eps) · weight over the last axis, in float32 whatever the dtype of `x`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        # x·√n·w / √(Σx² + n·eps) is the same with the constants taken out: the root is a hypotenuse.
        size = weight.shape[-1]
        self._scaled_weight = weight.float() * math.sqrt(size)
        self._leg = torch.tensor(math.sqrt(size * eps), dtype=torch.float32, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x / torch.hypot(norm, self._leg)).mul_(self._scaled_weight).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self._scaled_weight.nbytes
