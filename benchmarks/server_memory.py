"""What a server's sessions take, as the formulas predict and as a process grows; and the server process
itself.

Keys and values are those of rows that real blocks filled, kept inputs those that a session keeps, each in a
process of its own, whose memory is read between the first row and the last. malloc is told to keep nothing of
what is freed, or its scratch for the next product would be counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.driver import hidden_session
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
from petalite.net.loop import new_event_loop
from petalite.node.processes import serve_node
from petalite.swarm.codecs import CODECS
from petalite.swarm.kept import KeptInputs
from tests.helpers.checkpoints import tiny_llama

SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 4}
HIDDEN, BLOCKS = SIZES["hidden_size"], SIZES["num_hidden_layers"]
ROWS = 8
TOKENS = 2048  # of each
CHUNK = 256
KEEPS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
PREDICTED = {  # bytes per token, of keys and values per token and block
    "keys and values, float32": 2 * HIDDEN * 4,
    "keys and values, bfloat16": 2 * HIDDEN * 2,
    "kept inputs, f32": HIDDEN * 4,
    "kept inputs, bf16": HIDDEN * 2,
    "kept inputs, q8": HIDDEN + HIDDEN // 64 * 2,
}


def sessions() -> dict[str, tuple[float, float]]:
    """Bytes predicted and measured, per token; keys and values per token and block."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny_llama(Path(folder) / "model", max_position_embeddings=TOKENS, **SIZES))
        for what, predicted in PREDICTED.items():
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.server_memory", model, what],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | KEEPS_NOTHING,
            )
            found[what] = (predicted, json.loads(ran.stdout.splitlines()[-1]))
    return found


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


def _cached(model: str, dtype: torch.dtype) -> float:
    """Bytes per token and block."""
    span = load_span(Checkpoint.open(model), 0, BLOCKS, dtype=dtype)
    cache, sizes = span.new_cache(), []
    for _ in range(ROWS):
        row = cache.open_row(TOKENS)
        for position in range(0, TOKENS, CHUNK):
            span.forward(torch.randn(CHUNK, HIDDEN), [Segment(row, position, CHUNK)], cache)
        sizes.append(resident_bytes("self"))
    return (sizes[-1] - sizes[0]) / (ROWS - 1) / TOKENS / BLOCKS


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
    _, _model, _what = sys.argv
    _kind, _, _how = _what.partition(", ")
    print(_cached(_model, getattr(torch, _how)) if _kind == "keys and values" else _kept(_how))
