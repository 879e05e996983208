"""The Llama-shaped block: attention and a gated MLP, each after an RMSNorm and added to what came in.

One class for every family of the table; its flags are the config's. Query, key and value are one product,
gate and up another, and the rows of query and key are reordered for `rotate_`. Knows tensors; where keys
and values are kept is the step's business.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from petalite.kernels.gated import gated
from petalite.kernels.linear import Linear
from petalite.kernels.native.span import BlockWeights, NormWeights
from petalite.kernels.norm import RmsNorm
from petalite.kernels.rope import interleave_rows, rotate_
from petalite.model.block import AttentionStep, Block, Shape
from petalite.model.config import ModelConfig

_ROTATED = ("query", "key", "query_norm", "key_norm")


class LlamaBlock(Block):
    """Linears: `qkv`, `output`, `gate_up`, `down`."""

    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None:
        attention = config.attention
        self.index = index
        self._n_heads, self._n_kv_heads = attention.n_heads, attention.n_kv_heads
        self._head_dim = attention.head_dim
        self._eps = config.norm_eps
        self._window = config.windows[index]
        self._has_rope = config.rope_blocks[index]
        self._vectors = vectors
        self._attention_norm = RmsNorm(vectors["attention_norm.weight"], config.norm_eps)
        self._mlp_norm = RmsNorm(vectors["mlp_norm.weight"], config.norm_eps)
        self._head_norm = self._fused_head_norm(vectors) if attention.qk_norm else None
        self._take(linears)

    def _take(self, linears: Mapping[str, Linear]) -> None:
        self.linears = linears
        self._qkv, self._output = linears["qkv"], linears["output"]
        self._take_mlp(linears)

    def _take_mlp(self, linears: Mapping[str, Linear]) -> None:
        self._gate_up, self._down = linears["gate_up"], linears["down"]

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """(T, E) → (T, E)."""
        heads = self._qkv(self._attention_norm(hidden)).view(hidden.shape[0], -1, self._head_dim)
        n_positioned = self._n_heads + self._n_kv_heads
        if self._head_norm is not None:
            normed = rms_norm(heads[:, :n_positioned], (self._head_dim,), None, self._eps)
            heads = torch.cat((normed * self._head_norm, heads[:, n_positioned:]), dim=1)
        if self._has_rope:
            heads = rotate_(heads, n_positioned, step.rotation)
        hidden = hidden + self._output(step.attend(self.index, heads, self._n_heads, self._window))
        return hidden + self._mlp(self._mlp_norm(hidden))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(gated(gate, up))

    def native(self) -> BlockWeights | None:
        return BlockWeights(
            *(self._qkv, self._output, self._gate_up, self._down),
            NormWeights(self._vectors["attention_norm.weight"]),
            NormWeights(self._vectors["mlp_norm.weight"]),
            self._head_norm,
            self._window,
            self._has_rope,
        )

    @property
    def nbytes(self) -> int:
        norms = self._attention_norm.nbytes + self._mlp_norm.nbytes
        return norms + sum(linear.nbytes for linear in self.linears.values())

    def _fused_head_norm(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """(H + K, D): the weights of both head norms, in the order of the rows they scale."""
        query = vectors["query_norm.weight"].expand(self._n_heads, -1)
        key = vectors["key_norm.weight"].expand(self._n_kv_heads, -1)
        return torch.cat((query, key))

    # -- its parts ---------------------------------------------------------------------------------

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
        hidden, inner = config.hidden_size, config.inner_size
        linears = {
            "gate": (inner, hidden, config.mlp_bias),
            "up": (inner, hidden, config.mlp_bias),
            "down": (hidden, inner, config.mlp_bias),
        }
        return attention_shapes(config) | _with_bias(linears)

    @staticmethod
    def stacks(config: ModelConfig) -> dict[str, tuple[str, ...]]:
        return {
            "qkv": ("query", "key", "value"),
            "output": ("output",),
            "gate_up": ("gate", "up"),
            "down": ("down",),
        }

    @staticmethod
    def reordered(config: ModelConfig, index: int, role: str, rows: Tensor) -> Tensor:
        if role in _ROTATED and config.rope_blocks[index]:
            return interleave_rows(rows, config.attention.head_dim)
        return rows


def attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Everything of a block but its MLP."""
    attention, hidden = config.attention, config.hidden_size
    queries, keys = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    shapes: dict[str, Shape] = {"attention_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
    if attention.qk_norm:
        shapes |= {"query_norm.weight": (attention.head_dim,), "key_norm.weight": (attention.head_dim,)}
    linears = {
        "query": (queries, hidden, attention.qkv_bias),
        "key": (keys, hidden, attention.qkv_bias),
        "value": (keys, hidden, attention.qkv_bias),
        "output": (hidden, queries, attention.output_bias),
    }
    return shapes | _with_bias(linears)


def _with_bias(linears: Mapping[str, tuple[int, int, bool]]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for role, (n_out, n_in, has_bias) in linears.items():
        shapes[f"{role}.weight"] = (n_out, n_in)
        if has_bias:
            shapes[f"{role}.bias"] = (n_out,)
    return shapes


tensor_shapes = LlamaBlock.tensor_shapes
