"""Sessions over long links: a client and three servers, each on a host of its own of the lab.

A tiny random Llama of 8 blocks shows what the network costs, SmolLM2 what a user sees: a step is one trip
through the chain, tokens/s count what the client computes, too. Without the lab (it takes root) the same on
loopback, and the rows say so. Then a prefill of 2,048 tokens, its chunks one after another and pipelined.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.lab import HostSpec, Lab, LabUnavailable
from benchmarks.report import Check, Report
from petalite.client.settings import ROUTES
from petalite.node.processes import NodeProcess, serve_node
from petalite.node.smollm2 import smollm2_folder
from tests.helpers.checkpoints import tiny_llama

RATE_BITS_S = 100e6
RTTS_MS = (5, 20, 100)
SERVERS = ("s1", "s2", "s3")
TINY_SPANS = ("0:3", "3:6", "6:8")
SMOLLM2_SPANS = ("0:10", "10:20", "20:30")
PROMPT = "The history of the city begins with"
NEW_TOKENS = 40
PREFILL_TOKENS, CHUNK_TOKENS = 2048, 128
BARE_PORT = 31331
BARE_BYTES = {"tiny": 4 * 256 + 128, "SmolLM2": 4 * 576 + 128}  # a step: float32 states, and the rest
LOOPBACK = "loopback"
CODEC_ROUNDS = 3
PARTS = (*(f"{rtt_ms} ms" for rtt_ms in RTTS_MS), "prefill", "codecs")
# Milliseconds from token to token over such a lab, by round trip.
PETALS_MS = {5: 38.8, 20: 83.3, 100: 323.7}  # Petals itself, a tiny model, three servers
LLAMA_CPP_MS = {5: 49.0, 20: 93.0, 100: 370.0}  # llama.cpp's RPC, SmolLM2, three servers

Wrap = Callable[[str, Sequence[str]], list[str]]


def run(only: str = "") -> Report:
    """All parts, or those whose names contain `only`."""
    return asyncio.run(_measure(only))


async def _measure(only: str) -> Report:
    report = Report("wan", ("where", "what", "route", "ms", "of it computing", "tokens/s"))
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512}
        tiny = str(tiny_llama(Path(folder) / "tiny", **sizes))
        for rtt_ms in RTTS_MS:
            if only in f"{rtt_ms} ms":
                for name, nbytes in BARE_BYTES.items():
                    await _bare_ring(report, rtt_ms, name, nbytes)
                await _steps(report, rtt_ms, "tiny", tiny, TINY_SPANS, ["steps", {}])
                text = ["generate", {"prompt": PROMPT, "new_tokens": NEW_TOKENS}]
                smollm2 = str(smollm2_folder())
                await _steps(report, rtt_ms, "SmolLM2", smollm2, SMOLLM2_SPANS, text)
                int8 = ["--quant", "int8"]
                await _steps(report, rtt_ms, "SmolLM2 int8", smollm2, SMOLLM2_SPANS, text, int8)
        if only in "prefill":
            await _prefill(report)
        if only in "codecs":
            await _codecs(report, Path(folder))
    return report


async def _steps(
    report: Report,
    rtt_ms: int,
    name: str,
    model: str,
    spans: Sequence[str],
    deed: list[Any],
    options: Sequence[str] = (),
) -> None:
    where, rows = await at(rtt_ms, model, spans, {route: [deed] for route in ROUTES}, options)
    for route, (result,) in rows.items():
        _row(report, where, name, route, result)
    if where != LOOPBACK:
        _check(report, rtt_ms, name, rows["ring"][0])


async def _bare_ring(report: Report, rtt_ms: int, name: str, nbytes: int) -> None:
    """What the lab and the kernel take of a step: as many bytes through the same ring, by sockets alone."""
    with contextlib.suppress(LabUnavailable):
        async with Lab(_hosts(rtt_ms)) as lab:
            for host, successor in itertools.pairwise((*SERVERS, "client")):
                await _probe(lab, host, "relay", lab.address(successor), BARE_PORT, nbytes)
            going = await _probe(lab, "client", "ring", lab.address("s1"), BARE_PORT, nbytes, NEW_TOKENS)
            assert going.stdout is not None
            trips_ms = [float(line) * 1e3 for line in (await going.stdout.read()).split()]
        trip_ms = statistics.median(trips_ms)
        report.rows.append((f"{rtt_ms} ms", f"sockets alone, a round of {name}'s", "ring", trip_ms, "", ""))
        report.results[f"{rtt_ms} ms {name} sockets alone"] = {"step_ms": trip_ms}


async def _probe(lab: Lab, host: str, *arguments: object) -> asyncio.subprocess.Process:
    """A `benchmarks.lab.probe` on a host, once it listens. It ends with the lab at the latest."""
    command = [sys.executable, "-m", "benchmarks.lab.probe", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(
        *lab.command(host, command), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


def _hosts(rtt_ms: float) -> list[HostSpec]:
    """The client's and the servers'."""
    return [HostSpec(host, rtt_ms / 4e3, rate_bits_s=RATE_BITS_S) for host in ("client", *SERVERS)]


async def _prefill(report: Report) -> None:
    """2,048 tokens of SmolLM2 at 20 ms."""
    deeds = [
        ["prefill", {"tokens": PREFILL_TOKENS, "chunk": CHUNK_TOKENS, "pipelined": pipelined}]
        for pipelined in (False, True)
    ]
    where, rows = await at(20, str(smollm2_folder()), SMOLLM2_SPANS, {"ring": deeds})
    one_by_one, pipelined = (result["seconds"] for result in rows["ring"])
    for what, seconds in (("one by one", one_by_one), ("pipelined", pipelined)):
        name = f"prefill of {PREFILL_TOKENS}, {what}"
        report.rows.append((where, name, "ring", seconds * 1e3, "", PREFILL_TOKENS / seconds))
        report.results[f"{where} prefill {what}"] = {"seconds": seconds}
    gain = one_by_one / pipelined
    report.checks.append(Check(f"{where}: pipelined prefill against one by one", gain, "×", 1.4, "at least"))


async def _codecs(report: Report, folder: Path) -> None:
    """A prefill that the wire bounds: wide states, next to nothing to compute, and links whose TCP is past
    its start."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 1024, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    wide = str(tiny_llama(folder / "wide", **sizes))
    options = {"tokens": PREFILL_TOKENS, "chunk": CHUNK_TOKENS, "pipelined": True, "before": PREFILL_TOKENS}
    deeds = [["prefill", options | {"wire": wire}] for wire in ("bf16", "q8")] * CODEC_ROUNDS
    where, rows = await at(20, wide, ("0:1", "1:2", "2:3"), {"ring": deeds})
    seconds = [result["seconds"] for result in rows["ring"]]
    bf16, q8 = statistics.median(seconds[::2]), statistics.median(seconds[1::2])
    for wire, seconds in (("bf16", bf16), ("q8", q8)):
        name = f"prefill of {PREFILL_TOKENS} × 1,024 values in {wire}"
        report.rows.append((where, name, "ring", seconds * 1e3, "", PREFILL_TOKENS / seconds))
        report.results[f"{where} wide prefill in {wire}"] = {"seconds": seconds}
    report.checks.append(Check(f"{where}: q8 against bf16, wire-bound", bf16 / q8, "×", 1.6, "at least"))


