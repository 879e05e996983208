"""Whether all of a tensor's values are numbers: one pass at the memory's speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from petalite.kernels.native import library
from petalite.kernels.native.packing import FLOATS


def all_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinity in a tensor of any float dtype, anywhere."""
    found = library() if tensor.device.type == "cpu" and tensor.dtype in FLOATS else None
    if found is not None and tensor.is_contiguous():
        return bool(found.functions.petalite_finite(FLOATS[tensor.dtype], tensor.data_ptr(), tensor.numel()))
    # Sums of finite numbers may overflow; only then is every one looked at.
    sums = (tensor.sum(dtype=dtype) for dtype in (tensor.dtype, torch.float32))
    return any(math.isfinite(float(total)) for total in sums) or bool(torch.isfinite(tensor).all())
