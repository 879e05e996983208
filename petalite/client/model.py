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

from petalite.client.arguments import check_whole
from petalite.client.autograd import Lora, source_of
from petalite.client.batches import Batch
from petalite.client.beams import BeamSettings, beam_search
from petalite.client.drafters import LOOKUP, DraftModel, LookupDrafter, ModelDrafter, load_draft
from petalite.client.generation import Generation, TokenSession, generate_tokens
from petalite.client.hops import Servers
from petalite.client.options import Options
from petalite.client.passes import Passes
from petalite.client.replies import Reply
from petalite.client.sampling import Choice
from petalite.client.session import Session, StepInput
from petalite.client.settings import SessionSettings, TrainingSettings
from petalite.client.spancalls import Work
from petalite.client.speculation import Drafter, Speculation
from petalite.client.trace import Trace
from petalite.errors import InvalidArgument
from petalite.model.checkpoint import Checkpoint
from petalite.model.compute import ComputeThread, use_threads
from petalite.model.config import ModelConfig
from petalite.model.dtypes import AUTO, compute_dtype
from petalite.model.edges import Edges, load_edges
from petalite.model.tokenizer import Tokenizer, load_tokenizer
from petalite.swarm.messages import ALL, MAX_ROWS
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
        training: TrainingSettings = TrainingSettings(),
    ) -> None:
        self.edges = edges
        self.tokenizer = tokenizer
        self._servers = servers
        self._thread = thread
        self._settings = settings
        self.passes = Passes(servers, training)
        self._drafts: dict[str, DraftModel] = {}
        self._loading_draft = asyncio.Lock()
        self._trace = Trace()

    @property
    def config(self) -> ModelConfig:
        return self.edges.config

    @property
    def model_id(self) -> str:
        """What peers call it: name@digest."""
        return self._servers.model_id

    @property
    def _all_blocks(self) -> Span:
        return Span(0, self.config.n_blocks)

    async def __aenter__(self) -> AsyncDistributedModel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Free what this model holds here. Sessions still open fail; a second call does nothing."""
        self._thread.close()

    # -- text --------------------------------------------------------------------------------------------

    def session(
        self,
        max_length: int | None = None,
        *,
        lora: Lora | None = None,
        prefix: torch.Tensor | None = None,
    ) -> TokenSession:
        """Room for `max_length` tokens at every hop; by default all that the model takes. An async context
        manager, to pass to `generate` and `stream` so that a conversation goes on where it stopped.

        `lora` is a LoRA as it is now, or the digest of one that servers hold; `prefix` (P, E) hidden states
        before the first token, such as a tuned prompt.
        """
        before = 0 if prefix is None else len(prefix)
        most = self.config.max_position_embeddings - before
        length = most if max_length is None else max_length
        check_whole(max_length=length)
        if not 0 < length <= most:
            raise InvalidArgument(
                f"max_length must be from 1 to {most}, what this model takes; found {length}"
            )
        if prefix is not None:
            self.check_hidden(prefix[None])
            prefix = prefix.detach().cpu()
        session = self.blocks_session(self._all_blocks, before + length, lora=lora)
        return TokenSession(session, self.edges, self._thread, prefix)

    async def generate(
        self,
        prompt: Prompt,
        *,
        session: TokenSession | None = None,
        lora: Lora | None = None,
        prefix: torch.Tensor | None = None,
        **options: Any,
    ) -> Generation:
        """Like `stream`, waiting for the whole text."""
        run = _Run(self, prompt, session, lora, prefix, Options(**options))
        async for _ in run.pieces():
            pass
        return run.generation()

    async def generate_batch(self, prompts: Sequence[Prompt], **options: Any) -> list[Generation]:
        """Like `generate` for each of the prompts, all at once over one session; each ends by itself.

        Faster than one by one, since a step through the chain costs little more for many rows than for one.
        Takes the options of `stream`, but for `speculate` and `session`.
        """
        chosen = Options(**options)
        if chosen.speculate is not None:
            raise InvalidArgument("a batch fills its steps itself; leave out speculate")
        replies = [self.reply(prompt, chosen) for prompt in prompts]
        generations: list[Generation] = []
        for first in range(0, len(replies), MAX_ROWS):
            group = replies[first : first + MAX_ROWS]
            length = max(self.length(reply, chosen) for reply in group)
            async with self.blocks_session(self._all_blocks, length, len(group)) as session:

                def take(row: int, choice: Choice, group: list[Reply] = group) -> bool:
                    group[row].take(choice)
                    return not group[row].has_stopped

                await Batch(session, self.edges, self._thread).generate(
                    [reply.prompt_ids for reply in group],
                    [reply.chooser for reply in group],
                    chosen.max_new_tokens,
                    take,
                )
            for reply in group:
                reply.end()
            generations += [reply.generation(session.trace) for reply in group]
        return generations

    async def stream(
        self,
        prompt: Prompt,
        *,
        session: TokenSession | None = None,
        lora: Lora | None = None,
        prefix: torch.Tensor | None = None,
        **options: Any,
    ) -> AsyncGenerator[str, None]:
        """The text that follows `prompt`, in pieces as they come.

        `options` are those of `client.options.Options`: max_new_tokens=256; temperature=0.0 (greedy),
        top_k, top_p, min_p, seed; repetition_penalty, presence_penalty, frequency_penalty, logit_bias;
        stop, stop_ids; logprobs; speculate. `session` is a `model.session()` to go on in; without one,
        `lora` and `prefix` are those of `session`. Raises InvalidArgument, PromptTooLong, MissingBlocks and
        whatever else ends the text early.
        """
        run = _Run(self, prompt, session, lora, prefix, Options(**options))
        async with aclosing(run.pieces()) as pieces:
            async for piece in pieces:
                yield piece

    async def beam_search(
        self,
        prompt: Prompt,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        **options: Any,
    ) -> list[Generation]:
        """The likeliest texts that `beams` rows find together, the best first. See `client.beams`.

        Takes the penalties, `logit_bias`, `stop_ids` and `max_new_tokens` of `stream`.
        """
        settings, chosen = BeamSettings(beams, length_penalty, early_stopping), Options(**options)
        if chosen.temperature or chosen.speculate or chosen.logprobs or chosen.stop:
            raise InvalidArgument(
                "a beam search looks for the likeliest text; leave out temperature, speculate, logprobs and "
                "stop"
            )
        prompt_reply = self.reply(prompt, chosen)
        length = self.length(prompt_reply, chosen)
        async with self.blocks_session(self._all_blocks, length, beams) as session:
            found = await beam_search(
                Batch(session, self.edges, self._thread),
                prompt_reply.prompt_ids,
                settings,
                prompt_reply.chooser.penalties,
                max_new_tokens=chosen.max_new_tokens,
                stop_ids=prompt_reply.stop_ids,
            )
        generations = []
        for beam in found:
            reply = Reply(self.tokenizer, prompt_reply.prompt_ids, chosen)
            for token_id, logprob in zip(beam.token_ids, beam.logprobs, strict=True):
                reply.take(Choice(token_id, logprob))
            reply.end()
            generations.append(reply.generation(session.trace))
        return generations

    def reply(self, prompt: Prompt, options: Options) -> Reply:
        """What becomes of a prompt. Raises InvalidArgument."""
        reply = Reply(self.tokenizer, self.encode(prompt), options)
        reply.chooser.penalties.check(self.config.vocab_size)
        return reply

    def length(self, reply: Reply, options: Options) -> int:
        """Room that a prompt and its answer need, as far as the model takes so many."""
        return min(len(reply.prompt_ids) + options.max_new_tokens, self.config.max_position_embeddings)

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

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> hidden states (B, T, E)."""
        if token_ids.ndim != 2 or 0 in token_ids.shape:
            raise InvalidArgument(f"token ids have shape (B, T), found {tuple(token_ids.shape)}")
        return self.edges.embed(token_ids.reshape(-1)).view(*token_ids.shape, -1)

    async def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden states (B, T, E) -> logits (B, T, V) float32, the final norm included; differentiable."""
        logits = await self._thread.run(self.edges.head, hidden.reshape(-1, hidden.shape[-1]))
        return logits.view(*hidden.shape[:-1], -1)

    async def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids (B, T) -> logits (B, T, V) float32: one forward, nothing kept."""
        hidden = self.embed(token_ids)
        return await self.head(await self.forward_blocks(self._all_blocks, hidden))

    async def forward_blocks(self, span: Span, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, T, E), each row a text from its beginning -> (B, T, E) after the blocks of `span`."""
        self._check_open()
        self.check_hidden(hidden)
        output, _ = await self.passes.forward(Work(span), hidden)
        return output.to(hidden.dtype)

    async def feed_blocks(self, session: Session, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """hidden (B, T, E), the same T positions of every row of `session` -> (B, T, E)."""
        self.check_hidden(hidden)
        rows, _length, _ = hidden.shape
        chunk = max(1, self._settings.chunk_tokens // rows)
        inputs = []
        for part in hidden.split(chunk, dim=1):  # type: ignore[no-untyped-call]
            packed = [(row, position, part.shape[1]) for row in range(rows)]
            inputs.append(StepInput(part.reshape(-1, part.shape[2]), packed, ALL))
            position += part.shape[1]
        outputs = await session.steps(inputs)
        joined = torch.cat([output.view(rows, -1, output.shape[1]) for output in outputs], dim=1)
        return joined.to(hidden.dtype)

    def blocks_session(
        self, span: Span, max_length: int, rows: int = 1, *, lora: Lora | None = None
    ) -> Session:
        """A session over some of the blocks, for hidden states."""
        self._check_open()
        if not 0 <= span.start < span.end <= self.config.n_blocks:
            raise InvalidArgument(f"the model has blocks 0:{self.config.n_blocks}, found {span}")
        check_whole(rows=rows, max_length=max_length)
        if not (0 < rows <= MAX_ROWS and 0 < max_length <= self.config.max_position_embeddings):
            raise InvalidArgument(
                f"a session has up to {MAX_ROWS} rows of up to {self.config.max_position_embeddings} tokens, "
                f"found {rows} of {max_length}"
            )
        session = Session(
            self._servers,
            span,
            self.config.hidden_size,
            max_length=max_length,
            rows=rows,
            settings=self._settings,
            adapter=source_of(lora, self.model_id),
        )
        self._trace = session.trace
        return session

    def trace(self) -> Trace:
        """Of the latest session: each step's time at each hop, and what was replaced."""
        return self._trace

    def _check_open(self) -> None:
        if self._thread.closed:
            raise InvalidArgument("the model was closed; open it anew")

    def check_hidden(self, hidden: torch.Tensor) -> None:
        """Raises InvalidArgument unless it is (B, T, E)."""
        size = self.config.hidden_size
        if hidden.ndim != 3 or hidden.shape[2] != size or 0 in hidden.shape:
            raise InvalidArgument(f"hidden states have shape (B, T, {size}), found {tuple(hidden.shape)}")


