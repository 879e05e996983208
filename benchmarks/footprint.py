"""What a node costs: start time and memory of a bootstrap node; of a server, the bytes of a few blocks that
it reads from disk, the memory of its process, and of its sessions beside what formulas predict.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import server_memory
from benchmarks.report import Check, Report
from petalite.model.checkpoint import Checkpoint
from petalite.node.processes import bootstrap_node
from petalite.node.smollm2 import smollm2_folder

PARTS = ("bootstrap", "disk", "server")
STARTS = 7
SPAN = (0, 10)
_LOAD = """
import json, pathlib, re, sys
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import load_span
def read():  # off disks, for this process
    return int(re.search(r"^read_bytes: (\\d+)", pathlib.Path("/proc/self/io").read_text(), re.M)[1])
folder, again, start, end = sys.argv[1:]
load_span(Checkpoint.open(again), int(start), int(end))  # what is read once in a process, modules too
checkpoint, before = Checkpoint.open(folder), read()
span = load_span(checkpoint, int(start), int(end))
print(json.dumps({"named": checkpoint.bytes_read, "read": read() - before}))
"""


def run(only: str = "") -> Report:
    report = Report("footprint", ("what", "value", "unit"))
    for part, measure in zip(PARTS, (_bootstrap, _disk, _server), strict=True):
        if only in part:
            measure(report)
    return report


def _show(report: Report, *rows: tuple[str, float, str]) -> None:
    for what, value, unit in rows:
        report.rows.append((what, value, unit))
        report.results[what] = {"value": value, "unit": unit}


def _server(report: Report) -> None:
    process_mb = server_memory.process_mb()
    _show(report, ("server process with 0.4 MB of weights: resident memory", process_mb, "MB"))
    report.checks.append(Check("server process without weights", process_mb, "MB", 350.0))
    for what, (predicted, measured) in server_memory.sessions().items():
        for how, nbytes in (("predicted", predicted), ("measured", measured)):
            _show(report, (f"{what}: {how}", nbytes, "B per token"))
        report.checks.append(Check(f"{what}: measured over predicted", measured / predicted, "×", 1.1))


def _disk(report: Report) -> None:
    with tempfile.TemporaryDirectory(dir=Path.home()) as own:  # a copy that no other process has mapped
        folder = Path(shutil.copytree(smollm2_folder(), Path(own) / "model"))
        named, read, expected, whole = _server_bytes(folder)
    _show(
        report,
        (f"weights of SmolLM2's blocks {SPAN[0]}:{SPAN[1]}", expected / 1e6, "MB"),
        ("of the file, tensors that a server of them asks for", named / 1e6, "MB"),
        ("read off the disk to load them", read / 1e6, "MB"),
        ("the whole file", whole / 1e6, "MB"),
    )
    report.checks += [
        Check("tensors asked for, over those of the blocks", named / expected, "×", 1.0),
        Check("bytes read, over the blocks'", read / expected, "×", 1.02),
    ]


def _bootstrap(report: Report) -> None:
    starts_s, memory_mb = [], 0.0
    for _ in range(STARTS):
        with bootstrap_node() as node:
            assert node.address
            starts_s.append(node.ready_s or 0.0)
            memory_mb = max(memory_mb, _resident_mb(node.pid))
    start_s = statistics.median(starts_s)
    _show(
        report,
        ("bootstrap node: start to printed address, median", start_s, "s"),
        ("bootstrap node: resident memory", memory_mb, "MB"),
    )
    report.checks += [
        Check("bootstrap start", start_s, "s", 1.0),
        Check("bootstrap memory", memory_mb, "MB", 60.0),
    ]


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("the kernel does not tell a process's memory")


def _server_bytes(folder: Path) -> tuple[int, int, int, int]:
    """Bytes asked for, bytes that came off the disk, bytes the blocks have, bytes of the file."""
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    prefixes = [checkpoint.family.names.block_prefix.format(block=block) for block in range(*SPAN)]
    expected = sum(_stored_bytes(checkpoint, prefix) for prefix in prefixes)
    _evict(path)
    arguments = [folder, smollm2_folder(), *SPAN]
    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    found = json.loads(loaded.stdout.splitlines()[-1])
    return found["named"], found["read"], expected, path.stat().st_size


def _stored_bytes(checkpoint: Checkpoint, prefix: str) -> int:
    from safetensors import safe_open

    with safe_open(checkpoint.folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in checkpoint.names(prefix))


def _evict(path: Path) -> None:
    """Out of the page cache, so that what comes back was read anew."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
