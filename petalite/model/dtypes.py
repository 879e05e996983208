"""Which dtype a model computes in: what the user asked for, or what its checkpoint was saved in."""

from __future__ import annotations

import torch

from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint

AUTO = "auto"
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(checkpoint: Checkpoint, wanted: str = AUTO) -> torch.dtype:
    """`auto` is bfloat16 for checkpoints saved so, else float32: float16's range is too small for the hidden
    states of many models, and CPUs are slow at it."""
    if wanted == AUTO:
        config = checkpoint.read_json("config.json") or {}
        saved = config.get("dtype", config.get("torch_dtype"))
        return torch.bfloat16 if saved == "bfloat16" else torch.float32
    if wanted not in _BY_NAME:
        raise InvalidArgument(f"dtype {wanted!r} is not known; choose auto, {' or '.join(_BY_NAME)}")
    return _BY_NAME[wanted]
