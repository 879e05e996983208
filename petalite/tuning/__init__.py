"""Adapting a model whose blocks are elsewhere: the trained part and its optimizer are here.

    lora = tuning.Lora(model, rank=8)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-3)
    loss = cross_entropy(lora(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # through the servers' blocks, which stay as they are
    optimizer.step()
    version = tuning.save_version("versions", lora, metrics={"loss": float(loss)})

Names are loaded when they are first used: importing this loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petalite.model.versions import Card, Version, diff, lineage, list_versions
    from petalite.tuning.lora import Lora
    from petalite.tuning.modules import Adapter, Between, Classifier, DeepPrompts, PromptTuning, Tuned
    from petalite.tuning.saving import load_version, save_version

__all__ = [
    "Adapter",
    "Between",
    "Card",
    "Classifier",
    "DeepPrompts",
    "Lora",
    "PromptTuning",
    "Tuned",
    "Version",
    "diff",
    "lineage",
    "list_versions",
    "load_version",
    "save_version",
]

_HOMES = {
    **dict.fromkeys(("Card", "Version", "diff", "lineage", "list_versions"), "petalite.model.versions"),
    **dict.fromkeys(
        ("Adapter", "Between", "Classifier", "DeepPrompts", "PromptTuning", "Tuned"),
        "petalite.tuning.modules",
    ),
    "Lora": "petalite.tuning.lora",
    **dict.fromkeys(("load_version", "save_version"), "petalite.tuning.saving"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'petalite.tuning' has no attribute {name!r}")
