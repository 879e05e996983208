"""Quantized blocks on disk, a safetensors file for each: a cache beside a checkpoint, or a folder to serve
from.

A file holds `vector.PART` and, for each linear, `linear.NAME.FIELD` with the fields of its format and
`bias`. A folder made by `write_folder` also has the checkpoint's config.json and a quantized.json that says
what it was made from: {"version": 2, "quant", "name", "model_version", "blocks": [start, end]}. Servers of
it and of the checkpoint itself have one model id.

In a cache, weights lie as native kernels have them in memory, where these serve: the file's metadata then
have a `layout` and a `checksum`, and all tensors are read at once to where they stay. Such a file is no use
to other kernels, and is made anew there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint, PetaliteError
from petalite.kernels.native import Library, stored
from petalite.kernels.native.packing import PackedWeight, check_columns, panel_memory
from petalite.kernels.quantized import FORMATS, QuantizedWeight
from petalite.model.block import Block, linear_shapes, vector_shapes
from petalite.model.checkpoint import Checkpoint, QuantizedFrom
from petalite.model.compute import is_finite
from petalite.model.config import ModelConfig
from petalite.model.reading import Stream, Wanted
from petalite.model.system import SECTOR
from petalite.model.tensorfile import DTYPES, TensorInfo, read_file_header, write_tensors

logger = logging.getLogger(__name__)

_FORMAT = 4  # of the files; a change of what quantizing gives counts it up
_WHOLE = "*"  # of a file that is read as one tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Weight = QuantizedWeight | PackedWeight
Linears = Iterator[tuple[str, Weight, Tensor | None]]  # name, weight, bias


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """A block's weights as a file holds them; all of one kind."""

    vectors: Mapping[str, Tensor]
    linears: Mapping[str, tuple[Weight, Tensor | None]]

    def tensors(self) -> dict[str, Tensor]:
        """By the names they have in a file."""
        tensors = {f"vector.{part}": tensor for part, tensor in self.vectors.items()}
        for name, (weight, bias) in self.linears.items():
            tensors |= {f"linear.{name}.{field}": tensor for field, tensor in weight.tensors().items()}
            if bias is not None:
                tensors[f"linear.{name}.bias"] = bias
        return tensors


