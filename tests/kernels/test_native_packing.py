"""Weights into panels as their rows come, and panels in files: against what packing a whole weight gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petalite.errors import InvalidArgument
from petalite.kernels import native
from petalite.kernels.native import stored
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.native.packing import (
    FLOATS,
    DenseRows,
    Format,
    PackedWeight,
    pack,
    quantize_packed,
    unpack,
)
from petalite.kernels.quantized import FORMATS

found = native.library()
if found is None:
    pytest.skip("no native kernels are built, or torch's are forced", allow_module_level=True)
LIBRARY: native.Library = found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_in_any_order_and_cut_anywhere_are_the_weight(data) -> None:
    """Every row once, some at a time, from memory that begins anywhere, shuffled within each cut."""
    dtype = data.draw(st.sampled_from(list(FLOATS)))
    n_out, n_in = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 150))
    weight = torch.randn(n_out, n_in).to(dtype)
    permutation = torch.randperm(n_out)
    cuts = sorted(data.draw(st.sets(st.integers(1, n_out), max_size=4)) | {n_out})
    offset = data.draw(st.integers(0, 8))
    rows = DenseRows(LIBRARY, dtype, (n_out, n_in))
    start = 0
    for end in cuts:
        there, here = permutation[start:end].sort()
        memory = torch.empty((end - start) * n_in + offset, dtype=dtype)[offset:].view(end - start, n_in)
        memory.copy_(weight[permutation[start:end]])
        rows.put(memory, here, there)
        start = end
    assert torch.equal(unpack(LIBRARY, rows.weight), weight)
    assert torch.equal(rows.weight.panels, pack(LIBRARY, weight).panels)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_another_dtype_are_converted(dtype: torch.dtype) -> None:
    weight, places = torch.randn(20, 30), torch.arange(20)
    rows = DenseRows(LIBRARY, dtype, (20, 30))
    rows.put(weight, places, places)
    assert torch.equal(unpack(LIBRARY, rows.weight), weight.to(dtype))


# -- bfloat16 in twelve bits ---------------------------------------------------------------------------------

SHORT = pytest.mark.skipif(not LIBRARY.functions.petalite_short_serves(), reason="BF12 does not serve here")


def put_at_once(weight: Tensor, used: Callable[[Tensor], None] = lambda memory: None) -> PackedWeight:
    rows, places = DenseRows(LIBRARY, weight.dtype, tuple(weight.shape), used), torch.arange(len(weight))
    rows.put(weight, places, places)
    return rows.weight


@SHORT
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(64, 300)),
    scale=st.sampled_from((1e-38, 1e-30, 0.02, 1.0, 1e30)),
    odd=st.lists(st.tuples(st.integers(0, 2**31), st.integers(-(2**15), 2**15 - 1)), max_size=20),
    seed=st.integers(0, 2**31),
)
def test_no_number_changes_in_twelve_bits(shape, scale, odd, seed) -> None:
    """Of any size, with zeros, and with any sixteen bits here and there: NaN, infinities, denormals."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).bfloat16()
    weight[shape[0] // 2] = 0
    bits = weight.view(torch.int16)
    for place, value in odd:
        bits.view(-1)[place % bits.numel()] = value
    packed = put_at_once(weight)
    assert packed.format is Format.BF12
    assert torch.equal(unpack(LIBRARY, packed).view(torch.int16), bits)


@SHORT
def test_numbers_of_all_exponents_stay_as_they_are() -> None:
    bits = torch.randint(0, 0x7F80, (64, 256), dtype=torch.int16)
    packed = put_at_once(bits.view(torch.bfloat16))
    assert packed.format is Format.BF16
    assert torch.equal(unpack(LIBRARY, packed).view(torch.int16), bits)


@SHORT
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 12, 13, 70])
def test_products_in_twelve_bits_are_those_in_sixteen(n_tokens: int) -> None:
    """On every instruction set, also on those that pack none; but for the order of a few sums."""
    weight = torch.randn(100, 331).mul(0.02).bfloat16()
    weight.view(-1)[torch.randperm(weight.numel())[:300]] *= 1e-6
    x, before = torch.randn(n_tokens, 331), LIBRARY.instructions
    short = put_at_once(weight)
    assert short.format is Format.BF12 and short.n_fine
    try:
        for name in (name for name, runs in LIBRARY.instruction_sets().items() if runs):
            LIBRARY.choose(name)
            here = put_at_once(weight)
            assert (here.format is Format.BF12) == (name == before)
            result = NativeLinear(short, None).product(x)
            exact = NativeLinear(here, None).product(x)
            torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-6)
            assert torch.equal(NativeLinear(short, None).product(x[-1:]), result[-1:])
    finally:
        LIBRARY.choose(before)


@SHORT
def test_a_large_weight_is_shortened_where_it_lies_and_the_rest_given_back() -> None:
    weight, rest = torch.randn(2048, 2304).mul(0.02).bfloat16(), []
    packed = put_at_once(weight, rest.append)
    assert sum(memory.nbytes for memory in rest) == weight.nbytes - packed.nbytes
    assert rest[0].data_ptr() == packed.panels.data_ptr() + packed.nbytes
    assert torch.equal(unpack(LIBRARY, packed), weight)


