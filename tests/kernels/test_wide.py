"""Products of 16-bit weights in float32, against float64; and that no float32 copy of the weight is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petalite.kernels import wide
from petalite.kernels.wide import WideLinear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_are_those_of_float32(dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_CHUNK_VALUES", 64 * 100)
    weight = torch.randn(1001, 64).to(dtype)
    bias = torch.randn(1001) if biased else None
    x = torch.randn(5, 64)
    widened: list[int] = []
    plain = wide.linear

    def watched(x: Tensor, rows: Tensor) -> Tensor:
        widened.append(len(rows))
        return plain(x, rows)

    monkeypatch.setattr(wide, "linear", watched)
    made = WideLinear(weight, bias)
    y = made(x)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert widened == [100] * 10 + [1]
    assert made.dense() is weight and made.nbytes == weight.nbytes + (0 if bias is None else bias.nbytes)


def test_gradients_pass_to_the_input() -> None:
    weight, x = torch.randn(30, 16).bfloat16(), torch.randn(3, 16, requires_grad=True)
    grad = torch.randn(3, 30)
    WideLinear(weight)(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.float())
