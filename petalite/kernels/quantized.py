"""Weights in 8 and 4 bits: the two formats, how they are made from dense ones, and what they stand for.

`Int8Weight` is vector-wise int8 (LLM.int8(), arXiv 2208.07339 §2.1): a scale per output row. The columns
that meet outliers get a second int8 digit, so that they carry 15 bits. They are static, and found without
data, so that every server of a block has the same weights to the bit. Half are the columns of smallest
norm: training keeps weights small where inputs are large (on SmolLM2, 32 of them hold three quarters of the
energy that the best 32 of the inputs after a norm hold). Half are those with the largest single weight,
which write the massive activations. Together they halve what int8 adds to the divergence from float32;
columns chosen with data, a third more.

`Nf4Weight` is 4-bit NormalFloat (QLoRA, arXiv 2305.14314 §3): a scale per 64 values of a row, a table of 16
levels. What it misses of outlier columns, chosen likewise, is more blocks of each row, in nf4 too; on SmolLM2
that takes the divergence from float32 to a fifth. Scales are the best of six per block, by errors that count
as their columns do: the smaller a column's norm, the larger its inputs. Sums of errors are whole numbers, so
that every machine chooses alike. Knows tensors only; how they are multiplied is the kernels' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

FINE_COLUMNS = 64
DIGIT = 254  # the second digit counts in 254ths of the first: both run from -127 to 127
INT8_BLOCK = 64  # inputs that share a step
NF4_BLOCK = 64
NF4_FACTORS = (1.0, 0.93, 0.86, -1.0, -0.93, -0.86)  # of a block's largest value: the scales that are tried
_NF4_STEPS = 2047  # how finely values are told apart, either side of zero: a table of as many fits a cache
_CHUNK_VALUES = 1 << 18  # dense ones in float32 at a time; they and what is made of them fit into a cache

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class _Stored:
    """A weight made of tensors, which are its fields."""

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, as they are kept in a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True, slots=True)
class Columns:
    """All that a row's codes depend on beside the row."""

    fine: Tensor  # (C,) int64, the outlier columns, ascending
    energy: Tensor  # (K,) float64, norms squared

    @classmethod
    def of(cls, weight: Tensor, n_fine: int) -> Columns:
        """Of all rows (N, K) of a weight."""
        energy, largest = _columns_of(weight)
        return cls(_outlier_columns(energy, largest, n_fine), energy)


