"""The two formats against their definitions and bitsandbytes; every kernel against the reference."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels import linear, nf4, quantized
from petalite.kernels.int8 import ExactInt8, FbgemmInt8, Int8Linear, IntMmInt8
from petalite.kernels.linear import KERNELS, LinearKernel, pick
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.nf4 import PackedNf4
from petalite.kernels.quantized import FORMATS, NF4_LEVELS, Int8Weight, Nf4Weight, column_order
from tests.kernels.meaning import int8_meaning

CPU = torch.device("cpu")
INT8 = [
    kernel
    for kernel, row in zip(
        (NativeLinear, None, FbgemmInt8, IntMmInt8, ExactInt8), KERNELS["int8"], strict=True
    )
    if row.works_on(CPU, torch.float32)
]
needs_packed_nf4 = pytest.mark.skipif(not nf4.packed_kernel_runs(), reason="needs AVX512-BF16")


def awkward(n_rows: int, n_columns: int, seed: int = 0) -> Tensor:
    """Inputs with an outlier column, a row of zeros, a tiny row and a huge one."""
    x = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 60
    x[0] = 0
    x[1:2] *= 1e-20
    x[2:3] *= 1e6
    return x


@pytest.fixture(params=[(96, 64), (100, 72), (33, 200), (1500, 16)], ids=str)
def weight(request: pytest.FixtureRequest) -> Tensor:
    n_out, n_in = request.param
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(n_out, n_in, generator=generator) * torch.rand(n_in, generator=generator)
    weight[5] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rounds_to_the_nearest_step(weight: Tensor, dtype: torch.dtype) -> None:
    """Half a step of the row at most; in the fine columns half of a 254th step."""
    weight = weight.to(dtype)
    made = Int8Weight.quantize(weight)
    off = (made.dense() - weight.float()).abs() / made.scales.unsqueeze(1)
    assert float(off.max()) <= 0.5 + 1e-4
    assert float(off[:, made.fine_columns].max()) <= 0.5 / 254 + 1e-4
    assert made.scales[5] == 1 and not made.codes[5].any()


def test_fine_columns_are_the_quiet_and_the_loud() -> None:
    weight = torch.rand(64, 160, generator=torch.Generator().manual_seed(2)) + 1
    weight[:, 7] *= 0.1  # smallest norm
    weight[3, 90] = 40.0  # largest single weight
    columns = Int8Weight.quantize(weight).fine_columns.tolist()
    assert {7, 90} <= set(columns) and columns == sorted(columns) and len(columns) == 20


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_are_those_of_what_is_made(name: str, weight: Tensor) -> None:
    tensors = FORMATS[name].quantize(weight).tensors()
    expected = FORMATS[name].shapes(*weight.shape)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == expected


def test_nf4_with_one_factor_has_the_codes_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier columns, what their first codes miss, and the others, each as a weight by itself, where scales
    are the largest values; but for values within half a step of the middle of two levels.
    """
    monkeypatch.setattr(quantized, "NF4_FACTORS", (1.0,))
    quantized._nf4_tables.cache_clear()
    functional = nf4.bitsandbytes().functional
    weight = torch.randn(48, 576, generator=torch.Generator().manual_seed(3))
    made = Nf4Weight.quantize(weight)
    assert torch.equal(torch.tensor(NF4_LEVELS), functional.get_4bit_type("nf4", device="cpu"))
    fine, others = weight[:, column_order(made.fine_columns, 576)].tensor_split((128,), 1)
    first = quantized._nf4_values(made.packed[:, :64].contiguous(), made.scales[:, :2])
    for given, blocks in ((fine, slice(2)), (fine - first, slice(2, 4)), (others, slice(4, None))):
        given, place = given.contiguous(), slice(*(at and 32 * at for at in (blocks.start, blocks.stop)))
        packed, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(made.scales[:, blocks], state.absmax.view(48, -1))
        ours = quantized._nf4_values(made.packed[:, place].contiguous(), made.scales[:, blocks])
        differs = ours != theirs
        assert float(differs.float().mean()) < 0.01
        step = made.scales[:, blocks].repeat_interleave(64, 1) / quantized._NF4_STEPS
        assert bool((((ours - given).abs() - (theirs - given).abs())[differs] <= step[differs]).all())
    quantized._nf4_tables.cache_clear()


