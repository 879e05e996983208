"""Every instruction set's products against the scalar reference, torch's kernels and float64."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petalite.errors import InvalidArgument
from petalite.kernels import native
from petalite.kernels.int8 import ExactInt8
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.native.packing import FLOATS, pack
from petalite.kernels.quantized import FORMATS, Int8Weight, Nf4Weight
from tests.kernels.meaning import nf4_meaning

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native kernels are built, or torch's are forced")
TABLES = LIBRARY.instruction_sets() if LIBRARY is not None else {}
SHAPES = [(96, 64), (100, 72), (33, 200), (2, 2), (17, 5), (150, 16), (48, 643)]


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    assert LIBRARY is not None
    if not TABLES[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    before = LIBRARY.instructions
    LIBRARY.choose(request.param)
    yield request.param
    LIBRARY.choose(before)


def weights(n_out: int, n_in: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) * torch.rand(n_in, generator=generator)
    weight[n_out // 2] = 0
    return weight


def awkward(n_rows: int, n_columns: int, seed: int = 0) -> Tensor:
    """Inputs with an outlier column, a row of zeros, a tiny row, a huge one, and one of denormals."""
    x = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))
    x[:, min(3, n_columns - 1)] *= 60
    for row, factor in enumerate((0, 1e-20, 1e6, 1e-39)[:n_rows]):
        x[row] *= factor
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 12, 13, 21])
def test_int8_is_that_of_torch_but_for_the_last_sums(
    table: str, shape: tuple[int, int], n_tokens: int
) -> None:
    """Sums of blocks are added in float32 here, in whole numbers there."""
    weight = Int8Weight.quantize(weights(*shape))
    bias = torch.randn(shape[0])
    x = awkward(n_tokens, shape[1])
    terms = x.abs() @ weight.dense().abs().t() + bias.abs()
    off = (NativeLinear(weight, bias)(x) - ExactInt8(weight, bias)(x)).abs()
    assert bool((off <= 5e-7 * terms + 1e-35).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 12, 13, 21])
def test_nf4_is_what_its_digits_say(table: str, shape: tuple[int, int], n_tokens: int) -> None:
    """But for float32's rounding. Of the weight's own: half a step of each input, and levels of one digit."""
    weight = Nf4Weight.quantize(weights(*shape))
    bias = torch.randn(shape[0])
    x = awkward(n_tokens, shape[1])
    exact, terms = nf4_meaning(weight, x)
    found = NativeLinear(weight, bias)(x).double()
    assert bool(((found - exact - bias).abs() <= 5e-7 * (terms + bias.abs()) + 1e-35).all())
    dense = weight.dense()[:, : shape[1]].double()
    off = (found - x.double() @ dense.t() - bias).norm(dim=1)
    assert bool((off <= 0.02 * (x.double().norm(dim=1) * dense.norm()) + 1e-6 * bias.norm() + 1e-35).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 12, 13, 21])
def test_floats_are_near_float64(
    table: str, dtype: torch.dtype, shape: tuple[int, int], n_tokens: int
) -> None:
    weight = weights(*shape).to(dtype)
    bias = torch.randn(shape[0])
    x = awkward(n_tokens, shape[1]).clamp(-6e4, 6e4).to(dtype)
    expected = x.double() @ weight.double().t() + bias
    terms = x.double().abs() @ weight.double().abs().t() + bias.abs()
    found = NativeLinear(weight, bias)(x.float())
    assert found.dtype == torch.float32
    assert bool(((found - expected).abs() <= 1e-6 * terms + 1e-35).all())


@pytest.mark.parametrize("name", [*FORMATS, *FLOATS])
def test_weights_come_back_out(name: str | torch.dtype) -> None:
    dense = weights(50, 130)
    if isinstance(name, str):
        made = FORMATS[name].quantize(dense)
        assert torch.equal(NativeLinear(made, None).dense(), made.dense())
    else:
        assert torch.equal(NativeLinear(dense.to(name), None).dense(), dense.to(name))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*FORMATS, *FLOATS])
def test_a_token_that_is_not_finite_stays_alone(table: str, name: str | torch.dtype, value: float) -> None:
    dense = weights(40, 64)
    linear = NativeLinear(FORMATS[name].quantize(dense) if isinstance(name, str) else dense.to(name), None)
    x = torch.randn(3, 64)
    before = linear(x)
    x[1, 5] = value
    after = linear(x)
    assert not torch.isfinite(after[1]).all()
    assert torch.equal(before[::2], after[::2])


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(64),
        torch.ones(2, 65),
        torch.ones(2, 64, dtype=torch.int32),
        torch.ones(2, 64, device="meta"),
    ],
    ids=["one axis", "too wide", "whole numbers", "elsewhere"],
)
def test_wrong_inputs_are_refused(x: Tensor) -> None:
    linear = NativeLinear(weights(16, 64), None)
    with pytest.raises(InvalidArgument, match=r"expected \(tokens, 64\)"):
        linear(x)


def test_wrong_weights_are_refused() -> None:
    assert LIBRARY is not None
    made = Int8Weight.quantize(weights(16, 64))
    for wrong in (
        Int8Weight(made.codes.short(), made.scales, made.fine_columns, made.fine_codes),
        Int8Weight(made.codes, made.scales[1:], made.fine_columns, made.fine_codes),
        Int8Weight(made.codes, made.scales, made.fine_columns + 60, made.fine_codes),
        weights(16, 64).double(),
        weights(16, 64).to("meta"),
        weights(16, 64)[0],
    ):
        with pytest.raises(InvalidArgument):
            pack(LIBRARY, wrong)
    with pytest.raises(InvalidArgument, match="bias"):
        pack(LIBRARY, made).struct(torch.ones(15))


FORMS = (*FORMATS, *FLOATS)


def made(form: str | torch.dtype, dense: Tensor, bias: Tensor | None = None) -> NativeLinear:
    return NativeLinear(FORMATS[form].quantize(dense) if isinstance(form, str) else dense.to(form), bias)


def by(table: str, linear: NativeLinear, x: Tensor) -> Tensor:
    assert LIBRARY is not None
    before = LIBRARY.instructions
    LIBRARY.choose(table)
    try:
        return linear(x)
    finally:
        LIBRARY.choose(before)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    n_tokens=st.integers(1, 33),
    n_threads=st.integers(1, 3),
    offset=st.integers(0, 70),
)
def test_any_shape_gives_what_the_reference_gives(form, shape, n_tokens, n_threads, offset) -> None:
    """On every instruction set, with weights and inputs that begin anywhere in memory."""
    dense = weights(*shape)
    linear = made(form, dense, torch.randn(shape[0]))
    panels = linear.packed.panels
    moved = torch.empty(panels.numel() + offset, dtype=torch.uint8)[offset:].view(panels.shape)
    moved.copy_(panels)
    linear = NativeLinear(replace(linear.packed, panels=moved), linear.bias)
    room = torch.empty(n_tokens * shape[1] + offset)
    x = room[offset:].view(n_tokens, shape[1]).copy_(awkward(n_tokens, shape[1], seed=offset))
    if not isinstance(form, str):
        x.clamp_(-6e4, 6e4).copy_(x.to(form))
    reference = by("scalar", linear, x)
    torch.set_num_threads(n_threads)
    for name, runs in TABLES.items():
        if runs and isinstance(form, str):
            assert torch.equal(by(name, linear, x), reference), name
        elif runs:
            terms = x.abs().double() @ dense.abs().double().t() + linear.bias.abs()
            off = (by(name, linear, x).double() - reference.double()).abs()
            assert bool((off <= 2e-6 * terms + 1e-35).all()), name


@pytest.mark.parametrize("form", FORMS)
def test_neither_threads_nor_company_nor_chunks_change_a_bit(table: str, form: str | torch.dtype) -> None:
    linear = made(form, weights(300, 257))
    x = awkward(40, 257).clamp(-6e4, 6e4)
    torch.set_num_threads(1)
    whole = linear(x)
    for n_threads in (1, 2, 3, 5):
        torch.set_num_threads(n_threads)
        for sizes in ([40], [1] * 40, [7, 8, 9, 16], [33, 7]):
            assert torch.equal(torch.cat([linear(part) for part in x.split(sizes)]), whole)


@pytest.mark.parametrize("form", FORMS)
def test_many_threads_of_the_process_take_turns(form: str | torch.dtype) -> None:
    linear, x = made(form, weights(200, 100)), torch.randn(3, 100)
    torch.set_num_threads(2)
    expected = linear(x)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: linear(x), range(200)))
    assert all(torch.equal(result, expected) for result in results)


def test_a_forked_child_has_a_team_of_its_own() -> None:
    """fork copies the memory but none of the threads."""
    linear, x = made("int8", weights(200, 100)), torch.randn(3, 100)
    torch.set_num_threads(2)
    expected = linear(x)
    child = os.fork()
    if child == 0:  # leave without pytest's clean-up
        signal.alarm(20)
        os._exit(0 if torch.equal(linear(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
