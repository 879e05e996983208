"""The sync facade: `DistributedModel`, for scripts and notebooks. Its async twin runs on a loop's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import torch

from petalite.client.autograd import Lora
from petalite.client.blocks import BlockList
from petalite.client.generation import Generation, TokenSession
from petalite.client.loops import LoopThread
from petalite.client.model import AsyncDistributedModel, Prompt
from petalite.client.options import Options
from petalite.client.passes import Passes
from petalite.client.replies import Reply
from petalite.client.trace import Trace
from petalite.model.config import ModelConfig
from petalite.model.tokenizer import Tokenizer


class DistributedModel:
    """A language model over a chain of servers or this process's own blocks. Close it, or use `with`."""

    def __init__(self, twin: AsyncDistributedModel, loop: LoopThread, closing: AsyncExitStack) -> None:
        """`closing` is left when the model is closed: the swarm it came from, or its own memory."""
        self._twin = twin
        self._loop = loop
        self._closing = closing

    @property
    def config(self) -> ModelConfig:
        return self._twin.config

    @property
    def model_id(self) -> str:
        """See `AsyncDistributedModel.model_id`."""
        return self._twin.model_id

    @property
    def passes(self) -> Passes:
        """Forward and backward passes of batches: their settings, and who failed in them."""
        return self._twin.passes

    @property
    def tokenizer(self) -> Tokenizer:
        return self._twin.tokenizer

    def __enter__(self) -> DistributedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the swarm and stop the thread. A second call does nothing."""
        if not self._loop.closed:
            try:
                self._loop.run(self._closing.aclose())
            finally:
                self._loop.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt of any kind."""
        return self._twin.encode(prompt)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """See `AsyncDistributedModel.stream` for the options."""
        return self._loop.run(self._twin.generate(prompt, **options))

    def generate_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """See `AsyncDistributedModel.generate_batch`."""
        return self._loop.run(self._twin.generate_batch(prompts, **options))

    def beam_search(self, prompt: Prompt, **options: Any) -> list[Generation]:
        """See `AsyncDistributedModel.beam_search`."""
        return self._loop.run(self._twin.beam_search(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See `AsyncDistributedModel.stream`."""
        return self._loop.iterate(self._twin.stream(prompt, **options))

    @contextmanager
    def session(
        self,
        max_length: int | None = None,
        *,
        lora: Lora | None = None,
        prefix: torch.Tensor | None = None,
    ) -> Iterator[TokenSession]:
        """See `AsyncDistributedModel.session`."""
        session = self._twin.session(max_length, lora=lora, prefix=prefix)
        self._loop.run(session.__aenter__())
        try:
            yield session
        finally:
            self._loop.finish(session.__aexit__(None, None, None))

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> logits (B, T, V) float32."""
        return self._loop.run(self._twin.logits(token_ids))

    @property
    def blocks(self) -> BlockList:
        """`model.blocks[a:b]` is a torch module over those blocks, wherever they are."""
        return BlockList(self._twin, self._loop)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> hidden states (B, T, E)."""
        return self._twin.embed(token_ids)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden states (…, E) after the last block -> (…, E) normed as the head has them."""
        return self._twin.edges.norm(hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden states (B, T, E) -> logits (B, T, V) float32, the final norm included; differentiable."""
        # Another thread computes it, whose own grad mode is none of the caller's business.
        given = hidden if torch.is_grad_enabled() else hidden.detach()
        return self._loop.run(self._twin.head(given))

    def reply(self, prompt: Prompt, options: Options) -> Reply:
        """See `AsyncDistributedModel.reply`."""
        return self._twin.reply(prompt, options)

    def trace(self) -> Trace:
        """See `AsyncDistributedModel.trace`."""
        return self._twin.trace()
