"""The KV cache of one span, and the plan of one packed step over it.

A row is one sequence's keys and values in every block of the span, or of a part of it. It has addresses for
the length that it was opened for, and on a CPU pages only for what was written: memory follows use while
`reserved_bytes` says what is promised, no growth moves anything, and all of it goes back when the row does.
A step appends to any number of rows at once; lengths change only when all its blocks have run, so a step that
failed can be sent again.

Per block a row holds one tensor (2, 1, K, max_length, D): keys and values, head by head, as attention reads
them. Knows tensors and lengths; not what a session is. Not thread-safe: it belongs to the thread that
computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from petalite.errors import BadMessage, InvalidArgument, SessionGap, SessionLimit, UnknownSession, WrongSpan
from petalite.kernels.attention import CausalMasks, attend
from petalite.kernels.native.span import NativeSegment, native_addresses
from petalite.kernels.rope import RotationTable
from petalite.model.system import mapped


@dataclass(frozen=True, slots=True)
class Segment:
    """`n_tokens` consecutive tokens of one row, the first at `position`."""

    row: int
    position: int
    n_tokens: int

    @property
    def end(self) -> int:
        return self.position + self.n_tokens


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the rows of one span have in common."""

    start: int  # the span's blocks [start, end)
    end: int
    n_kv_heads: int  # K
    head_dim: int  # D
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one block."""
        return 2 * self.n_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(slots=True)
class _Row:
    """One sequence."""

    max_length: int
    start: int
    end: int
    blocks: tuple[Tensor, ...]
    addresses: Any = None  # of the blocks, as a native call takes them; None: not asked for yet
    length: int = 0


def _room(shape: CacheShape, n_blocks: int, length: int) -> Tensor:
    """(blocks, 2, 1, K, length, D) of unwritten memory. A CPU's is mapped for itself: what malloc is given
    back it may keep, in holes that fit no longer row. Other devices give all of it at once.
    """
    size = (n_blocks, 2, 1, shape.n_kv_heads, length, shape.head_dim)
    if shape.device.type != "cpu":
        return torch.empty(size, dtype=shape.dtype, device=shape.device)
    return mapped(size, shape.dtype, small_pages=True)


class KVCache:
    """Rows of cached keys and values. Row numbers are never used twice."""

    def __init__(self, shape: CacheShape, rotations: RotationTable, masks: CausalMasks) -> None:
        self._shape = shape
        self._rotations = rotations
        self._masks = masks
        self._rows: dict[int, _Row] = {}
        self._numbers = itertools.count()

    def open_row(self, max_length: int, start: int | None = None, end: int | None = None) -> int:
        """A new, empty row of at most `max_length` tokens over the blocks [start, end), by default the
        whole span.
        """
        start = self._shape.start if start is None else start
        end = self._shape.end if end is None else end
        if not self._shape.start <= start < end <= self._shape.end:
            raise WrongSpan(
                f"blocks {start}:{end} are not here; expected part of {self._shape.start}:{self._shape.end}"
            )
        if max_length < 1:
            raise InvalidArgument(f"a row needs room for at least one token, found max_length {max_length}")
        return self._add(self._new_row(max_length, start, end))

    def length(self, row: int) -> int:
        """Tokens cached."""
        return self._row(row).length

    def max_length(self, row: int) -> int:
        """Tokens there may be."""
        return self._row(row).max_length

    def truncate(self, row: int, length: int) -> None:
        """Forget all tokens from position `length` on."""
        found = self._row(row)
        if not 0 <= length <= found.length:
            raise SessionGap(f"cannot truncate a row of {found.length} tokens to {length}")
        found.length = length

    def fork(self, row: int) -> int:
        """A new row with the same tokens so far; each then goes its own way."""
        source = self._row(row)
        copy = self._new_row(source.max_length, source.start, source.end)
        self._copy(source, copy)
        return self._add(copy)

    def fork_onto(self, source: int, target: int) -> None:
        """Like `fork`, into a row that is there; what it held is forgotten."""
        row, other = self._row(source), self._row(target)
        if (row.start, row.end) != (other.start, other.end) or row.length > other.max_length:
            raise WrongSpan(
                f"row {target} has room for {other.max_length} tokens of blocks {other.start}:{other.end}, "
                f"row {source} holds {row.length} of {row.start}:{row.end}"
            )
        self._copy(row, other)

    def _copy(self, source: _Row, target: _Row) -> None:
        target.length = 0
        with torch.inference_mode():
            for block, room in zip(source.blocks, target.blocks, strict=True):
                room.narrow(3, 0, source.length).copy_(block.narrow(3, 0, source.length))
        target.length = source.length

    def fill(self, row: int, length: int, key_scale: float, generator: torch.Generator) -> None:
        """Make it one of `length` random tokens, to try kernels on: keys `key_scale` times the size of
        values.
        """
        found = self._row(row)
        for block in found.blocks:
            keys, values = block.narrow(3, 0, length).unbind()
            keys.normal_(0.0, key_scale, generator=generator)
            values.normal_(generator=generator)
        found.length = length

    def drop(self, row: int) -> None:
        """Forget a row and free its memory."""
        self._row(row)
        del self._rows[row]

    @property
    def rows(self) -> int:
        """How many rows are open."""
        return len(self._rows)

    @property
    def reserved_bytes(self) -> int:
        """What all open rows hold once each has reached its max_length."""
        return sum(self.row_bytes(row.max_length, row.start, row.end) for row in self._rows.values())

    def row_bytes(self, length: int, start: int | None = None, end: int | None = None) -> int:
        """What a row of `length` tokens holds over the blocks [start, end)."""
        start = self._shape.start if start is None else start
        end = self._shape.end if end is None else end
        return length * (end - start) * self._shape.token_bytes

    @contextmanager
    def step(
        self, segments: Sequence[Segment], start: int, end: int, *, min_tokens: int = 1
    ) -> Iterator[Step]:
        """Plan a packed step over the blocks [start, end); the rows grow by it if the body ends without an
        error.

        Raises, and leaves everything as it was: UnknownSession, WrongSpan (a row of other blocks),
        SessionGap (a position beyond the row's length), SessionLimit, BadMessage. A position inside a row
        truncates the row there first; what stood after it is overwritten, so that stays so even if the step
        fails. A step of fewer than `min_tokens` is padded with tokens that belong to no row.
        """
        rows = self._checked(segments, start, end)
        for row, segment in zip(rows, segments, strict=True):
            row.length = min(row.length, segment.position)
        yield Step(self._shape, rows, segments, self._rotations, self._masks, min_tokens)
        for row, segment in zip(rows, segments, strict=True):
            row.length = segment.end

    def _checked(self, segments: Sequence[Segment], start: int, end: int) -> list[_Row]:
        if not segments or len({segment.row for segment in segments}) < len(segments):
            raise BadMessage("a step needs at least one segment, and one segment per row")
        rows = [self._row(segment.row) for segment in segments]
        for row, segment in zip(rows, segments, strict=True):
            if (row.start, row.end) != (start, end):
                raise WrongSpan(
                    f"row {segment.row} caches blocks {row.start}:{row.end}, the step is over {start}:{end}"
                )
            if segment.position < 0 or segment.n_tokens < 1:
                raise BadMessage(f"a segment of {segment.n_tokens} tokens at position {segment.position}")
            if segment.position > row.length:
                raise SessionGap(
                    f"position {segment.position} is beyond the {row.length} tokens of row {segment.row}; "
                    f"send those between first"
                )
            if segment.end > row.max_length:
                raise SessionLimit(
                    f"tokens up to {segment.end} do not fit row {segment.row}, opened for {row.max_length}"
                )
        return rows

    def _new_row(self, max_length: int, start: int, end: int) -> _Row:
        return _Row(max_length, start, end, _room(self._shape, end - start, max_length).unbind())

    def _add(self, row: _Row) -> int:
        number = next(self._numbers)
        self._rows[number] = row
        return number

    def _row(self, number: int) -> _Row:
        row = self._rows.get(number)
        if row is None:
            raise UnknownSession(f"there is no cache row {number}")
        return row


Place: TypeAlias = tuple[int, int, int]
"""Of one token: the address at which the model's block 0 of its row lies, or would lie; how many tokens the
row has room for; the token's position."""


class Step:
    """What every block of one packed step needs, computed once: rotations, masks, where the rows lie."""

    def __init__(
        self,
        shape: CacheShape,
        rows: Sequence[_Row],
        segments: Sequence[Segment],
        rotations: RotationTable,
        masks: CausalMasks,
        min_tokens: int,
    ) -> None:
        self._shape = shape
        self._rotations = rotations
        self._masks = masks
        # Of each row: where its tokens begin in the pack, how many they are, first position and end.
        self._parts: list[tuple[_Row, int, int, int, int]] = []
        first = 0
        for row, segment in zip(rows, segments, strict=True):
            self._parts.append((row, first, segment.n_tokens, segment.position, segment.end))
            first += segment.n_tokens
        self._padding = max(0, min_tokens - first)  # tokens that belong to no row
        self._zeros: Tensor | None = None  # what they get, the same in every block

    @cached_property
    def rotation(self) -> Tensor:
        """(T, 1, D/2), T at least `min_tokens`; what padding is rotated by does not matter."""
        *others, (_, _, _, position, end) = self._parts
        views = [self._rotations.rows(start, stop) for _, _, _, start, stop in others]
        views.append(self._rotations.rows(position, end + self._padding))
        return views[0] if len(views) == 1 else torch.cat(views)

    def native(self) -> tuple[Tensor, list[NativeSegment]]:
        """Rotations of all positions up to the last and maybe more, (positions, 1, D/2), and the segments, as
        a native call takes them.
        """
        segments = []
        for row, _, n_tokens, position, _ in self._parts:
            if row.addresses is None:
                row.addresses = native_addresses(row.blocks)
            segments.append(NativeSegment(position, n_tokens, row.max_length, row.addresses))
        return self._rotations.up_to(max(end for *_, end in self._parts)), segments

    def places(self) -> list[Place]:
        """Of every token; valid while nobody drops its row."""
        places = []
        for row, _, _, position, end in self._parts:
            before = row.start * row.max_length * self._shape.token_bytes
            origin = row.blocks[0].data_ptr() - before
            places += [(origin, row.max_length, at) for at in range(position, end)]
        return places

    def attend(self, block: int, heads: Tensor, n_heads: int, window: int | None) -> Tensor:
        """Append the keys and values in `heads` (T, H + 2K, D) to block `block` of every row → (T, H · D)."""
        shape, outputs = self._shape, []
        new = heads.narrow(1, n_heads, 2 * shape.n_kv_heads)
        new = new.view(-1, 2, 1, shape.n_kv_heads, shape.head_dim).permute(1, 2, 3, 0, 4)
        for row, first, n_tokens, position, end in self._parts:
            cached = row.blocks[block - row.start]
            cached.narrow(3, position, n_tokens).copy_(new.narrow(3, first, n_tokens))
            keys, values = cached.narrow(3, 0, end).unbind()
            queries = heads.narrow(0, first, n_tokens).narrow(1, 0, n_heads)
            outputs.append(attend(queries, keys, values, self._masks, window))
        if self._padding:
            if self._zeros is None:
                self._zeros = heads.new_zeros(self._padding, n_heads * shape.head_dim)
            outputs.append(self._zeros)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
