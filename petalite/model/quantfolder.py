"""Quantized blocks on disk, a safetensors file for each: a cache beside a checkpoint, or a folder to serve
from.

A file holds `vector.PART` and, for each linear, `linear.NAME.FIELD` with the fields of its format and
`bias`; all is as the block computes with it, so that loading is reading. A folder made by `write_folder`
also has the checkpoint's config.json and a quantized.json that says what it was made from: {"version": 1,
"quant", "name", "model_version", "blocks": [start, end]}. Servers of it and of the checkpoint itself have
one model id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint, PetaliteError
from petalite.kernels.quantized import FORMATS, QuantizedWeight
from petalite.model.block import Block, linear_shapes, vector_shapes
from petalite.model.checkpoint import Checkpoint, QuantizedFrom
from petalite.model.compute import is_finite
from petalite.model.config import ModelConfig
from petalite.model.reading import read_through
from petalite.model.tensorfile import DTYPES, mapped_tensors, read_header, write_tensors

logger = logging.getLogger(__name__)

_FORMAT = 3  # of the files; a change of what quantizing gives counts it up
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """A block's weights, ready for its kernels."""

    vectors: Mapping[str, Tensor]
    linears: Mapping[str, tuple[QuantizedWeight, Tensor | None]]
    source: str = "what was quantized"  # the file

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a file."""
        tensors = {f"vector.{part}": tensor for part, tensor in self.vectors.items()}
        for name, (weight, bias) in self.linears.items():
            tensors |= {f"linear.{name}.{field}": tensor for field, tensor in weight.tensors().items()}
            if bias is not None:
                tensors[f"linear.{name}.bias"] = bias
        return tensors

    def check(self) -> None:
        """Look at every number that is not a code. Raises InvalidCheckpoint."""
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise InvalidCheckpoint(f"{self.source} has NaN or Inf in {name!r}; quantize again")
        for name, (weight, _) in self.linears.items():
            columns = weight.tensors().get("fine_columns", torch.empty(0))
            if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < weight.shape[1]:
                raise InvalidCheckpoint(
                    f"{self.source}: linear {name!r} names columns beyond {weight.shape[1]}; quantize again"
                )


class QuantizedBlocks:
    """The files of a folder. Files appear whole or not at all."""

    def __init__(self, folder: Path, kind: type[Block], config: ModelConfig, quant: str) -> None:
        self._folder = folder
        self._kind = kind
        self._config = config
        self._format = FORMATS[quant]

    def path(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"

    def read(self, index: int) -> QuantizedBlock:
        """Mapped from its file and at hand. Raises InvalidCheckpoint for what is not as the config makes it;
        the numbers are `QuantizedBlock.check`'s.
        """
        path = self.path(index)
        header = read_header(path)
        tensors: dict[str, Tensor] = {}
        expected = self._expected()
        if header.keys() != expected.keys():
            odd = min(header.keys() ^ expected.keys())
            raise InvalidCheckpoint(f"{path} and config.json disagree about tensor {odd!r}; quantize again")
        for name, (dtypes, shape) in expected.items():
            info = header[name]
            if DTYPES.get(info.dtype) not in dtypes or info.shape != shape:
                raise InvalidCheckpoint(
                    f"{path}: tensor {name!r} is {info.dtype}{list(info.shape)}, expected "
                    f"{'/'.join(map(str, dtypes))}{list(shape)}; quantize again"
                )
        tensors.update(mapped_tensors(path, sorted(header, key=lambda name: header[name].start)))
        read_through(path, [(0, max(info.end for info in header.values()))])
        vectors = {part: tensors[f"vector.{part}"] for part in vector_shapes(self._kind, self._config)}
        linears = {}
        for name, (n_out, n_in, _) in linear_shapes(self._kind, self._config).items():
            stem = f"linear.{name}"
            fields = {field: tensors[f"{stem}.{field}"] for field in self._format.shapes(n_out, n_in)}
            linears[name] = (self._format(**fields), tensors.get(f"{stem}.bias"))
        return QuantizedBlock(vectors, linears, str(path))

    def write(self, index: int, block: QuantizedBlock) -> None:
        """Raises OSError."""
        tensors = block.tensors()
        # Large alignments first, so that every tensor is aligned in memory.
        names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        shapes = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".writing-") as folder:
            unfinished = Path(folder) / "block"
            write_tensors(unfinished, shapes, (tensors[name].cpu() for name in names))
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.path(index))

    def _expected(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
        found: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        for part, shape in vector_shapes(self._kind, self._config).items():
            found[f"vector.{part}"] = (_FLOATS, shape)
        for name, (n_out, n_in, has_bias) in linear_shapes(self._kind, self._config).items():
            for field, (dtype, shape) in self._format.shapes(n_out, n_in).items():
                found[f"linear.{name}.{field}"] = ((dtype,), shape)
            if has_bias:
                found[f"linear.{name}.bias"] = (_FLOATS, (n_out,))
        return found


def cached_blocks(checkpoint: Checkpoint, kind: type[Block], quant: str, folder: Path) -> QuantizedBlocks:
    """Where quantized blocks of a checkpoint are kept under `folder`: by a digest of their source."""
    text = json.dumps([_FORMAT, quant, checkpoint.config.canonical_json(), checkpoint.weights_key()])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return QuantizedBlocks(folder / digest, kind, checkpoint.config, quant)


def read_kept(blocks: QuantizedBlocks, index: int) -> QuantizedBlock | None:
    """The block from its file, not yet checked; None if there is none, or a broken one."""
    if not blocks.path(index).exists():
        return None
    try:
        return blocks.read(index)
    except InvalidCheckpoint as error:
        logger.warning("quantizing block %d again: %s", index, error)
        return None


def keep(blocks: QuantizedBlocks, index: int, block: QuantizedBlock) -> None:
    """Write the block for the next time, if the disk allows."""
    try:
        blocks.write(index, block)
    except OSError as error:
        logger.warning("cannot keep quantized block %d: %s", index, error)


def write_folder(
    checkpoint: Checkpoint,
    kind: type[Block],
    quant: str,
    span: tuple[int, int],
    folder: Path,
    make: Callable[[int], QuantizedBlock],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """A folder that `load_span` takes, with the blocks [start, end) that `make` gives one by one.

    Raises InvalidArgument if the folder is there already or cannot be written; what was begun is removed.
    """
    start, end = span
    config = checkpoint.file("config.json")
    assert config is not None
    about = QuantizedFrom(quant, checkpoint.name, checkpoint.version, start, end)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InvalidArgument(f"cannot make {folder}: {error.strerror or error}; give a new name") from error
    try:
        shutil.copyfile(config, folder / "config.json")
        blocks = QuantizedBlocks(folder, kind, checkpoint.config, quant)
        for index in range(start, end):
            blocks.write(index, make(index))
            if progress is not None:
                progress(index + 1 - start, end - start)
        (folder / QuantizedFrom.FILE).write_text(about.to_json())
    except (OSError, PetaliteError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InvalidArgument(f"cannot write {folder}: {error.strerror or error}") from error
        raise
