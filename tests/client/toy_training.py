"""Servers of toy blocks that train, in memory: real arithmetic under autograd, and faults at any call.

A block adds tanh(running mean · Wᵀ) to what enters; its one linear, `mix`, takes a LoRA. `reference` is the
same in one piece of torch.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import torch
from safetensors.torch import load
from torch import Tensor

from petalite.client.hops import NOTHING_MORE, Wanted
from petalite.client.settings import TrainingSettings
from petalite.errors import BatchTooLarge, ConnectionLost, DeadlineExceeded, NotKept, UnknownAdapter
from petalite.net.identity import PeerId
from petalite.net.messages import Buffer
from petalite.swarm.bans import Bans
from petalite.swarm.messages import HopReport
from petalite.swarm.routing import Candidate, Hop, sample_chain
from petalite.swarm.spans import Span
from petalite.swarm.training import (
    ADAPTER,
    HIDDEN,
    PROMPTS,
    SpanGradients,
    SpanInputs,
    SpanOutputs,
    adapter_digest,
)

E = 4
MODEL_ID = "toy@0"
REPORT = HopReport(0.0, 1.0)
LATENCY_S = 0.1
COMPUTE_S = 1.0  # of one call at one server, which computes one at a time


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def weight(block: int) -> Tensor:
    return torch.randn(E, E, generator=torch.Generator().manual_seed(block))


def reference(
    span: Span,
    hidden: Tensor,
    prompts: Tensor | None = None,
    lora: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """hidden (B, T, E) through the blocks of `span`; lora is by names, as the client has it."""
    for block in span.blocks:
        if prompts is not None:
            added = prompts[block - span.start]
            hidden = torch.cat((hidden[:, : len(added)] + added, hidden[:, len(added) :]), dim=1)
        mix = weight(block)
        if lora and f"blocks.{block}.mix.lora_A" in lora:
            mix = mix + scale * lora[f"blocks.{block}.mix.lora_B"] @ lora[f"blocks.{block}.mix.lora_A"]
        counts = torch.arange(1, hidden.shape[1] + 1).view(-1, 1)
        hidden = hidden + torch.tanh(hidden.cumsum(1) / counts @ mix.T)
    return hidden


class ToyServer:
    """Implements `swarm.training.SpanTraining`."""

    def __init__(self, swarm: ToySwarm, who: PeerId, span: Span) -> None:
        self.swarm, self.who, self.span = swarm, who, span
        self.most_tokens = 1 << 20
        self.adapters: dict[bytes, dict[str, Tensor]] = {}
        self.kept: dict[bytes, SpanInputs] = {}
        self.calls: Counter[str] = Counter()
        self.places = asyncio.Semaphore(1)
        self.tokens = itertools.count()

    async def forward(self, span: Span, inputs: SpanInputs, *, keep: bool = False) -> SpanOutputs:
        await self._compute("forward", span, inputs.hidden)
        token = next(self.tokens).to_bytes(16, "big") if keep and self.swarm.keeps else None
        if token is not None:
            self.kept[token] = inputs
        with torch.no_grad():
            hidden = self._through(span, inputs.hidden, inputs.prompts, self._adapter(inputs))
        return SpanOutputs(self.swarm.spoil(self.who, "forward", hidden), REPORT, token)

    async def backward(
        self,
        span: Span,
        inputs: SpanInputs,
        gradient: Tensor,
        wants: Sequence[str],
        *,
        kept: bytes | None = None,
    ) -> SpanGradients:
        await self._compute("backward", span, inputs.hidden)
        if kept is not None:
            if kept not in self.kept:
                raise NotKept("let go of")
            inputs = self.kept.pop(kept)
        hidden = inputs.hidden.clone().requires_grad_()
        prompts = None if inputs.prompts is None else inputs.prompts.clone().requires_grad_()
        lora = {name: one.clone().requires_grad_() for name, one in self._adapter(inputs).items()}
        self._through(span, hidden, prompts, lora).backward(gradient)
        here = [
            one.grad.flatten()
            for name, one in sorted(lora.items())
            if int(name.split(".")[1]) in span and one.grad is not None
        ]
        assert hidden.grad is not None
        return SpanGradients(
            self.swarm.spoil(self.who, "backward", hidden.grad) if HIDDEN in wants else None,
            prompts.grad if prompts is not None and PROMPTS in wants else None,
            torch.cat(here) if ADAPTER in wants else None,
            REPORT,
        )

    async def put_adapter(self, blob: Buffer) -> None:
        await asyncio.sleep(LATENCY_S)
        self.calls["adapter"] += 1
        self.adapters[adapter_digest(blob)] = load(bytes(blob))

    def _through(
        self, span: Span, hidden: Tensor, prompts: Tensor | None, lora: Mapping[str, Tensor]
    ) -> Tensor:
        assert span in self.span
        return reference(span, hidden, prompts, lora, self.swarm.scale)

    def _adapter(self, inputs: SpanInputs) -> dict[str, Tensor]:
        if inputs.adapter is None:
            return {}
        if inputs.adapter not in self.adapters:
            raise UnknownAdapter("never seen")
        return self.adapters[inputs.adapter]

    async def _compute(self, which: str, span: Span, hidden: Tensor) -> None:
        self.calls[which] += 1
        self.swarm.n_calls += 1
        self.swarm.on_call(self.swarm.n_calls - 1, self.who, which)
        await asyncio.sleep(LATENCY_S)
        if hidden.shape[0] * hidden.shape[1] > self.most_tokens:
            raise BatchTooLarge("too many", None if self.most_tokens == 1 else self.most_tokens)
        async with self.places:
            await asyncio.sleep(COMPUTE_S)
        if self.who in self.swarm.silent:
            await asyncio.sleep(1e6)
        if self.who in self.swarm.dead:
            raise ConnectionLost(f"{self.who.short()} died")


class ToySwarm:
    """Implements what `Passes` needs of `client.hops.Servers`."""

    def __init__(self, spans: Mapping[int, Span], *, scale: float = 1.0, keeps: bool = True) -> None:
        self.places = {peer(number): ToyServer(self, peer(number), span) for number, span in spans.items()}
        self.scale, self.keeps = scale, keeps
        self.dead: set[PeerId] = set()
        self.silent: set[PeerId] = set()
        self.n_calls = 0
        self.on_call: Callable[[int, PeerId, str], None] = lambda number, who, which: None
        self.spoil: Callable[[PeerId, str, Tensor], Tensor] = lambda who, which, tensor: tensor
        self.failures: list[tuple[PeerId, Exception]] = []
        self.bans = Bans()
        self.random = random.Random(0)

    model_id = MODEL_ID

    async def plan(
        self, span: Span, *, fresh: bool, timeout_s: float, wanted: Wanted = NOTHING_MORE
    ) -> list[Hop]:
        await asyncio.sleep(LATENCY_S if fresh else 0)
        now_s = asyncio.get_running_loop().time()
        candidates = [
            Candidate(who, place.span, 0.01, self.bans.penalty_s(who, now_s))
            for who, place in self.places.items()
            if who not in self.dead or not fresh
        ]
        return sample_chain(candidates, span, self.random)

    def training(self, who: PeerId, settings: TrainingSettings) -> Timed:
        return Timed(self.places[who], settings)

    def failed(self, who: PeerId, error: Exception) -> None:
        self.failures.append((who, error))
        self.bans.failed(who, asyncio.get_running_loop().time())

    def succeeded(self, who: PeerId) -> None:
        self.bans.succeeded(who)

    def kill(self, number: int) -> None:
        self.dead.add(peer(number))

    def total(self, which: str) -> int:
        return sum(place.calls[which] for place in self.places.values())


class Timed:
    """A server's calls with the deadline that a link would keep."""

    def __init__(self, server: ToyServer, settings: TrainingSettings) -> None:
        self._server, self._settings = server, settings

    async def forward(self, span: Span, inputs: SpanInputs, *, keep: bool = False) -> SpanOutputs:
        async with _deadline(self._settings.call_s):
            return await self._server.forward(span, inputs, keep=keep)

    async def backward(
        self,
        span: Span,
        inputs: SpanInputs,
        gradient: Tensor,
        wants: Sequence[str],
        *,
        kept: bytes | None = None,
    ) -> SpanGradients:
        async with _deadline(self._settings.call_s):
            return await self._server.backward(span, inputs, gradient, wants, kept=kept)

    async def put_adapter(self, blob: Buffer) -> None:
        await self._server.put_adapter(blob)


@asynccontextmanager
async def _deadline(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("late") from error
