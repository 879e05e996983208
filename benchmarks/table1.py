"""Steps/s over servers that fail, as in Table 1 of arXiv 2312.08361: a chain of four stages, every call of
a stage fails with probability p, by the policy of the client.

dual cache: what petalite does. cache-less: nothing is kept at servers; every step sends the whole history,
and a stage that fails is asked again. restart: caches at servers alone; a failure begins the text anew.
Real sessions over real servers on loopback; a failure cuts the stage's session, as a crash would.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import torch

from benchmarks.report import Check, Report
from petalite.client.hops import Answer, Listener, OpenHop, Opening
from petalite.client.servers import RemoteHop, SwarmServers
from petalite.client.session import Session
from petalite.errors import ConnectionLost, PetaliteError
from petalite.model.checkpoint import Checkpoint
from petalite.net.identity import Identity, PeerId
from petalite.net.loop import new_event_loop
from petalite.node.processes import serve_node
from petalite.swarm.directory import Directory
from petalite.swarm.messages import LAST
from petalite.swarm.peer import PeerSettings, SwarmPeer
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from tests.helpers.checkpoints import tiny_llama

STAGES = 4
HIDDEN = 256
RATES = (0.0, 1e-4, 1e-3, 1e-2)
LENGTHS = (128, 1024)
LIMIT_S = 60.0  # a run that takes longer is told as far as it came
# The paper's Table 1, steps/s at the same p: not the same model or machines, so only its own ratios compare.
PAPER = {1024: {"restart": (11.4, None, 0.48, 0.0), "dual cache": (10.7, 10.4, 7.76, 2.17)}}


class Dice(SwarmServers):
    """Servers whose sessions break off, each with probability `rate` per step of the chain."""

    rate = 0.0

    def __init__(self, peer: SwarmPeer, directory: Directory, seed: int) -> None:
        super().__init__(peer.host, directory)
        self._chance = random.Random(seed)
        self._stages: list[_Doomed] = []

    async def open(self, hop: Hop, opening: Opening, listener: Listener) -> RemoteHop:
        doomed = _Doomed(listener, self)
        doomed.hop = await super().open(hop, opening, doomed)
        self._stages.append(doomed)
        return doomed.hop

    def failed(self, peer: PeerId, error: Exception) -> None:
        """The server is not to blame, and may serve again at once."""

    def roll(self) -> None:
        """Before each step."""
        self._stages = [doomed for doomed in self._stages if not doomed.is_over]
        for doomed in self._stages:
            if self._chance.random() < self.rate:
                doomed.die()


class _Doomed:
    """Stands between a hop and who listens to it."""

    hop: OpenHop

    def __init__(self, listener: Listener, dice: Dice) -> None:
        self._listener = listener
        self.is_over = False

    def answered(self, answer: Answer) -> None:
        self._listener.answered(answer)

    def link_down(self, epoch: int, reason: str) -> None:
        self._listener.link_down(epoch, reason)

    def lost(self, error: PetaliteError) -> None:
        self.is_over = True
        self._listener.lost(error)

    def die(self) -> None:
        self.hop.close()
        self.lost(ConnectionLost("the dice fell so"))


def run() -> Report:
    torch.set_num_threads(1)
    report = Report("table1", ("tokens", "policy", *(f"p = {rate:g}" for rate in RATES)))
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        sizes = {"num_hidden_layers": STAGES, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN}
        model = str(tiny_llama(Path(folder) / "tiny", **sizes))
        runner.run(_measure(model, report))
    return report


async def _measure(model: str, report: Report) -> None:
    async with _swarm(model) as (peer, directory):
        for length in LENGTHS:
            for name, policy in POLICIES.items():
                speeds = []
                for rate in RATES:
                    dice = Dice(peer, directory, seed=length)
                    dice.rate = rate
                    speeds.append(await policy(dice, length))
                report.rows.append((length, name, *speeds))
                report.results[f"{length} {name}"] = dict(zip(map(str, RATES), speeds, strict=True))
    dual = report.results[f"{LENGTHS[-1]} dual cache"]
    for rate, share in ((1e-3, 0.9), (1e-2, 0.6)):
        kept = dual[str(rate)] / dual["0.0"]
        report.checks.append(
            Check(f"dual cache at p = {rate:g}, of its own speed at 0", kept, "×", share, "at least")
        )


@asynccontextmanager
async def _swarm(model: str) -> AsyncIterator[tuple[SwarmPeer, Directory]]:
    """Four servers of a block each, and a client's place among them."""
    async with AsyncExitStack() as stack:
        nodes = [stack.enter_context(serve_node(model, "0:1", []))]
        await asyncio.to_thread(lambda: nodes[0].address)
        for block in range(1, STAGES):
            span = f"{block}:{block + 1}"
            nodes.append(stack.enter_context(serve_node(model, span, [nodes[0].address])))
        for node in nodes:
            await asyncio.to_thread(lambda node=node: node.address)
        settings = PeerSettings(bootstrap=(nodes[0].address,))
        peer = await stack.enter_async_context(SwarmPeer(Identity.generate(), settings))
        yield peer, Directory(peer.dht, Checkpoint.open(model).model_id(), Span(0, STAGES))


def _session(dice: Dice, length: int) -> Session:
    return Session(dice, Span(0, STAGES), HIDDEN, max_length=length)


async def _dual_cache(dice: Dice, length: int) -> float:
    async with _session(dice, length) as session:
        began_s = time.perf_counter()
        for position in range(length):
            dice.roll()
            await session.step(torch.randn(1, HIDDEN), [(0, position, 1)])
            if time.perf_counter() - began_s > LIMIT_S:
                break
        return (position + 1) / (time.perf_counter() - began_s)


async def _cache_less(dice: Dice, length: int) -> float:
    states = torch.randn(length, HIDDEN)
    async with _session(dice, length) as session:
        began_s = time.perf_counter()
        for position in range(length):
            dice.roll()
            await session.step(states[: position + 1], [(0, 0, position + 1)], LAST)
            if time.perf_counter() - began_s > LIMIT_S:
                break
        return (position + 1) / (time.perf_counter() - began_s)


async def _restart(dice: Dice, length: int) -> float:
    """Steps/s of a text that was finished; 0 where none was in time."""
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < LIMIT_S:
        async with _session(dice, length) as session:
            for position in range(length):
                dice.roll()
                await session.step(torch.randn(1, HIDDEN), [(0, position, 1)])
                if session.trace.recoveries:
                    break
            else:
                return length / (time.perf_counter() - began_s)
    return 0.0


POLICIES = {"restart": _restart, "cache-less": _cache_less, "dual cache": _dual_cache}
