"""A checkpoint: a folder of config.json, safetensors and tokenizer files, or the same on the Hugging Face
hub.

Tensors are found by the index, and from the hub no other bytes than theirs are downloaded. Knows files and
names; what the tensors mean is the blocks' and the edges' business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from petalite.errors import InvalidArgument, InvalidCheckpoint, UnsupportedModel
from petalite.kernels.quantized import FORMATS
from petalite.model.config import ModelConfig
from petalite.model.families import FAMILIES, Family
from petalite.model.hub import HubFiles
from petalite.model.manifest import Manifest
from petalite.model.ranges import Range
from petalite.model.tensorfile import DTYPES, TensorInfo, header_end, mapped_tensors, read_header

_LENGTH = (0, 8)  # the bytes that say how long a safetensors header is
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_INDEX_LIMIT_BYTES = 64 << 20
_DIGEST_LETTERS = 32  # 128 bits of the SHA-256
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


class Files(Protocol):
    """Where a checkpoint's files come from."""

    name: str
    folder: Path
    version: str | None  # of all files together, where the source knows one

    def find(self, name: str) -> Path | None:
        """The file, fetched if need be; None if the checkpoint has none of that name."""
        ...

    def part(self, name: str, ranges: Sequence[Range]) -> Path | None:
        """The same, but only these bytes of it need be there."""
        ...

    def here(self, name: str, start: int, end: int) -> Path | None:
        """The file if its bytes [start, end) are here; nothing is fetched for that."""
        ...


class FolderFiles:
    """A checkpoint in a folder of this machine. A file that changes once it was looked at is refused: blocks
    of two checkpoints would be served as one.
    """

    version: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self._looks = {path.name: _look(path) for path in folder.glob("*.safetensors") if path.is_file()}

    def find(self, name: str) -> Path | None:
        path = self.folder / name
        try:
            if not path.is_file():
                return None
        except OSError as error:
            raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
        look = _look(path)
        if self._looks.setdefault(name, look) != look:
            raise InvalidCheckpoint(
                f"{path} has changed since it was opened; put models in folders that nobody writes to, and "
                f"start again"
            )
        return path

    def part(self, name: str, ranges: Sequence[Range]) -> Path | None:
        return self.find(name)

    def here(self, name: str, start: int, end: int) -> Path | None:
        return self.find(name)


def _look(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True)
class QuantizedFrom:
    """What quantized.json says: the folder holds blocks [start, end) of a checkpoint in another format."""

    quant: str
    name: str  # of the checkpoint
    version: str | None  # of its weights
    start: int
    end: int

    FILE: ClassVar[str] = "quantized.json"
    VERSION: ClassVar[int] = 2  # of it and of the formats

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, source: str) -> QuantizedFrom:
        """Raises InvalidCheckpoint."""
        match value:
            case {
                "version": cls.VERSION,
                "quant": str(quant),
                "name": str(name),
                "model_version": str() | None as version,
                "blocks": [int(start), int(end)],
            } if quant in FORMATS and 0 <= start < end:
                return cls(quant, name, version, start, end)
        raise InvalidCheckpoint(
            f"{source} is not of version {cls.VERSION} or names no format of {', '.join(FORMATS)}; "
            f"quantize again"
        )

    def to_json(self) -> str:
        """The text of quantized.json."""
        blocks = [self.start, self.end]
        about = {"quant": self.quant, "name": self.name, "model_version": self.version, "blocks": blocks}
        return json.dumps({"version": self.VERSION} | about, indent=1)