async def open_model(
    source: str | Checkpoint,
    make_servers: MakeServers,
    *,
    dtype: str = AUTO,
    settings: SessionSettings = SessionSettings(),
    training: TrainingSettings = TrainingSettings(),
    threads: int | None = None,
) -> AsyncDistributedModel:
    """Load what a client computes of a checkpoint: a folder, a repository of the hub, or one opened
    already. `threads` of tensor work, at most the cores there are.

    Raises InvalidCheckpoint or UnsupportedModel for what cannot be loaded.
    """
    thread = ComputeThread("petalite-edges")
    try:
        await thread.run(use_threads, threads)
        checkpoint = source if isinstance(source, Checkpoint) else await thread.run(Checkpoint.open, source)
        tokenizer = await thread.run(load_tokenizer, checkpoint)
        edges = await thread.run(load_edges, checkpoint, dtype=compute_dtype(checkpoint, dtype))
        servers = await make_servers(checkpoint, thread)
    except BaseException:
        thread.close()
        raise
    return AsyncDistributedModel(edges, tokenizer, servers, thread, settings, training)


class _Run:
    """One generation under way."""

    def __init__(
        self,
        model: AsyncDistributedModel,
        prompt: Prompt,
        session: TokenSession | None,
        lora: Lora | None,
        prefix: torch.Tensor | None,
        options: Options,
    ) -> None:
        if session is not None and not (lora is None and prefix is None):
            raise InvalidArgument("a session is opened with its lora and prefix; give them to `session`")
        self._model = model
        self._options = options
        self._reply = model.reply(prompt, options)
        self._given = session
        before = 0 if prefix is None else len(prefix)
        length = min(model.length(self._reply, options), model.config.max_position_embeddings - before)
        self._session = session or model.session(length, lora=lora, prefix=prefix)

    async def pieces(self) -> AsyncGenerator[str, None]:
        reply = self._reply
        async with AsyncExitStack() as stack:
            speculation = await self._model.speculation(self._session, self._options.speculate)
            if self._given is None:
                await stack.enter_async_context(self._session)
            tokens = generate_tokens(
                self._session,
                reply.prompt_ids,
                reply.chooser,
                max_new_tokens=self._options.max_new_tokens,
                stop_ids=reply.stop_ids,
                speculation=speculation,
            )
            async with aclosing(tokens):
                async for choice in tokens:
                    if piece := reply.take(choice):
                        yield piece
                    if reply.has_stopped:
                        break
            if tail := reply.end():
                yield tail

    def generation(self) -> Generation:
        return self._reply.generation(self._session.trace)
