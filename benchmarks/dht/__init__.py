"""The DHT: simulated at a thousand and ten thousand nodes, real on loopback, and beside the PyPI package
`kademlia` (extra `bench`).

Simulated links take 50 ms one way, so a round of calls takes 100 ms; what is told of simulations is counted
or in virtual time, but for "at rest 10000". All parts together take some two hours; `--only PART` runs one,
or those whose names contain PART.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.dht import loopback, reference, simulated
from benchmarks.report import Check, Report

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "lookups 1000": lambda: simulated.lookups(1000),
    "lookups 10000": lambda: simulated.lookups(10_000),
    "colluders 1000": lambda: simulated.collusion(1000),
    "colluders 10000": lambda: simulated.collusion(10_000),
    "deaths 1000": lambda: simulated.deaths(1000),
    "deaths 10000": lambda: simulated.deaths(10_000),
    "churn 1000": lambda: simulated.churn(1000),
    "churn 10000": lambda: simulated.churn(10_000, minutes=15, owners_share=0.02),
    "at rest 1000": lambda: simulated.at_rest(1000),
    "at rest 10000": lambda: simulated.at_rest(10_000),
    "beside: petalite": lambda: simulated.churn(reference.N_NODES, minutes=20),
    "beside: kademlia": lambda: reference.churn(minutes=20),
    "loopback": loopback.measure,
}
_AT_MOST: Literal["at most"] = "at most"
_AT_LEAST: Literal["at least"] = "at least"
# What is claimed of parts whose name begins so: where it stands in their results, unit, sense, bound.
_CLAIMS: list[tuple[str, str, str, Literal["at most", "at least"], float]] = [
    ("lookups", "first holder, 1 path/rounds/p50", "rounds", _AT_MOST, 2),
    ("lookups", "all k nearest, 1 path/rounds/p50", "rounds", _AT_MOST, 6),
    ("lookups", "all k nearest, 1 path/messages/p50", "calls", _AT_MOST, 24),
    ("colluders", "found over 4 paths", "%", _AT_LEAST, 100),
    ("colluders", "found over 4 paths, and again", "%", _AT_LEAST, 100),
    ("deaths", "found", "%", _AT_LEAST, 99.9),
    ("churn", "found", "%", _AT_LEAST, 99),
    ("at rest 10000", "rss_mib", "MiB", _AT_MOST, 4096),
    ("at rest 10000", "real_s", "s", _AT_MOST, 900),
    ("loopback", "store_ms/p50", "ms", _AT_MOST, 5),
    ("loopback", "get_ms/p50", "ms", _AT_MOST, 5),
    ("loopback", "get_newest_ms/p50", "ms", _AT_MOST, 5),
    ("loopback", "announce_80_blocks_ms/p50", "ms", _AT_MOST, 30),
    ("loopback", "start_ms/p50", "ms", _AT_MOST, 100),
    ("loopback", "mib_per_node", "MiB", _AT_MOST, 2),
]


def run(only: str = "") -> Report:
    """The part `only`, or every part whose name contains it, one after the other."""
    report = Report("dht", ("part", "what", "value"))
    for part, measure in PARTS.items():
        if part != only and (only in PARTS or only not in part):
            continue
        before_s = time.perf_counter()
        results = report.results[part] = measure()
        print(f"{part}: measured in {time.perf_counter() - before_s:.0f} s", file=sys.stderr, flush=True)
        values = flat(results)
        report.rows += [(part, what, value) for what, value in values.items()]
        report.checks += [
            Check(f"{part}: {what}", values[what], unit, bound, sense)
            for prefix, what, unit, sense, bound in _CLAIMS
            if part.startswith(prefix)
        ]
    return report


def flat(results: dict[str, Any]) -> dict[str, Any]:
    """A tree of results as one level, a slash between the names."""
    values: dict[str, Any] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            values |= {f"{name}/{below}": inner for below, inner in flat(value).items()}
        else:
            values[name] = value
    return values
