"""The house's one rule: a room imports only rooms on lower floors (docs/architecture.md, "The house")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "petalite"
FLOORS = {
    "errors": 0,
    "version": 0,
    "net": 1,
    "kernels": 1,
    "dht": 2,
    "model": 2,
    "swarm": 3,
    "server": 4,
    "client": 4,
    "tuning": 5,
    "node": 5,
    "sim": 5,
}
# Rooms that a bootstrap node loads: they must start in well under a second, so torch may not come along.
WITHOUT_TORCH = ("net", "dht")
FORBIDDEN_EVERYWHERE = {"transformers", "hivemind", "pickle"}
# Sideways and downward ties that the floors alone would allow.
ALSO_FORBIDDEN = {
    ("model", "net"),
    ("model", "dht"),
    ("kernels", "net"),
    ("dht", "kernels"),
    ("dht", "model"),
}


def imports_of(path: Path) -> set[str]:
    """Every module named in an import statement of the file, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "petalite" and len(parts) > 1 else None


# Modules of the package itself that put rooms together, above all of them but the command line.
FLOORS |= {"embedded": 5, "facade": 6}
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_downward(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    assert room in FLOORS, f"{room} is not a room of the house; add it to its floor here and in the docs"
    for name in imports_of(path):
        assert name.split(".")[0] not in FORBIDDEN_EVERYWHERE, f"{relative} imports {name}"
        if room in WITHOUT_TORCH:
            assert name.split(".")[0] != "torch", f"{relative} imports torch"
        other = room_of(name)
        if other is None or other == room:
            continue
        assert other in FLOORS, f"{relative} imports {name}, which is not a room"
        assert FLOORS[other] < FLOORS[room], f"{relative} (floor {FLOORS[room]}) imports {name}"
        assert (room, other) not in ALSO_FORBIDDEN, f"{relative} imports {name}"


@pytest.mark.parametrize("module", ["petalite", *(f"petalite.{room}" for room in ROOMS)])
def test_importing_a_room_loads_no_torch(module: str) -> None:
    """`import petalite` and each room's front door stay light; torch comes with what needs it."""
    if module.split(".")[-1] == "kernels":
        pytest.skip("kernels are torch")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
