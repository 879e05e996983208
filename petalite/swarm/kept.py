"""What was sent onward, kept by the sender so that a replacement can be brought to the receiver's state.

One half of the papers' dual caches (arXiv 2312.08361, Algorithm 1): a server holds attention keys and
values, and whoever feeds it holds its inputs: the client, or the server before it. Inputs are kept per row,
as the bytes that were sent. Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from petalite.swarm.codecs import Codec

JOINED_BYTES = 16384  # small inputs are joined up to this: the objects around one take half a kilobyte

Row = tuple[int, int, int]
"""(row, position, n_tokens), as in a step."""


@dataclass(slots=True)
class _Piece:
    position: int
    n_tokens: int
    data: memoryview

    @property
    def end(self) -> int:
        return self.position + self.n_tokens


class KeptInputs:
    """Per row, the bytes of every input up to the row's length, in `codec`."""

    def __init__(self, codec: Codec, hidden_size: int) -> None:
        self.codec = codec
        self._token_bytes = codec.nbytes(1, hidden_size)
        self._rows: dict[int, list[_Piece]] = {}

    @property
    def nbytes(self) -> int:
        return sum(len(piece.data) for pieces in self._rows.values() for piece in pieces)

    def length(self, row: int) -> int:
        """Tokens kept of this row; the next input continues there."""
        pieces = self._rows.get(row)
        return pieces[-1].end if pieces else 0

    def put(self, rows: Sequence[Row], data: memoryview) -> bool:
        """Keep a step's input. A position inside a row truncates it there first, as at the server; False
        where one lies beyond its row.
        """
        offset = 0
        for row, position, n_tokens in rows:
            pieces = self._rows.setdefault(row, [])
            length = pieces[-1].end if pieces else 0
            if position > length:
                return False
            if position < length:
                self.truncate(row, position)
            size = n_tokens * self._token_bytes
            whole = size == len(data)
            self._append(pieces, position, n_tokens, data if whole else data[offset : offset + size])
            offset += size
        assert offset == len(data)
        return True

    def _append(self, pieces: list[_Piece], position: int, n_tokens: int, data: memoryview) -> None:
        last = pieces[-1] if pieces else None
        if last is None or len(last.data) + len(data) > JOINED_BYTES:
            pieces.append(_Piece(position, n_tokens, data))
        else:  # another one, as forked rows may share the last
            joined = memoryview(b"".join((last.data, data)))
            pieces[-1] = _Piece(last.position, last.n_tokens + n_tokens, joined)

    def fork(self, source: int, target: int) -> None:
        """What is kept of `source` stands for `target` too; what was kept of that is forgotten."""
        pieces = self._rows.get(source, [])
        self._rows[target] = [_Piece(piece.position, piece.n_tokens, piece.data) for piece in pieces]

    def truncate(self, row: int, length: int) -> None:
        """Forget what lies at and after `length`."""
        pieces = self._rows.get(row)
        while pieces and pieces[-1].position >= length:
            pieces.pop()
        if pieces and pieces[-1].end > length:
            last = pieces[-1]
            last.n_tokens = length - last.position
            last.data = last.data[: last.n_tokens * self._token_bytes]

    def replay(
        self, most_tokens: int, lengths: Sequence[int] | None = None
    ) -> Iterator[tuple[Row, memoryview]]:
        """What is kept, as steps of one row and at most `most_tokens` each, in order.

        `lengths` gives how many tokens of row 0, 1, … are wanted; by default all of them.
        """
        for row, pieces in self._rows.items():
            wanted = self.length(row) if lengths is None else min(self.length(row), lengths[row])
            whole = memoryview(bytearray().join(piece.data for piece in pieces if piece.position < wanted))
            for position in range(0, wanted, most_tokens):
                n_tokens = min(most_tokens, wanted - position)
                start = position * self._token_bytes
                yield (row, position, n_tokens), whole[start : start + n_tokens * self._token_bytes]