def test_nf4_scales_are_the_best_of_those_tried() -> None:
    """Recomputed in float64, no other factor's weighted error is less, beyond what rounding errors to whole
    numbers costs.
    """
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(20, 256, generator=generator) * torch.rand(256, generator=generator)
    made = Nf4Weight.quantize(weight)
    assert len(made.fine_columns) == 64
    others = column_order(made.fine_columns, 256)[64:]
    importance = 1 / weight.double().square().mean(0)[others]
    counts = quantized._whole_counts(importance).double()
    expected = 255 * importance.view(3, 64) / importance.view(3, 64).amax(1, keepdim=True)
    assert float((counts - expected.clamp(min=1)).abs().max()) <= 0.5 + 1e-9
    blocks, scales = weight[:, others].double().view(20, 3, 64), made.scales[:, 2:].double()
    largest, levels = blocks.abs().amax(2), torch.tensor(NF4_LEVELS, dtype=torch.float64)

    def error(scale: Tensor) -> Tensor:
        nearest = (blocks.unsqueeze(3) / scale[..., None, None] - levels).abs().argmin(3)
        missed = (blocks - levels[nearest] * scale.unsqueeze(2)) / largest.unsqueeze(2)
        return (missed.square() * counts).sum(2)

    least = torch.stack([error(largest * factor) for factor in quantized.NF4_FACTORS]).amin(0)
    assert bool((error(scales) <= 1.02 * least).all())
    assert len((scales / largest).float().mul(100).round().unique()) > 3


def test_nf4_is_chosen_alike_whatever_the_order_of_sums(weight: Tensor, monkeypatch) -> None:
    """Errors are whole numbers: rows alone, and sums in doubles from the back, give the same."""
    made = Nf4Weight.quantize(weight)
    monkeypatch.setattr(quantized, "_CHUNK_VALUES", 1)
    plain = Tensor.sum

    def backwards(self: Tensor, dim: int, **options: torch.dtype) -> Tensor:
        return plain(self.flip(dim).double(), dim).to(options.get("dtype", self.dtype))

    monkeypatch.setattr(Tensor, "sum", backwards)
    for name, tensor in Nf4Weight.quantize(weight).tensors().items():
        assert torch.equal(tensor, made.tensors()[name]), name


@pytest.mark.parametrize(
    ("n_columns", "n_fine"), [(3, 0), (7, 1), (8, 2), (100, 25), (576, 128), (4096, 320)]
)
def test_nf4_misses_little_of_fine_columns(n_columns: int, n_fine: int) -> None:
    """What two nf4 codes miss of them is a tenth of what one does."""
    weight = torch.randn(40, n_columns, generator=torch.Generator().manual_seed(4))
    made = Nf4Weight.quantize(weight)
    columns = made.fine_columns
    assert len(columns) == n_fine
    assert torch.equal(columns, quantized._outlier_columns(*quantized._columns_of(weight), n_fine))
    missed = made.dense()[:, :n_columns] - weight
    others = torch.ones(n_columns, dtype=torch.bool)
    others[columns] = False
    if n_fine:
        assert float(missed[:, columns].norm(dim=0).mean()) < 0.2 * float(
            missed[:, others].norm(dim=0).mean()
        )


def test_bits_of_an_nf4_weight() -> None:
    """On large rows 4.8 a weight, as the documentation says; the columns themselves left out."""
    for n_in, bits in ((576, 5.5), (1536, 5.06), (4096, 4.85), (8192, 4.82), (28672, 4.79)):
        shapes = Nf4Weight.shapes(1, n_in)
        size = sum(shapes[part][1][1] * shapes[part][0].itemsize for part in ("packed", "scales"))
        assert 8 * size / n_in == pytest.approx(bits, abs=0.006)


