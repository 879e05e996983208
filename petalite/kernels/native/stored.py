"""Quantized weights in files as they lie in memory: what such a file holds, and how it is told from others.

Reading one back is a copy, without packing. The panels are the machine's own business: a file with another
`layout` is not read but made anew, and so is one whose `checksum` is not what was written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from petalite.kernels.native import Library
from petalite.kernels.native.packing import (
    PANEL_ROWS,
    Format,
    PackedWeight,
    check_columns,
    int8_packed,
    nf4_packed,
    pack,
)
from petalite.kernels.quantized import NF4_BLOCK, Int8Weight, QuantizedWeight

Form = type[QuantizedWeight]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def shapes(library: Library, form: Form, n_out: int, n_in: int) -> Shapes:
    """What `PackedWeight.tensors()` of a weight (n_out, n_in) looks like."""
    n_fine = form.shapes(n_out, n_in)["fine_columns"][1][0]
    format_ = Format.INT8 if form is Int8Weight else Format.NF4
    size = library.functions.petalite_panel_bytes(format_, n_in, n_fine)
    found: Shapes = {
        "panels": (torch.uint8, (-(-n_out // PANEL_ROWS), size)),
        "fine_columns": (torch.int32, (n_fine,)),
    }
    return found | ({"scales": (torch.float32, (n_out,))} if form is Int8Weight else {})


def packed_weight(form: Form, n_out: int, n_in: int, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """The weight (n_out, n_in) of these tensors. Raises InvalidArgument for columns that it does not have."""
    panels, columns = tensors["panels"], tensors["fine_columns"].long()
    check_columns(columns, len(columns), n_in)
    if form is Int8Weight:
        return int8_packed(n_in, panels, columns, tensors["scales"])
    return nf4_packed((n_out, n_in + (len(columns) - n_in) % NF4_BLOCK), panels, columns)


def layout(library: Library, form: Form) -> str:
    """A name for how weights of a format lie in panels: a digest of a small one."""
    tensors = {
        name: (torch.arange(math.prod(shape)) * 37 % 251 - 125 * (dtype == torch.int8)).to(dtype).view(shape)
        for name, (dtype, shape) in form.shapes(19, 200).items()
    }
    tensors["fine_columns"] = torch.arange(len(tensors["fine_columns"])) * 3
    panels = pack(library, form(**tensors)).panels
    return hashlib.sha256(panels.numpy().tobytes()).hexdigest()[:16]


def checksum(library: Library, tensor: Tensor, place: int) -> int:
    """Of a tensor's bytes, modulo 2^64; `place` is that of the first, in words of 8 bytes."""
    tensor = tensor.contiguous()
    found: int = library.functions.petalite_checksum(tensor.data_ptr(), tensor.nbytes, place)
    return found
