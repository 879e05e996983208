"""Making blocks from a checkpoint: their tensors and no others, one block at a time, quantized on the way.

Peak memory is the finished blocks plus one: a block's tensors are mapped from their file, and each linear is
stacked, quantized and packed before the next is touched. A thread reads the next block meanwhile. Knows files
and blocks; runs none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.kernels import linear
from petalite.kernels.quantized import FORMATS, NONE
from petalite.model.block import Block, stacked, vector_shapes
from petalite.model.bloom import BloomBlock
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import is_finite
from petalite.model.llama import LlamaBlock
from petalite.model.mixtral import MixtralBlock
from petalite.model.quantfolder import (
    QuantizedBlock,
    QuantizedBlocks,
    cached_blocks,
    keep,
    read_kept,
    write_folder,
)
from petalite.model.reading import one_ahead

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED = ("rotary_emb.inv_freq",)  # old conversions stored what the config says anyway

BLOCKS: Mapping[str, type[Block]] = {"llama": LlamaBlock, "mixtral": MixtralBlock, "bloom": BloomBlock}

Progress = Callable[[int, int], None]  # (done, total)
Stored = QuantizedBlock | dict[str, Tensor]


def block_kind(checkpoint: Checkpoint) -> type[Block]:
    """The class of the checkpoint's blocks."""
    return BLOCKS[checkpoint.family.block]


def load_blocks(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quant: str | None,
    cache: Path | None,
    progress: Progress | None,
) -> tuple[list[Block], linear.LinearKernel, str]:
    """The blocks, the kernel that runs their linears, and the format these are in; `load_span` tells the
    rest.
    """
    _check_range(checkpoint, start, end)
    if dtype not in COMPUTE_DTYPES:
        raise InvalidArgument(
            f"cannot compute in {dtype}; choose one of {', '.join(map(str, COMPUTE_DTYPES))}"
        )
    quant = _format(checkpoint, quant)
    kernel = linear.pick(device, dtype, quant)
    make = _Maker(checkpoint, dtype, device, quant, kernel, cache)
    indices, blocks = range(start, end), []
    for index, stored in zip(indices, one_ahead(make.read, indices), strict=True):
        blocks.append(make.block(index, stored))
        del stored
        if progress is not None:
            progress(index + 1 - start, end - start)
    checkpoint.check_unchanged()
    return blocks, kernel, quant


