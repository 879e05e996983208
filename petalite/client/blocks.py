"""Blocks as torch modules: hidden states in, hidden states out, for those who build on them.

middle = model.blocks[4:20]
hidden = middle(hidden)  # (B, T, E); nothing is kept, gradients pass
with middle.session(max_length=100) as session:
    first = session(hidden)
    second = session(more)  # goes on where the first ended
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from petalite.client.autograd import Lora, through_blocks
from petalite.client.loops import LoopThread
from petalite.client.model import AsyncDistributedModel
from petalite.client.session import Session
from petalite.client.trace import Trace
from petalite.errors import InvalidArgument
from petalite.swarm.spans import Span


class BlockList:
    """All blocks of a model; a slice is a module."""

    def __init__(self, twin: AsyncDistributedModel, loop: LoopThread) -> None:
        self._twin = twin
        self._loop = loop

    def __len__(self) -> int:
        return self._twin.config.n_blocks

    def __getitem__(self, which: slice | int) -> Blocks:
        """Indices as of a list, negative ones too. Raises InvalidArgument for none, or not consecutive
        ones, IndexError for one that is not there."""
        found = range(len(self))[which]
        chosen = found if isinstance(found, range) else range(found, found + 1)
        if not chosen or chosen.step != 1:
            raise InvalidArgument(f"{which} are no consecutive blocks of the {len(self)} that there are")
        return Blocks(self._twin, self._loop, Span(chosen.start, chosen.stop))


class Blocks(torch.nn.Module):
    """Consecutive blocks, whose weights are elsewhere and never change."""

    def __init__(self, twin: AsyncDistributedModel, loop: LoopThread, span: Span) -> None:
        super().__init__()
        self.span = span
        self._twin = twin
        self._loop = loop

    def forward(
        self, hidden: torch.Tensor, *, prompts: torch.Tensor | None = None, lora: Lora | None = None
    ) -> torch.Tensor:
        """hidden (B, T, E), each row a text from its beginning -> (B, T, E) after these blocks;
        differentiable in all that it is given.

        prompts (blocks, P, E) are added to the first P tokens of what enters each block. `lora` is a LoRA
        of one's own (`petalite.tuning.Lora`), or the digest of one that servers hold. Raises
        InvalidArgument, MissingBlocks, DeadlineExceeded, and NotFinite where two servers make NaN or Inf of
        it; in the backward pass too.
        """
        self._twin.check_hidden(hidden)
        return through_blocks(self._twin.passes, self._loop, self.span, hidden, prompts, lora)

    @contextmanager
    def session(self, max_length: int, rows: int = 1) -> Iterator[BlockSession]:
        """`rows` texts of up to `max_length` tokens, which these blocks remember."""
        session = self._twin.blocks_session(self.span, max_length, rows)
        self._loop.run(session.__aenter__())
        try:
            yield BlockSession(session, self._twin, self._loop)
        finally:
            self._loop.finish(session.__aexit__(None, None, None))

    def extra_repr(self) -> str:
        return str(self.span)


class BlockSession(torch.nn.Module):
    """Blocks that remember what they were fed, so that more can follow."""

    def __init__(self, session: Session, twin: AsyncDistributedModel, loop: LoopThread) -> None:
        super().__init__()
        self.position = 0  # tokens held of each row; set it to fewer to roll back
        self._session = session
        self._twin = twin
        self._loop = loop

    @property
    def trace(self) -> Trace:
        return self._session.trace

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, T, E) of the next T tokens of every row -> (B, T, E)."""
        _check_gradient(hidden)
        output = self._loop.run(self._twin.feed_blocks(self._session, hidden, self.position))
        self.position += hidden.shape[1]
        return output


def _check_gradient(hidden: torch.Tensor) -> None:
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise InvalidArgument(
            "no gradient passes through a session, whose servers remember; call the blocks themselves, "
            "detach the hidden states, or use torch.no_grad()"
        )