# -- products --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_products_are_near_the_weights_meaning(kernel, has_bias: bool, weight: Tensor) -> None:
    """What its digits say, but for float32's rounding; of the weight's own, off by half a step of each input
    at most, and by what low digits miss of the fine codes.
    """
    made, n_fine = Int8Weight.quantize(weight), len(weight[0]) // 8
    bias = torch.randn(len(weight)) if has_bias else torch.zeros(len(weight))
    x = awkward(20, weight.shape[1])
    found = kernel(made, bias if has_bias else None)(x)
    meaning, terms = int8_meaning(made, x)
    assert bool(((found - bias - meaning).abs() <= 2e-6 * (terms + bias.abs())).all())

    order = column_order(made.fine_columns, weight.shape[1])
    (fine, others), (of_fine, of_others) = (
        part[:, order].abs().split((n_fine, weight.shape[1] - n_fine), 1) for part in (made.dense(), x)
    )
    half_steps = [part.amax(1, keepdim=True) / 254 for part in (pad(of_fine, (0, 1)), of_others)]
    off = half_steps[0] / 254 * (fine.sum(1) + made.scales * n_fine * 127)
    off += 1.01 * half_steps[1] * others.sum(1)  # steps are whole numbers of units
    exact = x.double() @ made.dense().double().t() + bias
    assert bool(((found - exact).abs() <= off + 1e-6 * exact.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("kernel", INT8)
def test_int8_is_equal_to_the_bit_alone_and_batched(kernel, weight: Tensor) -> None:
    made = Int8Weight.quantize(weight)
    x = awkward(230, weight.shape[1])
    together = kernel(made, None)(x)
    assert torch.equal(together, torch.cat([kernel(made, None)(row) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([kernel(made, None)(rows) for rows in x.split([7, 100, 123])]))
    if kernel is not NativeLinear:  # which adds up blocks in another order
        assert torch.equal(together, ExactInt8(made, None)(x))
    strangers = torch.cat((awkward(5, weight.shape[1], seed=9) * 1e4, x[4:5]))
    assert torch.equal(kernel(made, None)(strangers)[5], together[4])


@pytest.mark.parametrize("kernel", INT8)
def test_int8_sums_that_would_overflow_sixteen_bits(kernel) -> None:
    """All codes ±127 and all inputs of one sign: where a product of bytes summed in 16 bits saturates."""
    weight = torch.ones(64, 4096)
    weight[1::2] = -1
    x = torch.ones(3, 4096)
    result = kernel(Int8Weight.quantize(weight), None)(x)
    torch.testing.assert_close(result, x @ weight.t(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", INT8)
def test_int8_weights_come_back_out(kernel: type[Int8Linear], weight: Tensor) -> None:
    made = Int8Weight.quantize(weight)
    packed = kernel(made, None)
    assert torch.equal(packed.dense(), made.dense())
    assert made.nbytes <= packed.nbytes <= 2 * made.nbytes  # native ones fill up panels of 16 rows
    assert packed(awkward(4, weight.shape[1]).bfloat16()).dtype == torch.bfloat16


@needs_packed_nf4
@pytest.mark.parametrize("n_rows", [1, 2, 5, 40])
def test_packed_nf4_is_near_the_weights_meaning(n_rows: int, weight: Tensor) -> None:
    """bfloat16 inputs and scales: 0.4 % each."""
    made, x = Nf4Weight.quantize(weight), torch.randn(n_rows, weight.shape[1])
    bias = torch.randn(len(weight))
    kernel = PackedNf4(made, bias)
    dense = made.dense()[:, : weight.shape[1]]
    expected = x @ dense.t() + bias
    assert float((kernel(x) - expected).norm() / expected.norm()) < 8e-3
    assert float((kernel.dense()[:, : weight.shape[1]] - dense).abs().max()) <= 4e-3 * float(
        weight.abs().max()
    )


@pytest.mark.parametrize("quant", FORMATS)
def test_every_row_of_the_table_passes_its_self_check_here(quant: str, caplog) -> None:
    for kernel in KERNELS[quant]:
        for dtype in (torch.float32, torch.bfloat16):
            if kernel.works_on(CPU, dtype):
                assert linear._self_check(kernel, CPU, dtype, quant) is None


@pytest.mark.parametrize("quant", FORMATS)
def test_gradients_pass_to_the_input(quant: str, weight: Tensor) -> None:
    made = FORMATS[quant].quantize(weight)
    for kernel in KERNELS[quant]:
        if kernel.works_on(CPU, torch.float32):
            x = torch.randn(5, weight.shape[1], requires_grad=True)
            grad = torch.randn(5, len(weight))
            kernel.make(made, None)(x).backward(grad)
            expected = grad @ made.dense()[:, : weight.shape[1]]
            assert x.grad is not None
            assert float((x.grad - expected).norm() / expected.norm()) < 0.01


class SevenBits(FbgemmInt8):
    """Loses the lowest bit, as a product that cannot hold 16-bit sums must."""

    def _product(self, rows: Tensor) -> Tensor:
        return super()._product((rows / 2).floor() * 2)


@pytest.mark.parametrize("quant", FORMATS)
def test_a_kernel_that_is_off_is_passed_over_and_the_fall_back_said_once(
    quant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = SevenBits if quant == "int8" else nf4.nf4_on(SevenBits)
    if quant == "nf4":
        make = lambda weight, bias: PackedNf4(replace(weight, scales=weight.scales * 1.1), bias)  # noqa: E731
    table = (LinearKernel("fast", make, lambda device, dtype: True), KERNELS[quant][-1])
    monkeypatch.setitem(linear.KERNELS, quant, table)
    pick.cache_clear()
    with caplog.at_level(logging.INFO, logger="petalite.kernels.linear"):
        assert pick(CPU, torch.float32, quant) is pick(CPU, torch.float32, quant) is table[-1]
    pick.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "fast does not work" in said[0] and table[-1].caution in said[1]
