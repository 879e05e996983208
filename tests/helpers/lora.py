"""Random LoRA for tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import block_kind
from petalite.model.lora import Adapter, names_of, read_adapter, write_adapter

MODEL = "tiny@0"
RANK, ALPHA = 3, 6.0
ROLES = {
    "bloom": ("qkv", "output", "up", "down"),
    "mixtral": ("query", "value", "output", "experts.1.gate", "experts.2.down"),
}
LLAMA_ROLES = ("query", "key", "value", "output", "gate", "up", "down")


def linear_roles(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Some roles of its linears, of every stack some."""
    return ROLES.get(checkpoint.config.family, LLAMA_ROLES)


def factors(
    checkpoint: Checkpoint, roles: Sequence[str], blocks: range = range(3), seed: int = 5
) -> dict[str, torch.Tensor]:
    """Random A and B of these roles, by our names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = block_kind(checkpoint).tensor_shapes(checkpoint.config)
    tensors = {}
    for block in blocks:
        for role in roles:
            n_out, n_in = shapes[f"{role}.weight"]
            a, b = names_of(block, role)
            tensors[a] = torch.randn(RANK, n_in, generator=generator) / n_in**0.5
            tensors[b] = torch.randn(n_out, RANK, generator=generator) * 0.2
    return tensors


def blob_of(tensors: dict[str, torch.Tensor], model: str = MODEL) -> bytes:
    return write_adapter(tensors, model=model, alpha=ALPHA)


def adapter_of(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> Adapter:
    return read_adapter(blob_of(tensors), MODEL, checkpoint.config, block_kind(checkpoint))


def peft_folder(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], folder: Path, **settings: Any
) -> Path:
    """As PEFT saves one: the family's names behind `base_model.model.`."""
    folder.mkdir(exist_ok=True)
    names = checkpoint.family.names
    stored = {}
    for name, tensor in tensors.items():
        block, role, side = int(name.split(".")[1]), ".".join(name.split(".")[2:-1]), name.split(".")[-1]
        path = names.outer + names.block_prefix.format(block=block) + names.of(role)
        stored[f"base_model.model.{path}.{side}.weight"] = tensor
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder
