"""Groups of options, against typer itself: what it parses arrives as the dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from petalite.node.grouping import grouped


@dataclass(frozen=True, slots=True)
class Base:
    """What is shared"""

    names: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Who.")] = None


@dataclass(frozen=True, slots=True)
class More(Base):
    """A panel of its own"""

    count: Annotated[int, typer.Option("--how-many", min=1)] = 3


def test_a_group_is_options_in_a_panel_and_arrives_as_one_object() -> None:
    seen: list[tuple[str, More, bool]] = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(word: str, more: More, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        seen.append((word, more, loud))

    runner = CliRunner()
    for arguments in (["a"], ["b", "--names", "x", "--names", "y", "--how-many", "5", "--loud"]):
        assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, ["c", "--how-many", "0"]).exit_code == 2
    assert seen == [("a", More(), False), ("b", More(["x", "y"], 5), True)]
    shown = runner.invoke(app, ["--help"]).output
    assert "A panel of its own" in shown and "What is shared" not in shown
