"""What every family's block is made of: its parts in a checkpoint, and how they become few large products.

A block class says as data which tensors it needs, which of them are stacked into one linear, and what has
to be reordered. The functions here apply that, one linear at a time, so that no second copy of a block is
in memory. Knows tensors and names of parts; knows no file.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from petalite.kernels.linear import Linear
from petalite.kernels.native.span import BlockWeights
from petalite.kernels.quantized import FORMATS, NONE
from petalite.model.config import ModelConfig

Shape = tuple[int, ...]
MakeLinear = Callable[[Tensor, Tensor | None], Linear]


class AttentionStep(Protocol):
    """How the tokens of one forward see each other and what came before."""

    @property
    def rotation(self) -> Tensor:
        """(T, 1, D/2)."""
        ...

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        """Heads (T, H + 2K, D): `n_heads` queries, then keys, then values → (T, H · D)."""
        ...


class Block(ABC):
    """Block `index` of a model. `vectors` and `linears` are named as its static methods say."""

    index: int
    linears: Mapping[str, Linear]
    is_static: ClassVar[bool] = True  # what it computes with is the same whatever the hidden states are

    @abstractmethod
    def __init__(
        self, config: ModelConfig, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]
    ) -> None: ...

    def with_linears(self, linears: Mapping[str, Linear]) -> Self:
        """The same block, with some of its linears replaced; everything else is shared."""
        other = copy.copy(self)
        other._take({**self.linears, **linears})
        return other

    @abstractmethod
    def _take(self, linears: Mapping[str, Linear]) -> None:
        """Compute with these."""

    @abstractmethod
    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """(T, E) → (T, E)."""

    def native(self) -> BlockWeights | None:
        """Its parts for a native span; None for a kind of block that knows none."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its weights."""

    @staticmethod
    @abstractmethod
    def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
        """Its parts in a checkpoint, `ROLE.weight` and `ROLE.bias` with the roles of `TensorNames.block`."""

    @staticmethod
    @abstractmethod
    def stacks(config: ModelConfig) -> dict[str, tuple[str, ...]]:
        """Each of its linears: the roles whose rows it stacks. Roles of no linear are its vectors."""

    @staticmethod
    def reordered(config: ModelConfig, index: int, role: str, rows: Tensor) -> Tensor:
        """The weight or bias of a role with its rows as the block wants them."""
        return rows


def linear_shapes(kind: type[Block], config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """Of each linear: outputs, inputs, whether it has a bias."""
    shapes = kind.tensor_shapes(config)
    found = {}
    for name, roles in kind.stacks(config).items():
        n_out = sum(shapes[f"{role}.weight"][0] for role in roles)
        found[name] = (n_out, shapes[f"{roles[0]}.weight"][1], f"{roles[0]}.bias" in shapes)
    return found


def vector_shapes(kind: type[Block], config: ModelConfig) -> dict[str, Shape]:
    """The parts that belong to no linear."""
    stacked = {role for roles in kind.stacks(config).values() for role in roles}
    shapes = kind.tensor_shapes(config)
    return {part: shape for part, shape in shapes.items() if part.rpartition(".")[0] not in stacked}


def row_places(kind: type[Block], config: ModelConfig, index: int, role: str, n_rows: int) -> Tensor:
    """(n_rows,) int64: where each row that a checkpoint has of a role belongs among the block's."""
    rows = torch.arange(n_rows)
    order = kind.reordered(config, index, role, rows)
    return rows if order is rows else order.argsort()


def block_bytes(kind: type[Block], config: ModelConfig, dtype: torch.dtype, quant: str = NONE) -> int:
    """What one block's weights take in memory and, quantized, on disk."""
    total = sum(math.prod(shape) for shape in vector_shapes(kind, config).values()) * dtype.itemsize
    for n_out, n_in, has_bias in linear_shapes(kind, config).values():
        total += n_out * dtype.itemsize * has_bias
        if quant == NONE:
            total += n_out * n_in * dtype.itemsize
        else:
            tensors = FORMATS[quant].shapes(n_out, n_in).values()
            total += sum(math.prod(shape) * stored.itemsize for stored, shape in tensors)
    return total
