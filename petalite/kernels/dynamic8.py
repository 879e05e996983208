"""Dynamic 8-bit quantization of activations (arXiv 2110.02861 §2.1), in blocks of 64 inside the last axis.

A code is one of 256 levels from -0.993 to 1, dense towards zero by a factor of ten seven times over; a
block has one float16 scale. Blocks never cross tokens, so what a token becomes does not depend on its
neighbours. Without the native kernels, which give the same bytes (native/q8.cc), work goes through buffers
that fit a core's cache, whatever the message's size: encoding is a product and a table look-up of 65,536
entries, decoding a look-up of 256 and a product. Knows tensors only; the wire is `swarm.codecs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.native import Library, library

BLOCK = 64
_STEPS = 32767  # the encoder's resolution: 1/32767 of the scale
_MIDDLE = 32768.5  # step 32768 is zero, and a half rounds what truncates
_CHUNK_VALUES = 1 << 17
_LARGEST_SCALE = 65504.0  # float16's
_SMALLEST_NORMAL = 2.0**-14  # float16's, below which it rounds by more than a thousandth
_ROUND_UP = 1 + 2.0**-10  # so that the nearest float16 is no smaller than the block's largest value


@cache
def levels() -> tuple[float, ...]:
    """The 256 levels, ascending; each to be rounded to float32.

    Decade i of seven, from 10^(i-6) down to a tenth of it, has 2^i levels of either sign: the middles of
    equal parts of [0.1, 1]. With them go 0 and 1.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        parts = 1 << decade
        for part in range(parts):
            middle = 0.1 + 0.9 * (part + 0.5) / parts
            found += [middle * 10.0 ** (decade - 6), -middle * 10.0 ** (decade - 6)]
    return tuple(sorted(found))


def n_blocks(hidden_size: int) -> int:
    """Scales of one token."""
    return -(-hidden_size // BLOCK)


@cache
@torch.inference_mode(False)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Level by code, (256,) float32; nearest code by step, (65536,) uint8, step 32768 being zero."""
    table = torch.tensor(levels(), dtype=torch.float64)
    between = (table[1:] + table[:-1]) / 2
    steps = (torch.arange(65536, dtype=torch.float64) - int(_MIDDLE)) / _STEPS
    nearest = torch.bucketize(steps, between).to(torch.uint8)
    return table.float().to(device), nearest.to(device)


def encode(hidden: Tensor, codes: Tensor, scales: Tensor) -> None:
    """hidden (T, E), any float dtype → codes (T, E) uint8 and scales (T, ceil(E / 64)) float16, both given.

    A block with NaN or Inf gets a scale of NaN. Values beyond float16's range saturate.
    """
    _, nearest = _tables(hidden.device)
    n_rows, width = hidden.shape
    found = _native(hidden, codes, scales)
    if found is not None:
        hidden = hidden.float()
        found.functions.petalite_q8_encode(
            *(hidden.data_ptr(), n_rows, width, hidden.stride(0), nearest.data_ptr()),
            *(codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0)),
        )
        return
    for place, scratch, steps in _chunks(n_rows, width, hidden.device):
        blocks = scratch.view(scratch.shape[0], -1, BLOCK)
        values = _whole_blocks(hidden[place])
        largest = torch.abs(values, out=blocks).amax(2)
        scales[place] = (largest * _ROUND_UP).clamp_(max=_LARGEST_SCALE)
        if not torch.isfinite(largest).all():
            scales[place].masked_fill_(~torch.isfinite(largest), torch.nan)
            values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
        inverse = (_STEPS / scales[place].float()).nan_to_num_(0.0, 0.0).unsqueeze(2)
        torch.mul(values, inverse, out=blocks)
        smallest, largest = torch.aminmax(inverse)
        if smallest <= _STEPS / _LARGEST_SCALE or largest >= _STEPS / _SMALLEST_NORMAL:
            blocks.clamp_(-_STEPS, _STEPS)  # the scale may be less than the block's largest value
        steps.copy_(scratch.add_(_MIDDLE))
        chosen = nearest.index_select(0, steps.view(-1)).view(steps.shape)
        codes[place] = chosen[:, :width]


def _whole_blocks(values: Tensor) -> Tensor:
    """(T, E) → (T, blocks, 64) float32, zero beyond E."""
    values = values.float()
    if values.shape[1] % BLOCK:
        values = pad(values, (0, -values.shape[1] % BLOCK))
    return values.reshape(values.shape[0], -1, BLOCK)


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """codes (T, E) uint8 and scales (T, ceil(E / 64)) float16 → out (T, E) float32, given."""
    table, _ = _tables(codes.device)
    n_rows, width = codes.shape
    found = _native(codes, scales, out)
    if found is not None:
        found.functions.petalite_q8_decode(
            *(codes.data_ptr(), n_rows, width, codes.stride(0), scales.data_ptr(), scales.stride(0)),
            *(table.data_ptr(), out.data_ptr(), out.stride(0)),
        )
        return
    for place, scratch, steps in _chunks(n_rows, width, codes.device):
        steps[:, :width] = codes[place]
        steps[:, width:] = 0
        torch.index_select(table, 0, steps.view(-1), out=scratch.view(-1))
        scratch.view(scratch.shape[0], -1, BLOCK).mul_(scales[place].float().unsqueeze(2))
        out[place] = scratch[:, :width]


def _native(*tensors: Tensor) -> Library | None:
    """The native kernels, where they can take these."""
    if any(tensor.device.type != "cpu" or tensor.stride(-1) != 1 for tensor in tensors):
        return None
    return library()


def _chunks(n_rows: int, width: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time, with room for them in whole blocks: float32 and int32, the same memory for all."""
    padded = n_blocks(width) * BLOCK
    some = min(n_rows, max(1, _CHUNK_VALUES // padded))
    values = torch.empty(some, padded, dtype=torch.float32, device=device)
    steps = torch.empty(some, padded, dtype=torch.int32, device=device)
    for start in range(0, n_rows, some):
        end = min(start + some, n_rows)
        yield slice(start, end), values[: end - start], steps[: end - start]
