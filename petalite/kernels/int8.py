"""Products with int8 weights: exact integer sums, so that no neighbour and no kernel changes a bit.

Activations are taken in two int8 digits of one scale per token, 15 bits together: an outlier 60 times the
rest leaves the rest 9 bits, where plain per-token int8 leaves 2. Of a token's sums

    coarse = Σ codes · high        fine = Σ codes · low + Σ fine_codes · high[fine_columns]

the result is (254 · coarse + fine) · scale of the row / 254 · scale of the token. Both sums are whole
numbers; the few float operations after them are elementwise. So a token gives the same bits alone and
batched, at one thread and many, and from every kernel of this file, which lets one server check another.
Both digits are rows of one product: at decode the weights are read once for both.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from math import inf

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.quantized import DIGIT, Int8Weight

_CHUNK_TOKENS = 96  # of one product: beyond this fbgemm runs slower, not faster
_SMALLEST = 1e-30  # keeps a token of zeros from dividing by zero
_LIMIT = 127.0


class Int8Linear(FrozenLinear):
    """x (T, K or less) → (T, N) in the dtype of x. A kernel multiplies rows of whole numbers."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        device = weight.codes.device
        self._n_in = weight.shape[1]
        self._columns = weight.fine_columns
        self._scales = weight.scales
        self._bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        n_fine = len(self._columns)
        self._no_fine = torch.zeros(1, n_fine, device=device)
        # A row over the whole range of int8 goes with every product: fbgemm, which finds its own range, finds
        # this one, and leaves whole numbers as they are.
        self._span = torch.zeros(1, self._n_in + n_fine, device=device)
        self._span[0, 0], self._span[0, 1] = -128.0, 127.0
        # As tensors of the right dtype: from a Python number torch makes one each time, which costs as much
        # again.
        self._digit = torch.tensor(float(DIGIT), device=device)
        self._smallest = torch.tensor(_SMALLEST, device=device)

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor:
        """Rows (R, K + C) of whole numbers, -128 to 127, in float32 → (R, N) float32: the sums, times the
        row's scale / 254.
        """

    @abstractmethod
    def weight(self) -> Int8Weight:
        """What it was made of."""

    def product(self, x: Tensor) -> Tensor:
        exact = x.float()
        if x.shape[1] < self._n_in:
            exact = pad(exact, (0, self._n_in - x.shape[1]))
        if x.shape[0] == 1:
            result = self._one(exact)
        elif x.shape[0] <= _CHUNK_TOKENS:
            result = self._some(exact)
        else:
            result = torch.cat([self._some(chunk) for chunk in torch.split(exact, _CHUNK_TOKENS)])
        return result.to(x.dtype)

    def dense(self) -> Tensor:
        return self.weight().dense()

    def _one(self, x: Tensor) -> Tensor:
        """x (1, K) float32. The same numbers as `_some` in fewer operations: at decode each costs its
        dispatch.
        """
        step = torch.add(self._smallest, vector_norm(x, inf, 1, True), alpha=1 / _LIMIT)
        scaled = x / step
        high = scaled.round()
        low = scaled.sub_(high).mul_(self._digit).round_()
        of_fine = high.index_select(1, self._columns)
        rows = torch.cat((high, self._no_fine, low, of_fine, self._span), dim=1).view(3, -1)
        coarse, fine, _ = self._product(rows).unbind()
        result = torch.add(fine, coarse, alpha=DIGIT).mul(step)
        return result if self._bias is None else result.add_(self._bias)

    def _some(self, x: Tensor) -> Tensor:
        """x (T, K) float32."""
        n_tokens, n_in = x.shape
        n_fine = len(self._columns)
        width = n_in + n_fine
        rows = x.new_zeros(2 * n_tokens + 1, width)
        rows[-1] = self._span
        high = rows.as_strided((n_tokens, n_in), (width, 1))
        low = rows.as_strided((n_tokens, n_in), (width, 1), n_tokens * width)
        step = torch.add(self._smallest, x.abs().amax(1, keepdim=True), alpha=1 / _LIMIT)
        scaled = x / step
        torch.round(scaled, out=high)
        torch.round(scaled.sub_(high).mul_(self._digit), out=low)
        if n_fine:
            of_fine = rows.as_strided((n_tokens, n_fine), (width, 1), n_tokens * width + n_in)
            torch.index_select(high, 1, self._columns, out=of_fine)
        sums = self._product(rows)
        coarse, fine = sums.narrow(0, 0, n_tokens), sums.narrow(0, n_tokens, n_tokens)
        result = fine.add_(coarse, alpha=DIGIT).mul_(step)
        return result if self._bias is None else result.add_(self._bias)


class FbgemmInt8(Int8Linear):
    """fbgemm's packed product (CPU with AVX512 VNNI): at decode 1.5 to 2 times as fast as `_int_mm` on small
    layers, level on large ones, and hardly slower at sixteen rows than at one.
    """

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        if "x86" not in torch.backends.quantized.supported_engines:
            raise RuntimeError("this torch was built without fbgemm")
        codes = torch.cat((weight.codes, weight.fine_codes), dim=1)
        zeros = torch.zeros(codes.shape[0], dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to take these away; until then they are the fastest
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(
                codes, (weight.scales / DIGIT).double(), zeros, 0
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._run = torch.ops.quantized.linear_dynamic

    def _product(self, rows: Tensor) -> Tensor:
        result: Tensor = self._run(rows, self._packed, False)
        return result

    def weight(self) -> Int8Weight:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
        codes, n_in = quantized.int_repr(), self._n_in
        coarse, fine = codes[:, :n_in].contiguous(), codes[:, n_in:].contiguous()
        return Int8Weight(coarse, self._scales, self._columns, fine)


class _PlainInt8(Int8Linear):
    """Keeps the codes as they are, the fine ones beside the others."""

    def __init__(self, weight: Int8Weight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._codes = torch.cat((weight.codes, weight.fine_codes), dim=1)
        self._steps = weight.scales / DIGIT

    def weight(self) -> Int8Weight:
        coarse, fine = self._codes[:, : self._n_in], self._codes[:, self._n_in :]
        return Int8Weight(coarse, self._scales, self._columns, fine)


class IntMmInt8(_PlainInt8):
    """`torch._int_mm`. On a CPU without AVX512 it is a scalar loop."""

    def _product(self, rows: Tensor) -> Tensor:
        return torch._int_mm(rows.to(torch.int8), self._codes.t()).float().mul_(self._steps)


class ExactInt8(_PlainInt8):
    """The same numbers in float64, which holds them exactly: works everywhere, and is slow."""

    _CHUNK_ROWS = 1024

    def _product(self, rows: Tensor) -> Tensor:
        exact = rows.double()
        sums = [exact @ part.double().t() for part in torch.split(self._codes, self._CHUNK_ROWS)]
        return torch.cat(sums, dim=1).float().mul_(self._steps)
