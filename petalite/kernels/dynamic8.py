"""Dynamic 8-bit quantization of activations (arXiv 2110.02861 §2.1), in blocks of 64 inside the last axis.

A code is one of 256 levels from -0.993 to 1, dense towards zero by a factor of ten seven times over; a
block has one float16 scale. Blocks never cross tokens, so what a token becomes does not depend on its
neighbours. Native kernels (native/q8.cc) and those of a GPU (triton_q8.py) give the same bytes. Else work
goes through buffers that fit a core's cache, whatever the message's size: encoding is a product and a table
look-up of 65,536 entries, decoding a look-up of 256 and a product. Knows tensors only; the wire is
`swarm.codecs`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.native import Library, library

logger = logging.getLogger(__name__)

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
    gpu = _on_gpu(hidden.device)
    if gpu is not None and all(tensor.stride(-1) == 1 for tensor in (hidden, codes, scales)):
        gpu.encode(hidden, codes, scales, nearest)
        return
    _encode_in_torch(hidden, codes, scales)


def _encode_in_torch(hidden: Tensor, codes: Tensor, scales: Tensor) -> None:
    _, nearest = _tables(hidden.device)
    n_rows, width = hidden.shape
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
    gpu = _on_gpu(codes.device)
    if gpu is not None and all(tensor.stride(-1) == 1 for tensor in (codes, scales, out)):
        gpu.decode(codes, scales, out, table)
        return
    _decode_in_torch(codes, scales, out)


def _decode_in_torch(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    table, _ = _tables(codes.device)
    n_rows, width = codes.shape
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


@cache
def _on_gpu(device: torch.device) -> ModuleType | None:
    """Triton's kernels, if they give torch's bytes on this GPU; said in one line if they do not."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from petalite.kernels import triton_q8

        wrong = _differs(triton_q8, device)
    except Exception as error:  # whatever a compiler or a driver makes of it
        wrong = (str(error).splitlines() or [type(error).__name__])[0]
    if wrong is None:
        return triton_q8
    logger.warning("q8 runs in torch on %s, more slowly: Triton's kernels %s", device, wrong)
    return None


@torch.inference_mode()
def _differs(kernels: ModuleType, device: torch.device) -> str | None:
    """What other than torch's bytes `kernels` give of awkward tokens; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 200, generator=generator)
    for row, factor in enumerate((0.0, 1e-6, 1e6, torch.inf)):
        hidden[row, 70:] *= factor  # of zeros comes NaN
    hidden = hidden.to(device)
    table, nearest = _tables(device)
    made = []
    for encode_ in (_encode_in_torch, lambda *to: kernels.encode(*to, nearest)):
        codes = torch.empty(6, 200, dtype=torch.uint8, device=device)
        scales = torch.empty(6, n_blocks(200), dtype=torch.float16, device=device)
        encode_(hidden, codes, scales)
        made.append((codes, scales, torch.empty_like(hidden)))
    (codes, scales, expected), (others, other_scales, found) = made
    _decode_in_torch(codes, scales, expected)
    kernels.decode(codes, scales, found, table)
    if not torch.equal(codes, others) or not torch.equal(
        scales.view(torch.int16), other_scales.view(torch.int16)
    ):
        return "encode to other bytes"
    return None if torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0)) else "decode to other values"


def _chunks(n_rows: int, width: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time, with room for them in whole blocks: float32 and int32, the same memory for all."""
    padded = n_blocks(width) * BLOCK
    some = min(n_rows, max(1, _CHUNK_VALUES // padded))
    values = torch.empty(some, padded, dtype=torch.float32, device=device)
    steps = torch.empty(some, padded, dtype=torch.int32, device=device)
    for start in range(0, n_rows, some):
        end = min(start + some, n_rows)
        yield slice(start, end), values[: end - start], steps[: end - start]
