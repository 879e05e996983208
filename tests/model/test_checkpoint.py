"""Checkpoints: found, refused in one clear sentence, read no further than asked, and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors.torch import load_file, save_file

from petalite.errors import InvalidArgument, InvalidCheckpoint, UnsupportedModel
from petalite.model.checkpoint import Checkpoint
from petalite.model.edges import load_edges
from petalite.model.manifest import Manifest
from petalite.model.span import load_span
from tests.helpers.checkpoints import tiny_llama


def shard(folder: Path) -> dict[str, Any]:
    """Split the folder's one file into two shards, block 1 across both; the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {}
    for name in tensors:
        first = "layers.0." in name or "layers.1.self_attn" in name or "embed" in name
        weight_map[name] = names[0 if first else 1]
    for file in names:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    whole, split = tiny_llama(tmp_path / "whole"), tiny_llama(tmp_path / "split")
    shard(split)
    hidden = torch.randn(1, 5, 64)
    outputs = [
        load_span(Checkpoint.open(folder), 0, 3).forward_stateless(hidden) for folder in (whole, split)
    ]
    assert torch.equal(*outputs)


def test_only_the_shards_that_hold_the_span_are_opened(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    shard(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    load_span(Checkpoint.open(folder), 2, 3)
    with pytest.raises(InvalidCheckpoint, match=r"model-00001-of-00002\.safetensors is missing"):
        load_span(Checkpoint.open(folder), 1, 2)


def test_only_the_named_tensors_are_counted(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    sizes = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.bytes_read == 0
    load_span(checkpoint, 1, 3)
    wanted = sum(n for name, n in sizes.items() if name.startswith(("model.layers.1.", "model.layers.2.")))
    assert checkpoint.bytes_read == wanted
    load_edges(checkpoint)
    assert checkpoint.bytes_read == wanted + sum(n for name, n in sizes.items() if "layers" not in name)


PEAK = """
import pathlib, re, sys, torch
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
def kib(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
folder, tiny, quant = sys.argv[1:]
load_span(Checkpoint.open(tiny), 0, 1, quant=quant)  # what is done once in a process
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
span = load_span(Checkpoint.open(folder), 0, 2, quant=quant)
print(1024 * (kib("VmHWM") - before) - span.nbytes, "model.safetensors" in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_load_takes_little_memory_beyond_its_weights(quant: str, tmp_path: Path) -> None:
    """The most at any time, less what the span holds in the end: buffers and, quantizing, one linear of the
    block and what is made of it. No file is mapped, where one that is cut off would kill the process.
    """
    tiny = tiny_llama(tmp_path / "tiny")
    folder = tiny_llama(
        tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=8
    )
    block_bytes = (folder / "model.safetensors").stat().st_size / 2
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tiny), quant],
        capture_output=True,
        text=True,
        check=True,
    )
    beyond, mapped = run.stdout.split()
    assert int(beyond) < block_bytes * (0.5 if quant == "none" else 1) and mapped == "False"


def test_weights_that_are_cut_off_while_they_are_read(tmp_path: Path, monkeypatch) -> None:
    """After the header was found right: an error, not a signal."""
    checkpoint = Checkpoint.open(tiny_llama(tmp_path))
    path, plain = tmp_path / "model.safetensors", checkpoint.places

    def places(shapes):
        found = plain(shapes)
        os.truncate(path, min(info.end for _, info in found.values()))
        return found

    monkeypatch.setattr(checkpoint, "places", places)
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is truncated"):
        load_span(checkpoint, 0, 1)


# -- what is refused -------------------------------------------------------------------------------------


def broken(folder: Path, what: str) -> None:
    weights = folder / "model.safetensors"
    match what:
        case "no folder":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "config no JSON":
            (folder / "config.json").write_text("{")
        case "other architecture":
            (folder / "config.json").write_text('{"model_type": "gpt2"}')
        case "no weights":
            weights.unlink()
        case "pickled weights":
            weights.rename(folder / "pytorch_model.bin")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "weights of another shape":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
        case "missing tensor":
            tensors = load_file(weights)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, weights)
        case "integer weights":
            tensors = load_file(weights)
            tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
            save_file(tensors, weights)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("no folder", InvalidCheckpoint, "there is no folder .* expected one with config.json"),
        ("no config", InvalidCheckpoint, "holds no config.json"),
        ("config no JSON", InvalidCheckpoint, "config.json is not JSON"),
        ("other architecture", UnsupportedModel, "model_type 'gpt2' is not supported; supported are llama"),
        ("no weights", InvalidCheckpoint, "holds neither model.safetensors nor"),
        ("pickled weights", InvalidCheckpoint, "other weight formats are not read"),
        ("truncated weights", InvalidCheckpoint, "model.safetensors is truncated"),
        (
            "weights of another shape",
            InvalidCheckpoint,
            r"has shape \(96, 64\); config.json makes it \(128, 64\)",
        ),
        ("missing tensor", InvalidCheckpoint, "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        ("integer weights", UnsupportedModel, "stored as I8"),
    ],
)
def test_a_broken_folder_is_one_clear_sentence(what: str, error: type, says: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    broken(folder, what)
    with pytest.raises(error, match=says) as caught:
        load_span(Checkpoint.open(folder), 0, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 32}, r"has shape \(64,\); config.json makes it \(32,\)"),
        ({"intermediate_size": 95}, r"\(96, 64\); config.json makes it \(95, 64\)"),
        ({"num_attention_heads": 2}, r"k_proj.*\(32, 64\); config.json makes it \(64, 64\)"),
        ({"num_key_value_heads": 4}, r"k_proj.*\(32, 64\); config.json makes it \(64, 64\)"),
        ({"head_dim": 8}, r"_proj.* config.json makes it \((16, 64|32, 64|64, 32)\)"),
        ({"attention_bias": True}, "has no tensor 'model.layers.0.self_attn.*bias'"),
        ({"mlp_bias": True}, "has no tensor 'model.layers.0.mlp.*bias'"),
        ({"model_type": "qwen3"}, "has no tensor 'model.layers.0.self_attn.[qk]_norm.weight'"),
        ({"model_type": "mixtral"}, "block 0 has a tensor 'model.layers.0.mlp.* unknown to config.json"),
        ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3"),
        ({"vocab_size": 261}, r"\(260, 64\); config.json makes it \(261, 64\)"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_its_tensors(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidCheckpoint, match=says) as caught:
        load_span(checkpoint, 0, checkpoint.config.n_blocks)
        load_edges(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: [1], "expected an object"),
        (lambda index: {}, "has no weight_map"),
        (lambda index: {"weight_map": {}}, "has no weight_map"),
        (lambda index: {"weight_map": dict.fromkeys(index["weight_map"], 1)}, "in 1"),
        (
            lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../../etc/passwd")},
            "no safetensors file",
        ),
        (
            lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "sub/model.safetensors")},
            "no safetensors file",
        ),
        (
            lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "nosuch.safetensors")},
            r"nosuch\.safetensors is missing; the index says it holds",
        ),
        (
            lambda index: {
                "weight_map": dict.fromkeys(index["weight_map"], "model-00002-of-00002.safetensors")
            },
            "does not hold tensor .* though the index says so",
        ),
    ],
)
def test_a_broken_index_is_one_clear_sentence(change, says: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    write_index(folder, change(shard(folder)))
    with pytest.raises(InvalidCheckpoint, match=says):
        load_span(Checkpoint.open(folder), 0, 3)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidCheckpoint, match="import-gguf"):
        Checkpoint.open(tmp_path / "x.gguf")


# -- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub of one repository, `owner/tiny`, that notes what is asked of it."""
    folder = tiny_llama(tmp_path / "remote")
    shard(folder)
    commit = tmp_path / "cache" / "snapshots" / "0123abcd"
    commit.mkdir(parents=True)
    state: dict[str, Any] = {"asked": [], "error": None, "folder": folder}

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        state["asked"].append((name, revision))
        if state["error"] is not None:
            raise state["error"]
        if not (folder / name).exists():
            raise EntryNotFoundError(f"404: {name}")
        shutil.copy(folder / name, commit / name)
        return str(commit / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)

    def metadata(url: str) -> SimpleNamespace:
        """Nothing of a file but that it is there: then it is fetched whole."""
        name = url.rpartition("/")[2]
        if not (folder / name).exists():
            raise EntryNotFoundError(f"404: {name}")
        return SimpleNamespace(location=url, size=None)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return state


def test_a_repository_is_fetched_file_by_file(hub: dict[str, Any]) -> None:
    """Only the shards that hold the span come, all from the commit that the first file came from."""
    checkpoint = Checkpoint.open("owner/tiny")
    assert checkpoint.name == "owner/tiny"
    span = load_span(checkpoint, 2, 3)
    local = load_span(Checkpoint.open(hub["folder"]), 2, 3)
    hidden = torch.randn(1, 4, 64)
    assert torch.equal(span.forward_stateless(hidden), local.forward_stateless(hidden))
    asked = [name for name, _ in hub["asked"]]
    assert "model-00002-of-00002.safetensors" in asked
    assert "model-00001-of-00002.safetensors" not in asked
    assert hub["asked"][0] == ("config.json", None)
    assert {revision for _, revision in hub["asked"][1:]} == {"0123abcd"}
    assert checkpoint.model_id().startswith("owner/tiny@")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            LocalEntryNotFoundError("no connection\nmore"),
            "cannot reach the hub for config.json of owner/tiny",
        ),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), "HF_HUB_OFFLINE"),
        (EntryNotFoundError("404"), "owner/tiny holds no config.json"),
        (ConnectionError("refused"), "cannot fetch config.json of owner/tiny from the hub: refused"),
    ],
)
def test_a_hub_that_fails_is_one_clear_sentence(hub: dict[str, Any], error: Exception, says: str) -> None:
    hub["error"] = error
    with pytest.raises(InvalidCheckpoint, match=says) as caught:
        Checkpoint.open("owner/tiny")
    assert "\n" not in str(caught.value)


