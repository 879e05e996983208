"""Making blocks from a checkpoint: their tensors and no others, one block at a time, quantized on the way.

Peak memory is the finished blocks plus one linear: a block's tensors are mapped from their file, and each
linear is stacked, quantized and packed before the next is touched. Knows files and blocks; runs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.kernels import linear
from petalite.kernels.quantized import FORMATS, NONE
from petalite.model.block import Block, stacked, vector_shapes
from petalite.model.bloom import BloomBlock
from petalite.model.checkpoint import Checkpoint
from petalite.model.llama import LlamaBlock
from petalite.model.mixtral import MixtralBlock
from petalite.model.quantfolder import (
    QuantizedBlock,
    QuantizedBlocks,
    cached_blocks,
    read_or_make,
    write_folder,
)

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_IGNORED = ("rotary_emb.inv_freq",)  # old conversions stored what the config says anyway

BLOCKS: Mapping[str, type[Block]] = {"llama": LlamaBlock, "mixtral": MixtralBlock, "bloom": BloomBlock}

Progress = Callable[[int, int], None]  # (done, total)


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
    source = _source(checkpoint, quant, cache)
    blocks = []
    for index in range(start, end):
        if source is None:
            blocks.append(_dense_block(checkpoint, index, dtype, device, kernel))
        else:
            blocks.append(_quantized_block(checkpoint, index, source(index), dtype, device, kernel))
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
    make = partial(_quantize, checkpoint, kind, quant)
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


def _source(checkpoint: Checkpoint, quant: str, cache: Path | None) -> Callable[[int], QuantizedBlock] | None:
    """Where quantized blocks come from; None where none are wanted."""
    if quant == NONE:
        return None
    kind = block_kind(checkpoint)
    if checkpoint.quantized is not None:
        return QuantizedBlocks(checkpoint.folder, kind, checkpoint.config, quant).read
    make = partial(_quantize, checkpoint, kind, quant)
    if cache is None:
        return make
    kept = cached_blocks(checkpoint, kind, quant, cache)
    return lambda index: read_or_make(kept, index, partial(make, index))


def _dense_block(
    checkpoint: Checkpoint,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: linear.LinearKernel,
) -> Block:
    kind, config = block_kind(checkpoint), checkpoint.config
    mapped = _read_parts(checkpoint, kind, index)
    places = {tensor.data_ptr() for tensor in mapped.values()}

    def own(tensor: Tensor) -> Tensor:
        # What stayed mapped would change with its file, or be cut off, which kills the process.
        return tensor.clone() if tensor.data_ptr() in places else tensor

    parts = {part: tensor.to(device, dtype) for part, tensor in mapped.items()}
    vectors = {part: own(vector) for part, vector in _vectors(checkpoint, kind, index, parts).items()}
    linears = {}
    for name, roles in kind.stacks(config).items():
        weight, bias = stacked(kind, config, index, parts, name)
        # All kernels but this one make something of their own of the weight.
        weight = own(weight) if kernel.make is linear.DenseLinear else weight
        linears[name] = kernel.make(weight, None if bias is None else own(bias))
        for role in roles:
            parts.pop(f"{role}.weight")
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
        moved = type(weight)(**{field: part.to(device) for field, part in weight.tensors().items()})
        linears[name] = kernel.make(moved, None if bias is None else bias.to(device, dtype, copy=True))
    vectors = {part: vector.to(device, dtype, copy=True) for part, vector in block.vectors.items()}
    return block_kind(checkpoint)(checkpoint.config, index, vectors, linears)


def _quantize(checkpoint: Checkpoint, kind: type[Block], quant: str, index: int) -> QuantizedBlock:
    """A block of a checkpoint, each linear stacked and quantized by itself."""
    config = checkpoint.config
    parts = _read_parts(checkpoint, kind, index)
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
    """A block's tensors by part, mapped, as they are stored; no other name may stand under its prefix."""
    names = checkpoint.family.names
    prefix = checkpoint.outer + names.block_prefix.format(block=index)
    shapes = kind.tensor_shapes(checkpoint.config)
    stored = {}
    for part in shapes:
        role, _, what = part.rpartition(".")
        stored[part] = f"{prefix}{names.of(role)}.{what}"
    unknown = [
        name for name in set(checkpoint.names(prefix)) - set(stored.values()) if not name.endswith(_IGNORED)
    ]
    if unknown:
        raise InvalidCheckpoint(
            f"{checkpoint.folder}: block {index} has a tensor {min(unknown)!r} unknown to config.json"
        )
    mapped = checkpoint.read({stored[part]: shape for part, shape in shapes.items()})
    parts = {part: mapped[name] for part, name in stored.items()}
    for part, tensor in parts.items():
        # The sum of finite numbers may overflow; only then is every one looked at.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise InvalidCheckpoint(f"{checkpoint.folder}: block {index} has NaN or Inf in {stored[part]!r}")
    return parts
