"""A span: consecutive transformer blocks `[start, end)`, what servers hold and chains are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from petalite.errors import InvalidArgument

MAX_BLOCKS = 1024  # no published model has more; a record that claims more is wrong


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `start` to `end - 1`. Never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_BLOCKS:
            raise InvalidArgument(
                f"blocks {self.start}:{self.end} are no span; expected 0 <= start < end <= {MAX_BLOCKS}"
            )

    @classmethod
    def parse(cls, text: str) -> Span:
        """From `A:B`, as on the command line."""
        match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text)
        if match is None:
            raise InvalidArgument(f"{text!r} is no span of blocks; expected START:END, as in 0:8")
        return cls(int(match[1]), int(match[2]))

    @property
    def blocks(self) -> range:
        return range(self.start, self.end)

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, other: object) -> bool:
        """Whether a block, or every block of another span, lies in this one."""
        if isinstance(other, Span):
            return self.start <= other.start and other.end <= self.end
        return isinstance(other, int) and self.start <= other < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


def uncovered(span: Span, holders: Iterable[Span]) -> list[Span]:
    """The parts of `span` that none of `holders` covers, in order."""
    missing: list[Span] = []
    position = span.start
    for held in sorted(holders):
        if held.start > position:
            missing.append(Span(position, min(held.start, span.end)))
        position = max(position, held.end)
        if position >= span.end:
            return missing
    if position < span.end:
        missing.append(Span(position, span.end))
    return missing


def describe(spans: Iterable[Span]) -> str:
    """For people: "block 3", "blocks 0:4 and 9:12"."""
    spans = list(spans)
    if len(spans) == 1 and len(spans[0]) == 1:
        return f"block {spans[0].start}"
    return "blocks " + " and ".join(map(str, spans))
