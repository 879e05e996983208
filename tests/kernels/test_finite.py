"""`all_finite` against torch, with the odd value at every kind of place."""

from __future__ import annotations

import pytest
import torch

from petalite.kernels.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    for size in (1, 2, 17, 4095, 4096, 4097, 9000):
        tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
        assert all_finite(tensor) and all_finite(tensor * 0)
        for place in {0, size // 2, size - 1}:
            spoilt = tensor.clone()
            spoilt[place] = value
            assert not all_finite(spoilt)
            assert all_finite(spoilt[place + 1 :]) and all_finite(spoilt[:place])  # unaligned views


def test_views_and_nothing() -> None:
    tensor = torch.ones(10, 12)
    tensor[:, 5] = torch.nan
    assert all_finite(tensor[:, :5]) and not all_finite(tensor[:, 3:8]) and not all_finite(tensor.t())
    assert all_finite(torch.empty(0))
