"""Tiny random checkpoints, written with safetensors alone: every dimension small, every option of a config
free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


def tiny_llama(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """A checkpoint in `folder`, made if absent, with TINY's config changed by `config`; the folder."""
    settings = (BLOOM if config.get("model_type") == "bloom" else TINY) | config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(random_tensors(settings, seed), folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def random_tensors(settings: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a Llama checkpoint by its usual name, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    if settings["model_type"] == "bloom":
        return bloom_tensors(settings, generator)
    hidden, inner, vocab = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    head_dim = settings.get("head_dim") or hidden // settings["num_attention_heads"]
    queries = settings["num_attention_heads"] * head_dim
    keys = settings["num_key_value_heads"] * head_dim
    family = settings["model_type"]
    qkv_bias = settings["attention_bias"] or family == "qwen2"
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(n_out, generator=generator) * 0.1

    def norm(name: str, size: int = hidden) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)

    tensors["model.embed_tokens.weight"] = torch.randn(vocab, hidden, generator=generator)
    for block in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        for name, n_out, n_in in (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden)):
            linear(f"{prefix}.self_attn.{name}_proj", n_out, n_in, qkv_bias)
        if family == "qwen3":
            norm(f"{prefix}.self_attn.q_norm", head_dim)
            norm(f"{prefix}.self_attn.k_norm", head_dim)
        linear(f"{prefix}.self_attn.o_proj", hidden, queries, settings["attention_bias"])
        if family == "mixtral":
            linear(f"{prefix}.block_sparse_moe.gate", settings["num_local_experts"], hidden, False)
        for expert in range(settings["num_local_experts"] if family == "mixtral" else 0):
            for name, n_out, n_in in (("w1", inner, hidden), ("w3", inner, hidden), ("w2", hidden, inner)):
                linear(f"{prefix}.block_sparse_moe.experts.{expert}.{name}", n_out, n_in, False)
        for name, n_out, n_in in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            if family != "mixtral":
                linear(f"{prefix}.mlp.{name}_proj", n_out, n_in, settings["mlp_bias"])
        norm(f"{prefix}.input_layernorm")
        norm(f"{prefix}.post_attention_layernorm")
    norm("model.norm")
    if not settings["tie_word_embeddings"]:
        linear("lm_head", vocab, hidden, False)
    return tensors


BLOOM: dict[str, Any] = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "n_embed": 64,
    "n_layer": 3,
    "n_head": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def bloom_tensors(settings: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Every tensor of a BLOOM checkpoint, as the hub's are named."""
    hidden, vocab = settings["hidden_size"], settings["vocab_size"]
    tensors = {"word_embeddings.weight": torch.randn(vocab, hidden, generator=generator) / hidden**0.5}

    def linear(name: str, n_out: int, n_in: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
        tensors[f"{name}.bias"] = torch.randn(n_out, generator=generator) * 0.1

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(hidden, generator=generator)

    norm("word_embeddings_layernorm")
    for block in range(settings["num_hidden_layers"]):
        norm(f"h.{block}.input_layernorm")
        linear(f"h.{block}.self_attention.query_key_value", 3 * hidden, hidden)
        linear(f"h.{block}.self_attention.dense", hidden, hidden)
        norm(f"h.{block}.post_attention_layernorm")
        linear(f"h.{block}.mlp.dense_h_to_4h", 4 * hidden, hidden)
        linear(f"h.{block}.mlp.dense_4h_to_h", hidden, 4 * hidden)
    norm("ln_f")
    return tensors


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and two specials behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
