"""`quantize`: blocks of a model become a folder that servers load directly."""

from __future__ import annotations

from pathlib import Path

from petalite.model.checkpoint import Checkpoint
from petalite.model.loading import quantize_folder
from petalite.node.console import out, progress
from petalite.swarm.spans import Span


def run(model: str, quant: str, blocks: str | None, folder: Path) -> None:
    checkpoint = Checkpoint.open(model)
    span = Span(0, checkpoint.config.n_blocks) if blocks is None else Span.parse(blocks)
    with progress(f"quantizing blocks {span.start}:{span.end} of {checkpoint.name}") as report:
        quantize_folder(checkpoint, span.start, span.end, quant, folder, report)
    size = sum(path.stat().st_size for path in folder.iterdir())
    out.print(f"wrote {folder}, {size >> 20} MiB; serve it with: python -m petalite.node serve {folder}")