class Checkpoint:
    """An opened checkpoint. Reading config.json is all that opening does."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.config = self._read_config()
        self._headers: dict[str, dict[str, TensorInfo]] = {}  # by shard
        self.bytes_read = 0  # of tensors asked for

    @classmethod
    def open(cls, path_or_repo: str | Path, *, revision: str | None = None) -> Checkpoint:
        """A folder if there is one of that name, else a repository `owner/name` of the hub, at `revision`.

        Raises InvalidCheckpoint where there is neither or its config.json is broken, UnsupportedModel where
        petalite cannot run the model that it describes.
        """
        try:
            folder = Path(path_or_repo).expanduser()
            is_folder, exists = folder.is_dir(), folder.exists()
        except (OSError, RuntimeError) as error:  # too long a name, a stranger's or nobody's home
            raise InvalidCheckpoint(f"cannot look for {str(path_or_repo)[:200]!r}: {error}") from error
        if is_folder:
            return cls(FolderFiles(folder))
        if exists:
            raise InvalidCheckpoint(
                f"{folder} is a file; a checkpoint is a folder (import a GGUF file with "
                f"`python -m petalite.node import-gguf FILE FOLDER`)"
            )
        if isinstance(path_or_repo, str) and _REPO_ID.fullmatch(path_or_repo):
            return cls(HubFiles(path_or_repo, revision))
        raise InvalidCheckpoint(
            f"there is no folder {str(path_or_repo)!r}; expected one with config.json and "
            f"model.safetensors, or a repository of the Hugging Face hub as owner/name"
        )

    @property
    def name(self) -> str:
        """The folder's or the repository's; of a quantized folder, that of what it was made from."""
        return self.quantized.name if self.quantized else self._files.name

    @property
    def folder(self) -> Path:
        """Where its files are; those of a hub repository appear there as they are asked for."""
        return self._files.folder

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.family]

    def model_id(self, name: str | None = None) -> str:
        """`name@digest`: equal only for checkpoints that compute the same, as far as can be known without
        reading them.

        The digest is over the config fields that shape the arithmetic and the version of the weights: the
        folder's manifest, else the hub's commit, else nothing; then two fine-tunes of one model must be
        given different names.
        """
        name = self.name if name is None else name
        if not _NAME.fullmatch(name) or len(name) > 96:
            raise InvalidArgument(
                f"{name!r} cannot name a model: use letters, digits, '.', '_' and '-', as NAME or "
                f"OWNER/NAME; give one with --name"
            )
        text = f"petalite-model-1\n{self.config.canonical_json()}\n{self.version or ''}"
        return f"{name}@{hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LETTERS]}"

    @property
    def version(self) -> str | None:
        """Of the weights: the manifest's digest, else the hub's commit, else unknown."""
        if self.quantized is not None:
            return self.quantized.version
        return self.manifest.digest if self.manifest else self._files.version

    def weights_key(self) -> list[Any]:
        """What changes when the weights do, found without reading them: the version, else every weight file's
        name, size and time of change.
        """
        if self.version is not None:
            return [self.version]
        files = [(name, self.file(name)) for name in sorted(set(self.shard_of.values()))]
        stats = [(name, path.stat()) for name, path in files if path is not None]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    @cached_property
    def quantized(self) -> QuantizedFrom | None:
        """Of a folder that `quantize` wrote: what is in it; None for a checkpoint proper."""
        found = self.read_json(QuantizedFrom.FILE) if isinstance(self._files, FolderFiles) else None
        if found is None:
            return None
        return QuantizedFrom.parse(found, source=str(self.folder / QuantizedFrom.FILE))

    def file(self, name: str) -> Path | None:
        """The path of a file beside the weights, such as tokenizer.json; None if the checkpoint has none."""
        return self._files.find(name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file beside the weights; None if the checkpoint has none."""
        path = self.file(name)
        return None if path is None else _read_object(path)

    @cached_property
    def manifest(self) -> Manifest | None:
        """What its tensors and files are, where somebody wrote that down."""
        path = self.file(Manifest.FILE)
        return None if path is None else Manifest.parse(_read_object(path), source=str(path))

    # -- tensors -----------------------------------------------------------------------------------

    @cached_property
    def shard_of(self) -> Mapping[str, str]:
        """Which file holds each tensor."""
        if self._has(_SINGLE):
            return dict.fromkeys(self._header(_SINGLE), _SINGLE)
        index = self.file(_INDEX)
        if index is None:
            raise InvalidCheckpoint(
                f"{self.folder} holds neither {_SINGLE} nor {_INDEX}; other weight formats are not read"
            )
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidCheckpoint(f"{index} has no weight_map")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise InvalidCheckpoint(
                    f"{index} puts tensor {tensor!r} in {shard!r}, which is no safetensors file"
                )
        return weight_map

    @cached_property
    def outer(self) -> str:
        """What this checkpoint puts before the names of its family: checkpoints saved with their head do."""
        names = self.family.names
        return names.outer if names.outer + names.embedding in self.shard_of else ""

    def names(self, prefix: str = "") -> list[str]:
        """The names of all tensors that begin with `prefix`."""
        return [name for name in self.shard_of if name.startswith(prefix)]

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Path, TensorInfo]]:
        """Where the named tensors lie in files, each checked to have its shape; they are here and will be
        read.

        Raises InvalidCheckpoint for what is missing or of another shape.
        """
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for shard, names in self._by_shard(shapes).items():
            if not self._has(shard):
                raise InvalidCheckpoint(
                    f"{self.folder / shard} is missing; the index says it holds {names[0]!r}"
                )
            header = self._header(shard)
            for name in names:
                self._check(self.folder / shard, name, header.get(name), shapes[name])
            path = self._part(shard, [(header[name].start, header[name].end) for name in names])
            found.update((name, (path, header[name])) for name in names)
            self.bytes_read += sum(header[name].nbytes for name in names)
        return found

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The named tensors, mapped from their files, in the dtype they are stored in. Raises what `places`
        raises.
        """
        by_path: dict[Path, list[str]] = {}
        for name, (path, _) in self.places(shapes).items():
            by_path.setdefault(path, []).append(name)
        return {name: part for path, names in by_path.items() for name, part in mapped_tensors(path, names)}

    def bring(self, prefix: str) -> None:
        """Have the tensors whose names begin with `prefix` on this machine. Raises what `read` raises."""
        for shard, names in self._by_shard(self.names(prefix)).items():
            header = self._header(shard)
            self._part(shard, [(header[name].start, header[name].end) for name in names if name in header])

    def check_unchanged(self) -> None:
        """Raises InvalidCheckpoint if a file that tensors were read from has changed meanwhile."""
        for shard in self._headers:
            self._part(shard, [])

    def stored(self, name: str) -> tuple[Path, TensorInfo] | None:
        """Where a tensor's bytes lie in a file; None where they are not on this machine."""
        shard = self.shard_of.get(name)
        info = None if shard is None else self._header(shard).get(name)
        if shard is None or info is None:
            return None
        path = self._files.here(shard, info.start, info.end)
        return None if path is None else (path, info)

    def _by_shard(self, names: Iterable[str]) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = {}
        for name in names:
            shard = self.shard_of.get(name)
            if shard is None:
                raise InvalidCheckpoint(
                    f"{self.folder} has no tensor {name!r}, which a {self.config.family} model needs"
                )
            shards.setdefault(shard, []).append(name)
        return shards

    def _check(self, path: Path, name: str, info: TensorInfo | None, shape: tuple[int, ...]) -> None:
        if info is None:
            raise InvalidCheckpoint(f"{path} does not hold tensor {name!r}, though the index says so")
        if info.dtype not in DTYPES or not DTYPES[info.dtype].is_floating_point:
            raise UnsupportedModel(
                f"{path}: tensor {name!r} is stored as {info.dtype}; F32, F16 and BF16 are read"
            )
        if info.shape != shape:
            raise InvalidCheckpoint(
                f"{path}: tensor {name!r} has shape {info.shape}; config.json makes it {shape}"
            )
        if self.manifest is not None:
            self.manifest.check(name, info.dtype, info.shape)

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        if shard not in self._headers:
            path = self._part(shard, [_LENGTH])
            self._part(shard, [(0, header_end(path))])
            self._headers[shard] = read_header(path)
        return self._headers[shard]

    def _has(self, shard: str) -> bool:
        return shard in self._headers or self._files.part(shard, []) is not None

    def _part(self, shard: str, ranges: Sequence[Range]) -> Path:
        path = self._files.part(shard, ranges)
        if path is None:
            raise InvalidCheckpoint(f"{self.folder / shard} is missing; it was there just now")
        return path

    def _read_config(self) -> ModelConfig:
        path = self.file("config.json")
        if path is None:
            raise InvalidCheckpoint(f"{self._files.folder} holds no config.json; it is no checkpoint")
        return ModelConfig.from_dict(_read_object(path), source=str(path))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _INDEX_LIMIT_BYTES:
            raise InvalidCheckpoint(f"{path} is larger than {_INDEX_LIMIT_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{path} holds a {type(value).__name__}, expected an object")
    return value
