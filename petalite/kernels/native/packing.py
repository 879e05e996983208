"""Weights in the native layout: panels of 16 rows, made once, and their tensors as a file keeps them.

The layout is described in common.h. A packed weight owns its tensors; the C++ side borrows them through a
`LinearStruct`, which must not outlive it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.errors import InvalidArgument
from petalite.kernels.native import Library
from petalite.kernels.quantized import (
    FINE_COLUMNS,
    NF4_BLOCK,
    Int8Weight,
    Nf4Weight,
    QuantizedWeight,
    column_order,
)

PANEL_ROWS = 16
_ROWS_AT_ONCE = 4 * PANEL_ROWS  # whose codes are put in order while they are in a cache
_NF4_BLOCK_BYTES = PANEL_ROWS * (NF4_BLOCK // 2 + 4)


class Format(IntEnum):
    """As in common.h."""

    F32 = 0
    BF16 = 1
    F16 = 2
    INT8 = 3
    NF4 = 4
    BF12 = 5


FLOATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16, torch.float16: Format.F16}
_DTYPES = {format_: dtype for dtype, format_ in FLOATS.items()} | {Format.BF12: torch.bfloat16}
_WORTHWHILE = 0.9  # of BF16's bytes: with more, BF12 is not used


class LinearStruct(ctypes.Structure):
    """`Linear` of common.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("n_in", ctypes.c_int32),
        ("n_fine", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight (N, K) on the CPU as the native kernels read it."""

    format: Format
    shape: tuple[int, int]  # K is filled up to whole blocks for nf4, as in `Nf4Weight`
    panels: Tensor  # (ceil(N / 16), bytes of a panel) uint8
    n_fine: int = 0  # int8 and nf4: outlier columns; BF12: the most exceptions of a panel
    columns: Tensor | None = None  # int8 and nf4: (K,) int32, outlier columns, then the others
    scales: Tensor | None = None  # int8: (N filled up to whole panels,) float32

    @property
    def nbytes(self) -> int:
        parts = (self.panels, self.columns, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def fine_columns(self) -> Tensor:
        """(C,) int32."""
        assert self.columns is not None
        return self.columns[: self.n_fine]

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, as they are kept in a file."""
        found = {"panels": self.panels}
        if self.columns is not None:
            found["fine_columns"] = self.fine_columns
        if self.scales is not None:
            found["scales"] = self.scales[: self.shape[0]]
        return found

    def struct(self, bias: Tensor | None = None, n_in: int | None = None) -> LinearStruct:
        """What C++ sees; `bias` (N,) float32 or None. Valid while this and the bias live. `n_in`: inputs
        that there are, where blocks were filled up.
        """
        if bias is not None:
            _check("a bias", bias, torch.float32, (self.shape[0],))
        if n_in is not None and not self.shape[1] - NF4_BLOCK < n_in <= self.shape[1]:
            raise InvalidArgument(f"a weight of {self.shape[1]} inputs cannot serve {n_in}")
        return LinearStruct(
            self.format,
            *(self.shape[0], n_in or self.shape[1], self.n_fine),
            self.panels.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            None if self.columns is None else self.columns.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )


def pack(library: Library, weight: Tensor | Int8Weight | Nf4Weight) -> PackedWeight:
    """A copy in panels of a dense weight (N, K) in one of the float formats, or of a quantized one."""
    if isinstance(weight, Int8Weight | Nf4Weight):
        return _pack_quantized(library, weight, _room(library, weight, len(weight.scales)))
    if weight.dtype not in FLOATS or weight.ndim != 2 or weight.device.type != "cpu" or 0 in weight.shape:
        raise InvalidArgument(
            f"cannot pack a weight of shape {tuple(weight.shape)} in {weight.dtype} on {weight.device}; "
            f"expected (outputs, inputs) on the CPU in {', '.join(map(str, FLOATS))}"
        )
    rows = DenseRows(library, weight.dtype, (weight.shape[0], weight.shape[1]))
    everywhere = torch.arange(len(weight))
    rows.put(weight.detach(), everywhere, everywhere)
    return rows.weight


def quantize_packed(
    library: Library, form: type[QuantizedWeight], weight: Tensor, used: Callable[[Tensor], None]
) -> PackedWeight:
    """What `pack` makes of a dense weight (N, K) of finite numbers in a format. Codes are made and packed a
    few rows at a time; then `used` is called with these rows, which are not read again.
    """
    columns, done = form.columns(weight), []
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE]
        codes = form.quantize(rows, columns)
        if not first:
            panels = _room(library, codes, len(weight))
        there = panels[first // PANEL_ROWS : (first + _ROWS_AT_ONCE) // PANEL_ROWS]
        done.append(_pack_quantized(library, codes, there))
        used(rows)
    scales = [part.scales for part in done if part.scales is not None]
    shape = (len(weight), done[0].shape[1])
    return replace(done[0], shape=shape, panels=panels, scales=torch.cat(scales) if scales else None)


class DenseRows:
    """Room for a dense weight, packed row by row as the rows come."""

    def __init__(
        self,
        library: Library,
        dtype: torch.dtype,
        shape: tuple[int, int],
        used: Callable[[Tensor], None] = lambda memory: None,
    ) -> None:
        """`shape` (N, K); `dtype` one of FLOATS. `used` is called with memory that is not needed any more."""
        format_ = FLOATS[dtype]
        size = library.functions.petalite_panel_bytes(format_, shape[1], 0)
        room = (-(-shape[0] // PANEL_ROWS), size)
        self._shorten = format_ is Format.BF16 and library.functions.petalite_short_serves()
        # Where small weights share pages, what is left over of one would be lost.
        self._to_stay = not self._shorten or math.prod(room) > _Slabs.SHARED
        panels = panel_memory(library, room) if self._to_stay else torch.empty(room, dtype=torch.uint8)
        if shape[0] % PANEL_ROWS:  # no row comes for what fills it up
            panels[-1:].zero_()
        self._dense = PackedWeight(format_, shape, panels)
        self._weight: PackedWeight | None = None
        self._dtype, self._library, self._used = dtype, library, used

    @property
    def memory(self) -> Tensor:
        """That rows are put into."""
        return self._dense.panels

    @property
    def weight(self) -> PackedWeight:
        """Once every row was put; then no more are."""
        if self._weight is None:
            self._weight = self._shortened() if self._shorten else self._dense
        return self._weight

    def _shortened(self) -> PackedWeight:
        """The same numbers in BF12, where that is smaller."""
        functions, panels, n_in = self._library.functions, self._dense.panels, self._dense.shape[1]
        base, most = ctypes.c_int32(), ctypes.c_int32()
        found = ctypes.byref(base), ctypes.byref(most)
        functions.petalite_short_range(panels.data_ptr(), len(panels), n_in, *found)
        size = functions.petalite_panel_bytes(Format.BF12, n_in, most.value)
        smaller = size <= _WORTHWHILE * panels.shape[1]
        room = (len(panels), size if smaller else panels.shape[1])
        if self._to_stay:
            memory, nbytes = panels.view(-1), math.prod(room)
            short, rest = memory[:nbytes].view(room), memory[nbytes:]
        else:
            short, rest = panel_memory(self._library, room), panels
        if smaller:
            place = panels.data_ptr(), len(panels), n_in, base.value, most.value, short.data_ptr()
            functions.petalite_shorten(*place)
        elif not self._to_stay:
            short.copy_(panels)
        self._used(rest)
        if not smaller:
            return replace(self._dense, panels=short)
        return replace(self._dense, format=Format.BF12, panels=short, n_fine=most.value)

    def put(self, rows: Tensor, here: Tensor, there: Tensor) -> None:
        """Of rows (n, K), in any float dtype, that of number here[i] becomes row there[i]. Both (m,) int64,
        `there` ascending: panels are filled one by one.
        """
        n_out, n_in = self._dense.shape
        rows = rows.to(self._dtype).contiguous()
        _check("rows", rows, self._dtype, (len(rows), n_in))
        for places, count in ((here, len(rows)), (there, n_out)):
            _check("places of rows", places, torch.int64, (len(there),))
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < count:
                raise InvalidArgument(f"places of rows {places.tolist()[:8]}… are not all below {count}")
        here, there = here.contiguous(), there.contiguous()
        self._library.functions.petalite_pack_float(
            self._dense.format,
            *(rows.data_ptr(), len(there), n_in, here.data_ptr(), there.data_ptr()),
            self._dense.panels.data_ptr(),
        )


def unpack(library: Library, packed: PackedWeight) -> Tensor | Int8Weight | Nf4Weight:
    """What it was packed from."""
    n_out, n_in = packed.shape
    source = packed.panels.data_ptr()
    if packed.format is Format.INT8:
        assert packed.scales is not None and packed.columns is not None
        n_fine = packed.n_fine
        n_steps = -(-n_fine // 4)
        arranged = torch.empty(n_out, n_steps * 8 + n_in - n_fine, dtype=torch.int8)
        library.functions.petalite_unpack_int8(source, n_out, arranged.shape[1], arranged.data_ptr())
        outliers, others = arranged[:, : n_steps * 8], arranged[:, n_steps * 8 :]
        steps = outliers.reshape(n_out, n_steps, 2, 4).transpose(1, 2).flatten(2)
        first, fine = steps[..., :n_fine].unbind(1)
        codes = others.new_empty(n_out, n_in)
        codes[:, packed.columns.long()] = torch.cat((first, others), 1)
        return Int8Weight(codes, packed.scales[:n_out], packed.fine_columns.long(), fine.contiguous())
    if packed.format is Format.NF4:
        n_blocks = packed.panels.shape[1] // _NF4_BLOCK_BYTES
        halves = torch.empty(n_out, n_blocks * NF4_BLOCK // 2, dtype=torch.uint8)
        block_scales = torch.empty(n_out, n_blocks)
        library.functions.petalite_unpack_nf4(
            source, n_out, n_blocks, halves.data_ptr(), block_scales.data_ptr()
        )
        return Nf4Weight(halves, block_scales, packed.fine_columns.long())
    dense = torch.empty(n_out, n_in, dtype=_DTYPES[packed.format])
    library.functions.petalite_unpack_float(
        packed.format, source, n_out, n_in, packed.n_fine, dense.data_ptr()
    )
    return dense


def int8_packed(n_in: int, panels: Tensor, fine_columns: Tensor, scales: Tensor) -> PackedWeight:
    """Of panels, (C,) int64 and (N,) float32."""
    columns = column_order(fine_columns, n_in).to(torch.int32)
    filled = pad(scales, (0, -len(scales) % PANEL_ROWS))
    return PackedWeight(
        Format.INT8, (len(scales), n_in), panels, len(fine_columns), columns, filled.contiguous()
    )


def nf4_packed(shape: tuple[int, int], panels: Tensor, fine_columns: Tensor) -> PackedWeight:
    """Of panels and (C,) int64."""
    columns = column_order(fine_columns, shape[1]).to(torch.int32)
    return PackedWeight(Format.NF4, shape, panels, len(fine_columns), columns)


def _room(library: Library, weight: Int8Weight | Nf4Weight, n_out: int) -> Tensor:
    """Panels for `n_out` rows like these."""
    format_ = Format.INT8 if isinstance(weight, Int8Weight) else Format.NF4
    return _panels(library, format_, n_out, weight.shape[1], len(weight.fine_columns))


def _pack_quantized(library: Library, weight: Int8Weight | Nf4Weight, panels: Tensor) -> PackedWeight:
    if isinstance(weight, Int8Weight):
        return _pack_int8(library, weight, panels)
    return _pack_nf4(library, weight, panels)


def _pack_int8(library: Library, weight: Int8Weight, panels: Tensor) -> PackedWeight:
    (n_out, n_in), n_fine = weight.shape, len(weight.fine_columns)
    _check("int8 codes", weight.codes, torch.int8, (n_out, n_in))
    _check("int8 fine codes", weight.fine_codes, torch.int8, (n_out, n_fine))
    _check("int8 scales", weight.scales, torch.float32, (n_out,))
    check_columns(weight.fine_columns, n_fine, n_in)
    if n_fine > FINE_COLUMNS:
        raise InvalidArgument(f"found {n_fine} outlier columns; expected {FINE_COLUMNS} at most")
    order = column_order(weight.fine_columns, n_in)
    for first in range(0, n_out, _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        codes = weight.codes[rows].index_select(1, order)
        outliers = pad(torch.stack((codes[:, :n_fine], weight.fine_codes[rows]), 1), (0, -n_fine % 4))
        steps = outliers.view(len(codes), 2, -(-n_fine // 4), 4).transpose(1, 2).flatten(1)
        arranged = torch.cat((steps, codes[:, n_fine:]), 1)
        library.functions.petalite_pack_int8(
            arranged.data_ptr(), len(codes), arranged.shape[1], panels[first // PANEL_ROWS].data_ptr()
        )
    return int8_packed(n_in, panels, weight.fine_columns, weight.scales)


def _pack_nf4(library: Library, weight: Nf4Weight, panels: Tensor) -> PackedWeight:
    (n_out, n_in), n_fine = weight.shape, len(weight.fine_columns)
    n_blocks = weight.scales.shape[1]
    _check("nf4 codes", weight.packed, torch.uint8, (n_out, n_blocks * NF4_BLOCK // 2))
    _check("nf4 scales", weight.scales, torch.float32, (n_out, n_blocks))
    check_columns(weight.fine_columns, n_fine, n_in)
    assert panels.shape[1] == n_blocks * _NF4_BLOCK_BYTES
    packed, scales = weight.packed.contiguous(), weight.scales.contiguous()
    library.functions.petalite_pack_nf4(
        packed.data_ptr(), scales.data_ptr(), n_out, n_blocks, panels.data_ptr()
    )
    return nf4_packed((n_out, n_in), panels, weight.fine_columns)


def check_columns(columns: Tensor, n_fine: int, n_in: int) -> None:
    """Raises InvalidArgument unless (n_fine,) outlier columns are among `n_in` inputs."""
    _check("fine columns", columns, torch.int64, (n_fine,))
    if n_fine and not 0 <= int(columns[0]) <= int(columns[-1]) < n_in:
        raise InvalidArgument(f"fine columns {columns.tolist()[:8]}… are not all below {n_in}")
    if not bool((columns[1:] > columns[:-1]).all()):
        raise InvalidArgument(f"fine columns {columns.tolist()[:8]}… do not ascend")


def _panels(library: Library, format_: Format, n_out: int, n_in: int, n_fine: int = 0) -> Tensor:
    size = library.functions.petalite_panel_bytes(format_, n_in, n_fine)
    return panel_memory(library, (-(-n_out // PANEL_ROWS), size))


def panel_memory(library: Library, shape: tuple[int, ...]) -> Tensor:
    """(panels, bytes of one) uint8, not yet filled, at an address that is a multiple of 4,096."""
    return _SLABS.take(library, math.prod(shape)).view(shape)


class _Slabs:
    """Memory for panels in huge pages, which small weights share; a slab goes with the last weight in it."""

    _ALIGNED = 4096  # so that files can be read into it past the page cache
    _PAGE = 2 << 20
    _SLAB = 16 << 20
    SHARED = _SLAB // 2  # bytes up to which

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, library: Library, nbytes: int) -> Tensor:
        """(nbytes,) uint8."""
        room = nbytes + -nbytes % self._ALIGNED
        if room > self.SHARED:
            return self._pages(library, nbytes)
        with self._lock:
            if room > len(self._rest):
                self._rest = self._pages(library, self._SLAB)
            taken, self._rest = self._rest[:nbytes], self._rest[room:]
            return taken

    def _pages(self, library: Library, nbytes: int) -> Tensor:
        """As far as it fills them: of a last one the rest would be lost."""
        memory = torch.empty(nbytes + self._PAGE, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % self._PAGE :][:nbytes]
        library.functions.petalite_huge_pages(memory.data_ptr(), nbytes // self._PAGE * self._PAGE)
        return memory


_SLABS = _Slabs()


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
        raise InvalidArgument(
            f"{what} are {tensor.dtype}{list(tensor.shape)} on {tensor.device}; "
            f"expected {dtype}{list(shape)} on the CPU"
        )
