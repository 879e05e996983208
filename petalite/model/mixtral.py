"""Mixtral's block (arXiv 2401.04088): Llama's attention, and for each token a few MLPs of many.

A router weighs all experts, the best few run, and their weights are made to sum to one. Each expert sees the
tokens that chose it as one product. Knows tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from petalite.kernels.gated import gated
from petalite.kernels.linear import Linear
from petalite.model.block import Shape
from petalite.model.config import ModelConfig
from petalite.model.llama import LlamaBlock, attention_shapes


class MixtralBlock(LlamaBlock):
    """Linears: `qkv`, `output`, and `experts.N.gate_up` and `experts.N.down` for every expert N."""

    is_static: ClassVar[bool] = False

    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None:
        assert config.experts is not None
        super().__init__(config, index, vectors, linears)
        self._n_chosen = config.experts.n_chosen
        self._router = vectors["router.weight"].float()

    def _take_mlp(self, linears: Mapping[str, Linear]) -> None:
        count = sum(name.endswith(".down") for name in linears)
        self._experts = [
            (linears[f"experts.{n}.gate_up"], linears[f"experts.{n}.down"]) for n in range(count)
        ]

    def _mlp(self, x: Tensor) -> Tensor:
        weights, chosen = linear(x.float(), self._router).softmax(-1).topk(self._n_chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for number in torch.unique(chosen).tolist():
            gate_up, down = self._experts[number]
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            gate, up = gate_up(x[tokens]).chunk(2, dim=-1)
            share = weights[tokens, place].unsqueeze(1).to(x.dtype)
            result = result.index_add(0, tokens, down(gated(gate, up)) * share)
        return result

    def native(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._router.nbytes

    # -- its parts ---------------------------------------------------------------------------------

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
        assert config.experts is not None
        hidden, inner = config.hidden_size, config.inner_size
        shapes = attention_shapes(config)
        shapes["router.weight"] = (config.experts.n_experts, hidden)
        for n in range(config.experts.n_experts):
            shapes[f"experts.{n}.gate.weight"] = shapes[f"experts.{n}.up.weight"] = (inner, hidden)
            shapes[f"experts.{n}.down.weight"] = (hidden, inner)
        return shapes

    @staticmethod
    def stacks(config: ModelConfig) -> dict[str, tuple[str, ...]]:
        assert config.experts is not None
        found: dict[str, tuple[str, ...]] = {"qkv": ("query", "key", "value"), "output": ("output",)}
        for n in range(config.experts.n_experts):
            found[f"experts.{n}.gate_up"] = (f"experts.{n}.gate", f"experts.{n}.up")
            found[f"experts.{n}.down"] = (f"experts.{n}.down",)
        return found