@pytest.mark.parametrize(
    ("given_rows", "here", "there"),
    [
        (torch.ones(4, 31), [0], [0]),
        (torch.ones(30), [0], [0]),
        (torch.ones(4, 30), [4], [0]),
        (torch.ones(4, 30), [0], [20]),
        (torch.ones(4, 30), [-1], [0]),
        (torch.ones(4, 30), [0, 1], [0]),
        (torch.ones(4, 30, device="meta"), [0], [0]),
    ],
    ids=["wider", "one axis", "not there", "beyond the weight", "negative", "uneven", "elsewhere"],
)
def test_wrong_rows_are_refused(given_rows: Tensor, here: list[int], there: list[int]) -> None:
    rows = DenseRows(LIBRARY, torch.float32, (20, 30))
    with pytest.raises(InvalidArgument):
        rows.put(given_rows, torch.tensor(here), torch.tensor(there))


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.NAME)
@pytest.mark.parametrize("shape", [(96, 64), (33, 200), (2, 2), (150, 16)], ids=str)
def test_a_packed_weight_comes_back_from_its_tensors(form, shape: tuple[int, int]) -> None:
    packed = pack(LIBRARY, form.quantize(torch.randn(shape)))
    tensors = {name: part.clone() for name, part in packed.tensors().items()}
    looks = {name: (part.dtype, tuple(part.shape)) for name, part in tensors.items()}
    assert looks == stored.shapes(LIBRARY, form, *shape)
    again = stored.packed_weight(form, *shape, tensors)
    assert (again.format, again.shape, again.nbytes) == (packed.format, packed.shape, packed.nbytes)
    assert torch.equal(unpack(LIBRARY, again).dense(), unpack(LIBRARY, packed).dense())
    for ours, theirs in ((again.columns, packed.columns), (again.scales, packed.scales)):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.NAME)
@pytest.mark.parametrize("shape", [(200, 640), (33, 200), (64, 24), (2, 2)], ids=str)
def test_quantizing_a_few_rows_at_a_time_changes_no_bit(form, shape: tuple[int, int]) -> None:
    """Also when rows are gone as soon as it is said that they were used."""
    dense = torch.randn(shape)
    at_once, used = pack(LIBRARY, form.quantize(dense)), []

    def forget(rows: Tensor) -> None:
        used.append(len(rows))
        rows.fill_(torch.nan)

    ours = quantize_packed(LIBRARY, form, dense.clone(), forget)
    assert sum(used) == len(dense)
    assert (ours.format, ours.shape, ours.n_fine) == (at_once.format, at_once.shape, at_once.n_fine)
    assert ours.tensors().keys() == at_once.tensors().keys()
    for name, tensor in at_once.tensors().items():
        assert torch.equal(ours.tensors()[name], tensor), name
    assert (ours.scales is None) == (at_once.scales is None)
    assert ours.scales is None or torch.equal(ours.scales, at_once.scales)  # also those that fill it up


@pytest.mark.parametrize("column", [-1, 64])
@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.NAME)
def test_columns_that_a_weight_does_not_have_are_refused(form, column: int) -> None:
    """A product would read beyond its inputs."""
    tensors = pack(LIBRARY, form.quantize(torch.randn(16, 64))).tensors()
    tensors["fine_columns"][0] = column
    with pytest.raises(InvalidArgument, match="columns"):
        stored.packed_weight(form, 16, 64, tensors)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.NAME)
def test_columns_that_are_named_twice_are_refused(form) -> None:
    """The others would be more than there is room for."""
    tensors = pack(LIBRARY, form.quantize(torch.randn(16, 64))).tensors()
    tensors["fine_columns"][1] = tensors["fine_columns"][0]
    with pytest.raises(InvalidArgument, match="ascend"):
        stored.packed_weight(form, 16, 64, tensors)


def test_a_layout_is_told_by_what_packing_gives() -> None:
    """The same from every instruction set; another when a byte lies elsewhere."""
    names = {form: stored.layout(LIBRARY, form) for form in FORMATS.values()}
    assert len(set(names.values())) == len(names)
    before = LIBRARY.instructions
    for name, runs in LIBRARY.instruction_sets().items():
        if runs:
            LIBRARY.choose(name)
            assert {form: stored.layout(LIBRARY, form) for form in names} == names
    LIBRARY.choose(before)


@settings(max_examples=100, deadline=None)
@given(n_bytes=st.integers(1, 300), data=st.data())
def test_a_checksum_tells_any_change_of_a_word(n_bytes: int, data) -> None:
    """Also two words in each other's place, and the same bytes elsewhere."""
    generator = torch.Generator().manual_seed(n_bytes)
    tensor = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)
    exact = stored.checksum(LIBRARY, tensor, 5)
    assert exact == stored.checksum(LIBRARY, tensor.clone(), 5) != stored.checksum(LIBRARY, tensor, 6)
    changed = tensor.clone()
    changed[data.draw(st.integers(0, n_bytes - 1))] ^= data.draw(st.integers(1, 255))
    assert stored.checksum(LIBRARY, changed, 5) != exact
    if n_bytes >= 16 and not torch.equal(tensor[:8], tensor[8:16]):
        swapped = torch.cat((tensor[8:16], tensor[:8], tensor[16:]))
        assert stored.checksum(LIBRARY, swapped, 5) != exact
