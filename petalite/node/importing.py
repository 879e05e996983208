"""`import-gguf`: a GGUF file becomes a model folder."""

from __future__ import annotations

from pathlib import Path

from petalite.model.gguf import import_gguf
from petalite.node.console import out, progress


def run(file: Path, folder: Path, dtype: str) -> None:
    with progress(f"importing {file.name}") as report:
        import_gguf(file, folder, dtype=dtype, progress=report)
    out.print(f"wrote {folder}; serve it with: python -m petalite.node serve {folder} --new-swarm")
