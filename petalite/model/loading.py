"""Making blocks from a checkpoint: their tensors and no others, a few rows at a time, quantized on the way.

A thread reads pieces of tensors ahead (`reading.py`). Rows that native kernels take as they are go straight
into panels; other linears are gathered and quantized one by one, a few rows at a time. So peak memory is the
finished blocks and one linear. Knows files and blocks; runs none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.kernels import linear
from petalite.kernels.native import library
from petalite.kernels.native.linears import NativeLinear
from petalite.kernels.native.packing import DenseRows, PackedWeight, quantize_packed
from petalite.kernels.quantized import FORMATS, NONE
from petalite.model.block import Block
from petalite.model.bloom import BloomBlock
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import FEW_BYTES
from petalite.model.llama import LlamaBlock
from petalite.model.mixtral import MixtralBlock
from petalite.model.parts import Gathered, Parts, Rows
from petalite.model.quantfolder import (
    KeptBlock,
    Linears,
    QuantizedBlock,
    QuantizedBlocks,
    Weight,
    cached_blocks,
    find_kept,
    keep,
    write_folder,
)
from petalite.model.reading import AHEAD, Stream, Wanted
from petalite.model.system import give_back, take_pages, trim

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

BLOCKS: Mapping[str, type[Block]] = {"llama": LlamaBlock, "mixtral": MixtralBlock, "bloom": BloomBlock}

_FEW_AHEAD = 1  # pieces, where reading takes far less than what is made of them
_PAGERS = 2  # threads that take memory

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
    quant = chosen_format(checkpoint, quant)
    kernel = linear.pick(device, dtype, quant)
    blocks = []
    pages = ThreadPoolExecutor(_PAGERS, "petalite-pages")
    make = _Maker(checkpoint, dtype, device, quant, kernel, cache, pages)
    try:
        ahead = AHEAD if quant == NONE else _FEW_AHEAD
        with Stream(make.wanted(range(start, end)), ahead) as stream:
            for index in range(start, end):
                blocks.append(make.block(index, stream))
                if progress is not None:
                    progress(index + 1 - start, end - start)
    finally:
        pages.shutdown(cancel_futures=True)  # after an error nobody wants them
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
    parts = Parts(checkpoint, kind, _gathered)

    def make(index: int) -> QuantizedBlock:
        with Stream(parts.wanted(index)) as stream:
            vectors, weights = parts.read(index, stream)
            quantize = FORMATS[quant].quantize
            return QuantizedBlock(vectors, {name: (quantize(weight), bias) for name, weight, bias in weights})

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


def chosen_format(checkpoint: Checkpoint, quant: str | None) -> str:
    """What its blocks are loaded in when `quant` is asked for; None asks for what it holds. Raises
    InvalidArgument for a format that there is not, or that it cannot be loaded in.
    """
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


def _gathered(n_out: int, n_in: int) -> Gathered:
    return Gathered((n_out, n_in))


class _Packed:
    """A dense weight's rows in panels, whose last work is done while the next weight is read."""

    def __init__(self, rows: DenseRows, later: Executor) -> None:
        self._rows, self._later = rows, later
        self.put = rows.put

    @property
    def weight(self) -> Future[PackedWeight]:
        """Once all rows were put."""
        return self._later.submit(lambda: self._rows.weight)


