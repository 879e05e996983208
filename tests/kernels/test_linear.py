"""Every linear kernel against the product in float64; the choice among kernels that lie or break."""

from __future__ import annotations

import logging

import pytest
import torch

from petalite.kernels import linear
from petalite.kernels.linear import KERNELS, DenseLinear, LinearKernel, pick
from petalite.kernels.quantized import NONE

CPU = torch.device("cpu")
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def usable(dtype: torch.dtype) -> list[LinearKernel]:
    return [kernel for kernel in KERNELS[NONE] if kernel.works_on(CPU, dtype)]


@pytest.fixture(autouse=True)
def _fresh_choice():
    pick.cache_clear()
    yield
    pick.cache_clear()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 64])
def test_kernels_equal_the_product(dtype, tolerance, has_bias, n_rows) -> None:
    weight, x = torch.randn(48, 80).to(dtype), torch.randn(n_rows, 80).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    for kernel in usable(dtype):
        made = kernel.make(weight, bias)
        result = made(x)
        assert result.shape == (n_rows, 48) and result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * 10)
        assert torch.equal(made.dense(), weight)
        biases = 48 if has_bias else 0  # native kernels hold them in float32
        most = weight.nbytes + biases * 4
        least = weight.nbytes * (0.75 if dtype is torch.bfloat16 else 1) + biases * dtype.itemsize
        assert least <= made.nbytes <= most  # native kernels hold bfloat16 in twelve bits


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_kernels_pass_gradients_to_the_input(dtype, tolerance) -> None:
    weight, grad = torch.randn(48, 80).to(dtype), torch.randn(5, 48).to(dtype)
    for kernel in usable(dtype):
        x = torch.randn(5, 80).to(dtype).requires_grad_()
        kernel.make(weight, None)(x).backward(grad)
        torch.testing.assert_close(x.grad.double(), grad.double() @ weight.double(), rtol=tolerance, atol=0.3)


def broken(weight: torch.Tensor, bias: torch.Tensor | None) -> DenseLinear:
    raise RuntimeError("no such instruction\nand more")


def lying(weight: torch.Tensor, bias: torch.Tensor | None) -> DenseLinear:
    return DenseLinear(weight * 1.01, bias)


@pytest.mark.parametrize(("make", "reason"), [(broken, "no such instruction"), (lying, "off by")])
def test_a_kernel_that_does_not_work_is_passed_over_with_one_line(make, reason, monkeypatch, caplog) -> None:
    table = (LinearKernel("fast", make, lambda device, dtype: True), KERNELS[NONE][-1])
    monkeypatch.setitem(linear.KERNELS, NONE, table)
    with caplog.at_level(logging.INFO, logger="petalite.kernels.linear"):
        assert pick(CPU, torch.float32).name == "dense"
        assert pick(CPU, torch.float32).name == "dense"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "fast" in warnings[0] and reason in warnings[0]


def test_the_first_that_works_is_picked() -> None:
    for dtype, _ in DTYPES:
        assert pick(CPU, dtype) is usable(dtype)[0]
