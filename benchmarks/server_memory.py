"""What a server's sessions take, as the formulas predict and as a process grows; and the server process
itself.

Servers are real ones, run as anybody runs them, and their clients' sessions fill their caches; what is kept
for a successor is also measured alone, in a process that does nothing else. Memory is read between the first
session and the last.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import torch

from benchmarks.driver import hidden_session
from petalite.net.loop import new_event_loop
from petalite.node.processes import NodeProcess, serve_node
from petalite.swarm.codecs import CODECS
from petalite.swarm.kept import KeptInputs
from petalite.swarm.messages import NONE
from tests.helpers.checkpoints import tiny_llama

SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 4}
HIDDEN, BLOCKS = SIZES["hidden_size"], SIZES["num_hidden_layers"]
ROWS = 8  # sessions of one row
TOKENS = 2048  # of each
CHUNK = 256  # of them in one step; the last so many come one by one
KEYS_AND_VALUES = {"float32": 2 * HIDDEN * 4, "bfloat16": 2 * HIDDEN * 2}  # bytes per token and block
KEPT = {"f32": HIDDEN * 4, "bf16": HIDDEN * 2, "q8": HIDDEN + HIDDEN // 64 * 2}  # bytes per token


def sessions() -> dict[str, tuple[float, float]]:
    """Bytes per token of sessions, predicted and measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=new_event_loop) as runner:
        model = str(tiny_llama(Path(folder) / "model", max_position_embeddings=TOKENS, **SIZES))
        for dtype, block_bytes in KEYS_AND_VALUES.items():
            predicted = BLOCKS * block_bytes
            found[f"a server, {dtype}"] = (predicted, runner.run(_served(model, dtype, [f"0:{BLOCKS}"])))
        half = BLOCKS // 2
        predicted = half * KEYS_AND_VALUES["bfloat16"] + KEPT["bf16"]
        spans = [f"0:{half}", f"{half}:{BLOCKS}"]
        found["the first of two, bfloat16"] = (predicted, runner.run(_served(model, "bfloat16", spans)))
    for codec, predicted in KEPT.items():
        command = [sys.executable, "-m", "benchmarks.server_memory", codec]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"kept inputs alone, {codec}"] = (predicted, json.loads(ran.stdout.splitlines()[-1]))
    return found


async def _served(model: str, dtype: str, spans: list[str]) -> float:
    """What the first of some servers grows by."""
    sizes: list[int] = []
    async with AsyncExitStack() as stack:
        nodes: list[NodeProcess] = []
        for span in spans:
            peers = [node.address for node in nodes[:1]]
            nodes.append(stack.enter_context(serve_node(model, span, peers, "--dtype", dtype)))
            await asyncio.to_thread(lambda: nodes[-1].address)
        for _ in range(ROWS):
            session = await stack.enter_async_context(hidden_session(model, [str(nodes[0].address)], TOKENS))
            lengths = [CHUNK] * (TOKENS // CHUNK - 1) + [1] * CHUNK
            for position, count in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
                await session.step(torch.randn(count, HIDDEN), [(0, position, count)], NONE)
            sizes.append(resident_bytes(str(nodes[0].pid)))
    return (sizes[-1] - sizes[0]) / (ROWS - 1) / TOKENS


def process_mb() -> float:
    """Resident memory of a server that served a session, all of its weights under a megabyte."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = str(tiny_llama(Path(folder) / "model"))
        node = stack.enter_context(serve_node(model, "0:3", []))
        peers = [str(node.address)]
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_use(model, peers))
        return resident_bytes(str(node.pid)) / 1e6


async def _use(model: str, peers: list[str]) -> None:
    async with hidden_session(model, peers, 64) as session:
        await session.step(torch.randn(32, 64), [(0, 0, 32)])
        for position in range(32, 64):
            await session.step(torch.randn(1, 64), [(0, position, 1)])


# -- in a process of its own ---------------------------------------------------------------------------------


def _kept(codec: str) -> float:
    """Bytes per token; half of them came in a prefill, half one by one."""
    kept, sizes = KeptInputs(CODECS[codec], HIDDEN), []
    for row in range(ROWS):
        for position in range(0, TOKENS // 2, CHUNK):
            kept.put([(row, position, CHUNK)], memoryview(CODECS[codec].encode(torch.randn(CHUNK, HIDDEN))))
        for position in range(TOKENS // 2, TOKENS):
            kept.put([(row, position, 1)], memoryview(CODECS[codec].encode(torch.randn(1, HIDDEN))))
        sizes.append(resident_bytes("self"))
    return (sizes[-1] - sizes[0]) / (ROWS - 1) / TOKENS


def resident_bytes(process: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell a process's memory")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_kept(sys.argv[1]))
