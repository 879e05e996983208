"""The dynamic 8-bit codec against its definition, and against bitsandbytes at the same block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from petalite.kernels import dynamic8
from petalite.kernels.nf4 import bitsandbytes


def coded(hidden: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(hidden.shape, dtype=torch.uint8)
    scales = torch.zeros(len(hidden), dynamic8.n_blocks(hidden.shape[1]), dtype=torch.float16)
    dynamic8.encode(hidden, codes, scales)
    return codes, scales


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    out = torch.empty(codes.shape)
    dynamic8.decode(codes, scales, out)
    return out


def test_the_levels_are_those_of_bitsandbytes() -> None:
    theirs = bitsandbytes().functional.create_dynamic_map(signed=True)
    torch.testing.assert_close(torch.tensor(dynamic8.levels()), theirs, rtol=1e-6, atol=1e-9)
    assert len(dynamic8.levels()) == 256 and list(dynamic8.levels()) == sorted(dynamic8.levels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 576), (5, 100), (300, 1000), (2, 1)], ids=str)
def test_every_value_becomes_a_nearest_level(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """To the encoder's resolution, 1/32767 of the scale; the scale is the block's largest, rounded up."""
    hidden = (torch.randn(shape) * (torch.rand(shape) ** 4 * 300 + 0.01)).to(dtype)
    codes, scales = coded(hidden)
    width = shape[1]
    each = scales.float().repeat_interleave(64, dim=1)[:, :width]
    for block in range(dynamic8.n_blocks(width)):
        largest = hidden[:, 64 * block : 64 * (block + 1)].float().abs().amax(1)
        assert bool((scales[:, block].float() >= largest).all())
        assert bool((scales[:, block].float() <= largest * 1.002 + 1e-7).all())
    table = torch.tensor(dynamic8.levels())
    off = (decoded(codes, scales) - hidden.float()).abs()
    best = (table * each.unsqueeze(2) - hidden.float().unsqueeze(2)).abs().amin(2)
    assert bool((off <= best + each * 1.01 / 32767).all())
    torch.testing.assert_close(decoded(codes, scales), table[codes.int()] * each)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    hidden = torch.randn(9, 200) * 10 ** torch.randint(-3, 4, (9, 1)).float()
    codes, scales = coded(hidden)
    for row in range(9):
        alone = coded(hidden[row : row + 1])
        assert torch.equal(alone[0][0], codes[row]) and torch.equal(alone[1][0], scales[row])


def test_error_beside_bitsandbytes_at_the_same_block() -> None:
    """Gaussian with two massive channels: within 1 % of bitsandbytes' error at block 64."""
    functional = bitsandbytes().functional
    hidden = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    hidden[:, 1415] *= 300
    hidden[:, 2533] *= 900
    theirs = functional.dequantize_blockwise(*functional.quantize_blockwise(hidden, blocksize=64))
    ours = decoded(*coded(hidden))
    errors = [float((each - hidden).norm() / hidden.norm()) for each in (ours, theirs)]
    assert errors[0] < 1.01 * errors[1]


def test_zeros_extremes_and_what_is_no_number() -> None:
    hidden = torch.zeros(7, 128)
    hidden[1, 3], hidden[1, 100] = 1e30, -1e-30
    hidden[2, 5] = torch.nan
    hidden[3, 70] = torch.inf
    hidden[4] = 1e-9
    hidden[5, 0] = 65504.0
    hidden[6, 1] = -7.0
    result = decoded(*coded(hidden))
    assert not result[0].any() and result[1, 3] == 65504.0 and abs(float(result[1, 100])) < 1e-7
    assert bool(result[2, :64].isnan().all()) and not result[2, 64:].any()
    assert bool(result[3, 64:].isnan().all()) and not result[3, :64].any()
    assert bool((result[4].abs() <= 1e-7).all())
    assert abs(float(result[5, 0]) - 65504) < 70 and abs(float(result[6, 1]) + 7) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_and_torch_give_the_same_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All magnitudes, denormals, zeros, what is no number; odd widths, and views of wider rows."""
    generator = torch.Generator().manual_seed(4)
    for n_rows, width in ((1, 1), (3, 64), (7, 100), (40, 576), (300, 1000)):
        hidden = torch.randn(n_rows, width + 3, generator=generator)
        hidden *= 10 ** torch.randint(-44, 38, (n_rows, 1), generator=generator).float()
        hidden[torch.rand(hidden.shape, generator=generator) < 1e-3] = torch.nan
        hidden[torch.rand(hidden.shape, generator=generator) < 1e-3] = torch.inf
        hidden = hidden.to(dtype)[:, 1 : 1 + width]
        wide = torch.zeros(n_rows, width + 5, dtype=torch.uint8)
        ours = coded(hidden)
        dynamic8.encode(hidden, wide[:, 2 : 2 + width], ours[1])
        back = decoded(*ours)
        with monkeypatch.context() as patch:
            patch.setattr(dynamic8, "library", lambda: None)
            theirs = coded(hidden)
            assert torch.equal(theirs[0], ours[0]) and torch.equal(wide[:, 2 : 2 + width], ours[0])
            assert torch.equal(theirs[1].view(torch.int16), ours[1].view(torch.int16))
            torch.testing.assert_close(decoded(*theirs), back, rtol=0, atol=0, equal_nan=True)