class _Maker:
    """Blocks of a checkpoint: what is read for them, on any thread, and what is made of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        quant: str,
        kernel: linear.LinearKernel,
        cache: Path | None,
        pages: Executor,
    ) -> None:
        """`pages`: takes memory from the system while something else is waited for."""
        self._pages = pages
        self._config = checkpoint.config
        self._dtype, self._device, self._kernel = dtype, device, kernel
        self._quant = quant
        self._kind = block_kind(checkpoint)
        self._native = library() if kernel.make is NativeLinear else None
        to_stay = quant == NONE and self._native is not None  # rows go where they are used
        self._parts: Parts[Tensor | Future[PackedWeight]] = Parts(
            checkpoint, self._kind, self._room, as_stored=to_stay
        )
        self._kept: QuantizedBlocks | None = None  # where blocks are kept that were quantized before
        self._finished: QuantizedBlocks | None = None  # where there is nothing else
        if checkpoint.quantized is not None:
            self._finished = QuantizedBlocks(checkpoint.folder, self._kind, checkpoint.config, quant)
        elif quant != NONE and cache is not None:
            self._kept = cached_blocks(checkpoint, self._kind, quant, cache, self._native)

    def wanted(self, indices: Iterable[int]) -> Iterator[Wanted]:
        """The tensors of each block. Raises InvalidCheckpoint."""
        for index in indices:
            kept = None
            if self._finished is not None:
                kept = self._finished.find(index)
            elif self._kept is not None:
                kept = find_kept(self._kept, index)
            for each in self._parts.wanted(index) if kept is None else kept.wanted():
                if each.into is not None:
                    self._early(each.into)
                yield each

    def block(self, index: int, stream: Stream) -> Block:
        """The block of the tensors that come next. Raises InvalidCheckpoint."""
        kept = stream.peek().owner
        if not isinstance(kept, KeptBlock):
            return self._of_parts(index, stream)
        try:
            return self._built(index, *kept.read(stream))
        except InvalidCheckpoint as error:
            if self._finished is not None:
                raise
            logger.warning("quantizing block %d again: %s", index, error)
        stream.skip(kept)
        with Stream(self._parts.wanted(index)) as again:
            return self._of_parts(index, again)

    def _of_parts(self, index: int, stream: Stream) -> Block:
        vectors, weights = self._parts.read(index, stream)
        if self._quant == NONE:
            read = list(weights)  # all, before one is waited for
            packed = ((n, w.result() if isinstance(w, Future) else w, bias) for n, w, bias in read)
            return self._built(index, vectors, packed)
        made: dict[str, tuple[Weight, Tensor | None]] = {}  # and kept until the block is written
        block = self._built(index, vectors, self._quantized(weights, made))
        if self._kept is not None:
            keep(self._kept, index, QuantizedBlock(vectors, made))
        return block

    def _quantized(
        self,
        weights: Iterable[tuple[str, Tensor | Future[PackedWeight], Tensor | None]],
        made: dict[str, tuple[Weight, Tensor | None]],
    ) -> Linears:
        for name, dense, bias in weights:
            assert isinstance(dense, Tensor)
            trim()  # of what the next one takes anew, some comes in other sizes
            form = FORMATS[self._quant]
            weight: Weight
            if self._native is None:
                weight = form.quantize(dense)
            else:
                weight = quantize_packed(self._native, form, dense, give_back)
            del dense
            if self._kept is not None:
                made[name] = weight, bias
            yield name, weight, bias

    def _room(self, n_out: int, n_in: int) -> Rows[Tensor | Future[PackedWeight]]:
        if self._quant != NONE:
            return Gathered((n_out, n_in))
        if self._native is not None:
            rows = DenseRows(self._native, self._dtype, (n_out, n_in), give_back)
            self._early(rows.memory)
            return _Packed(rows, self._pages)
        return Gathered((n_out, n_in), self._dtype, self._device)

    def _early(self, memory: Tensor) -> None:
        """It will be written soon. What the system does for new memory takes as long as reading does."""
        if memory.nbytes > FEW_BYTES:
            self._pages.submit(take_pages, memory)

    def _built(
        self,
        index: int,
        vectors: Mapping[str, Tensor],
        weights: Iterable[tuple[str, Tensor | Weight, Tensor | None]],
    ) -> Block:
        linears = {}
        for name, weight, bias in weights:
            if not isinstance(weight, Tensor | PackedWeight):
                moved = {field: part.to(self._device) for field, part in weight.tensors().items()}
                weight = type(weight)(**moved)
            bias = None if bias is None else bias.to(self._device, self._dtype)
            linears[name] = self._kernel.make(weight, bias)
            del weight  # before there is room for the next
        moved = {part: vector.to(self._device, self._dtype) for part, vector in vectors.items()}
        return self._kind(self._config, index, moved, linears)