def test_files_that_nobody_asks_for_may_be_gone(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    (folder / "consolidated.safetensors").symlink_to(tmp_path / "nowhere")
    assert load_span(Checkpoint.open(folder), 0, 1).nbytes


def test_an_index_that_names_what_no_file_can_be_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "x" * 300 + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidCheckpoint, match="File name too long"):
        Checkpoint.open(folder).read({"model.embed_tokens.weight": (260, 64)})


@pytest.mark.parametrize("name", ["owner/a--b", "own..er/x", "owner/x.git", "-owner/x"])
def test_a_name_that_no_repository_can_have(name: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"of {name} from the hub"):
        Checkpoint.open(name)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a/b\0c"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"cannot look for|no folder"):
        Checkpoint.open(name)


def test_offline_the_real_client_says_so(tmp_path: Path) -> None:
    """huggingface_hub itself, told to stay offline, with an empty cache."""
    code = (
        "from petalite.model.checkpoint import Checkpoint\n"
        "from petalite.errors import InvalidCheckpoint\n"
        "try: Checkpoint.open('owner/nosuch')\n"
        "except InvalidCheckpoint as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "owner/nosuch" in run.stdout and "folder" in run.stdout


# -- names -----------------------------------------------------------------------------------------------


def test_model_ids_tell_configs_manifests_and_commits_apart(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "tiny")
    other = tiny_llama(tmp_path / "other" / "tiny", rms_norm_eps=1e-6)
    ids = {Checkpoint.open(folder).model_id() for folder in (plain, other)}
    assert len(ids) == 2
    name, _, digest = Checkpoint.open(plain).model_id().partition("@")
    assert name == "tiny" and len(digest) == 32
    assert Checkpoint.open(plain).model_id("lab/mine").startswith("lab/mine@")
    write_manifest(plain)
    with_manifest = Checkpoint.open(plain).model_id()
    assert with_manifest not in ids
    tensors = load_file(plain / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, plain / "model.safetensors")
    write_manifest(plain)
    assert Checkpoint.open(plain).model_id() != with_manifest


@pytest.mark.parametrize("name", ["", "a b", "a@b", "../x/y", "a/b/c", "é" * 97, "x" * 97])
def test_names_that_name_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--name"):
        Checkpoint.open(tiny_llama(tmp_path)).model_id(name)


def write_manifest(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    digests = {
        name: ("F32", tuple(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        for name, tensor in tensors.items()
    }
    (folder / Manifest.FILE).write_text(Manifest(digests).to_json())


def test_a_manifest_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "a")
    write_manifest(folder)
    load_span(Checkpoint.open(folder), 0, 1)
    shutil.copy(folder / Manifest.FILE, tiny_llama(tmp_path / "b", intermediate_size=128) / Manifest.FILE)
    with pytest.raises(InvalidCheckpoint, match="does not describe these weights"):
        load_span(Checkpoint.open(tmp_path / "b"), 0, 1)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"version": 2, "tensors": {}},
        {"version": 1, "tensors": []},
        {"version": 1, "tensors": {"a": {"dtype": "F32", "shape": [1], "sha256": "short"}}},
        {"version": 1, "tensors": {"a": {"dtype": "F32", "shape": ["x"], "sha256": "0" * 64}}},
        {"version": 1, "tensors": {"a": 1}},
    ],
)
def test_what_is_no_manifest(value: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint, match="manifest"):
        Manifest.parse(value, source="manifest.json")
