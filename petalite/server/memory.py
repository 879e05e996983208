"""How much memory there is, and how much blocks take."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from petalite.model.config import ModelConfig
from petalite.model.llama import tensor_shapes


def available_bytes() -> int:
    """Memory to be had without swapping: the kernel's own estimate, or half of all there is."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one block's weights in memory."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * dtype.itemsize
