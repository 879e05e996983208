"""A model whose blocks are elsewhere: text in, text out. The async twin; `client.sync` wraps it.

Holds what a client computes itself (embedding, final norm, head, tokenizer) and opens sessions for the
rest. Knows no socket: where the blocks are is the business of the `Servers` it was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeAlias

import torch

from petalite.client.drafters import LOOKUP, DraftModel, LookupDrafter, ModelDrafter, load_draft
from petalite.client.generation import LENGTH, STOP, Generation, TokenSession, generate_tokens
from petalite.client.hops import Servers
from petalite.client.options import Options
from petalite.client.sampling import Choice
from petalite.client.session import Session
from petalite.client.settings import SessionSettings
from petalite.client.speculation import Drafter, Speculation
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
        self._drafts: dict[str, DraftModel] = {}
        self._loading_draft = asyncio.Lock()

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

    async def generate(
        self, prompt: Prompt, *, session: TokenSession | None = None, **options: Any
    ) -> Generation:
        """Like `stream`, waiting for the whole text."""
        run = _Run(self, prompt, session, Options(**options))
        text = "".join([piece async for piece in run.pieces()])
        return run.generation(text)

    async def stream(
        self, prompt: Prompt, *, session: TokenSession | None = None, **options: Any
    ) -> AsyncGenerator[str, None]:
        """The text that follows `prompt`, in pieces as they come.

        `options` are those of `client.options.Options`: max_new_tokens=256; temperature=0.0 (greedy), top_k,
        top_p, min_p, seed; repetition_penalty, presence_penalty, frequency_penalty, logit_bias; stop,
        stop_ids; logprobs; speculate. `session` is a `model.session()` to go on in. Raises InvalidArgument,
        PromptTooLong, MissingBlocks and whatever else ends the text early.
        """
        async with aclosing(_Run(self, prompt, session, Options(**options)).pieces()) as pieces:
            async for piece in pieces:
                yield piece

    async def speculation(self, session: TokenSession, how: str | None) -> Speculation | None:
        """The session's own of that kind: LOOKUP, or a draft model's folder or repository, loaded once."""
        if how is None:
            return None
        if how not in session.speculations:
            drafter: Drafter = LookupDrafter()
            if how != LOOKUP:
                drafter = ModelDrafter(await self._draft_model(how), session.max_length)
            session.speculations[how] = Speculation(drafter)
        return session.speculations[how]

    async def _draft_model(self, path_or_repo: str) -> DraftModel:
        async with self._loading_draft:
            if path_or_repo not in self._drafts:
                self._drafts[path_or_repo] = await load_draft(
                    path_or_repo, self.tokenizer, self.config.vocab_size, self._thread
                )
        return self._drafts[path_or_repo]

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
        self, model: AsyncDistributedModel, prompt: Prompt, session: TokenSession | None, options: Options
    ) -> None:
        self._model = model
        self._options = options
        self._prompt_ids = model.encode(prompt)
        self._chooser = options.chooser(len(self._prompt_ids))
        self._chooser.penalties.check(model.config.vocab_size)
        self._stop_ids = model.tokenizer.eos_ids | frozenset(options.stop_ids)
        self._stop_texts = options.stop_texts()
        self._choices: list[Choice] = []
        self._given = session
        self._session = session or model.session(
            min(len(self._prompt_ids) + options.max_new_tokens, model.config.max_position_embeddings)
        )

    async def pieces(self) -> AsyncGenerator[str, None]:
        async with AsyncExitStack() as stack:
            speculation = await self._model.speculation(self._session, self._options.speculate)
            if self._given is None:
                await stack.enter_async_context(self._session)
            text = self._model.tokenizer.stream(self._prompt_ids)
            tokens = generate_tokens(
                self._session,
                self._prompt_ids,
                self._chooser,
                max_new_tokens=self._options.max_new_tokens,
                stop_ids=self._stop_ids,
                speculation=speculation,
            )
            async with aclosing(tokens):
                async for choice in tokens:
                    self._choices.append(choice)
                    if choice.token_id in self._stop_ids:
                        break
                    if piece := self._stop_texts.step(text.step(choice.token_id)):
                        yield piece
                    if self._stop_texts.found is not None:
                        break
            if tail := self._stop_texts.step(text.flush()) + self._stop_texts.flush():
                yield tail

    def generation(self, text: str) -> Generation:
        token_ids = [choice.token_id for choice in self._choices]
        stopped = token_ids[-1] in self._stop_ids or self._stop_texts.found is not None
        return Generation(
            text=text,
            token_ids=token_ids,
            logprobs=[choice.logprob for choice in self._choices],
            finish_reason=STOP if stopped else LENGTH,
            trace=self._session.trace,
            alternatives=[choice.alternatives for choice in self._choices] if self._options.logprobs else [],
        )
