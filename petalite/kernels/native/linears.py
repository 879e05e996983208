"""Linear layers over the native kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.errors import InvalidArgument
from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.native import Library, library
from petalite.kernels.native.packing import PackedWeight, pack, unpack
from petalite.kernels.quantized import Int8Weight, Nf4Weight

Weight = Tensor | Int8Weight | Nf4Weight | PackedWeight


class NativeLinear(FrozenLinear):
    """x (T, K or, where blocks were filled up, less) → (T, N) in the dtype of x; see linear.h."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        found = library()
        if found is None:
            raise RuntimeError("there are no native kernels")
        self._library: Library = found
        self.packed = weight if isinstance(weight, PackedWeight) else pack(found, weight)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.nbytes = self.packed.nbytes + (self.bias.nbytes if self.bias is not None else 0)
        self._struct = self.packed.struct(self.bias)
        self._pointer = ctypes.pointer(self._struct)

    def product(self, x: Tensor) -> Tensor:
        n_out, n_in = self.packed.shape
        if x.ndim != 2 or x.shape[1] > n_in or x.device.type != "cpu" or not x.is_floating_point():
            raise InvalidArgument(
                f"found inputs {tuple(x.shape)} in {x.dtype} on {x.device}; "
                f"expected (tokens, {n_in}), floats on the CPU"
            )
        exact = x.float()
        if x.shape[1] < n_in:
            exact = pad(exact, (0, n_in - x.shape[1]))
        exact = exact.contiguous()
        y = torch.empty(len(x), n_out)
        if len(x):
            functions = self._library.functions
            size = functions.petalite_linear_scratch_bytes(self._pointer, len(x))
            scratch = torch.empty(size, dtype=torch.uint8)
            functions.petalite_linear(
                self._library.team(),
                self._pointer,
                exact.data_ptr(),
                len(x),
                y.data_ptr(),
                scratch.data_ptr(),
            )
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        weight = unpack(self._library, self.packed)
        return weight if isinstance(weight, Tensor) else weight.dense()