class QuantizedBlocks:
    """The files of a folder. Files appear whole or not at all."""

    def __init__(
        self, folder: Path, kind: type[Block], config: ModelConfig, quant: str, packed: Library | None = None
    ) -> None:
        """`packed`: these kernels' layout, instead of the format's own that all read."""
        self._folder = folder
        self._kind = kind
        self._config = config
        self._form = FORMATS[quant]
        self._library = packed
        self._layout = "" if packed is None else stored.layout(packed, self._form)

    def path(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"

    def find(self, index: int) -> KeptBlock:
        """A block's file, with a header as it should be. Raises InvalidCheckpoint."""
        path = self.path(index)
        header, metadata = read_file_header(path)
        found = metadata.get("layout", "")
        if found != self._layout:
            raise InvalidCheckpoint(
                f"{path} has the layout {found or 'of no kernel'!r}, expected "
                f"{self._layout or 'of no kernel'!r}; quantize again"
            )
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
        begin = next(iter(header.values())).start
        if self._library is not None and (list(header) != list(expected) or begin % SECTOR):
            raise InvalidCheckpoint(f"the tensors of {path} do not lie as they are read; quantize again")
        shapes = linear_shapes(self._kind, self._config)
        in_order = {name: header[name] for name in expected}
        return KeptBlock(index, path, in_order, self._form, shapes, self._library, metadata.get("checksum"))

    def write(self, index: int, block: QuantizedBlock) -> None:
        """Raises OSError."""
        tensors = block.tensors()
        names = list(self._expected())  # a file is read fastest from its beginning to its end
        shapes = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        metadata = {}
        if self._library is not None:
            sums = (_checksum(self._library, name, tensor) for name, tensor in tensors.items())
            metadata = {"layout": self._layout, "checksum": _hex(sum(sums))}
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".writing-") as folder:
            unfinished = Path(folder) / "block"
            write_tensors(unfinished, shapes, (tensors[name].cpu() for name in names), metadata, SECTOR)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.path(index))

    def _expected(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
        """Names, dtypes and shapes, in the order in which they are read. Panels come first where a file stays
        in memory as it is: so they begin where native kernels need it.
        """
        found: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        for part, shape in vector_shapes(self._kind, self._config).items():
            found[f"vector.{part}"] = (_FLOATS, shape)
        for name, (n_out, n_in, has_bias) in linear_shapes(self._kind, self._config).items():
            for field, (dtype, shape) in self._fields(n_out, n_in).items():
                found[f"linear.{name}.{field}"] = ((dtype,), shape)
            if has_bias:
                found[f"linear.{name}.bias"] = (_FLOATS, (n_out,))
        return dict(sorted(found.items(), key=lambda item: not item[0].endswith(".panels")))

    def _fields(self, n_out: int, n_in: int) -> stored.Shapes:
        if self._library is None:
            return self._form.shapes(n_out, n_in)
        return stored.shapes(self._library, self._form, n_out, n_in)


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """A block in a file."""

    index: int
    path: Path
    infos: Mapping[str, TensorInfo]
    form: type[QuantizedWeight]
    shapes: Mapping[str, tuple[int, int, bool]]  # of linears, as `linear_shapes`
    library: Library | None  # whose layout it has
    checksum: str | None

    def wanted(self) -> Iterator[Wanted]:
        """Its tensors; in a layout of native kernels the whole file as one, read to where it stays."""
        if self.library is None:
            for name, info in self.infos.items():
                yield Wanted(self, name, self.path, info)
        else:
            start, end = self._span()
            whole = TensorInfo("U8", (end - start,), start, end)
            yield Wanted(self, _WHOLE, self.path, whole, panel_memory(self.library, whole.shape))

    def _span(self) -> tuple[int, int]:
        """Where its tensors begin and end in the file."""
        infos = self.infos.values()
        return min(info.start for info in infos), max(info.end for info in infos)

    def read(self, stream: Stream) -> tuple[dict[str, Tensor], Linears]:
        """Its vectors; then, as they are asked for, its linears. Raises InvalidCheckpoint for numbers that
        are not what was written.
        """
        part = stream.tensor if self.library is None else self._parts(self.library, stream).__getitem__
        vectors = {
            name.removeprefix("vector."): self._finite(name, part(name))
            for name in self.infos
            if name.startswith("vector.")
        }
        return vectors, self._linears(part)

    def _parts(self, library: Library, stream: Stream) -> dict[str, Tensor]:
        """Each tensor as a view of the whole, which is what was written. Raises InvalidCheckpoint."""
        whole, parts, found = stream.tensor(_WHOLE), {}, 0
        base, _ = self._span()
        for name, info in self.infos.items():
            dtype, data = DTYPES[info.dtype], whole[info.start - base : info.end - base]
            parts[name] = (data.clone() if info.start % dtype.itemsize else data).view(dtype).view(info.shape)
            found += _checksum(library, name, data)
        if _hex(found) != self.checksum:
            raise InvalidCheckpoint(
                f"{self.path} has the checksum {_hex(found)}, expected {self.checksum}; quantize again"
            )
        return parts

    def _linears(self, part: Callable[[str], Tensor]) -> Linears:
        for name, (n_out, n_in, has_bias) in self.shapes.items():
            stem = f"linear.{name}."
            fields = [full.removeprefix(stem) for full in self.infos if full.startswith(stem)]
            tensors = {field: self._finite(stem + field, part(stem + field)) for field in fields}
            bias = tensors.pop("bias") if has_bias else None
            try:
                weight = self._weight(n_out, n_in, tensors)
            except InvalidArgument as error:
                raise InvalidCheckpoint(f"{self.path}, linear {name!r}: {error}; quantize again") from error
            yield name, weight, bias

    def _weight(self, n_out: int, n_in: int, tensors: dict[str, Tensor]) -> Weight:
        """Raises InvalidArgument."""
        if self.library is not None:
            return stored.packed_weight(self.form, n_out, n_in, tensors)
        columns = tensors["fine_columns"]
        check_columns(columns, len(columns), n_in)
        return self.form(**tensors)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """Raises InvalidCheckpoint."""
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InvalidCheckpoint(f"{self.path} has NaN or Inf in {name!r}; quantize again")
        return tensor


def _checksum(library: Library, name: str, tensor: Tensor) -> int:
    """Every word of a file counts with its tensor's name and its place there."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return stored.checksum(library, tensor, start)


def _hex(total: int) -> str:
    return f"{total % 2**64:016x}"


def cached_blocks(
    checkpoint: Checkpoint, kind: type[Block], quant: str, folder: Path, packed: Library | None
) -> QuantizedBlocks:
    """Where quantized blocks of a checkpoint are kept under `folder`: by a digest of their source."""
    text = json.dumps([_FORMAT, quant, checkpoint.config.canonical_json(), checkpoint.weights_key()])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return QuantizedBlocks(folder / digest, kind, checkpoint.config, quant, packed)


def find_kept(blocks: QuantizedBlocks, index: int) -> KeptBlock | None:
    """The block's file; None if there is none, or a broken one."""
    if not blocks.path(index).exists():
        return None
    try:
        return blocks.find(index)
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
