"""LoRA beside the merged weights: W + scale · B · A in a checkpoint of its own computes the same, stacked,
reordered, quantized or not; and files that are broken, hostile or another model's are refused by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalite.errors import InvalidAdapter, WrongModel
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.model.lora import Adapter, names_of, read_adapter, read_peft, write_adapter
from petalite.model.span import load_span
from tests.helpers.checkpoints import tiny_llama
from tests.helpers.lora import ALPHA, MODEL, RANK, adapter_of, factors, linear_roles, peft_folder

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "bloom": {"model_type": "bloom"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny"), **FAMILIES[request.param]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("tiny")))


def merged(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    """The checkpoint with the change added to its weights, by the family's names."""
    folder.mkdir()
    names, weights = checkpoint.family.names, load_file(checkpoint.folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".lora_A"):
            block, role = int(name.split(".")[1]), ".".join(name.split(".")[2:-1])
            a, b = (tensors[side] for side in names_of(block, role))
            weights[f"{names.block_prefix.format(block=block)}{names.of(role)}.weight"] += (
                ALPHA / RANK * b @ a
            )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint.folder / "config.json").read_text())
    return Checkpoint.open(folder)


def test_an_adapter_computes_what_merged_weights_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = factors(checkpoint, linear_roles(checkpoint))
    expected = load_span(merged(checkpoint, tensors, tmp_path / "merged"), 0, 3)
    span, adapter = load_span(checkpoint, 0, 3), adapter_of(checkpoint, tensors)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    wanted = expected.forward_stateless(hidden)
    assert not torch.allclose(span.forward_stateless(hidden), wanted, atol=1e-2)
    torch.testing.assert_close(span.forward_stateless(hidden, adapter=adapter), wanted, rtol=0, atol=1e-4)
    cache = span.new_cache()
    row = cache.open_row(9)
    stepped = span.forward(hidden[1], [Segment(row, 0, 9)], cache, adapted=span.adapted_blocks(adapter))
    torch.testing.assert_close(stepped, wanted[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("roles", [("query", "value"), ("key",), ("up",), ("gate", "down")])
def test_some_targets_of_some_blocks_are_enough(
    llama: Checkpoint, roles: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = factors(llama, roles, range(1, 2))
    expected = load_span(merged(llama, tensors, tmp_path / "merged"), 1, 3)
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    actual = load_span(llama, 1, 3).forward_stateless(hidden, adapter=adapter_of(llama, tensors))
    torch.testing.assert_close(actual, expected.forward_stateless(hidden), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_an_adapter_goes_beside_quantized_weights(llama: Checkpoint, quant: str) -> None:
    span, adapter = load_span(llama, 0, 1, quant=quant), adapter_of(llama, factors(llama, ("query", "down")))
    linears = span._blocks[0].linears
    for name, (a, b) in span.factors(0, adapter).items():
        adapted = span.adapted_blocks(adapter)[0].linears[name]
        x = torch.randn(4, a.shape[1], generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(adapted(x), linears[name](x) + x @ a.t() @ b.t(), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            adapted.dense()[:, : a.shape[1]],
            linears[name].dense()[:, : a.shape[1]] + b @ a,
            rtol=0,
            atol=1e-5,
        )


def test_the_same_factors_have_the_same_digest(llama: Checkpoint) -> None:
    tensors = factors(llama, ("query", "value"))
    one = write_adapter(tensors, model=MODEL, alpha=ALPHA)
    assert one == write_adapter(dict(reversed(tensors.items())), model=MODEL, alpha=ALPHA)
    adapter = adapter_of(llama, tensors)
    assert set(adapter.names(0, 3)) == set(tensors)
    assert adapter.names(1, 2) == sorted(name for name in tensors if name.startswith("blocks.1."))


# -- files that are refused ------------------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replace(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


A, B = names_of(0, "query")
WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a target that is not there": (rename(A, "blocks.0.router.lora_A"), "router"),
    "a vector as target": (rename(A, "blocks.0.attention_norm.lora_A"), "attention_norm"),
    "a block that is not there": (rename(A, "blocks.3.query.lora_A"), "below 3"),
    "a number that is none": (rename(A, "blocks.-1.query.lora_A"), "-1"),
    "a number in another spelling": (rename(A, "blocks.00.query.lora_A"), "00"),
    "a tensor of its own": (rename(A, "embedding"), "embedding"),
    "half a pair": (lambda tensors: tensors.pop(B), "shapes"),
    "two ranks": (replace(B, torch.zeros(64, RANK + 1)), "shapes"),
    "no rank": (lambda tensors: tensors.update({A: torch.zeros(0, 64), B: torch.zeros(64, 0)}), "shapes"),
    "too high a rank": (
        lambda tensors: tensors.update({A: torch.zeros(1025, 64), B: torch.zeros(64, 1025)}),
        "1024",
    ),
    "another model's width": (replace(A, torch.zeros(RANK, 65)), "65"),
    "three axes": (replace(A, torch.zeros(1, RANK, 64)), "shapes"),
    "NaN": (replace(A, torch.full((RANK, 64), torch.nan)), "NaN"),
    "nothing": (lambda tensors: tensors.clear(), "no tensors"),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_adapter_is_refused(
    llama: Checkpoint, change: Callable[[dict[str, torch.Tensor]], Any], says: str
) -> None:
    tensors = factors(llama, ("query",))
    change(tensors)
    with pytest.raises(InvalidAdapter, match=says):
        adapter_of(llama, tensors)


def test_broken_files_are_refused(llama: Checkpoint) -> None:
    blob = write_adapter(factors(llama, ("query",)), model=MODEL, alpha=ALPHA)
    kind = block_kind(llama)
    nested = b'{"a":' * 100_000
    broken = {
        "empty": b"",
        "cut": blob[:-1],
        "more": blob + b"x",
        "a long header": struct.pack("<Q", 1 << 40) + blob[8:],
        "no header": struct.pack("<Q", 0) + blob[8:],
        "another dtype": blob.replace(b'"F32"', b'"I32"'),
        "deeply nested": struct.pack("<Q", len(nested)) + nested,
    }
    for what, data in broken.items():
        with pytest.raises(InvalidAdapter):
            pytest.fail(what) if read_adapter(data, MODEL, llama.config, kind) else None
    with pytest.raises(WrongModel, match="other"):
        read_adapter(blob, "other@1", llama.config, kind)
    for alpha in ("nan", "inf", "0", "x", ""):
        header = json.dumps({"__metadata__": {"model": MODEL, "alpha": alpha}}).encode()
        with pytest.raises(InvalidAdapter, match="alpha"):
            read_adapter(struct.pack("<Q", len(header)) + header, MODEL, llama.config, kind)


# -- PEFT ------------------------------------------------------------------------------------------------


def open_peft(checkpoint: Checkpoint, folder: Path) -> Adapter:
    return read_peft(folder, checkpoint.config, block_kind(checkpoint), checkpoint.family.names)


def test_a_peft_folder_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = factors(checkpoint, linear_roles(checkpoint))
    adapter = open_peft(checkpoint, peft_folder(checkpoint, tensors, tmp_path / "peft"))
    assert set(adapter.tensors) == set(tensors)
    assert all(torch.equal(adapter.tensors[name], tensors[name]) for name in tensors)
    assert set(adapter.scales.values()) == {ALPHA / RANK}
    rooted = open_peft(checkpoint, peft_folder(checkpoint, tensors, tmp_path / "root", use_rslora=True))
    assert set(rooted.scales.values()) == {ALPHA / RANK**0.5}
    assert rooted.digest != adapter.digest


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 3}},
        {"lora_alpha": "many"},
        {"lora_alpha": True},
        {"lora_alpha": 10**400},
    ],
    ids=str,
)
def test_what_is_more_than_a_lora_is_refused(
    llama: Checkpoint, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = peft_folder(llama, factors(llama, ("query",)), tmp_path / "peft", **settings)
    with pytest.raises(InvalidAdapter, match=next(iter(settings))):
        open_peft(llama, folder)


def test_a_peft_folder_that_says_a_thing_twice_is_refused(llama: Checkpoint, tmp_path: Path) -> None:
    folder = peft_folder(llama, factors(llama, ("query",)), tmp_path / "peft")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace(".weight", ".default.weight")] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="two tensors"):
        read_peft(folder, llama.config, block_kind(llama), llama.family.names)


def test_a_peft_folder_of_another_model_is_refused(llama: Checkpoint, tmp_path: Path) -> None:
    for number, name in enumerate(
        (
            "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight",
        )
    ):
        folder = tmp_path / str(number)
        peft_folder(llama, factors(llama, ("query",)), folder)
        save_file({name: torch.zeros(RANK, 64)}, folder / "adapter_model.safetensors")
        with pytest.raises(InvalidAdapter):
            open_peft(llama, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(InvalidAdapter):
        open_peft(llama, folder)
    with pytest.raises(InvalidAdapter, match="adapter_config"):
        open_peft(llama, tmp_path / "nowhere")
