"""Model families as data: what tells one `model_type` from Llama, and what its tensors are called.

A family is a row of `FAMILIES`. One Llama-shaped block serves them all by the flags its row sets; a family
that is not in the table is refused by name. Knows names and config keys; reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Where a family keeps its tensors. In `block`, a name stands for `.weight` and, where there is one,
    `.bias`.
    """

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"  # absent where the embedding serves as the head
    embedding_norm: str | None = None  # a LayerNorm after the embedding
    outer: str = ""  # what some checkpoints put before every name but the head's
    block_prefix: str = "model.layers.{block}."
    block: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention_norm": "input_layernorm",
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "query_norm": "self_attn.q_norm",
            "key_norm": "self_attn.k_norm",
            "output": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    )

    def of(self, role: str) -> str:
        """The name of a part's role within its block; the role of an expert's part is `experts.N.ROLE`."""
        if role.startswith("experts."):
            _, expert, part = role.split(".")
            return self.block[f"experts.{part}"].format(expert=expert)
        return self.block[role]


@dataclass(frozen=True, slots=True)
class Flags:
    """What a family's block has beyond Llama's plainest. A string names the config key that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False  # RMSNorm over each query and key head, before rope
    rope_off: bool = False  # `no_rope_layers` turns rope off in some blocks
    alibi: bool = False  # positions by ALiBi, not rope
    window: str | None = None  # the WINDOWS row that reads the sliding window


@dataclass(frozen=True, slots=True)
class Family:
    """One model type. `defaults` are what the family's own library assumes for keys that config.json leaves
    out.
    """

    flags: Flags
    defaults: Mapping[str, object] = field(default_factory=dict)
    names: TensorNames = field(default_factory=TensorNames)
    block: str = "llama"  # the class of its blocks, by name
    aliases: Mapping[str, str] = field(default_factory=dict)  # keys by the names other families have for them


def _everywhere(config: Mapping[str, object], block: int) -> bool:
    return True


def _from_max_window_layers(config: Mapping[str, object], block: int) -> bool:
    first = config.get("max_window_layers")
    return _listed_as_sliding(config, block, otherwise=isinstance(first, int) and block >= first)


def _without_rope(config: Mapping[str, object], block: int) -> bool:
    return _listed_as_sliding(config, block, otherwise=not block_has_rope(config, block))


def _listed_as_sliding(config: Mapping[str, object], block: int, *, otherwise: bool) -> bool:
    """What `layer_types` says of a block where `use_sliding_window` is on; `otherwise` where there is no
    list.
    """
    if not config.get("use_sliding_window"):
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and block < len(kinds):
        return bool(kinds[block] == "sliding_attention")
    return otherwise


# Which blocks a config's `sliding_window` holds for.
WINDOWS = {
    "everywhere": _everywhere,
    "from max_window_layers": _from_max_window_layers,
    "blocks without rope": _without_rope,
}


def block_has_rope(config: Mapping[str, object], block: int) -> bool:
    """SmolLM3's rule: a 1 in `no_rope_layers` means rope; without the list every n-th block goes without."""
    listed = config.get("no_rope_layers")
    if isinstance(listed, list) and block < len(listed):
        return bool(listed[block])
    interval = config.get("no_rope_layer_interval")
    return not (isinstance(interval, int) and interval > 0 and (block + 1) % interval == 0)


FAMILIES: dict[str, Family] = {
    # Llama 1 to 3.3, SmolLM 1 and 2, and everything saved in their shape.
    "llama": Family(Flags(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias")),
    "mistral": Family(
        Flags(window="everywhere"),
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(
        Flags(qkv_bias=True, window="from max_window_layers"),
        {"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        Flags(
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norm=True,
            window="from max_window_layers",
        ),
        {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "smollm3": Family(
        Flags(
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            rope_off=True,
            window="blocks without rope",
        ),
        {
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
    "mixtral": Family(
        Flags(window="everywhere"),
        {
            "num_key_value_heads": 8,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,
        },
        TensorNames(
            block={
                **{role: name for role, name in TensorNames().block.items() if not name.startswith("mlp.")},
                "router": "block_sparse_moe.gate",
                "experts.gate": "block_sparse_moe.experts.{expert}.w1",
                "experts.up": "block_sparse_moe.experts.{expert}.w3",
                "experts.down": "block_sparse_moe.experts.{expert}.w2",
            }
        ),
        block="mixtral",
    ),
    "bloom": Family(
        Flags(qkv_bias=True, output_bias=True, mlp_bias=True, alibi=True),
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        TensorNames(
            embedding="word_embeddings.weight",
            norm="ln_f.weight",
            embedding_norm="word_embeddings_layernorm.weight",
            outer="transformer.",
            block_prefix="h.{block}.",
            block={
                "attention_norm": "input_layernorm",
                "qkv": "self_attention.query_key_value",
                "output": "self_attention.dense",
                "mlp_norm": "post_attention_layernorm",
                "up": "mlp.dense_h_to_4h",
                "down": "mlp.dense_4h_to_h",
            },
        ),
        block="bloom",
        aliases={
            "n_embed": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "layer_norm_epsilon": "rms_norm_eps",
            "seq_length": "max_position_embeddings",
        },
    ),
}
