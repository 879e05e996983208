"""`adapters`: the versions of trained parts in a folder, who came of whom, and what two of them differ in."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from petalite.model.versions import Version, diff, find_version, lineage, list_versions
from petalite.node.console import err, out, plain


def run(folder: Path, compare: tuple[str, str] | None) -> None:
    if compare is not None:
        show_diff(*(find_version(which, folder) for which in compare))
        return
    versions, broken = list_versions(folder)
    for model in sorted({version.card.model for version in versions}):
        out.print(f"\n[bold]{plain(model)}[/]")
        out.print(tree([version for version in versions if version.card.model == model]))
    for error in broken:
        err.print(f"[red]{plain(error)}[/]")
    if not versions:
        out.print(f"{plain(folder)} has no versions; petalite.tuning.save_version writes them")


def tree(versions: list[Version]) -> Table:
    """A line for each, below the one that it was trained on from."""
    table = Table("version", "method", "settings", "metrics", "values", "trained (UTC)", "note", box=None)
    for version, depth in lineage(versions):
        card = version.card
        values = sum(math.prod(shape) for shape in version.shapes.values())
        table.add_row(
            "  " * max(0, depth - 1) + ("└ " if depth else "") + version.short,
            plain(card.method),
            plain(_pairs(card.settings)),
            plain(_pairs(card.metrics)),
            f"{values:,}",
            plain(card.created[:16].replace("T", " ")),
            plain(card.note),
        )
    return table


def show_diff(one: Version, other: Version) -> None:
    table = Table("", one.short, other.short, box=None)
    for key, (a, b) in diff(one, other).items():
        table.add_row(*map(plain, (key, _text(a), _text(b))))
    out.print(table)


def _pairs(values: object) -> str:
    assert isinstance(values, dict)
    return " ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: object) -> str:
    if isinstance(value, list):
        first = value[0] if value and isinstance(value[0], int) else None
        if first is not None and value == list(range(first, first + len(value))):
            return f"{first}:{first + len(value)}"
        return ",".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
