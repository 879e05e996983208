"""Disks that fill, folders that change under a server: a sentence or a fallback, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from petalite.errors import InvalidArgument, InvalidCheckpoint
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint, FolderFiles
from petalite.model.hashing import write_manifest
from petalite.model.loading import quantize_folder
from petalite.model.manifest import Manifest
from petalite.model.span import BlockSpan, load_span
from petalite.model.tensorstore import TensorStore
from petalite.server import loaded
from petalite.server.loaded import ComputeSettings
from petalite.server.memory import MemorySettings
from petalite.server.node import Node
from petalite.server.server import ServerSettings
from petalite.server.throughput import BlockSpeed, measured_once
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.disk import room_for


@pytest.fixture(autouse=True)
def _equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "measure", lambda span: BlockSpeed(0.001, 0.001))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


def outputs(span: BlockSpan) -> torch.Tensor:
    cache = span.new_cache()
    row = cache.open_row(4, span.start, span.end)
    states = torch.linspace(-1, 1, 64).repeat(3, 1)
    stepped = span.forward(states, [Segment(row, 0, 3)], cache, start=span.start, end=span.end)
    # The other way through the blocks, which training takes and machines without the native kernels.
    with torch.no_grad():
        return torch.cat([stepped, span.forward_stateless(states.unsqueeze(0))[0]])


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


# -- a disk that fills ---------------------------------------------------------------------------------------


def test_quantized_blocks_are_served_where_they_cannot_be_kept(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = outputs(load_span(Checkpoint.open(folder), 0, 2, quant="int8"))
    with room_for(10_000):
        span = load_span(Checkpoint.open(folder), 0, 2, quant="int8", cache=cache)
    assert torch.equal(outputs(span), expected)
    assert not files_in(cache)
    load_span(Checkpoint.open(folder), 0, 2, quant="int8", cache=cache)
    assert len(files_in(cache)) == 2


def test_a_speed_is_used_where_it_cannot_be_kept(tmp_path: Path) -> None:
    speed = BlockSpeed(0.5, 0.25)
    with room_for(10):
        assert measured_once(tmp_path / "speed", "a", lambda: speed) == speed
    assert not files_in(tmp_path)


def test_folders_that_do_not_fit_are_taken_back(folder: Path, tmp_path: Path) -> None:
    before = files_in(folder)
    with room_for(10_000), pytest.raises(InvalidArgument, match="File too large"):
        quantize_folder(Checkpoint.open(folder), 0, 2, "int8", tmp_path / "out")
    with room_for(100), pytest.raises(InvalidArgument, match="File too large"):
        write_manifest(Checkpoint.open(folder))
    assert not (tmp_path / "out").exists()
    assert files_in(folder) == before


def test_a_model_to_be_fetched_that_no_file_can_hold(folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(Checkpoint.open(folder))
    kept = tmp_path / "kept"
    kept.mkdir()
    with room_for(100_000), pytest.raises(InvalidCheckpoint, match="cannot write"):
        TensorStore(kept, "tiny", manifest, lambda store, names: None)


@pytest.mark.parametrize(
    ("shape", "says"), [((1 << 63,), "cannot be stored"), ((1 << 43,), "16 TiB"), ((1 << 60,), "16 TiB")]
)
def test_a_model_that_no_disk_can_hold(tmp_path: Path, shape: tuple[int, ...], says: str) -> None:
    manifest = Manifest({"a": ("F32", shape, "0" * 64), "b": ("F32", shape, "0" * 64)})
    with pytest.raises(InvalidCheckpoint, match=says):
        TensorStore(tmp_path, "tiny", manifest, lambda store, names: None)


async def test_a_server_without_room_on_its_disk_serves(folder: Path, tmp_path: Path) -> None:
    compute = ComputeSettings(quant="int8", threads=1, cache=tmp_path / "cache")
    settings = ServerSettings(Span(0, 3), compute=compute, memory=MemorySettings(cache_tokens=64))
    async with Node(listen=["/ip4/127.0.0.1/tcp/0"]) as node:
        with room_for(10):
            server = await node.serve(str(folder), settings)
        assert server.loaded.backend.free_tokens() == 64
    assert not files_in(tmp_path / "cache")


# -- a folder that changes -----------------------------------------------------------------------------------


def overwrite(folder: Path, tmp_path: Path, **config: str) -> None:
    """In place, as a careless copy does: the same files, other bytes."""
    other = tiny_llama(tmp_path / "other", seed=1, **config)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("quant", [None, "int8", "nf4"])
@pytest.mark.parametrize("how", ["overwritten", "truncated"])
def test_loaded_blocks_do_not_change_with_their_files(
    folder: Path, tmp_path: Path, family: str, quant: str | None, how: str
) -> None:
    """Nor does a read of what was cut off kill the process."""
    path = tiny_llama(folder, model_type=family) / "model.safetensors"
    span = load_span(Checkpoint.open(folder), 0, 3, dtype=torch.float32, quant=quant)
    expected = outputs(span)
    if how == "overwritten":
        overwrite(folder, tmp_path, model_type=family)
    else:
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(outputs(span), expected)


def test_other_blocks_of_a_changed_folder_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    """They would be another model's, served under this one's name."""
    checkpoint = Checkpoint.open(folder)
    load_span(checkpoint, 0, 1)
    overwrite(folder, tmp_path)
    with pytest.raises(InvalidCheckpoint, match="has changed since"):
        load_span(checkpoint, 1, 2)
    load_span(Checkpoint.open(folder), 1, 2)


def test_a_file_that_changes_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    """Replaced whole, and so that the index of the old one would fit it."""
    checkpoint = Checkpoint.open(folder)
    other = tiny_llama(tmp_path / "other", seed=1)
    shutil.move(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="has changed since"):
        load_span(checkpoint, 0, 1)


def test_a_file_that_changes_while_it_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidCheckpoint, match="has changed since"):
        load_span(checkpoint, 0, 1, progress=lambda done, total: overwrite(folder, tmp_path))


def test_a_file_that_comes_later_is_read(folder: Path, tmp_path: Path) -> None:
    tokenizer = shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    files = FolderFiles(folder)
    assert files.find("tokenizer.json") is None
    shutil.move(tokenizer, folder / "tokenizer.json")
    assert files.find("tokenizer.json") is not None


async def test_a_server_whose_folder_changed_stays_with_what_it_has(folder: Path, tmp_path: Path) -> None:
    """A move finds the change before anything is unloaded."""
    settings = ServerSettings(Span(0, 2), memory=MemorySettings(cache_tokens=64))
    async with Node(listen=["/ip4/127.0.0.1/tcp/0"]) as node:
        server = await node.serve(str(folder), settings)
        expected = outputs(server.loaded.backend.span)
        overwrite(folder, tmp_path)
        with pytest.raises(InvalidCheckpoint, match="has changed since"):
            await server.prepare(Span(1, 3))
        assert torch.equal(outputs(server.loaded.backend.span), expected)
        assert server.loaded.backend.free_tokens() == 64
