"""Rope against the textbook, pairs turned by position times frequency; its types against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from petalite.kernels.rope import (
    ROPES,
    DefaultRope,
    LinearRope,
    Llama3Rope,
    RotationTable,
    YarnRope,
    interleave_rows,
    rotate_,
    rotations,
)

CPU = torch.device("cpu")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
CASES = [
    (DefaultRope(1e4), {"rope_type": "default"}),
    (LinearRope(1e4, 4.0), {"rope_type": "linear", "factor": 4.0}),
    (Llama3Rope(1e4, 8.0, 1.0, 4.0, 512), {"rope_type": "llama3", **LLAMA3}),
    (YarnRope(1e4, 4.0, 512, 0.1 * math.log(4.0) + 1, 32.0, 1.0, True), {"rope_type": "yarn", **YARN}),
    (
        YarnRope(1e4, 4.0, 512, 1.5, 16.0, 2.0, False),
        {
            "rope_type": "yarn",
            **YARN,
            "attention_factor": 1.5,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        },
    ),
]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("rope", "parameters"), CASES, ids=lambda case: type(case).__name__)
def test_frequencies_equal_those_of_transformers(rope, parameters, head_dim) -> None:
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 1e4, **parameters},
    )
    reference = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(rope.inverse_frequencies(head_dim), reference.inv_freq, rtol=3e-7, atol=0)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling)


def test_every_type_has_a_case() -> None:
    assert {type(rope) for rope, _ in CASES} == set(ROPES.values())


def test_rotation_is_the_half_split_formula_on_interleaved_rows() -> None:
    """x·cos + rotate_half(x)·sin (RoFormer as Llama checkpoints spell it), after both sides are reordered."""
    head_dim, heads, start, end = 8, 5, 3, 9
    rope = LinearRope(100.0, 2.0)
    x = torch.randn(end - start, heads, head_dim)
    angles = torch.outer(torch.arange(start, end).float(), rope.inverse_frequencies(head_dim)).repeat(1, 2)
    half = torch.cat((-x[..., head_dim // 2 :], x[..., : head_dim // 2]), dim=-1)
    expected = x * angles.cos().unsqueeze(1) + half * angles.sin().unsqueeze(1)
    expected[:, 3:] = x[:, 3:]  # only the first three heads are turned

    def reordered(tensor: torch.Tensor) -> torch.Tensor:
        return interleave_rows(tensor.permute(1, 2, 0).reshape(heads * head_dim, -1), head_dim)

    turned = rotate_(
        reordered(x).view(heads, head_dim, -1).permute(2, 0, 1).contiguous(),
        3,
        rotations(rope, head_dim, start, end, CPU),
    )
    torch.testing.assert_close(turned, reordered(expected).view(heads, head_dim, -1).permute(2, 0, 1))


def test_bfloat16_is_turned_in_float32() -> None:
    x = torch.randn(4, 3, 16).bfloat16()
    rotation = rotations(DefaultRope(1e4), 16, 1000, 1004, CPU)
    exact = rotate_(x.float(), 3, rotation)
    assert torch.equal(rotate_(x.clone(), 3, rotation), exact.bfloat16())


@pytest.mark.parametrize("spans", [[(0, 3), (1020, 1030), (5, 9)], [(5000, 5001), (0, 2)]])
def test_a_table_grows_and_keeps_what_it_had(spans) -> None:
    table = RotationTable(DefaultRope(1e4), 16, CPU)
    for start, end in spans:
        assert torch.equal(table.rows(start, end), rotations(DefaultRope(1e4), 16, start, end, CPU))
