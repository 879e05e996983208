"""The Llama-shaped block: attention and a gated MLP, each after an RMSNorm and added to what came in.

One class for every family of the table; its flags are the config's. Layout quirks are settled when the
block is made: query, key and value are one product, gate and up another, and the rows of query and key are
reordered for `rotate`. Knows tensors; where keys and values are kept is the step's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from petalite.kernels.linear import Linear
from petalite.kernels.norm import RmsNorm
from petalite.kernels.rope import interleave_rows, rotate_
from petalite.model.config import ModelConfig


class AttentionStep(Protocol):
    """How the tokens of one forward see each other and what came before."""

    @property
    def rotation(self) -> Tensor:
        """(T, 1, D/2)."""
        ...

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        """Heads (T, H + 2K, D): `n_heads` queries, then keys, then values → (T, H · D)."""
        ...


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parts of a block, `ROLE.weight` and `ROLE.bias` with the roles of `TensorNames.block`, and their
    shapes.
    """
    attention = config.attention
    hidden, inner = config.hidden_size, config.inner_size
    queries, keys = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    linears = {
        "query": (queries, hidden, attention.qkv_bias),
        "key": (keys, hidden, attention.qkv_bias),
        "value": (keys, hidden, attention.qkv_bias),
        "output": (hidden, queries, attention.output_bias),
        "gate": (inner, hidden, config.mlp_bias),
        "up": (inner, hidden, config.mlp_bias),
        "down": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"attention_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
    if attention.qk_norm:
        shapes |= {"query_norm.weight": (attention.head_dim,), "key_norm.weight": (attention.head_dim,)}
    for role, (n_out, n_in, has_bias) in linears.items():
        shapes[f"{role}.weight"] = (n_out, n_in)
        if has_bias:
            shapes[f"{role}.bias"] = (n_out,)
    return shapes


class LlamaBlock:
    """Block `index` of a model, from `parts` named as in `tensor_shapes`."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        parts: Mapping[str, Tensor],
        linear: Callable[[Tensor, Tensor | None], Linear],
    ) -> None:
        attention = config.attention
        self.index = index
        self._n_heads, self._n_kv_heads = attention.n_heads, attention.n_kv_heads
        self._head_dim = attention.head_dim
        self._eps = config.norm_eps
        self._window = config.windows[index]
        self._has_rope = config.rope_blocks[index]
        self._attention_norm = RmsNorm(parts["attention_norm.weight"], config.norm_eps)
        self._mlp_norm = RmsNorm(parts["mlp_norm.weight"], config.norm_eps)
        self._head_norm = self._fused_head_norm(parts) if attention.qk_norm else None
        self._qkv = linear(*self._fused(parts, ("query", "key", "value"), rotated=("query", "key")))
        self._output = linear(*self._fused(parts, ("output",)))
        self._gate_up = linear(*self._fused(parts, ("gate", "up")))
        self._down = linear(*self._fused(parts, ("down",)))

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

        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self._down(silu(gate).mul_(up))

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        norms = self._attention_norm.nbytes + self._mlp_norm.nbytes
        linears = (self._qkv, self._output, self._gate_up, self._down)
        return norms + sum(linear.nbytes for linear in linears)

    def _fused(
        self, parts: Mapping[str, Tensor], roles: tuple[str, ...], rotated: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """One weight and one bias for the roles, one under the other."""

        def stacked(kind: str) -> Tensor | None:
            found = [parts.get(f"{role}.{kind}") for role in roles]
            rows = [
                self._reordered(part) if role in rotated else part
                for role, part in zip(roles, found, strict=True)
                if part is not None
            ]
            return torch.cat(rows) if rows else None

        weight = stacked("weight")
        assert weight is not None
        return weight, stacked("bias")

    def _reordered(self, rows: Tensor) -> Tensor:
        return interleave_rows(rows, self._head_dim) if self._has_rope else rows

    def _fused_head_norm(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(H + K, D): the weights of both head norms, in the order of the rows they scale."""
        query = self._reordered(parts["query_norm.weight"]).expand(self._n_heads, -1)
        key = self._reordered(parts["key_norm.weight"]).expand(self._n_kv_heads, -1)
        return torch.cat((query, key))
