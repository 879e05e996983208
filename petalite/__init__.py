"""petalite: run and fine-tune large language models together over the Internet.

    model = petalite.load("path-or-repo", peers=["/ip4/…/tcp/31330/p2p/12D3Koo…"])
    for text in model.stream("A cat sat on", max_new_tokens=32):
        print(text, end="", flush=True)

Names are loaded when they are first used, so importing this costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from petalite.version import __version__

if TYPE_CHECKING:
    from petalite import errors
    from petalite.client.settings import Routing, SessionSettings, TrainingSettings
    from petalite.client.swarm import Swarm
    from petalite.client.sync import DistributedModel
    from petalite.facade import load
    from petalite.net.identity import Identity, PeerId
    from petalite.server.node import Node

__all__ = [
    "DistributedModel",
    "Identity",
    "Node",
    "PeerId",
    "Routing",
    "SessionSettings",
    "Swarm",
    "TrainingSettings",
    "__version__",
    "errors",
    "load",
]

_HOMES = {
    "DistributedModel": "petalite.client.sync",
    "Identity": "petalite.net.identity",
    "Node": "petalite.server.node",
    "PeerId": "petalite.net.identity",
    "Routing": "petalite.client.settings",
    "SessionSettings": "petalite.client.settings",
    "Swarm": "petalite.client.swarm",
    "TrainingSettings": "petalite.client.settings",
    "load": "petalite.facade",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("petalite.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'petalite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
