"""The lab on this machine: real programs on its hosts find the delay, rate and cuts that were asked for.

The lower bounds are exact: nothing is faster than the network lets it be. The upper ones leave a busy machine
a wide margin.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.lab import HostSpec, Lab, LabUnavailable

PORT = "7007"


async def probe(lab: Lab, host: str, *arguments: str) -> list[float]:
    """What `benchmarks.lab.probe` prints on that host."""
    process = await asyncio.create_subprocess_exec(
        *lab.command(host, [sys.executable, "-m", "benchmarks.lab.probe", *arguments]),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return [float(line) for line in output.split()]


@contextlib.asynccontextmanager
async def two_hosts(*links: HostSpec) -> AsyncIterator[Lab]:
    """A lab of hosts `a` and `b`, with an echo on `b`."""
    try:
        async with Lab(links) as lab:
            command = [sys.executable, "-m", "benchmarks.lab.probe", "echo", PORT]
            server = await asyncio.create_subprocess_exec(
                *lab.command("b", command), stdout=asyncio.subprocess.PIPE
            )
            assert server.stdout is not None and await server.stdout.readline()
            yield lab
            server.kill()
            await server.wait()
    except LabUnavailable as reason:
        pytest.skip(str(reason))


def test_round_trips_take_what_the_delays_say() -> None:
    async def run() -> None:
        async with two_hosts(HostSpec("a", delay_s=0.02), HostSpec("b", delay_s=0.03)) as lab:
            rtts_s = await probe(lab, "a", "ping", lab.address("b"), PORT, "20")
            assert min(rtts_s) >= 0.1
            assert statistics.median(rtts_s) < 0.14
            await lab.set("b", delay_s=0.0)
            rtts_s = await probe(lab, "a", "ping", lab.address("b"), PORT, "20")
            assert min(rtts_s) >= 0.04
            assert statistics.median(rtts_s) < 0.08

    asyncio.run(run())


def test_tcp_gets_the_rate_and_no_more() -> None:
    async def run() -> None:
        async with two_hosts(HostSpec("a"), HostSpec("b", delay_s=0.001, rate_bits_s=30e6)) as lab:
            rates = []
            for _ in range(3):
                [elapsed_s] = await probe(lab, "a", "flood", lab.address("b"), PORT, "4000000")
                rates.append(4e6 * 8 / elapsed_s)
            assert max(rates) < 30e6 * 1460 / 1500
            assert max(rates) > 15e6
            counts = await lab.counts("b")
            assert counts["received"]["passed_bytes"] > 12e6

    asyncio.run(run())


def test_cut_and_healed_while_it_runs() -> None:
    async def run() -> None:
        async with two_hosts(HostSpec("a"), HostSpec("b")) as lab:
            await lab.cut("b")
            assert await probe(lab, "a", "ping", lab.address("b"), PORT, "2") == [math.inf] * 2
            await lab.heal("b")
            assert math.inf not in (await probe(lab, "a", "ping", lab.address("b"), PORT, "3"))[1:]
            with pytest.raises(ValueError, match="a share"):
                await lab.set("a", loss=2.0)

    asyncio.run(run())


def test_nothing_is_left_behind() -> None:
    async def run() -> None:
        async with two_hosts(HostSpec("a"), HostSpec("b")) as lab:
            process = await asyncio.create_subprocess_exec(*lab.command("a", ["sleep", "1000"]))
        assert await process.wait() < 0

    def n_descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = n_descriptors()
    asyncio.run(run())
    assert n_descriptors() == before
    assert not list(Path("/run/netns").glob(f"petalite-lab-{os.getpid()}-*"))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with Lab([HostSpec("a")]):
            pass

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabUnavailable, match="root"):
        asyncio.run(run())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(LabUnavailable, match="iproute2"):
        asyncio.run(run())
