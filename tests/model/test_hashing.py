"""Manifests: digests are those of the tensors' bytes as safetensors reads them, and name the weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalite.errors import InvalidCheckpoint
from petalite.model.checkpoint import Checkpoint
from petalite.model.hashing import manifest_of, write_manifest
from petalite.model.manifest import Manifest
from tests.helpers.checkpoints import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


def test_digests_are_those_of_the_tensors_bytes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    seen: list[tuple[int, int]] = []
    manifest = manifest_of(Checkpoint.open(folder), lambda done, total: seen.append((done, total)))
    assert manifest.tensors == {
        name: ("F32", tuple(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        for name, tensor in tensors.items()
    }
    assert seen[-1] == (len(tensors), len(tensors))


def test_shards_make_no_difference(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    other = tmp_path / "sharded"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    shutil.copy(folder / "tokenizer.json", other)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, other / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert manifest_of(Checkpoint.open(other)).digest == manifest_of(Checkpoint.open(folder)).digest
    weight_map["model.missing"] = "a.safetensors"
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidCheckpoint, match=r"model\.missing"):
        manifest_of(Checkpoint.open(other))


def test_what_was_written_is_the_version_and_is_checked(folder: Path) -> None:
    before = Checkpoint.open(folder).model_id()
    manifest = write_manifest(Checkpoint.open(folder))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.version == manifest.digest
    assert checkpoint.model_id() != before
    assert [path.name for path in folder.glob(".writing-*")] == []
    parsed = Manifest.parse(json.loads((folder / Manifest.FILE).read_text()), source="it")
    assert parsed == manifest
    assert write_manifest(checkpoint) == manifest


def test_another_fine_tune_has_another_id(folder: Path) -> None:
    first = write_manifest(Checkpoint.open(folder)).digest
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.nextafter(tensors["model.norm.weight"], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert write_manifest(Checkpoint.open(folder)).digest != first


def test_a_truncated_file_is_said_to_be(folder: Path) -> None:
    path = folder / "model.safetensors"
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shard_of
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        manifest_of(checkpoint)
