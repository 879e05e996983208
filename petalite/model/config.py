"""What a checkpoint's config.json says about the arithmetic, read once into plain numbers.

Both spellings of every key that changed its name over the years are understood (RoPE settings, head
counts), every number is checked, and what petalite cannot run is refused by name: a model type without a
row in `FAMILIES`, a rope type without a row in `ROPES`, weights in another quantization. Knows no tensor
and no file but config.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from petalite.errors import InvalidCheckpoint, UnsupportedModel
from petalite.kernels.rope import ROPES, DefaultRope, LinearRope, Llama3Rope, NoRope, YarnRope
from petalite.model.families import FAMILIES, WINDOWS, Family, block_has_rope

_ACTIVATIONS = ("silu", "swish")  # two names of one function
_MAX_BLOCKS = 4096
_MAX_EXPERTS = 1024
_MAX_SIZE = 1 << 24  # of any one dimension
_MAX_POSITIONS = 1 << 30
_CONFIG_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The attention of every block; what differs from block to block is in `ModelConfig`."""

    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key/value heads; divides H
    head_dim: int  # D
    rope: DefaultRope | LinearRope | Llama3Rope | YarnRope | NoRope
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool  # RMSNorm over each query and key head, before rope
    alibi: bool = False  # logits fall with distance, by a slope per head


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """An MLP of several, of which a router takes some for each token."""

    n_experts: int
    n_chosen: int  # per token


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's dimensions and flags."""

    family: str  # a key of FAMILIES
    n_blocks: int  # L
    hidden_size: int  # E
    inner_size: int  # F
    vocab_size: int  # V; rows of the embedding, which may be more than the tokenizer knows
    norm_eps: float
    max_position_embeddings: int  # tokens the model was made for
    tied_embeddings: bool  # the embedding is the head
    mlp_bias: bool
    attention: AttentionConfig
    windows: tuple[int | None, ...]  # per block: how many tokens back it sees, itself included; None: all
    rope_blocks: tuple[bool, ...]  # per block: whether queries and keys are rotated
    experts: ExpertsConfig | None = None  # None: one MLP for all tokens
    residual_after_norm: bool = False  # what a norm gave is added to what its branch gives (BLOOM's option)

    @classmethod
    def parse(cls, text: str | bytes, *, source: str = "config.json") -> ModelConfig:
        """From the text of a config.json. Raises InvalidCheckpoint, or UnsupportedModel with what is not
        supported.
        """
        if len(text) > _CONFIG_LIMIT_BYTES:
            raise InvalidCheckpoint(
                f"{source} is larger than {_CONFIG_LIMIT_BYTES >> 20} MiB; it is no config"
            )
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidCheckpoint(f"{source} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise InvalidCheckpoint(f"{source} holds a {type(config).__name__}, expected an object")
        return cls.from_dict(config, source=source)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
        """From a parsed config.json; raises as `parse` does."""
        family_name = config.get("model_type")
        family = FAMILIES.get(family_name) if isinstance(family_name, str) else None
        if family is None or not isinstance(family_name, str):
            raise UnsupportedModel(
                f"{source}: model_type {family_name!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        _refuse_other_quantization(config, source)
        return _Reader(config, family, source).model(family_name)

    def canonical_json(self) -> str:
        """One text per arithmetic: two checkpoints with equal texts and equal tensors compute the same."""
        rope = {"type": type(self.attention.rope).__name__, **asdict(self.attention.rope)}
        fields = asdict(self)
        fields["attention"]["rope"] = rope
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def _refuse_other_quantization(config: Mapping[str, Any], source: str) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{source}: the weights are quantized ({method!r}); use the checkpoint they were made from"
        )


class _Reader:
    """Typed access to one config.json with its family's defaults underneath."""

    def __init__(self, config: Mapping[str, Any], family: Family, source: str) -> None:
        known = {**config, **{new: config[old] for old, new in family.aliases.items() if old in config}}
        self._values = {**family.defaults, **known}
        self._family = family
        self._source = source

    def model(self, family_name: str) -> ModelConfig:
        n_blocks = self._integer("num_hidden_layers", _MAX_BLOCKS)
        hidden_size = self._integer("hidden_size", _MAX_SIZE)
        flags = self._family.flags
        activation = self._values.get("hidden_act", "silu")
        if not flags.alibi and activation not in _ACTIVATIONS:
            raise UnsupportedModel(f"{self._source}: hidden_act {activation!r} is not supported; silu is")
        return ModelConfig(
            family=family_name,
            n_blocks=n_blocks,
            hidden_size=hidden_size,
            inner_size=4 * hidden_size if flags.alibi else self._integer("intermediate_size", _MAX_SIZE),
            vocab_size=self._integer("vocab_size", _MAX_SIZE),
            norm_eps=self._number("rms_norm_eps", default=1e-6),
            max_position_embeddings=self._integer("max_position_embeddings", _MAX_POSITIONS, default=2048),
            tied_embeddings=self._flag("tie_word_embeddings"),
            mlp_bias=self._flag(flags.mlp_bias),
            attention=self._attention(hidden_size),
            windows=self._windows(n_blocks),
            rope_blocks=tuple(
                not flags.alibi and (not flags.rope_off or block_has_rope(self._values, block))
                for block in range(n_blocks)
            ),
            experts=self._experts() if self._family.block == "mixtral" else None,
            residual_after_norm=self._flag("apply_residual_connection_post_layernorm"),
        )

    def _experts(self) -> ExpertsConfig:
        n_experts = self._integer("num_local_experts", _MAX_EXPERTS)
        return ExpertsConfig(n_experts, self._integer("num_experts_per_tok", n_experts))

    def _attention(self, hidden_size: int) -> AttentionConfig:
        flags = self._family.flags
        n_heads = self._integer("num_attention_heads", _MAX_SIZE)
        n_kv_heads = self._integer("num_key_value_heads", _MAX_SIZE, default=n_heads)
        if flags.alibi:  # BLOOM's library reads no such key
            n_kv_heads = n_heads
        if n_heads % n_kv_heads:
            raise InvalidCheckpoint(
                f"{self._source}: num_attention_heads {n_heads} is not a multiple of "
                f"num_key_value_heads {n_kv_heads}"
            )
        if self._values.get("head_dim") is None and hidden_size % n_heads:
            raise InvalidCheckpoint(
                f"{self._source}: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {n_heads}"
            )
        head_dim = self._integer("head_dim", _MAX_SIZE, default=hidden_size // n_heads)
        if head_dim % 2 and not flags.alibi:
            raise InvalidCheckpoint(f"{self._source}: head_dim {head_dim} is odd; rope turns pairs")
        return AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope=NoRope() if flags.alibi else self._rope_over(head_dim),
            qkv_bias=self._flag(flags.qkv_bias),
            output_bias=self._flag(flags.output_bias),
            qk_norm=flags.qk_norm,
            alibi=flags.alibi,
        )

    def _windows(self, n_blocks: int) -> tuple[int | None, ...]:
        rule = self._family.flags.window
        if rule is None or self._values.get("sliding_window") is None:
            return (None,) * n_blocks
        window = self._integer("sliding_window", _MAX_POSITIONS)
        slides = WINDOWS[rule]
        return tuple(window if slides(self._values, block) else None for block in range(n_blocks))

    # -- rope --------------------------------------------------------------------------------------

    def _rope_over(self, head_dim: int) -> DefaultRope | LinearRope | Llama3Rope | YarnRope:
        """Settings that are numbers each can still come to rotations that are none."""
        rope = self._rope()
        try:
            turns = rope.inverse_frequencies(head_dim)
        except (ValueError, OverflowError):
            turns = None
        if turns is None or not turns.isfinite().all() or not math.isfinite(rope.attention_factor):
            raise InvalidCheckpoint(f"{self._source}: no rotation can be computed with {rope}")
        return rope

    def _rope(self) -> DefaultRope | LinearRope | Llama3Rope | YarnRope:
        """Older configs keep `rope_theta` beside `rope_scaling`; newer ones both in `rope_parameters`."""
        given = self._values.get("rope_scaling") or self._values.get("rope_parameters") or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise UnsupportedModel(f"{self._source}: rope settings per layer type are not supported")
        rope = {key: value for key, value in given.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPES:
            raise UnsupportedModel(
                f"{self._source}: rope type {kind!r} is not supported; supported are {', '.join(ROPES)}"
            )
        partial = rope.get("partial_rotary_factor", self._values.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise UnsupportedModel(f"{self._source}: partial_rotary_factor {partial!r} is not supported")
        reader = _Reader({**self._values, **rope}, self._family, self._source)
        theta = reader._number("rope_theta", default=10_000.0)
        if theta <= 1:
            raise InvalidCheckpoint(f"{self._source}: rope_theta is {theta}, expected a number above 1")
        match kind:
            case "linear":
                return LinearRope(theta, reader._number("factor"))
            case "llama3":
                return reader._llama3(theta)
            case "yarn":
                return reader._yarn(theta)
            case _:
                return DefaultRope(theta)

    def _llama3(self, theta: float) -> Llama3Rope:
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        if low >= high:
            raise InvalidCheckpoint(
                f"{self._source}: rope's low_freq_factor {low} is not below high_freq_factor {high}"
            )
        return Llama3Rope(theta, self._number("factor"), low, high, self._original_positions())

    def _yarn(self, theta: float) -> YarnRope:
        factor = self._number("factor")
        mscale, mscale_all_dim = self._values.get("mscale"), self._values.get("mscale_all_dim")
        if self._values.get("attention_factor") is not None:
            attention_factor = self._number("attention_factor")
        elif mscale and mscale_all_dim:
            attention_factor = _yarn_magnitude(factor, self._number("mscale"))
            attention_factor /= _yarn_magnitude(factor, self._number("mscale_all_dim"))
        else:
            attention_factor = _yarn_magnitude(factor, 1.0)
        truncate = self._values.get("truncate", True)
        return YarnRope(
            theta=theta,
            factor=factor,
            original_max_positions=self._original_positions(),
            attention_factor=attention_factor,
            beta_fast=self._number("beta_fast", default=32.0),
            beta_slow=self._number("beta_slow", default=1.0),
            truncate=bool(truncate),
        )

    def _original_positions(self) -> int:
        whole = self._integer("max_position_embeddings", _MAX_POSITIONS, default=2048)
        return self._integer("original_max_position_embeddings", _MAX_POSITIONS, default=whole)

    # -- typed access ------------------------------------------------------------------------------

    def _integer(self, key: str, limit: int, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise InvalidCheckpoint(
                f"{self._source}: {key} is {value!r}, expected a whole number from 1 to {limit}"
            )
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None:
            value = default
        most = sys.float_info.max  # whole numbers of JSON have no end
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            raise InvalidCheckpoint(f"{self._source}: {key} is {value!r}, expected a number above 0")
        return float(value)

    def _flag(self, key: str | bool) -> bool:
        if isinstance(key, bool):
            return key
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidCheckpoint(f"{self._source}: {key} is {value!r}, expected true or false")
        return bool(value)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
