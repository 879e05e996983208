"""The sync facade: `DistributedModel`, for scripts and notebooks. Runs its async twin on a loop in one
thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

import torch

from petalite.client.generation import Generation, TokenSession
from petalite.client.model import AsyncDistributedModel, Prompt
from petalite.model.config import ModelConfig
from petalite.model.tokenizer import Tokenizer
from petalite.net.loop import new_event_loop

T = TypeVar("T")
CANCEL_S = 5.0  # how long an interrupt waits for what it cancelled


class LoopThread:
    """An event loop in a thread of its own; coroutines are handed to it and waited for."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="petalite-loop", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return its result. An interrupt here cancels it there, and waits for its end."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(CANCEL_S)
            raise

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an async generator, which is closed when the iteration here ends, early or not."""
        # An interrupt can come after an item was asked for and before anybody waits for it.
        one_at_a_time = asyncio.Lock()

        async def next_item() -> T:
            async with one_at_a_time:
                return await anext(source)

        async def close() -> None:
            async with one_at_a_time:
                await source.aclose()

        try:
            while True:
                try:
                    yield self.run(next_item())
                except StopAsyncIteration:
                    return
        finally:
            self.run(close())

    def close(self) -> None:
        """Stop the loop and its thread. A second call does nothing."""
        if not self.closed:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


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

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See `AsyncDistributedModel.stream`."""
        return self._loop.iterate(self._twin.stream(prompt, **options))

    @contextmanager
    def session(self, max_length: int | None = None) -> Iterator[TokenSession]:
        """See `AsyncDistributedModel.session`."""
        session = self._twin.session(max_length)
        self._loop.run(session.__aenter__())
        try:
            yield session
        finally:
            self._loop.run(session.__aexit__(None, None, None))

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> logits (B, T, V) float32."""
        return self._loop.run(self._twin.logits(token_ids))
