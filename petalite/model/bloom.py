"""BLOOM's block (arXiv 2211.05100): attention with ALiBi and a plain MLP, each after a LayerNorm, biases
everywhere.

Checkpoints keep query, key and value head by head; their rows are reordered at load to all queries, all
keys, all values, as every block has them. Knows tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from petalite.kernels.linear import Linear
from petalite.kernels.native.span import BlockWeights, NormWeights
from petalite.model.block import AttentionStep, Block, Shape
from petalite.model.config import ModelConfig


class BloomBlock(Block):
    """Linears: `qkv`, `output`, `up`, `down`."""

    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None:
        self.index = index
        self._n_heads, self._head_dim = config.attention.n_heads, config.attention.head_dim
        self._eps = config.norm_eps
        self._residual_after_norm = config.residual_after_norm
        self._vectors = vectors
        self._take(linears)

    def _take(self, linears: Mapping[str, Linear]) -> None:
        self.linears = linears
        self._qkv, self._output = linears["qkv"], linears["output"]
        self._up, self._down = linears["up"], linears["down"]

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """(T, E) → (T, E)."""
        normed = self._norm("attention_norm", hidden)
        heads = self._qkv(normed).view(hidden.shape[0], -1, self._head_dim)
        residual = normed if self._residual_after_norm else hidden
        hidden = residual + self._output(step.attend(self.index, heads, self._n_heads, None))

        normed = self._norm("mlp_norm", hidden)
        residual = normed if self._residual_after_norm else hidden
        return residual + self._down(gelu(self._up(normed), approximate="tanh"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._vectors[f"{name}.weight"], self._vectors[f"{name}.bias"]
        return layer_norm(x, x.shape[-1:], weight, bias, self._eps)

    def native(self) -> BlockWeights | None:
        vectors = self._vectors
        return BlockWeights(
            *(self._qkv, self._output, self._up, self._down),
            NormWeights(vectors["attention_norm.weight"], vectors["attention_norm.bias"]),
            NormWeights(vectors["mlp_norm.weight"], vectors["mlp_norm.bias"]),
            head_norm=None,
            window=None,
            rope=False,
        )

    @property
    def nbytes(self) -> int:
        tensors = sum(vector.nbytes for vector in self._vectors.values())
        return tensors + sum(linear.nbytes for linear in self.linears.values())

    # -- its parts ---------------------------------------------------------------------------------

    @staticmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
        hidden, inner = config.hidden_size, config.inner_size
        shapes: dict[str, Shape] = {}
        for norm in ("attention_norm", "mlp_norm"):
            shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (hidden,)
        sizes = {
            "qkv": (3 * hidden, hidden),
            "output": (hidden, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        for role, (n_out, n_in) in sizes.items():
            shapes[f"{role}.weight"], shapes[f"{role}.bias"] = (n_out, n_in), (n_out,)
        return shapes

    @staticmethod
    def stacks(config: ModelConfig) -> dict[str, tuple[str, ...]]:
        return {role: (role,) for role in ("qkv", "output", "up", "down")}

    @staticmethod
    def reordered(config: ModelConfig, index: int, role: str, rows: Tensor) -> Tensor:
        if role != "qkv":
            return rows
        attention = config.attention
        by_head = rows.view(attention.n_heads, 3, attention.head_dim, *rows.shape[1:])
        return by_head.transpose(0, 1).reshape(rows.shape)
