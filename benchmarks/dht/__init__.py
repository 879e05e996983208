"""The DHT: simulated at a thousand and ten thousand nodes, real on loopback, and beside the PyPI package
`kademlia`.

Simulated links take 50 ms one way, so a round of calls takes 100 ms. The whole takes about twenty minutes,
most of it ten virtual minutes of ten thousand nodes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.dht import loopback, reference, simulated
from benchmarks.report import Check, Report


def run() -> Report:
    report = Report("dht", ("what", "value"))
    parts: dict[str, dict[str, Any]] = {
        "lookups 1000": simulated.lookups(1000),
        "colluders 40 %": simulated.collusion(),
        "30 % die": simulated.massacre(),
        "churn": simulated.churn(1000),
        "at rest 1000": simulated.at_rest(1000),
        "at rest 10000": simulated.at_rest(10_000),
        "beside kademlia": {
            "petalite": simulated.churn(reference.N_NODES, minutes=20),
            "kademlia": reference.churn(minutes=20),
        },
        "loopback 32 nodes": loopback.measure(),
    }
    for title, results in parts.items():
        report.results[title] = results
        report.rows += [(f"{title}: {name}", value) for name, value in _flat(results)]
    report.checks = _checks(parts)
    return report


def _checks(parts: dict[str, dict[str, Any]]) -> list[Check]:
    real, ten_thousand = parts["loopback 32 nodes"], parts["at rest 10000"]
    colluders = parts["colluders 40 %"]
    quiet = parts["lookups 1000"]
    first, everything = quiet["first holder, 1 path"], quiet["all k nearest, 1 path"]
    return [
        Check("rounds to the first holder, p50", first["rounds"]["p50"], "rounds", 2),
        Check("rounds to all k nearest, p50", everything["rounds"]["p50"], "rounds", 6),
        Check("messages to all k nearest, p50", everything["messages"]["p50"], "calls", 24),
        Check("found among 40 % colluders, 4 paths", colluders["found, 4 paths"], "%", 100, "at least"),
        Check("read after 30 % died", parts["30 % die"]["found"], "%", 99.9, "at least"),
        Check("read under churn", parts["churn"]["found"], "%", 99, "at least"),
        Check("10,000 nodes in memory", ten_thousand["rss_mib"], "MiB", 4096),
        Check("10,000 nodes, ten virtual minutes", ten_thousand["real_s"], "s", 900),
        Check("store on loopback, p50", real["store_ms"]["p50"], "ms", 5),
        Check("get on loopback, p50", real["get_ms"]["p50"], "ms", 5),
        Check("get newest on loopback, p50", real["get_newest_ms"]["p50"], "ms", 5),
        Check("announce 80 blocks on loopback, p50", real["announce_80_blocks_ms"]["p50"], "ms", 30),
        Check("start one more node", real["start_ms"]["p50"], "ms", 100),
        Check("memory of one more node", real["mib_per_node"], "MiB", 2),
    ]


def _flat(results: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in results.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        else:
            rows.append((prefix + name, value))
    return rows
