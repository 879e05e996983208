"""Triton's attention of few tokens over cached rows beside torch's, row by row (see test_triton.py)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from petalite.kernels.attention import CausalMasks, alibi_slopes, attend

pytest.importorskip("triton")
from petalite.kernels.triton_attention import append_and_attend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy

BLOCKS, BLOCK = 3, 1  # a row's, and the one that is attended to


@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if (request.param == "gpu") != torch.cuda.is_available():
        pytest.skip("this needs a GPU" if request.param == "gpu" else "kernels are compiled here")
    return torch.device("cuda" if request.param == "gpu" else "cpu")


@dataclass(frozen=True)
class Case:
    n_heads: int
    n_kv_heads: int
    head_dim: int
    segments: tuple[tuple[int, int], ...]  # of each row: tokens cached, and new ones
    window: int | None = None
    alibi: bool = False


CASES = {
    "grouped": Case(6, 2, 16, ((0, 1), (37, 1), (300, 1))),
    "one key head": Case(3, 1, 64, ((129, 1),)),
    "a head of no power": Case(2, 2, 20, ((15, 1), (16, 1))),
    "drafts": Case(2, 1, 16, ((5, 4), (0, 3), (250, 2))),
    "window": Case(4, 1, 16, ((3, 1), (7, 1), (8, 2), (200, 1)), window=8),
    "wide window": Case(2, 1, 16, ((255, 1), (256, 1), (290, 3)), window=257),
    "ALiBi": Case(3, 3, 16, ((0, 1), (130, 2)), alibi=True),
}


def rows_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(blocks, 2, K, capacity, D) each, of capacities that are no two alike."""
    return [
        torch.randn(BLOCKS, 2, case.n_kv_heads, cached + new + 1 + index, case.head_dim).to(device, dtype)
        for index, (cached, new) in enumerate(case.segments)
    ]


def places_of(case: Case, rows: list[Tensor], padding: int, first_block: int = 0) -> Tensor:
    """As a graph has them: more columns than tokens, of which the last ones belong to no row."""
    places = [
        (row.data_ptr() - first_block * row[0].nbytes, row.shape[3], cached + token)
        for row, (cached, new) in zip(rows, case.segments, strict=True)
        for token in range(new)
    ]
    return torch.tensor([*places, *[(0, 0, 0)] * padding]).t().contiguous().to(rows[0].device)


def by_torch(case: Case, rows: list[Tensor], heads: Tensor) -> Tensor:
    """The same of copies of the rows, which are the longer for it."""
    slopes = alibi_slopes(case.n_heads) if case.alibi else None
    masks = CausalMasks(case.n_heads // case.n_kv_heads, heads.dtype, heads.device, slopes)
    outputs, first = [], 0
    for row, (cached, new) in zip(rows, case.segments, strict=True):
        own = heads[first : first + new]
        added = own[:, case.n_heads :].unflatten(1, (2, -1)).permute(1, 2, 0, 3)
        row[BLOCK, :, :, cached : cached + new] = added
        keys, values = row[BLOCK, :, None, :, : cached + new].unbind()
        outputs.append(attend(own[:, : case.n_heads], keys, values, masks, case.window))
        first += new
    return torch.cat(outputs)


NARROW = [("grouped", torch.bfloat16, 2e-2), ("ALiBi", torch.float16, 2e-3)]


@pytest.mark.parametrize(
    ("name", "dtype", "bound"), [*((name, torch.float32, 2e-6) for name in CASES), *NARROW], ids=str
)
def test_is_what_torch_makes_of_each_row(
    device: torch.device, name: str, dtype: torch.dtype, bound: float
) -> None:
    """Rows and all, to the bit: nothing is written but the new tokens' keys and values."""
    torch.manual_seed(0)
    case = CASES[name]
    rows = rows_of(case, dtype, device)
    copies = [row.clone() for row in rows]
    n_tokens, padding = sum(new for _, new in case.segments), 2
    heads = torch.randn(n_tokens + padding, case.n_heads + 2 * case.n_kv_heads, case.head_dim)
    heads = heads.to(device, dtype)
    slopes = alibi_slopes(case.n_heads).to(device) if case.alibi else None
    # Its rows begin at the model's block 5.
    places = places_of(case, rows, padding + 3, first_block=5)
    found = append_and_attend(heads, places, 5 + BLOCK, case.n_heads, slopes, case.window)
    expected = by_torch(case, copies, heads[:n_tokens])
    assert found.dtype == dtype and found.shape == (n_tokens + padding, case.n_heads * case.head_dim)
    assert float((found[:n_tokens].double() - expected.double()).abs().max()) < bound
    assert not found[n_tokens:].any()
    assert all(torch.equal(row, copy) for row, copy in zip(rows, copies, strict=True))


def test_blocks_further_apart_than_32_bits_count(device: torch.device) -> None:
    """A row of 40 blocks of 4 M tokens, of which the last block is there, and of it the last tokens."""
    block, capacity, n_seen = 40, 1 << 22, 8
    keys_values = torch.empty(2, 1, capacity, 16, dtype=torch.float16, device=device)
    seen = torch.randn(2, 1, n_seen, 16, device=device).half()
    keys_values[:, :, -n_seen:-1] = seen[:, :, :-1]
    heads = torch.cat((torch.randn(2, 16, device=device).half(), seen[:, 0, -1]))[None]
    origin = keys_values.data_ptr() - block * keys_values.nbytes
    places = torch.tensor([[origin], [capacity], [capacity - 1]], device=device)
    found = append_and_attend(heads, places, block, 2, None, n_seen)
    masks = CausalMasks(2, torch.float16, device)
    assert torch.equal(keys_values[:, :, -n_seen:], seen)
    torch.testing.assert_close(found, attend(heads[:, :2], *seen[:, None], masks, None), rtol=0, atol=2e-3)


def test_neighbours_do_not_change_a_bit(device: torch.device) -> None:
    case = Case(3, 1, 16, ((0, 1), (37, 1), (300, 1)))
    rows = rows_of(case, torch.float32, device)
    heads = torch.randn(3, 5, 16, device=device)
    places = places_of(case, rows, 0)
    together = append_and_attend(heads, places, BLOCK, case.n_heads, None, None)
    for token in range(3):
        own = places[:, token : token + 1].contiguous()
        alone = append_and_attend(heads[token : token + 1], own, BLOCK, case.n_heads, None, None)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["query", "cached key", "cached value"])
def test_what_is_not_finite_shows(device: torch.device, value: float, place: str) -> None:
    """In the token that sees it alone."""
    case = Case(3, 1, 16, ((0, 1), (37, 1), (300, 1)))
    rows = rows_of(case, torch.float32, device)
    heads = torch.randn(3, 5, 16, device=device)
    if place == "query":
        heads[1, :3] = value
    else:
        rows[1][BLOCK, 0 if place == "cached key" else 1, :, 9] = value
    found = append_and_attend(heads, places_of(case, rows, 0), BLOCK, case.n_heads, None, None)
    if place != "cached key" or value != torch.inf:  # whose logits may be -inf
        assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[::2]).all()


def test_what_was_never_written_is_never_read(device: torch.device) -> None:
    case = CASES["window"]
    rows = [row.fill_(torch.nan) for row in rows_of(case, torch.float32, device)]
    for row, (cached, _) in zip(rows, case.segments, strict=True):
        row[BLOCK, :, :, max(0, cached - 7) : cached] = 1.0
    heads = torch.randn(5, 6, 16, device=device)
    found = append_and_attend(heads, places_of(case, rows, 0), BLOCK, case.n_heads, None, case.window)
    assert torch.isfinite(found).all()
