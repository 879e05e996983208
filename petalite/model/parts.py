"""A block's tensors as its checkpoint has them, made into its vectors and into one weight for each linear.

Roles are stacked and rows put in the block's order while they are read, a piece at a time. Whether all are
finite is looked at on the way, while a piece is in the caches. Knows names and places of tensors; how weights
are held is their room's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from petalite.errors import InvalidCheckpoint
from petalite.model.block import Block, linear_shapes, row_places, vector_shapes
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import is_finite
from petalite.model.reading import Stream, Wanted
from petalite.model.system import mapped

_IGNORED = ("rotary_emb.inv_freq",)  # old conversions stored what the config says anyway

Made = TypeVar("Made", covariant=True)


class Rows(Protocol[Made]):
    """Room for a weight (N, K) whose rows come a few at a time."""

    def put(self, rows: Tensor, here: Tensor, there: Tensor) -> None:
        """Of rows (n, K), in any float dtype, that of number here[i] becomes row there[i].
        Both int64, `there` ascending.
        """
        ...

    @property
    def weight(self) -> Made:
        """Once all rows were put."""
        ...


class Gathered:
    """As a tensor. It takes memory from the first row on; without a `dtype` that of the rows, for a while:
    what is made of it takes its place.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._weight: Tensor | None = None

    def put(self, rows: Tensor, here: Tensor, there: Tensor) -> None:
        """As `Rows` has it."""
        if self._weight is None and self._dtype is None:
            self._weight = mapped(self._shape, rows.dtype)
        elif self._weight is None:
            self._weight = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        elif self._dtype is None:
            self._weight = self._weight.to(torch.promote_types(rows.dtype, self._weight.dtype))
        self._weight.index_copy_(0, there.to(self._device), rows[here].to(self._weight))

    @property
    def weight(self) -> Tensor:
        """(N, K)."""
        assert self._weight is not None
        return self._weight


class Parts(Generic[Made]):
    """The blocks of a checkpoint that is not quantized. `room(n_out, n_in)` is where a weight goes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: type[Block],
        room: Callable[[int, int], Rows[Made]],
        *,
        as_stored: bool = False,
    ) -> None:
        """`as_stored`: read a block in the order of its files, which is fastest; all its linears then fill at
        the same time, and not one by one.
        """
        self._checkpoint = checkpoint
        self._kind = kind
        self._room = room
        self._as_stored = as_stored
        self._rooms: dict[tuple[int, str], Rows[Made]] = {}  # of what will be read
        self._linear_of = {
            role: name for name, roles in kind.stacks(checkpoint.config).items() for role in roles
        }

    def wanted(self, index: int) -> Iterator[Wanted]:
        """A block's tensors, for `read`; no others may stand under its prefix. Raises InvalidCheckpoint."""
        checkpoint = self._checkpoint
        shapes = {
            self._stored_name(index, part): shape
            for part, shape in self._kind.tensor_shapes(checkpoint.config).items()
        }
        unknown = [
            name
            for name in set(checkpoint.names(self._prefix(index))) - shapes.keys()
            if not name.endswith(_IGNORED)
        ]
        if unknown:
            raise InvalidCheckpoint(
                f"{checkpoint.folder}: block {index} has a tensor {min(unknown)!r} unknown to config.json"
            )
        places = checkpoint.places(shapes)
        wanted = [Wanted(index, part, *places[self._stored_name(index, part)]) for part in self._in_order()]
        if self._as_stored:
            wanted.sort(key=lambda each: (str(each.path), each.info.start))
        sizes = linear_shapes(self._kind, checkpoint.config)
        for each in wanted:
            name = self._linear_of.get(each.name.rpartition(".")[0])
            if name is not None and (index, name) not in self._rooms:
                self._rooms[index, name] = self._room(*sizes[name][:2])
            yield each

    def _in_order(self) -> Iterator[str]:
        """A block's parts, those of a linear together."""
        config = self._checkpoint.config
        yield from vector_shapes(self._kind, config)
        for name, (_, _, has_bias) in linear_shapes(self._kind, config).items():
            roles = self._kind.stacks(config)[name]
            yield from (f"{role}.bias" for role in roles if has_bias)
            yield from (f"{role}.weight" for role in roles)

    def read(
        self, index: int, stream: Stream
    ) -> tuple[dict[str, Tensor], Iterator[tuple[str, Made, Tensor | None]]]:
        """A block's vectors, all there after the last linear; as they are asked for, name, weight and bias of
        each linear. Raises InvalidCheckpoint.
        """
        vectors: dict[str, Tensor] = {}
        return vectors, self._linears(index, stream, vectors)

    def _linears(
        self, index: int, stream: Stream, vectors: dict[str, Tensor]
    ) -> Iterator[tuple[str, Made, Tensor | None]]:
        left = list(self._in_order())
        while left:
            part = stream.peek().name
            left.remove(part)
            role, _, what = part.rpartition(".")
            name = self._linear_of.get(role)
            if name is None or what == "bias":
                vectors[part] = self._vector(index, part, stream)
            else:
                self._put(index, name, role, stream)
            roles = () if name is None else self._kind.stacks(self._checkpoint.config)[name]
            if name is not None and not any(each.rpartition(".")[0] in roles for each in left):
                biases = [vectors.pop(f"{each}.bias") for each in roles if f"{each}.bias" in vectors]
                yield name, self._rooms.pop((index, name)).weight, torch.cat(biases) if biases else None

    def _put(self, index: int, name: str, role: str, stream: Stream) -> None:
        """A role's rows to their place in the weight of its linear."""
        config, room = self._checkpoint.config, self._rooms[index, name]
        shapes, first = self._kind.tensor_shapes(config), 0
        for before in takewhile(lambda each: each != role, self._kind.stacks(config)[name]):
            first += shapes[f"{before}.weight"][0]
        places = row_places(self._kind, config, index, role, shapes[f"{role}.weight"][0]) + first
        for piece in stream.rows(f"{role}.weight"):
            self._check(index, f"{role}.weight", piece.rows)
            there, here = places[piece.first : piece.end].sort()
            room.put(piece.rows, here, there)

    def _vector(self, index: int, part: str, stream: Stream) -> Tensor:
        tensor = stream.tensor(part)
        self._check(index, part, tensor)
        return self._kind.reordered(self._checkpoint.config, index, part.rpartition(".")[0], tensor)

    def _check(self, index: int, part: str, tensor: Tensor) -> None:
        if not is_finite(tensor):
            name = self._stored_name(index, part)
            raise InvalidCheckpoint(f"{self._checkpoint.folder}: block {index} has NaN or Inf in {name!r}")

    def _prefix(self, index: int) -> str:
        checkpoint = self._checkpoint
        return checkpoint.outer + checkpoint.family.names.block_prefix.format(block=index)

    def _stored_name(self, index: int, part: str) -> str:
        role, _, what = part.rpartition(".")
        return f"{self._prefix(index)}{self._checkpoint.family.names.of(role)}.{what}"
