"""A step through a whole span in one native call: see span.h for what it computes.

`NativeSpan` holds what C++ borrows (weights, norms) and checks every shape before a pointer is passed on;
C++ reads no length that it was not given. Knows tensors; rows, positions and rotations are told to it by
whoever keeps the caches.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from petalite.errors import InvalidArgument
from petalite.kernels.native import Library
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.native.packing import FLOATS, PANEL_ROWS, LinearStruct

_POINTER, _I32, _I64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class SpanShape:
    """What all blocks have in common."""

    hidden_size: int  # E
    inner_size: int  # F
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # D
    eps: float  # of the norms
    gated: bool  # the MLP is silu(gate) · up of one stacked product; else gelu by tanh
    residual_after_norm: bool  # what a norm gave is added to what its branch gives
    slopes: Tensor | None  # ALiBi's, (H,) float32


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Of a LayerNorm with a bias (E,), else of an RMSNorm."""

    weight: Tensor  # (E,)
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block."""

    qkv: Any  # linears, of whatever kernel; a `NativeSpan` takes native ones
    output: Any
    up: Any  # gate and up stacked, where the MLP is gated
    down: Any
    attention_norm: NormWeights
    mlp_norm: NormWeights
    head_norm: Tensor | None  # (H + K, D): RMSNorms of queries and keys
    window: int | None  # how many tokens back a token sees, itself included
    rope: bool

    def linears(self) -> tuple[Any, ...]:
        return self.qkv, self.output, self.up, self.down


@dataclass(frozen=True, slots=True)
class NativeSegment:
    """Consecutive tokens of one cached row."""

    position: int
    n_tokens: int
    capacity: int  # tokens that the row has room for
    addresses: Any  # `native_addresses` of its blocks


def native_addresses(blocks: Sequence[Tensor]) -> Any:
    """Where a row's blocks lie, each (2, 1, K, capacity, D) and contiguous; valid while they live."""
    return (_POINTER * len(blocks))(*(block.data_ptr() for block in blocks))