@dataclass(frozen=True, slots=True)
class Int8Weight(_Stored):
    """w[n, k] = scales[n] · (codes[n, k] + fine_codes[n, c] / 254 where fine_columns[c] = k)."""

    codes: Tensor  # (N, K) int8, -127 to 127
    scales: Tensor  # (N,) float32
    fine_columns: Tensor  # (C,) int64, ascending
    fine_codes: Tensor  # (N, C) int8

    NAME: ClassVar[str] = "int8"

    @classmethod
    def columns(cls, weight: Tensor) -> Columns:
        """Of a dense weight (N, K) of finite numbers."""
        return Columns.of(weight, _n_fine(weight.shape[1]))

    @classmethod
    def quantize(cls, weight: Tensor, among: Columns | None = None) -> Int8Weight:
        """From a dense weight (N, K) of finite numbers, or from some of its rows `among` all."""
        n_rows = len(weight)
        columns = (among or cls.columns(weight)).fine
        codes = torch.empty_like(weight, dtype=torch.int8)
        fine_codes = codes.new_empty(n_rows, len(columns))
        scales = torch.empty(n_rows, dtype=torch.float32, device=weight.device)
        for place, rows in _float_rows(weight):
            scale = rows.abs().amax(1) / 127
            scale[scale == 0] = 1.0
            exact = rows / scale.unsqueeze(1)
            coarse = exact.round()
            scales[place], codes[place] = scale, coarse.to(torch.int8)
            fine_codes[place] = ((exact - coarse)[:, columns] * DIGIT).round().to(torch.int8)
        return cls(codes, scales, columns, fine_codes)

    @classmethod
    def shapes(cls, n_out: int, n_in: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What `tensors()` of a weight (n_out, n_in) looks like."""
        n_fine = _n_fine(n_in)
        return {
            "codes": (torch.int8, (n_out, n_in)),
            "scales": (torch.float32, (n_out,)),
            "fine_columns": (torch.int64, (n_fine,)),
            "fine_codes": (torch.int8, (n_out, n_fine)),
        }

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        """(N, K) float32."""
        values = self.codes.float()
        values.index_add_(1, self.fine_columns, self.fine_codes.float().div_(DIGIT))
        return values.mul_(self.scales.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class Nf4Weight(_Stored):
    """Each column's value is scale · level. Columns are in three parts, each filled up with zeros to whole
    blocks: the outlier columns' first codes, their second codes, which are added to the first, and the
    others:

        value[n, i] = scales[n, i // 64] · NF4_LEVELS[code of n, i]

    Two codes a byte, the first in the upper half. There are outlier columns for a sixteenth of the inputs and
    64 more, in whole blocks where there are 512 inputs or more: 4.8 bits a weight and 288 a row.
    """

    packed: Tensor  # (N, (2 C + R) / 2) uint8, C outlier columns and R others, both filled up
    scales: Tensor  # (N, (2 C + R) / 64) float32, of either sign
    fine_columns: Tensor  # (C,) int64, ascending

    NAME: ClassVar[str] = "nf4"

    @classmethod
    def columns(cls, weight: Tensor) -> Columns:
        """Of a dense weight (N, K) of finite numbers."""
        return Columns.of(weight, _n_nf4_fine(weight.shape[1]))

    @classmethod
    def quantize(cls, weight: Tensor, among: Columns | None = None) -> Nf4Weight:
        """From a dense weight (N, K) of finite numbers, or from some of its rows `among` all."""
        n_rows, n_columns = weight.shape
        shapes = cls.shapes(n_rows, n_columns)
        among = among or cls.columns(weight)
        order, n_fine = column_order(among.fine, n_columns), len(among.fine)
        importance = _importance(among.energy)[order]
        counts, fine_counts = _whole_counts(importance[n_fine:]), _whole_counts(importance[:n_fine])
        packed = torch.empty(shapes["packed"][1], dtype=torch.uint8, device=weight.device)
        scales = torch.empty(shapes["scales"][1], dtype=torch.float32, device=weight.device)
        for place, rows in _float_rows(weight):
            fine, others = rows.index_select(1, order).tensor_split((n_fine,), 1)
            parts = [_nf4(others, counts)]
            if n_fine:
                first = _nf4(fine, fine_counts)
                missed = fine - _nf4_values(*first)[:, :n_fine]
                parts = [first, _nf4(missed, fine_counts), *parts]
            codes, scale = zip(*parts, strict=True)
            torch.cat(codes, 1, out=packed[place])
            torch.cat(scale, 1, out=scales[place])
        return cls(packed, scales, among.fine)

    @classmethod
    def shapes(cls, n_out: int, n_in: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What `tensors()` of a weight (n_out, n_in) looks like."""
        n_fine = _n_nf4_fine(n_in)
        n_blocks = 2 * -(-n_fine // NF4_BLOCK) + -(-(n_in - n_fine) // NF4_BLOCK)
        return {
            "packed": (torch.uint8, (n_out, n_blocks * NF4_BLOCK // 2)),
            "scales": (torch.float32, (n_out, n_blocks)),
            "fine_columns": (torch.int64, (n_fine,)),
        }

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), where K may exceed the dense weight's by up to 63, which fill up the others."""
        n_fine = len(self.fine_columns)
        n_other_blocks = self.scales.shape[1] - 2 * -(-n_fine // NF4_BLOCK)
        return self.packed.shape[0], n_fine + n_other_blocks * NF4_BLOCK

    def codes(self) -> Tensor:
        """(N, 2 C + R) uint8, 0 to 15, where C and R are filled up."""
        return torch.stack((self.packed >> 4, self.packed & 15), dim=-1).flatten(1)

    def inputs(self) -> Tensor:
        """(2 C + R,) int64: the column that each code is of, K where it fills up a block."""
        n_fine, n_in = len(self.fine_columns), self.shape[1]
        fine = pad(self.fine_columns, (0, -n_fine % NF4_BLOCK), value=n_in)
        return torch.cat((fine, fine, column_order(self.fine_columns, n_in)[n_fine:]))

    def dense(self) -> Tensor:
        """(N, K) float32."""
        return nf4_dense(_nf4_values(self.packed, self.scales), self.fine_columns)


def nf4_dense(values: Tensor, fine_columns: Tensor) -> Tensor:
    """An nf4 weight (N, K) of the values (N, 2 C + R) of all its codes, which are changed."""
    n_fine = len(fine_columns)
    n_filled = n_fine + -n_fine % NF4_BLOCK
    values[:, :n_fine] += values[:, n_filled : n_filled + n_fine]
    places = column_order(fine_columns, values.shape[1] - 2 * n_filled + n_fine).argsort()
    places[places >= n_fine] += 2 * n_filled - n_fine
    return values.index_select(1, places)


def _nf4(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes (N, K / 2) uint8 and scales (N, K / 64) of float32 rows, K filled up to whole blocks.

    A block's scale is the one of `NF4_FACTORS`, the first of equal ones, whose squared errors times `counts`
    (K / 64, 64) have the least sum.
    """
    codes, errors = _nf4_tables(rows.device)
    blocks = pad(rows, (0, -rows.shape[1] % NF4_BLOCK)).view(len(rows), -1, NF4_BLOCK)
    largest = torch.maximum(blocks.amax(2), blocks.amin(2).neg())
    steps = blocks / largest.masked_fill(largest == 0, 1.0).unsqueeze(2)
    steps = steps.mul_(_NF4_STEPS).add_(_NF4_STEPS + 0.5).int()
    best, least = torch.zeros_like(largest, dtype=torch.int32), torch.full_like(largest, inf)
    for number, table in enumerate(errors.unbind()):
        missed = table.index_select(0, steps.view(-1)).view(blocks.shape).mul_(counts).sum(2)
        best.masked_fill_(missed < least, number)
        torch.minimum(missed, least, out=least)
    steps += best.mul(errors.shape[1]).unsqueeze(2)
    pairs = codes.view(-1).index_select(0, steps.view(-1)).view(len(rows), -1, 2)
    scale = largest * torch.tensor(NF4_FACTORS, device=rows.device)[best]
    return pairs[..., 0] << 4 | pairs[..., 1], scale


@cache
@torch.inference_mode(False)
def _nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each factor and step of a block's range, (6, 4095): the nearest level's code, uint8; the square of
    what it misses in 32768ths, float32.
    """
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    values = torch.arange(-_NF4_STEPS, _NF4_STEPS + 1, dtype=torch.float64) / _NF4_STEPS
    factors = torch.tensor(NF4_FACTORS, dtype=torch.float64).unsqueeze(1)
    codes = torch.bucketize(values / factors, (levels[1:] + levels[:-1]) / 2)
    errors = (values - factors * levels[codes]).square().mul(32768).round()
    # 64 of them, 255 times each, have a sum that float32 holds exactly: no order of adding changes it.
    assert float(errors.max()) * 255 * NF4_BLOCK < 2**24
    return codes.to(device, torch.uint8), errors.to(device, torch.float32)


def _nf4_values(packed: Tensor, scales: Tensor) -> Tensor:
    """(N, K) float32 of packed codes (N, K / 2) and scales (N, K / 64)."""
    levels = torch.tensor(NF4_LEVELS, device=packed.device)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # of every byte
    values = embedding(packed.int(), pairs).view(*scales.shape, NF4_BLOCK)
    return values.mul_(scales.unsqueeze(2)).flatten(1)


QuantizedWeight = Int8Weight | Nf4Weight
NONE = "none"
FORMATS: Mapping[str, type[Int8Weight] | type[Nf4Weight]] = {
    Int8Weight.NAME: Int8Weight,
    Nf4Weight.NAME: Nf4Weight,
}


def column_order(fine_columns: Tensor, n_columns: int) -> Tensor:
    """(K,) int64: the outlier columns, then the others, each ascending."""
    others = torch.ones(n_columns, dtype=torch.bool, device=fine_columns.device)
    others[fine_columns] = False
    return torch.cat((fine_columns, others.nonzero().squeeze(1)))


def _n_fine(n_columns: int) -> int:
    return min(FINE_COLUMNS, n_columns // 8)


def _n_nf4_fine(n_columns: int) -> int:
    return min((n_columns // 16 + 2 * NF4_BLOCK - 1) // NF4_BLOCK * NF4_BLOCK, n_columns // 4)


def _importance(energy: Tensor) -> Tensor:
    """(K,) float64: what an error in a column counts, one over its norm squared; 0 for a column of zeros."""
    return energy.reciprocal().masked_fill(energy == 0, 0.0)


def _whole_counts(importance: Tensor) -> Tensor:
    """(K / 64, 64) float32: whole numbers, 255 the largest of each block, 0 where there is none."""
    blocks = pad(importance, (0, -len(importance) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.amax(1, keepdim=True)
    counts = (blocks * (255 / largest.masked_fill(largest == 0, 1.0))).round().clamp(min=1)
    return counts.masked_fill(blocks == 0, 0.0).float()


def _columns_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's norm squared, (K,) float64, and its largest absolute value, (K,) float32."""
    n_columns = weight.shape[1]
    energy = torch.zeros(n_columns, dtype=torch.float64, device=weight.device)
    largest = torch.zeros(n_columns, dtype=torch.float32, device=weight.device)
    for _, rows in _float_rows(weight):
        energy += rows.square().sum(0, dtype=torch.float64)
        largest = torch.maximum(largest, rows.abs().amax(0))
    return energy, largest


def _outlier_columns(energy: Tensor, largest: Tensor, count: int) -> Tensor:
    """(count,) ascending: half those of smallest norm, then those with the largest single weight."""
    small = energy.argsort(stable=True)[: count // 2]
    rest = largest.index_fill(0, small, -1.0)
    loud = rest.argsort(descending=True, stable=True)[: count - count // 2]
    return torch.cat((small, loud)).sort().values


def _float_rows(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in float32, some at a time, so that no dense copy of all is made."""
    n_rows = max(1, _CHUNK_VALUES // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], n_rows):
        place = slice(start, min(start + n_rows, weight.shape[0]))
        yield place, weight[place].float()
