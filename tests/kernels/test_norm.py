"""RMSNorm against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from petalite.kernels.norm import RmsNorm


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_equals_the_definition(dtype, tolerance, scale) -> None:
    x, weight, eps = (torch.randn(5, 96) * scale).to(dtype), torch.randn(96).to(dtype), 1e-5
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    result = RmsNorm(weight, eps)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max())


def test_zeros_stay_zeros() -> None:
    assert not RmsNorm(torch.ones(8), 1e-6)(torch.zeros(2, 8)).any()


def test_gradient_equals_that_of_torch() -> None:
    weight = torch.randn(8)
    ours, theirs = (torch.linspace(-2, 3, 24).view(3, 8).requires_grad_() for _ in range(2))
    RmsNorm(weight, 1e-5)(ours).square().sum().backward()
    torch.nn.functional.rms_norm(theirs, (8,), weight, 1e-5).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
