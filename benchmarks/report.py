"""What every benchmark hands back, and how it is shown: a table for people, one line of JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Check:
    """A bound that the project set itself, and whether this run met it."""

    name: str
    value: float
    unit: str
    bound: float
    sense: Literal["at most", "at least"] = "at most"

    @property
    def ok(self) -> bool:
        return self.value <= self.bound if self.sense == "at most" else self.value >= self.bound


@dataclass(slots=True)
class Report:
    """One run of one benchmark. `rows` are for the table, `results` for programs."""

    benchmark: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def json(self) -> str:
        return json.dumps(
            {
                "benchmark": self.benchmark,
                "machine": machine(),
                "results": self.results,
                "checks": [asdict(check) | {"ok": check.ok} for check in self.checks],
            }
        )

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(*self.columns, title=self.benchmark)
        for row in self.rows:
            table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(table)
        for check in self.checks:
            mark = "met   " if check.ok else "missed"
            console.print(
                f"  {mark} {check.name}: {check.value:.3g} {check.unit}, {check.sense} {check.bound:g}"
            )


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def quantiles(samples: Sequence[float]) -> Mapping[str, float]:
    """Median and 90th percentile."""
    ordered = sorted(samples)
    return {"p50": statistics.median(ordered), "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}
