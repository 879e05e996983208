"""Products with int8 weights: exact integer sums, so that no neighbour changes a bit.

A weight's outlier columns go first. Their inputs are taken in two int8 digits of one step per token, 15 bits
together; all others in one digit, in blocks of 64 with a step each, which is a whole number `m` of a unit of
the token's: the largest input takes 128 units. With

    fine  = Σ (254 · codes + fine_codes) · high + Σ codes · low         over outlier columns
    whole = Σ m · Σ codes · digits                                      over blocks, and their columns

the result is (fine · step / 254 + whole · unit) · scale of the row. All sums are of whole numbers, and the
few float operations after them elementwise: a token gives the same bits alone and batched, and at one thread
and many. Kernels of this file differ in nothing, native ones and Triton's in the order of the last sums, by
float32's rounding.

On SmolLM2 that costs 0.1 % more perplexity than two digits for every input do, and half the products; one
step per token, without blocks and outlier columns, costs 3 %. Here `m` goes into the digits, whose products
have 14 bits, so these kernels take two rows of int8 for the blocks. All rows are of one product: at decode
the weights are read once.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import DIGIT, INT8_BLOCK, Int8Weight, column_order

_CHUNK_TOKENS = 96  # of one product: beyond this fbgemm runs slower, not faster
_SMALLEST = 1e-30  # keeps a token of zeros from dividing by zero
_LIMIT = 127.0
MULTIPLES = 128  # units of the largest step


class Int8Linear(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x. A kernel multiplies rows of whole numbers."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        device = weight.codes.device
        self._n_in = weight.shape[1]
        self._n_fine = len(weight.fine_columns)
        self._order = column_order(weight.fine_columns, self._n_in)
        self._scales = weight.scales
        self._bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        # A row over the whole range of int8 goes with every product: fbgemm, which finds its own range, finds
        # this one, and leaves whole numbers as they are.
        self._span = torch.zeros(1, self._n_in + self._n_fine, device=device)
        self._span[0, 0], self._span[0, 1] = -128.0, 127.0
        # As tensors of the right dtype: from a Python number torch makes one each time, which costs as much
        # again.
        self._digit = torch.tensor(float(DIGIT), device=device)
        self._multiples = torch.tensor(float(MULTIPLES), device=device)
        self._share = torch.tensor(1 / _LIMIT, device=device)

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor:
        """Rows (R, K + C) of whole numbers, -128 to 127, in float32, for codes in `_arranged` order → (R, N)
        float32: the sums, times the row's scale.
        """

    @abstractmethod
    def weight(self) -> Int8Weight:
        """What it was made of."""

    def _weight_of(self, arranged: Tensor) -> Int8Weight:
        codes = torch.empty_like(arranged[:, : self._n_in])
        codes[:, self._order] = arranged[:, : self._n_in]
        fine = arranged[:, self._n_in :].contiguous()
        return Int8Weight(codes, self._scales, self._order[: self._n_fine], fine)

    def product(self, x: Tensor) -> Tensor:
        exact = x.float()
        if x.shape[1] < self._n_in:
            exact = pad(exact, (0, self._n_in - x.shape[1]))
        chunks = torch.split(exact, _CHUNK_TOKENS)
        result = self._some(exact) if len(chunks) == 1 else torch.cat([self._some(chunk) for chunk in chunks])
        return result.to(x.dtype)

    def dense(self) -> Tensor:
        return self.weight().dense()

    def _some(self, x: Tensor) -> Tensor:
        """x (T, K) float32."""
        n_tokens, n_fine, n_in = len(x), self._n_fine, self._n_in
        ordered = x.index_select(1, self._order)
        rows = x.new_zeros(4 * n_tokens + 1, n_in + n_fine)
        rows[-1] = self._span
        high, low, upper, lower = rows[:-1].view(4, n_tokens, -1).unbind()
        step = self._put_outliers(ordered[:, :n_fine], high, low) if n_fine else 0.0
        unit = self._put_blocks(ordered[:, n_fine:], upper[:, n_fine:n_in], lower[:, n_fine:n_in])
        sums = self._product(rows)[:-1].view(4, n_tokens, -1)
        fine = torch.add(sums[1], sums[0], alpha=DIGIT).mul_(step / DIGIT)
        result = torch.add(sums[3], sums[2], alpha=MULTIPLES).mul_(unit).add_(fine)
        return result if self._bias is None else result.add_(self._bias)

    def _put_outliers(self, x: Tensor, high: Tensor, low: Tensor) -> Tensor:
        """x (T, C) in two digits; the steps (T, 1)."""
        n_fine = x.shape[1]
        step = x.abs().amax(1, keepdim=True).mul_(self._share).clamp_(min=_SMALLEST)
        scaled = x * step.reciprocal()
        rounded = scaled.round()
        high[:, :n_fine] = rounded
        torch.round(scaled.sub_(rounded).mul_(self._digit), out=low[:, :n_fine])
        low[:, -n_fine:] = rounded  # those that meet fine codes
        return step

    def _put_blocks(self, x: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        """x (T, K - C) in whole numbers of units, 128 · upper + lower; the units (T, 1)."""
        n_tokens, n_rest = x.shape
        blocks = pad(x, (0, -n_rest % INT8_BLOCK)).view(n_tokens, -1, INT8_BLOCK)
        largest = blocks.abs().amax(2)
        unit = largest.amax(1, keepdim=True).mul_(self._share).clamp_(min=_SMALLEST).div_(self._multiples)
        multiples = largest.div_(unit * _LIMIT).ceil_().clamp_(1, MULTIPLES).unsqueeze(2)
        whole = (blocks * (multiples * unit.unsqueeze(2)).reciprocal_()).round_().mul_(multiples)
        whole = whole.view(n_tokens, -1)[:, :n_rest]
        torch.round(whole / self._multiples, out=upper)
        torch.add(whole, upper, alpha=-MULTIPLES, out=lower)
        return unit


def _arranged(weight: Int8Weight) -> Tensor:
    """(N, K + C) int8: the codes of outlier columns, of the others, and the fine codes."""
    codes = weight.codes.index_select(1, column_order(weight.fine_columns, weight.shape[1]))
    return torch.cat((codes, weight.fine_codes), dim=1)


class FbgemmInt8(Int8Linear):
    """fbgemm's packed product (CPU with AVX512 VNNI): at decode 1.5 to 2 times as fast as `_int_mm` on small
    layers, level on large ones, and hardly slower at sixteen rows than at one.
    """

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        if "x86" not in torch.backends.quantized.supported_engines:
            raise RuntimeError("this torch was built without fbgemm")
        codes = _arranged(weight)
        zeros = torch.zeros(codes.shape[0], dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to take these away; until then they are the fastest
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(codes, weight.scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._run = torch.ops.quantized.linear_dynamic

    def _product(self, rows: Tensor) -> Tensor:
        result: Tensor = self._run(rows, self._packed, False)
        return result

    def weight(self) -> Int8Weight:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
        return self._weight_of(quantized.int_repr())


class _PlainInt8(Int8Linear):
    """Keeps the codes as they are, the fine ones beside the others."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._codes = _arranged(weight)

    def weight(self) -> Int8Weight:
        return self._weight_of(self._codes)


class IntMmInt8(_PlainInt8):
    """`torch._int_mm`. On a CPU without AVX512 it is a scalar loop."""

    def _product(self, rows: Tensor) -> Tensor:
        return torch._int_mm(rows.to(torch.int8), self._codes.t()).float().mul_(self._scales)


class ExactInt8(_PlainInt8):
    """The same numbers in float64, which holds them exactly: works everywhere, and is slow."""

    _CHUNK_ROWS = 1024

    def _product(self, rows: Tensor) -> Tensor:
        exact = rows.double()
        sums = [exact @ part.double().t() for part in torch.split(self._codes, self._CHUNK_ROWS)]
        return torch.cat(sums, dim=1).float().mul_(self._scales)
