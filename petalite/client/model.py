"""A model whose blocks are elsewhere: text in, text out. The async twin; `client.sync` wraps it.

Holds what a client computes itself (embedding, final norm, head, tokenizer) and opens sessions for the
rest. Knows no socket: where the blocks are is the business of the `Servers` it was given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeAlias

import torch

from petalite.client.generation import LENGTH, STOP, Generation, TokenSession, generate_tokens
from petalite.client.hops import Servers
from petalite.client.sampling import Choice, Sampling
from petalite.client.session import Session
from petalite.client.settings import SessionSettings
from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread
from petalite.model.config import ModelConfig
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.edges import Edges, load_edges
from petalite.model.tokenizer import Tokenizer, load_tokenizer
from petalite.swarm.messages import ALL
from petalite.swarm.spans import Span

MakeServers: TypeAlias = Callable[[Checkpoint, ComputeThread], Awaitable[Servers]]
"""Where the blocks of an opened checkpoint are; may use the model's own thread."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages such as `[{"role": "user", "content": "Hello"}]`."""


class AsyncDistributedModel:
    """A language model over a chain of servers. Close it, or use it in `async with`."""

    def __init__(
        self,
        edges: Edges,
        tokenizer: Tokenizer,
        servers: Servers,
        thread: ComputeThread,
        settings: SessionSettings = SessionSettings(),
    ) -> None:
        self.edges = edges
        self.tokenizer = tokenizer
        self._servers = servers
        self._thread = thread
        self._settings = settings

    @property
    def config(self) -> ModelConfig:
        return self.edges.config

    async def __aenter__(self) -> AsyncDistributedModel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Free what this model holds here. Sessions still open fail; a second call does nothing."""
        self._thread.close()

    # -- text --------------------------------------------------------------------------------------------

    def session(self, max_length: int | None = None) -> TokenSession:
        """Room for `max_length` tokens at every hop; by default all that the model takes. An async context
        manager, to pass to `generate` and `stream` so that a conversation goes on where it stopped."""
        length = max_length or self.config.max_position_embeddings
        if not 0 < length <= self.config.max_position_embeddings:
            raise InvalidArgument(
                f"max_length must be from 1 to {self.config.max_position_embeddings}, what this model takes; "
                f"found {length}"
            )
        return TokenSession(self._hidden_session(length, rows=1), self.edges, self._thread)

    async def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Like `stream`, waiting for the whole text."""
        run = _Run(self, prompt, **options)
        text = "".join([piece async for piece in run.pieces()])
        return run.generation(text)

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[str, None]:
        """The text that follows `prompt`, in pieces as they come.

        max_new_tokens=256: at most so many. temperature=0.0, top_k=0, top_p=1.0, seed=None: see `Sampling`;
        the default is greedy. session=None: a `model.session()` to go on in. Raises PromptTooLong,
        MissingBlocks and whatever else ends the text early.
        """
        async with aclosing(_Run(self, prompt, **options).pieces()) as pieces:
            async for piece in pieces:
                yield piece

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and all(isinstance(part, Mapping) for part in prompt):
            return self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        ids = [part for part in prompt if isinstance(part, int) and 0 <= part < self.config.vocab_size]
        if len(ids) != len(prompt):
            raise InvalidArgument(
                f"a prompt is text, a list of messages or a list of token ids below {self.config.vocab_size}"
            )
        return ids

    # -- tensors -----------------------------------------------------------------------------------------

    async def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> logits (B, T, V) float32: one forward, nothing kept."""
        if token_ids.ndim != 2 or 0 in token_ids.shape:
            raise InvalidArgument(f"token ids have shape (B, T), found {tuple(token_ids.shape)}")
        rows, length = token_ids.shape
        chunk = max(1, self._settings.chunk_tokens // rows)
        outputs = []
        async with self._hidden_session(length, rows=rows) as session:
            for start in range(0, length, chunk):
                part = token_ids[:, start : start + chunk]
                hidden = self.edges.embed(part.reshape(-1))
                packed = [(row, start, part.shape[1]) for row in range(rows)]
                output = await session.step(hidden, packed, ALL)
                logits = await self._thread.run(self.edges.head, output)
                outputs.append(logits.view(rows, part.shape[1], -1))
        return torch.cat(outputs, dim=1)

    def _hidden_session(self, max_length: int, rows: int) -> Session:
        return Session(
            self._servers,
            Span(0, self.config.n_blocks),
            self.config.hidden_size,
            max_length=max_length,
            rows=rows,
            settings=self._settings,
        )


async def open_model(
    path_or_repo: str,
    make_servers: MakeServers,
    *,
    dtype: str = AUTO,
    settings: SessionSettings = SessionSettings(),
) -> AsyncDistributedModel:
    """Load what a client computes of a checkpoint: a folder, or a repository of the hub.

    Raises InvalidCheckpoint or UnsupportedModel for what cannot be loaded.
    """
    thread = ComputeThread("petalite-edges")
    try:
        checkpoint = await thread.run(Checkpoint.open, path_or_repo)
        tokenizer = await thread.run(load_tokenizer, checkpoint)
        edges = await thread.run(load_edges, checkpoint, dtype=compute_dtype(checkpoint, dtype))
        servers = await make_servers(checkpoint, thread)
    except BaseException:
        thread.close()
        raise
    return AsyncDistributedModel(edges, tokenizer, servers, thread, settings)


class _Run:
    """One generation under way: the prompt and the settings, and what has come of them so far."""

    def __init__(
        self,
        model: AsyncDistributedModel,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        session: TokenSession | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
        seeded = {} if seed is None else {"seed": seed}
        self._sampling = Sampling(temperature, top_k, top_p, **seeded)
        self._model = model
        self._prompt_ids = model.encode(prompt)
        self._max_new_tokens = max_new_tokens
        self._choices: list[Choice] = []
        self._given = session
        self._session = session or model.session(
            min(len(self._prompt_ids) + max_new_tokens, model.config.max_position_embeddings)
        )

    async def pieces(self) -> AsyncGenerator[str, None]:
        async with AsyncExitStack() as stack:
            if self._given is None:
                await stack.enter_async_context(self._session)
            stream = self._model.tokenizer.stream(self._prompt_ids)
            tokens = generate_tokens(
                self._session,
                self._prompt_ids,
                self._sampling,
                max_new_tokens=self._max_new_tokens,
                stop_ids=self._model.tokenizer.eos_ids,
            )
            async with aclosing(tokens):
                async for choice in tokens:
                    self._choices.append(choice)
                    if piece := stream.step(choice.token_id):
                        yield piece
            if tail := stream.flush():
                yield tail

    def generation(self, text: str) -> Generation:
        token_ids = [choice.token_id for choice in self._choices]
        stopped = token_ids[-1] in self._model.tokenizer.eos_ids
        return Generation(
            text=text,
            token_ids=token_ids,
            logprobs=[choice.logprob for choice in self._choices],
            finish_reason=STOP if stopped else LENGTH,
            trace=self._session.trace,
        )
