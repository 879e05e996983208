"""What runs on a GPU: by Triton's interpreter where there is none, and on it where there is (`-m gpu`)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from petalite.kernels import dynamic8, linear, native
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.quantized import FORMATS, Int8Weight, Nf4Weight, column_order
from tests.kernels.meaning import int8_meaning, nf4_meaning

pytest.importorskip("triton")
from petalite.kernels import triton_q8
from petalite.kernels.triton_int8 import TritonInt8
from petalite.kernels.triton_nf4 import TritonNf4

HERE = "cpu" if not torch.cuda.is_available() else "cuda"
SMALLEST_SHARED_BYTES = 99 << 10  # that a block of threads may have, of all GPUs of capability 8 and later
SHAPES = [(96, 64), (33, 200), (17, 5), (48, 643)]


KINDS = [(Int8Weight, TritonInt8), (Nf4Weight, TritonNf4)]
kinds = pytest.mark.parametrize(("form", "kind"), KINDS, ids=FORMATS)


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if (request.param == "gpu") != torch.cuda.is_available():
        pytest.skip("this needs a GPU" if request.param == "gpu" else "kernels are compiled here")
    return torch.device(HERE)


def weights(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[1], generator=generator)
    weight[shape[0] // 2] = 0
    return weight


def awkward(n_rows: int, n_columns: int) -> Tensor:
    """Inputs with an outlier column, a row of zeros, a tiny row and a huge one."""
    x = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 60
    for row, factor in enumerate((1.0, 0.0, 1e-20, 1e6)[:n_rows]):
        x[row] *= factor
    return x


def on(device: torch.device, weight: Int8Weight | Nf4Weight) -> Int8Weight | Nf4Weight:
    return type(weight)(**{name: tensor.to(device) for name, tensor in weight.tensors().items()})


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5, 34])
@pytest.mark.parametrize(
    ("dtype", "missing", "most", "rounding"),
    [
        (torch.float32, 0, 1e9, 0.0),
        (torch.float16, 1, 1e2, 2**-11),
        (torch.bfloat16, 0, 1e9, 2**-7),  # which the interpreter cuts off
    ],
    ids=str,
)
def test_products_are_what_they_are_defined_as(
    device: torch.device,
    form: type[Int8Weight] | type[Nf4Weight],
    kind: type,
    shape: tuple[int, int],
    n_tokens: int,
    dtype: torch.dtype,
    missing: int,
    most: float,
    rounding: float,
) -> None:
    """With and without a bias; of fewer inputs than columns; of 16 bits, to what the result is rounded to."""
    made, bias = form.quantize(weights(shape)), torch.randn(shape[0])
    x = awkward(n_tokens, shape[1])[:, : shape[1] - missing].clamp(-most, most).to(dtype)
    product, terms = int8_meaning(made, x) if isinstance(made, Int8Weight) else nf4_meaning(made, x)
    for some in (None, bias):
        found = kind(on(device, made), None if some is None else some.to(device))(x.to(device))
        assert found.dtype == dtype
        expected, size = (product, terms) if some is None else (product + some, terms + some.abs())
        off = (found.cpu().double() - expected).abs()
        smallest = torch.finfo(dtype).smallest_normal * rounding
        assert bool((off <= 2e-6 * size + rounding * expected.abs() + smallest).all())


@pytest.mark.skipif(native.library() is None, reason="no native kernels are built, or torch's are forced")
@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_bits_of_the_native_kernels(
    device: torch.device, form: type, kind: type, shape: tuple[int, int]
) -> None:
    made, bias, x = form.quantize(weights(shape)), torch.randn(shape[0]), awkward(21, shape[1])
    found = kind(on(device, made), bias.to(device))(x.to(device))
    assert torch.equal(found.cpu(), NativeLinear(made, bias)(x))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # of the interpreter's numpy
@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_product_of_a_token_that_is_not_finite_is_not(
    device: torch.device, form: type, kind: type, value: float
) -> None:
    weight = form.quantize(weights((48, 200)))
    made, x = kind(on(device, weight), None), torch.randn(4, 200)
    before = made(x.to(device))
    outlier, other = column_order(weight.fine_columns, 200)[[0, -1]]
    x[1, outlier], x[2, other] = value, value
    after = made(x.to(device))
    assert not torch.isfinite(after[1:3]).any()
    assert torch.equal(before[::3], after[::3])


@kinds
def test_alone_and_batched(device: torch.device, form: type, kind: type) -> None:
    made = kind(on(device, form.quantize(weights((48, 200)))), None)
    x = awkward(40, 200).to(device)
    together = made(x)
    assert torch.equal(together[4:7], torch.cat([made(row) for row in x[4:7].split(1)]))
    assert torch.equal(together[30:], made(x[30:]))
    assert made(x[:0]).shape == (0, 48)


@kinds
def test_weights_come_back_out_and_gradients_pass(device: torch.device, form: type, kind: type) -> None:
    made = form.quantize(weights((33, 200)))
    kernel = kind(on(device, made), None)
    assert torch.equal(kernel.dense().cpu(), made.dense())
    # int8: 25 outlier columns' two codes and 175 others', in whole blocks; scales; columns in int32. nf4
    # has 50.
    columns = 4 * 64 * 4
    assert kernel.nbytes == columns + (33 * 5 * 64 + 33 * 4 if form is Int8Weight else made.nbytes)
    x = torch.randn(3, 200, device=device, requires_grad=True)
    kernel(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.cpu(), made.dense()[:, :200].sum(0).expand(3, 200))


@pytest.mark.parametrize("width", [1, 64, 100, 1100])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_q8_has_the_bytes_of_torch(device: torch.device, width: int, factor: float) -> None:
    """Zeros, NaN, Inf, values beyond float16 and scales below its normal ones."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(5, width) * factor
        hidden[1], hidden[2, width // 2], hidden[3, -1] = 0.0, torch.nan, -torch.inf
        hidden, n = hidden.to(dtype), dynamic8.n_blocks(width)
        codes, scales = torch.empty(5, width, dtype=torch.uint8), torch.empty(5, n, dtype=torch.float16)
        dynamic8._encode_in_torch(hidden, codes, scales)
        table, nearest = dynamic8._tables(device)
        others, other_scales = torch.empty_like(codes, device=device), torch.empty_like(scales, device=device)
        triton_q8.encode(hidden.to(device), others, other_scales, nearest)
        assert torch.equal(others.cpu(), codes)
        assert torch.equal(other_scales.cpu().view(torch.int16), scales.view(torch.int16))
        expected, found = torch.empty(5, width), torch.empty(5, width, device=device)
        dynamic8._decode_in_torch(codes, scales, expected)
        triton_q8.decode(others, other_scales, found, table)
        assert torch.equal(found.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_for_a_gpu_that_is_not_here(capability: int) -> None:
    """To machine code, with products on tensor cores, and without divisions that only come near."""
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    made = {tuple(line[:2]): line[2:] for line in map(str.split, run.stdout.splitlines())}
    assert len(made) == 12
    for (kernel, what), found in made.items():
        multiplies = kernel in ("_product", "_attend") and what != "ieee"
        assert ("mma" in found) == multiplies
        assert "cubin" in found and ("div.full" not in found or kernel == "_merge")
        assert "wide" in found or kernel != "_attend"
        assert int(found[-1]) <= SMALLEST_SHARED_BYTES


# -- where they are chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_table_takes_them_after_its_self_check(
    device: torch.device, quant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead of all that a GPU has besides. Without one the rows for CPUs are left out."""
    row = next(row for row in linear.KERNELS[quant] if row.name == "triton")
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not row.works_on(torch.device("cuda"), dtype)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert row.works_on(torch.device("cuda"), dtype) and not row.works_on(torch.device("cpu"), dtype)
    chosen = next(each for each in linear.KERNELS[quant] if each.works_on(torch.device("cuda"), dtype))
    assert chosen is row and linear._self_check(row, device, dtype, quant) is None
    if device.type == "cuda":
        assert linear.pick(device, dtype, quant) is row


def test_q8_is_checked_before_it_is_used(
    device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dynamic8._differs(triton_q8, device) is None
    wrong = SimpleNamespace(encode=triton_q8.encode, decode=lambda codes, scales, out, _: out.fill_(1.0))
    assert dynamic8._differs(wrong, device) == "decode to other values"
    lazy = SimpleNamespace(encode=lambda hidden, codes, scales, nearest: codes.zero_(), decode=wrong.decode)
    assert dynamic8._differs(lazy, device) == "encode to other bytes"
    assert dynamic8._on_gpu(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_fails_leaves_q8_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    dynamic8._on_gpu.cache_clear()
    with caplog.at_level(logging.WARNING, logger="petalite.kernels.dynamic8"):
        assert dynamic8._on_gpu(torch.device("cuda")) is None
    assert "q8 runs in torch on cuda" in caplog.text
    dynamic8._on_gpu.cache_clear()
