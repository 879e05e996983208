"""What a step names, checked and cut: packed tokens, forks of rows, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from petalite.errors import BadMessage, NotFinite
from petalite.model.cache import Segment
from petalite.model.compute import is_finite
from petalite.swarm.messages import ALL, NONE, Step


def cut(segments: Sequence[Segment], skip: int, take: int) -> list[Segment]:
    """The segments of `take` packed tokens after the first `skip`."""
    parts = []
    for segment in segments:
        first, last = min(skip, segment.n_tokens), min(skip + take, segment.n_tokens)
        if last > first:
            parts.append(Segment(segment.row, segment.position + first, last - first))
        skip = max(0, skip - segment.n_tokens)
        take -= last - first
    return parts


def check_finite(given: torch.Tensor, computed: torch.Tensor) -> None:
    """Raises NotFinite, saying whether the numbers came in broken or broke here."""
    if not is_finite(computed):
        if is_finite(given):
            raise NotFinite("these blocks made NaN or Inf of hidden states that had none", given=False)
        raise NotFinite(
            "the hidden states that came in have NaN or Inf; whoever sent them computes wrongly", given=True
        )


def checked_forks(step: Step, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The forks of a step as pairs of cache rows, `numbers` being those of the session's rows."""
    forks = [(source, target) for source, target in step.forks or ()]
    sources, targets = {source for source, _ in forks}, [target for _, target in forks]
    stepped = {row for row, _, _ in step.rows}
    if max((*sources, *targets), default=0) >= len(numbers):
        raise BadMessage(f"the step forks rows {forks}; the session has {len(numbers)}")
    if len(set(targets)) < len(targets) or sources & set(targets) or not stepped.issuperset(targets):
        raise BadMessage(f"rows {forks} cannot be forked in a step of rows {sorted(stepped)}")
    return [(numbers[source], numbers[target]) for source, target in forks]


def wanted_outputs(output: torch.Tensor, rows: Sequence[tuple[int, ...]], which: str) -> torch.Tensor:
    """output (T, E) of a step over `rows` -> those that `which` (ALL, LAST or NONE) asks for."""
    if which == NONE:
        return output[:0]
    counts = [n_tokens for _, _, n_tokens in rows]
    if which == ALL or max(counts) == 1:
        return output
    if len(rows) == 1:
        return output[-1:]
    return torch.cat([output[end - 1 : end] for end in accumulate(counts)])
