"""Making a manifest: the SHA-256 of every tensor of a folder and of the files beside them, each read once."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.model.checkpoint import Checkpoint
from petalite.model.manifest import Manifest
from petalite.model.tensorfile import TensorInfo, read_header

_PIECE_BYTES = 4 << 20

Progress = Callable[[int, int], None]  # (tensors done, of so many)


def manifest_of(checkpoint: Checkpoint, progress: Progress | None = None) -> Manifest:
    """What the checkpoint's files hold, whatever a manifest beside them says. Raises InvalidCheckpoint."""
    tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}
    shard_of = checkpoint.shard_of
    for shard in sorted(set(shard_of.values())):
        path = checkpoint.file(shard)
        if path is None:
            raise InvalidCheckpoint(f"{checkpoint.folder / shard} is missing; the index names it")
        for name, info in read_header(path).items():
            if shard_of.get(name) == shard:
                tensors[name] = (info.dtype, info.shape, tensor_digest(path, name, info))
                if progress is not None:
                    progress(len(tensors), len(shard_of))
    missing = shard_of.keys() - tensors.keys()
    if missing:
        raise InvalidCheckpoint(
            f"{checkpoint.folder} does not hold tensor {min(missing)!r}, which its index names"
        )
    return Manifest(tensors, file_digests(checkpoint.file))


def write_manifest(checkpoint: Checkpoint, progress: Progress | None = None) -> Manifest:
    """Into the checkpoint's folder, whole or not at all. From then on its digest is the weights' version, so
    the model id changes. Raises InvalidArgument for a folder that cannot be written.
    """
    manifest = manifest_of(checkpoint, progress)
    folder = checkpoint.folder
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:
            path = Path(unfinished) / Manifest.FILE
            path.write_text(manifest.to_json())
            path.replace(folder / Manifest.FILE)
    except OSError as error:
        raise InvalidArgument(f"cannot write to {folder}: {error.strerror or error}") from error
    return manifest


def file_digests(find: Callable[[str], Path | None]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files beside the weights that a manifest names. Raises InvalidCheckpoint."""
    digests = {}
    for name in Manifest.OTHER_FILES:
        path = find(name)
        if path is None:
            continue
        try:
            if path.stat().st_size > Manifest.MOST_FILE_BYTES:
                raise InvalidCheckpoint(f"{path} is larger than {Manifest.MOST_FILE_BYTES >> 20} MiB")
            data = path.read_bytes()
        except OSError as error:
            raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
        digests[name] = len(data), hashlib.sha256(data).hexdigest()
    return digests


def tensor_digest(path: Path, name: str, info: TensorInfo) -> str:
    """SHA-256 of a tensor's bytes in its file, in hex. Raises InvalidCheckpoint."""
    digest, left = hashlib.sha256(), info.nbytes
    try:
        with path.open("rb") as file:
            file.seek(info.start)
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise InvalidCheckpoint(f"{path} ends {left} bytes before the end of tensor {name!r}")
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise InvalidCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
