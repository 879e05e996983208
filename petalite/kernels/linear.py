"""Linear layers whose weights never change, and the table of kernels that run them.

`pick(device, dtype, quant)` chooses once per device, dtype and format of the weights: the first row of
`KERNELS` that says it works there and whose answers agree with the reference. Falling back is said in one
log line. A kernel may keep its weights in a layout of its own; `dense()` gives them back as (N, K) for the
backward pass, which every kernel shares. Knows tensors only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from petalite.kernels.frozen import FrozenLinear
from petalite.kernels.int8 import ExactInt8, FbgemmInt8, IntMmInt8
from petalite.kernels.native import library
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.nf4 import DenseNf4, PackedNf4, nf4_on, packed_kernel_runs
from petalite.kernels.quantized import FORMATS, NONE, Int8Weight, Nf4Weight

logger = logging.getLogger(__name__)

_linear_pointwise: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default


class Linear(Protocol):
    """x (T, K) → (T, N)."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def dense(self) -> Tensor:
        """The weight, (N, K)."""
        ...

    @property
    def nbytes(self) -> int: ...


class DenseLinear:
    """torch's own product, on every device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def dense(self) -> Tensor:
        return self._weight

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)


class OneDnnLinear(FrozenLinear):
    """oneDNN's product over weights reordered once into its blocked layout (CPU; float32, bfloat16).

    Against `DenseLinear` at decode, weights cold: 1.2 to 2 times faster at one thread, 1.5 to 2.9 at two,
    where torch's float32 product of one row uses one core only (torch 2.13, AVX512). Below four rows oneDNN
    takes a slower path, so fewer are repeated up to four.
    """

    MIN_ROWS = 4

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def product(self, x: Tensor) -> Tensor:
        n_rows = x.shape[0]
        if n_rows < self.MIN_ROWS:
            x = torch.cat((x,) * -(-self.MIN_ROWS // n_rows))
            return _linear_pointwise(x, self._packed, self._bias, "none", [], "")[:n_rows]
        return _linear_pointwise(x, self._packed, self._bias, "none", [], "")

    def dense(self) -> Tensor:
        return self._packed.to_dense()


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """One row of the table: how to make the linear, and where it may be tried."""

    name: str
    make: Callable[[Any, Tensor | None], Linear]  # from a weight of its format, and a bias
    works_on: Callable[[torch.device, torch.dtype], bool]
    # Fewer tokens than this cost as much; a caller that pads once spares every linear doing so.
    min_rows: int = 1
    caution: str | None = None  # what an operator should know before relying on it


def _onednn_works_on(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Without AVX512-BF16 or AMX, oneDNN's bfloat16 product is emulated and slow.
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _native_works_on(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and library() is not None


def triton_works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels may be tried there."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    # Triton has no products of bytes for older ones.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _triton_int8(weight: Int8Weight, bias: Tensor | None) -> Linear:
    from petalite.kernels.triton_int8 import TritonInt8

    return TritonInt8(weight, bias)


def _triton_nf4(weight: Nf4Weight, bias: Tensor | None) -> Linear:
    from petalite.kernels.triton_nf4 import TritonNf4

    return TritonNf4(weight, bias)


def _on_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu"


def _on_wide_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    # What lies between is slower than float32: `_int_mm` is a scalar loop without AVX512.
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _everywhere(device: torch.device, dtype: torch.dtype) -> bool:
    return True


def _packed_nf4_works_on(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and packed_kernel_runs()


_SLOW = "it is far slower than float32; serve without --quant for speed"
_TWICE = "it takes twice the memory of nf4"

_NATIVE = LinearKernel("native", NativeLinear, _native_works_on)

# Per format of the weights, best first.
KERNELS: dict[str, tuple[LinearKernel, ...]] = {
    NONE: (
        _NATIVE,
        LinearKernel("onednn", OneDnnLinear, _onednn_works_on, OneDnnLinear.MIN_ROWS),
        LinearKernel("dense", DenseLinear, _everywhere),
    ),
    Int8Weight.NAME: (
        _NATIVE,
        LinearKernel("triton", _triton_int8, triton_works_on),
        LinearKernel("fbgemm", FbgemmInt8, _on_cpu),
        LinearKernel("_int_mm", IntMmInt8, _on_wide_cpu),
        LinearKernel("exact", ExactInt8, _everywhere, caution=_SLOW),
    ),
    Nf4Weight.NAME: (
        _NATIVE,
        LinearKernel("triton", _triton_nf4, triton_works_on),
        LinearKernel("bitsandbytes", PackedNf4, _packed_nf4_works_on),
        LinearKernel("fbgemm, as int8", nf4_on(FbgemmInt8), _on_cpu, caution=_TWICE),
        LinearKernel("_int_mm, as int8", nf4_on(IntMmInt8), _on_wide_cpu, caution=_TWICE),
        LinearKernel("dense", DenseNf4, _everywhere, caution="it takes the memory of dense weights"),
    ),
}


@functools.cache
def pick(device: torch.device, dtype: torch.dtype, quant: str = NONE) -> LinearKernel:
    """The kernel for weights in the format `quant` and activations in `dtype` on `device`.

    Chosen and checked once; said in one log line.
    """
    where = f"linear layers in {dtype if quant == NONE else quant} on {device}"
    for kernel in KERNELS[quant]:
        if kernel.works_on(device, dtype):
            error = _self_check(kernel, device, dtype, quant)
            if error is None:
                if kernel.caution is None:
                    logger.info("%s run on %s", where, kernel.name)
                else:
                    logger.warning("%s run on %s: %s", where, kernel.name, kernel.caution)
                return kernel
            logger.warning("linear kernel %s does not work on %s: %s", kernel.name, device, error)
    raise AssertionError("the last kernel of each format works everywhere")


def _self_check(kernel: LinearKernel, device: torch.device, dtype: torch.dtype, quant: str) -> str | None:
    """What is wrong with `kernel` here; None if it agrees with the reference of its format."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype)
    weight = given.to(device) if quant == NONE else FORMATS[quant].quantize(given.to(device))
    reference = _reference(weight, bias)
    tolerance = 8 * max(torch.finfo(dtype).eps, _TOLERANCE[quant])
    try:
        made = kernel.make(weight, bias.to(device))
        for n_rows in (1, 3, 4, 40):
            x = torch.randn(n_rows, 64, generator=generator).to(dtype)
            x[0] *= 30 * x[0].sign()  # one row far from the others and all of one sign, where sums saturate
            expected = reference(x)
            off = (made(x.to(device)).cpu().double() - expected).abs().amax(1) / expected.abs().amax(1)
            if not float(off.max()) < tolerance:
                return f"off by {float(off.max()):.1e} at {n_rows} rows"
    except Exception as error:  # whatever a library, a compiler or a driver makes of it
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _reference(weight: Tensor | Int8Weight | Nf4Weight, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """What the format says of inputs, in float64. int8 rounds them, too."""
    if isinstance(weight, Int8Weight):
        parts = {name: tensor.cpu() for name, tensor in weight.tensors().items()}
        exact = ExactInt8(Int8Weight(**parts), bias.float())
        return lambda x: exact(x.float()).double()
    dense = (weight if isinstance(weight, Tensor) else weight.dense()).cpu().double()
    return lambda x: linear(x.double(), dense[:, : x.shape[1]], bias.double())


# What a kernel may differ by, beside rounding: in nf4, bfloat16 inputs or levels in int8.
_TOLERANCE = {NONE: 0.0, Int8Weight.NAME: 0.0, Nf4Weight.NAME: 4e-3}