class NativeSpan:
    """Blocks as C++ sees them. One call at a time; others wait."""

    def __init__(
        self, library: Library, shape: SpanShape, blocks: Sequence[BlockWeights], dtype: torch.dtype
    ) -> None:
        """`dtype` of the caches and of what comes in and out. Raises InvalidArgument for weights that do not
        fit together."""
        self._library = library
        self._shape = shape
        self._dtype = dtype
        self._kept: list[Any] = [shape, blocks]  # all that pointers lead to
        _check_shape(shape, dtype)
        self._has_rope = any(block.rope for block in blocks)
        self._struct = _ShapeStruct(
            *(shape.hidden_size, shape.inner_size, shape.n_heads, shape.n_kv_heads, shape.head_dim),
            *(FLOATS[dtype], shape.gated, shape.residual_after_norm, shape.eps),
            self._floats("ALiBi slopes", shape.slopes, (shape.n_heads,)),
        )
        self._blocks = (_BlockStruct * len(blocks))(*(self._block(block) for block in blocks))
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._call = _CallStruct(shape=ctypes.addressof(self._struct))
        self._lock = threading.Lock()

    @staticmethod
    def takes(shape: SpanShape, blocks: Sequence[BlockWeights]) -> bool:
        """Whether it knows this kind of blocks, and their linears are native ones."""
        linears = [linear for block in blocks for linear in block.linears()]
        # Panels of gate and up are computed side by side, so neither may begin within one.
        whole = not shape.gated or shape.inner_size % PANEL_ROWS == 0
        return whole and all(isinstance(linear, NativeLinear) for linear in linears)

    def step(
        self, hidden: Tensor, first: int, last: int, segments: Sequence[NativeSegment], rotations: Tensor
    ) -> Tensor:
        """hidden (T, E) of the segments, one after the other, through the blocks [first, last), counted from
        this span's own → (T, E) in its dtype. Appends to the segments' rows.

        `rotations` (positions, 1, D/2) complex64 of all positions. Raises InvalidArgument.
        """
        n_tokens = self._check_step(first, last, segments, rotations)
        if hidden.shape != (n_tokens, self._shape.hidden_size) or hidden.device.type != "cpu":
            raise InvalidArgument(
                f"hidden states of shape {tuple(hidden.shape)} on {hidden.device}; expected "
                f"({n_tokens}, {self._shape.hidden_size}) on the CPU"
            )
        exact = hidden.to(self._dtype).float().contiguous()
        result = exact.clone() if exact.data_ptr() == hidden.data_ptr() else exact
        places = (_SegmentStruct * len(segments))()
        for place, segment in zip(places, segments, strict=True):
            place.position, place.n_tokens, place.capacity = (
                segment.position,
                segment.n_tokens,
                segment.capacity,
            )
            place.blocks = ctypes.addressof(segment.addresses)
        with self._lock:
            call = self._call
            call.blocks = ctypes.addressof(self._blocks) + first * ctypes.sizeof(_BlockStruct)
            call.segments, call.n_segments = ctypes.addressof(places), len(segments)
            call.n_blocks = last - first
            call.hidden, call.rotation = result.data_ptr(), rotations.data_ptr()
            self._run(call)
        return result.to(self._dtype)

    def _run(self, call: _CallStruct) -> None:
        run: Callable[..., int] = self._library.functions.petalite_span_step
        team = self._library.team()
        while needed := run(team, ctypes.byref(call)):
            self._scratch = torch.empty(needed, dtype=torch.uint8)
            call.scratch, call.scratch_bytes = self._scratch.data_ptr(), needed

    def _check_step(self, first: int, last: int, segments: Sequence[NativeSegment], rotations: Tensor) -> int:
        """How many tokens it is."""
        n_blocks, n_tokens, end = last - first, 0, 0
        for segment in segments:
            last_position = segment.position + segment.n_tokens
            if segment.position < 0 or segment.n_tokens < 1 or last_position > segment.capacity:
                raise InvalidArgument(f"{segment} does not fit its row")
            if len(segment.addresses) != n_blocks:
                raise InvalidArgument(
                    f"a row of {len(segment.addresses)} blocks, the step is over {n_blocks}"
                )
            n_tokens += segment.n_tokens
            end = max(end, last_position)
        if not (0 <= first < last <= len(self._blocks)) or not n_tokens:
            raise InvalidArgument(f"blocks {first}:{last} of {len(self._blocks)}, {n_tokens} tokens")
        if self._has_rope and (
            rotations.shape[1:] != (1, self._shape.head_dim // 2)
            or len(rotations) < end
            or rotations.dtype != torch.complex64
            or not rotations.is_contiguous()
        ):
            raise InvalidArgument(
                f"rotations {rotations.dtype}{list(rotations.shape)}; expected contiguous complex64 of {end} "
                f"positions, (positions, 1, {self._shape.head_dim // 2})"
            )
        return n_tokens

    # -- making it ---------------------------------------------------------------------------------------

    def _block(self, block: BlockWeights) -> _BlockStruct:
        shape = self._shape
        heads = shape.n_heads * shape.head_dim
        stacked = heads + 2 * shape.n_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.inner_size
        return _BlockStruct(
            self._linear("qkv", block.qkv, stacked, hidden),
            self._linear("output", block.output, hidden, heads),
            self._linear("up", block.up, 2 * inner if shape.gated else inner, hidden),
            self._linear("down", block.down, hidden, inner),
            *self._norm("the attention's norm", block.attention_norm),
            *self._norm("the MLP's norm", block.mlp_norm),
            self._head_norm(block.head_norm),
            block.window or 0,
            block.rope,
        )

    def _linear(self, name: str, linear: NativeLinear, n_out: int, n_in: int) -> LinearStruct:
        found_out, found_in = linear.packed.shape
        if found_out != n_out or not n_in <= found_in:
            raise InvalidArgument(f"linear {name!r} is ({found_out}, {found_in}); expected ({n_out}, {n_in})")
        return linear.packed.struct(linear.bias, n_in)

    def _norm(self, what: str, norm: NormWeights) -> tuple[int | None, int | None]:
        size = self._shape.hidden_size
        scaled = norm.weight.float() * (1.0 if norm.bias is not None else sqrt(size))
        return self._floats(what, scaled, (size,)), self._floats(f"{what}'s bias", norm.bias, (size,))

    def _head_norm(self, weight: Tensor | None) -> int | None:
        shape = self._shape
        scaled = None if weight is None else weight.float() * sqrt(shape.head_dim)
        return self._floats("head norms", scaled, (shape.n_heads + shape.n_kv_heads, shape.head_dim))

    def _floats(self, what: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int | None:
        """The address of a float32 copy that lives as long as this span."""
        if tensor is None:
            return None
        if tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            raise InvalidArgument(
                f"{what}: shape {tuple(tensor.shape)} on {tensor.device}; expected {shape} on the CPU"
            )
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _check_shape(shape: SpanShape, dtype: torch.dtype) -> None:
    sizes = (shape.hidden_size, shape.inner_size, shape.n_heads, shape.n_kv_heads, shape.head_dim)
    if dtype not in FLOATS or min(sizes) < 1 or shape.n_heads % shape.n_kv_heads:
        raise InvalidArgument(f"{shape} in {dtype}: expected sizes above 0, and a float dtype")


class _ShapeStruct(ctypes.Structure):
    """`SpanShape` of span.h."""

    _fields_ = (
        ("hidden", _I32),
        ("inner", _I32),
        ("n_heads", _I32),
        ("n_kv_heads", _I32),
        ("head_dim", _I32),
        ("cache", _I32),
        ("gated", _I32),
        ("residual_after_norm", _I32),
        ("eps", _FLOAT),
        ("slopes", _POINTER),
    )


class _BlockStruct(ctypes.Structure):
    """`SpanBlock`."""

    _fields_ = (
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("up", LinearStruct),
        ("down", LinearStruct),
        ("attention_norm", _POINTER),
        ("attention_norm_bias", _POINTER),
        ("mlp_norm", _POINTER),
        ("mlp_norm_bias", _POINTER),
        ("head_norm", _POINTER),
        ("window", _I64),
        ("rope", _I32),
    )


class _SegmentStruct(ctypes.Structure):
    """`SpanSegment`."""

    _fields_ = (("position", _I64), ("n_tokens", _I64), ("capacity", _I64), ("blocks", _POINTER))


class _CallStruct(ctypes.Structure):
    """`SpanCall`."""

    _fields_ = (
        ("shape", _POINTER),
        ("blocks", _POINTER),
        ("segments", _POINTER),
        ("n_blocks", _I64),
        ("n_segments", _I64),
        ("hidden", _POINTER),
        ("rotation", _POINTER),
        ("scratch", _POINTER),
        ("scratch_bytes", _I64),
    )
