"""config.json: both spellings of what changed its name, defaults against transformers' own, and refusals by
name.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig

from petalite.errors import InvalidCheckpoint, UnsupportedModel
from petalite.kernels.rope import DefaultRope, LinearRope, Llama3Rope, YarnRope
from petalite.model.config import ExpertsConfig, ModelConfig
from petalite.model.families import FAMILIES
from tests.helpers.checkpoints import TINY


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(TINY | changes)


YARN = {"rope_type": "yarn", "factor": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    ({}, DefaultRope(1e4)),
    ({"rope_theta": None}, DefaultRope(1e4)),
    ({"rope_theta": 5e5}, DefaultRope(5e5)),
    ({"rope_scaling": None, "rope_theta": 5e5}, DefaultRope(5e5)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, DefaultRope(1e6)),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(1e4, 2.0)),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, LinearRope(1e4, 2.0)),
    ({"rope_scaling": {"type": "llama3", **LLAMA3}}, Llama3Rope(1e4, 8.0, 1.0, 4.0, 2048)),
    (
        {"rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}},
        Llama3Rope(1e4, 8.0, 1.0, 4.0, 64),
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        YarnRope(1e4, 4.0, 2048, 0.1 * math.log(4) + 1, 32.0, 1.0, True),
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 2.0, "mscale_all_dim": 0.5}},
        YarnRope(1e4, 4.0, 2048, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1), 32.0, 1.0, True),
    ),
    (
        # rope_scaling wins over rope_parameters where a file has both
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        LinearRope(1e4, 2.0),
    ),
]


@pytest.mark.parametrize(("changes", "rope"), ROPES)
def test_rope_in_every_spelling(changes: dict[str, Any], rope: Any) -> None:
    assert parse(**changes).attention.rope == rope


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_equal_those_of_transformers(family: str) -> None:
    """A config.json that names its sizes and no more."""
    sizes = {
        "model_type": family,
        "hidden_size": 512,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 260,
    }
    reference = AutoConfig.for_model(**sizes)
    config = ModelConfig.from_dict(sizes)
    assert config.tied_embeddings == reference.tie_word_embeddings
    if family == "bloom":  # no rope, no window, and other names
        assert config.norm_eps == reference.layer_norm_epsilon
        assert config.residual_after_norm == reference.apply_residual_connection_post_layernorm
        return
    assert config.norm_eps == reference.rms_norm_eps
    assert config.attention.rope == DefaultRope(reference.rope_parameters["rope_theta"])
    if family == "mixtral":
        experts = (reference.num_local_experts, reference.num_experts_per_tok)
        assert config.experts == ExpertsConfig(*experts)
    assert config.attention.head_dim == (getattr(reference, "head_dim", None) or 64)
    window = getattr(reference, "sliding_window", None)
    kinds = getattr(reference, "layer_types", None) or ["sliding_attention"] * 8
    assert config.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert config.rope_blocks == tuple(map(bool, getattr(reference, "no_rope_layers", None) or [1] * 8))


def test_key_value_heads_default_to_heads() -> None:
    assert parse(num_key_value_heads=None).attention.n_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "gpt_neox"}, "'gpt_neox'.*llama"),
        ({"model_type": None}, "None"),
        ({"model_type": ["llama"]}, "llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        *(({"quantization_config": {"quant_method": name}}, name) for name in ("gptq", "awq", "fp8")),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_scaling": ["linear"]}, "rope"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"hidden_size": 65}, "multiple of num_attention_heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "no rotation"),
        *(({"rope_scaling": {**YARN, "beta_fast": beta}}, "no rotation") for beta in (1e308, 5e-324)),
        (
            {
                "rope_scaling": {
                    **YARN,
                    "attention_factor": None,
                    "factor": 1e308,
                    "mscale": 1e308,
                    "mscale_all_dim": 1,
                }
            },
            "no rotation",
        ),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low",
        ),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=names):
        parse(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '{"a": NaN', "[" * 100_000, b"\xff\xfe\xff"])
def test_text_that_is_no_config(text: str | bytes) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
        ModelConfig.parse(text)


def test_a_config_of_gigabytes_is_not_parsed() -> None:
    with pytest.raises(InvalidCheckpoint, match="larger"):
        ModelConfig.parse(b" " * (5 << 20))


def test_canonical_text_tells_arithmetic_apart() -> None:
    """What shapes the arithmetic changes it; what does not, or only its spelling, leaves it."""
    same = [parse(), parse(torch_dtype="bfloat16"), parse(eos_token_id=3), parse(attention_bias=None)]
    same.append(parse(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    assert len({config.canonical_json() for config in same}) == 1
    other = [parse(rms_norm_eps=1e-6), parse(rope_theta=2e4), parse(tie_word_embeddings=True)]
    other += [parse(rope_scaling={"type": "linear", "factor": 1.0})]
    assert len({config.canonical_json() for config in [parse(), *other]}) == 5
    json.loads(parse().canonical_json())


def test_bloom_in_its_own_spelling() -> None:
    """As the hub's config.json of BLOOM says it."""
    given = {
        "model_type": "bloom",
        "n_embed": 14336,
        "n_layer": 70,
        "num_attention_heads": 112,
        "vocab_size": 250880,
        "layer_norm_epsilon": 1e-5,
        "seq_length": 2048,
        "apply_residual_connection_post_layernorm": False,
    }
    config = ModelConfig.from_dict(given)
    assert (config.hidden_size, config.n_blocks, config.inner_size) == (14336, 70, 57344)
    assert (config.attention.n_heads, config.attention.head_dim) == (112, 128)
    assert config.tied_embeddings and config.attention.alibi and config.max_position_embeddings == 2048
    assert ModelConfig.from_dict({**given, "num_key_value_heads": 8}) == config


@pytest.mark.parametrize("changes", [{"num_experts_per_tok": 9}, {"num_local_experts": 0}])
def test_mixtral_with_experts_it_has_not(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint, match=next(iter(changes))):
        parse(model_type="mixtral", **changes)


def test_falcon_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"'falcon'.*bloom"):
        parse(model_type="falcon")