def quantize_folder(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    quant: str,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Write a folder with the blocks [start, end) quantized; servers load it without the checkpoint."""
    _check_range(checkpoint, start, end)
    if quant not in FORMATS or checkpoint.quantized is not None:
        raise InvalidArgument(f"cannot make {quant!r} of {checkpoint.folder}; {_choices(checkpoint)}")
    kind = block_kind(checkpoint)

    def make(index: int) -> QuantizedBlock:
        parts = _read_parts(checkpoint, kind, index)
        _check_finite(checkpoint, index, parts)
        return _quantize(checkpoint, kind, quant, index, parts)

    write_folder(checkpoint, kind, quant, (start, end), folder, make, progress)


def _check_range(checkpoint: Checkpoint, start: int, end: int) -> None:
    n_blocks, held = checkpoint.config.n_blocks, checkpoint.quantized
    if not 0 <= start < end <= n_blocks:
        raise InvalidArgument(
            f"blocks {start}:{end} are outside the model; {checkpoint.name} has blocks 0:{n_blocks}"
        )
    if held is not None and not held.start <= start < end <= held.end:
        raise InvalidArgument(
            f"{checkpoint.folder} holds the quantized blocks {held.start}:{held.end}, not {start}:{end}"
        )


def _format(checkpoint: Checkpoint, quant: str | None) -> str:
    held = checkpoint.quantized
    if quant is None:
        quant = NONE if held is None else held.quant
    if quant not in linear.KERNELS or (held is not None and quant != held.quant):
        raise InvalidArgument(f"cannot load {checkpoint.folder} as {quant!r}; {_choices(checkpoint)}")
    return quant


def _choices(checkpoint: Checkpoint) -> str:
    if checkpoint.quantized is not None:
        return f"it is quantized to {checkpoint.quantized.quant} already"
    return f"choose {', '.join(linear.KERNELS)}"


class _Maker:
    """Blocks of a checkpoint in two parts: what is read, on any thread, and what is computed of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        quant: str,
        kernel: linear.LinearKernel,
        cache: Path | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._place = (dtype, device, kernel)
        self._quant = quant
        self._kind = block_kind(checkpoint)
        self._kept: QuantizedBlocks | None = None  # where blocks are kept that were quantized before
        self._finished: QuantizedBlocks | None = None  # where there is nothing else
        if checkpoint.quantized is not None:
            self._finished = QuantizedBlocks(checkpoint.folder, self._kind, checkpoint.config, quant)
        elif quant != NONE and cache is not None:
            self._kept = cached_blocks(checkpoint, self._kind, quant, cache)

    def read(self, index: int) -> Stored:
        """A block as it is quantized already, or its parts. Raises InvalidCheckpoint."""
        if self._finished is not None:
            return self._finished.read(index)
        kept = None if self._kept is None else read_kept(self._kept, index)
        return _read_parts(self._checkpoint, self._kind, index) if kept is None else kept

    def block(self, index: int, stored: Stored) -> Block:
        """The block of what was read, which is used up. Raises InvalidCheckpoint."""
        if isinstance(stored, QuantizedBlock):
            stored = self._checked(index, stored)
        if isinstance(stored, dict):
            _check_finite(self._checkpoint, index, stored)
            if self._quant == NONE:
                return _dense_block(self._checkpoint, index, stored, *self._place)
            stored = _quantize(self._checkpoint, self._kind, self._quant, index, stored)
            if self._kept is not None:
                keep(self._kept, index, stored)
        return _quantized_block(self._checkpoint, index, stored, *self._place)

    def _checked(self, index: int, block: QuantizedBlock) -> Stored:
        """The block if its numbers are sound; else, where it was only kept, the parts it was made of."""
        try:
            block.check()
        except InvalidCheckpoint as error:
            if self._kept is None:
                raise
            logger.warning("quantizing block %d again: %s", index, error)
            return _read_parts(self._checkpoint, self._kind, index)
        return block


def _dense_block(
    checkpoint: Checkpoint,
    index: int,
    parts: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    kernel: linear.LinearKernel,
) -> Block:
    kind, config = block_kind(checkpoint), checkpoint.config
    mapped = {tensor.data_ptr() for tensor in parts.values()}

    def own(tensor: Tensor) -> Tensor:
        # What stayed mapped would change with its file, or be cut off, which kills the process.
        tensor = tensor.to(device, dtype)
        return tensor.clone() if tensor.data_ptr() in mapped else tensor

    vectors = {part: own(vector) for part, vector in _vectors(checkpoint, kind, index, parts).items()}
    linears = {}
    for name, roles in kind.stacks(config).items():
        weight, bias = stacked(kind, config, index, parts, name)
        # All kernels but this one make something of their own of the weight.
        weight = own(weight) if kernel.make is linear.DenseLinear else weight.to(device, dtype)
        linears[name] = kernel.make(weight, None if bias is None else own(bias))
        for role in roles:
            del parts[f"{role}.weight"]
    return kind(config, index, vectors, linears)


def _quantized_block(
    checkpoint: Checkpoint,
    index: int,
    block: QuantizedBlock,
    dtype: torch.dtype,
    device: torch.device,
    kernel: linear.LinearKernel,
) -> Block:
    linears = {}
    for name, (weight, bias) in block.linears.items():
        # Codes are packed into something of the kernel's own; what it may keep as it is must not stay mapped.
        fields = weight.tensors().items()
        moved = type(weight)(**{field: part.to(device, copy=part.ndim == 1) for field, part in fields})
        linears[name] = kernel.make(moved, None if bias is None else bias.to(device, dtype, copy=True))
    vectors = {part: vector.to(device, dtype, copy=True) for part, vector in block.vectors.items()}
    return block_kind(checkpoint)(checkpoint.config, index, vectors, linears)


def _quantize(
    checkpoint: Checkpoint, kind: type[Block], quant: str, index: int, parts: Mapping[str, Tensor]
) -> QuantizedBlock:
    """A block of a checkpoint, each linear stacked and quantized by itself."""
    config = checkpoint.config
    linears = {}
    for name in kind.stacks(config):
        weight, bias = stacked(kind, config, index, parts, name)
        linears[name] = (FORMATS[quant].quantize(weight), bias)
    return QuantizedBlock(_vectors(checkpoint, kind, index, parts), linears)


def _vectors(
    checkpoint: Checkpoint, kind: type[Block], index: int, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    config = checkpoint.config
    return {
        part: kind.reordered(config, index, part.rpartition(".")[0], parts[part])
        for part in vector_shapes(kind, config)
    }


def _read_parts(checkpoint: Checkpoint, kind: type[Block], index: int) -> dict[str, Tensor]:
    """A block's tensors by part, mapped, as they are stored, and at hand; no other name may stand under its
    prefix.
    """
    prefix = _prefix(checkpoint, index)
    shapes = kind.tensor_shapes(checkpoint.config)
    stored = {part: _stored_name(checkpoint, index, part) for part in shapes}
    unknown = [
        name for name in set(checkpoint.names(prefix)) - set(stored.values()) if not name.endswith(_IGNORED)
    ]
    if unknown:
        raise InvalidCheckpoint(
            f"{checkpoint.folder}: block {index} has a tensor {min(unknown)!r} unknown to config.json"
        )
    mapped = checkpoint.read({stored[part]: shape for part, shape in shapes.items()})
    checkpoint.warm(mapped)
    return {part: mapped[name] for part, name in stored.items()}


def _check_finite(checkpoint: Checkpoint, index: int, parts: Mapping[str, Tensor]) -> None:
    for part, tensor in parts.items():
        if not is_finite(tensor):
            name = _stored_name(checkpoint, index, part)
            raise InvalidCheckpoint(f"{checkpoint.folder}: block {index} has NaN or Inf in {name!r}")


def _prefix(checkpoint: Checkpoint, index: int) -> str:
    return checkpoint.outer + checkpoint.family.names.block_prefix.format(block=index)


def _stored_name(checkpoint: Checkpoint, index: int, part: str) -> str:
    role, _, what = part.rpartition(".")
    return f"{_prefix(checkpoint, index)}{checkpoint.family.names.of(role)}.{what}"
