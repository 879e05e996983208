"""A client in a process of its own, for benchmarks that put it on a host of the lab.

    python -m benchmarks.driver '{"model": …, "peers": […], "route": "ring", "do": [["steps", {…}], …]}'

Prints one line of JSON: what each of `do` gave.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

import petalite
from petalite.client.servers import SwarmServers
from petalite.client.session import Session, StepInput
from petalite.client.settings import RING, Routing, SessionSettings
from petalite.model.checkpoint import Checkpoint
from petalite.net.identity import Identity
from petalite.net.loop import new_event_loop
from petalite.net.multiaddr import Multiaddr
from petalite.swarm.directory import Directory
from petalite.swarm.messages import LAST, NONE
from petalite.swarm.peer import PeerSettings, SwarmPeer
from petalite.swarm.spans import Span


@asynccontextmanager
async def hidden_session(
    model: str,
    peers: list[str],
    max_length: int,
    route: str = RING,
    span: Span | None = None,
    wire: str | None = None,
) -> AsyncIterator[Session]:
    """A session of hidden states over a swarm; over all blocks, or `span`."""
    checkpoint = Checkpoint.open(model)
    span = span or Span(0, checkpoint.config.n_blocks)
    settings = PeerSettings(bootstrap=tuple(map(Multiaddr.parse, peers)))
    async with SwarmPeer(Identity.generate(), settings) as peer:
        directory = Directory(peer.dht, checkpoint.model_id(), span)
        servers = SwarmServers(peer.host, directory, routing=Routing(route))
        hidden_size = checkpoint.config.hidden_size
        limits = SessionSettings(wire=wire)
        async with Session(servers, span, hidden_size, max_length=max_length, settings=limits) as session:
            yield session


async def steps(
    model: str, peers: list[str], route: str, *, prefix: int = 16, count: int = 40
) -> dict[str, Any]:
    """Decode steps of random states: medians in milliseconds."""
    width = Checkpoint.open(model).config.hidden_size
    async with hidden_session(model, peers, prefix + count, route) as session:
        await session.step(torch.randn(prefix, width), [(0, 0, prefix)], NONE)
        for offset in range(count):
            await session.step(torch.randn(1, width), [(0, prefix + offset, 1)])
        timings = list(session.trace.steps)[-count:]
        step_ms = statistics.median(timing.total_s for timing in timings) * 1e3
        return {
            "step_ms": step_ms,
            "token_ms": step_ms,
            "compute_ms": statistics.median(
                sum(hop.compute_s + hop.queue_s for hop in timing.hops) for timing in timings
            )
            * 1e3,
            "hops": len(session.chain),
        }


async def prefill(
    model: str,
    peers: list[str],
    route: str,
    *,
    tokens: int,
    chunk: int,
    pipelined: bool,
    wire: str | None = None,
    before: int = 1,
) -> dict[str, Any]:
    """Seconds until the last of `tokens` random states has come out, after as many `before` that are rolled
    back: links are up then, and if there were many of them TCP knows what they carry."""
    width = Checkpoint.open(model).config.hidden_size
    async with hidden_session(model, peers, tokens + 1, route, wire=wire) as session:

        def parts_of(total: int) -> list[StepInput]:
            sizes = [(at, min(chunk, total - at)) for at in range(0, total, chunk)]
            return [StepInput(torch.randn(size, width), [(0, at, size)], LAST) for at, size in sizes]

        await session.steps(parts_of(before))
        parts = parts_of(tokens)
        began_s = time.perf_counter()
        if pipelined:
            await session.steps(parts)
        else:
            for part in parts:
                await session.steps([part])
        return {"seconds": time.perf_counter() - began_s}


async def generate(
    model: str, peers: list[str], route: str, *, prompt: str, new_tokens: int
) -> dict[str, Any]:
    """Milliseconds of a step through the chain, and from token to token: embedding, head and choice, too. The
    prompt is left out."""
    async with petalite.Swarm(peers) as swarm:
        opened = await swarm.model(model, routing=Routing(route))
        ids = opened.encode(prompt)
        async with opened.session(len(ids) + new_tokens) as session:
            await session.feed(ids[:-1])
            began_s = time.perf_counter()
            result = await opened.generate(ids, max_new_tokens=new_tokens, session=session)
            seconds = time.perf_counter() - began_s
        timings = [timing for timing in result.trace.steps if timing.n_tokens == 1]
        return {
            "step_ms": statistics.median(timing.total_s for timing in timings) * 1e3,
            "compute_ms": statistics.median(sum(hop.compute_s for hop in timing.hops) for timing in timings)
            * 1e3,
            "token_ms": seconds / len(result.token_ids) * 1e3,
            "tokens": len(result.token_ids),
        }


async def speculate(
    model: str,
    peers: list[str],
    route: str,
    *,
    prompt: Any,
    new_tokens: int,
    rounds: int,
    guessing: dict[str, str],
) -> dict[str, Any]:
    """Tokens/s of a text without and with guesses, by the names in `guessing`, in turns, the prompt left out;
    medians, and the steps that each took."""
    ways: dict[str, str | None] = {"plain": None, **guessing}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, int] = {}
    texts: set[tuple[int, ...]] = set()
    async with petalite.Swarm(peers) as swarm:
        opened = await swarm.model(model, routing=Routing(route))
        ids = opened.encode(prompt)
        for how in guessing.values():  # a small model is loaded once
            await opened.generate(ids, max_new_tokens=2, speculate=how)
        for _ in range(rounds):
            for name, how in ways.items():
                async with opened.session(len(ids) + new_tokens) as session:
                    await session.feed(ids[:-1])
                    began_s = time.perf_counter()
                    result = await opened.generate(
                        ids, max_new_tokens=new_tokens, speculate=how, session=session
                    )
                    rates[name].append(len(result.token_ids) / (time.perf_counter() - began_s))
                steps[name] = len(result.trace.steps) - 1
                texts.add(tuple(result.token_ids))
    [text] = texts  # or guessing has changed it
    medians = {name: statistics.median(samples) for name, samples in rates.items()}
    return {"tokens": len(text), "rates": medians, "steps": steps}


async def beams(
    model: str, peers: list[str], route: str, *, prompt: Any, new_tokens: int, beams: list[int]
) -> dict[str, Any]:
    """Milliseconds for each token of a text: greedily, and by searches with so many beams, their head and
    choice included."""
    found: dict[str, Any] = {}
    async with petalite.Swarm(peers) as swarm:
        opened = await swarm.model(model, routing=Routing(route))
        await opened.generate(prompt, max_new_tokens=2)
        for count in (1, *beams):
            began_s = time.perf_counter()
            if count == 1:
                best = await opened.generate(prompt, max_new_tokens=new_tokens)
            else:
                best, *_ = await opened.beam_search(
                    prompt, beams=count, max_new_tokens=new_tokens, length_penalty=0.0
                )
            seconds, steps = time.perf_counter() - began_s, len(best.trace.steps)
            found[str(count)] = {"token_ms": seconds / steps * 1e3, "logprob": sum(best.logprobs)}
    return found


DEEDS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "steps": steps,
    "prefill": prefill,
    "generate": generate,
    "speculate": speculate,
    "beams": beams,
}


async def _run(order: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        await DEEDS[deed](order["model"], order["peers"], order["route"], **options)
        for deed, options in order["do"]
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        print(json.dumps(runner.run(_run(json.loads(sys.argv[1])))))