def _row(report: Report, where: str, name: str, route: str, result: dict[str, Any]) -> None:
    rate = 1e3 / result["token_ms"]
    report.rows.append((where, f"{name}, a step", route, result["step_ms"], result["compute_ms"], rate))
    report.results[f"{where} {name} {route}"] = result


def _check(report: Report, rtt_ms: int, name: str, ring: dict[str, Any]) -> None:
    bound = ring["compute_ms"] + 4 * rtt_ms / 2 + len(SERVERS)
    report.checks.append(Check(f"{rtt_ms} ms, {name}: a step over the ring", ring["step_ms"], "ms", bound))
    rival, rival_ms = ("Petals", PETALS_MS) if name == "tiny" else ("llama.cpp's RPC", LLAMA_CPP_MS)
    faster = rival_ms[rtt_ms] / ring["token_ms"]
    report.checks.append(Check(f"{rtt_ms} ms, {name}: tokens/s beside {rival}", faster, "×", 1.0, "at least"))


Deeds = dict[str, list[list[Any]]]
"""By route, what `benchmarks.driver` is to do."""


async def at(
    rtt_ms: int | None, model: str, spans: Sequence[str], deeds: Deeds, options: Sequence[str] = ()
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Where it was measured, and the results by route; None is loopback."""
    try:
        if rtt_ms is None:
            raise LabUnavailable("none was asked for")
        async with Lab(_hosts(rtt_ms)) as lab, _swarm(model, spans, lab, options) as peers:
            return f"{rtt_ms} ms", await drive(model, peers, deeds, lab.command)
    except LabUnavailable as error:
        print(f"no lab, so on loopback: {error}", file=sys.stderr)
    async with _swarm(model, spans, None, options) as peers:
        return LOOPBACK, await drive(model, peers, deeds, lambda host, command: list(command))


@asynccontextmanager
async def _swarm(
    model: str, spans: Sequence[str], lab: Lab | None, options: Sequence[str]
) -> AsyncIterator[list[str]]:
    """Servers of `spans`, each on its host; the first one's address."""
    async with AsyncExitStack() as stack:
        nodes: list[NodeProcess] = []
        for host, span in zip(SERVERS, spans, strict=True):
            peers = [await asyncio.to_thread(lambda: nodes[0].address)] if nodes else []
            if lab is None:
                node = serve_node(model, span, peers, *options)
            else:
                listen = f"/ip4/{lab.address(host)}/tcp/31330"
                node = serve_node(model, span, peers, *options, listen=listen, wrap=_on(lab, host))
            nodes.append(stack.enter_context(node))
        for node in nodes:
            await asyncio.to_thread(lambda node=node: node.address)
        yield [str(nodes[0].address)]


def _on(lab: Lab, host: str) -> Callable[[list[str]], list[str]]:
    return lambda command: lab.command(host, command)


async def drive(model: str, peers: list[str], deeds: Deeds, wrap: Wrap) -> dict[str, list[dict[str, Any]]]:
    """What the deeds give from the host `client`."""
    results = {}
    for route, todo in deeds.items():
        order = json.dumps({"model": model, "peers": peers, "route": route, "do": todo})
        command = wrap("client", [sys.executable, "-m", "benchmarks.driver", order])
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"the client ended with code {process.returncode}")
        results[route] = json.loads(output)
    return results
