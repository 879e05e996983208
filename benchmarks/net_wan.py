"""The net room over long, narrow and lossy links: the WAN rows of `benchmarks.net`, on the lab.

A sender and a receiver, each on a lab host of its own, in turns with plain TCP between the same two. Both see
one clock, so a message's way is timed one way, from the call to the receiver's handler.

    python -m benchmarks.net_wan receive ADDRESS             a host's part: prints where it listens
    python -m benchmarks.net_wan send ADDRESS SECONDS BULK   a host's part: prints what was measured, as JSON
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.lab import HostSpec, Lab
from benchmarks.report import Check, Report, quantiles
from petalite.net import Call, Host, Identity, Message, Multiaddr, Priority
from petalite.net.loop import new_event_loop

RATE_BITS_S = 100e6
MESSAGE_BYTES = 16 * 1024
MESSAGE_EVERY_S = 0.05
TENSOR_BYTES = 32 * 1024 * 1024
STREAM_BYTES = 60_000_000  # of the one stream at 100 ms
ROUNDS = 3
WARM_UP_S = 2.0
PORT = "7007"
# One-way delays of each of the two hosts: a quarter of the round trip.
NEAR = (HostSpec("a", 0.001, rate_bits_s=RATE_BITS_S), HostSpec("b", 0.001, rate_bits_s=RATE_BITS_S))
FAR = (HostSpec("a", 0.025, rate_bits_s=RATE_BITS_S), HostSpec("b", 0.025, rate_bits_s=RATE_BITS_S))
LOSSY = (
    HostSpec("a", 0.015, rate_bits_s=RATE_BITS_S, loss=0.01),
    HostSpec("b", 0.015, rate_bits_s=RATE_BITS_S),
)


async def measure() -> dict[str, Any]:
    """All rows. Raises LabUnavailable."""
    results: dict[str, Any] = {"wan_congestion_control": _congestion_control()}
    async with _peers(NEAR) as (lab, address):
        results |= await _beside_bulk(lab, address, "near", seconds=8.0)
        plain = await _plain(lab, 30_000_000)
        results["near_plain_mbit_s"] = plain
    async with _peers(FAR) as (lab, address):
        ours, plains = [], []
        for _ in range(ROUNDS):
            plains.append(await _plain(lab, STREAM_BYTES))
            ours.append((await _send(lab, address, "stream", 0))["mbit_s"])
        results |= {"far_stream_mbit_s": sorted(ours)[1], "far_plain_mbit_s": sorted(plains)[1]}
    async with _peers(LOSSY) as (lab, address):
        results |= await _beside_bulk(lab, address, "lossy", seconds=12.0)
        results["lossy_plain_mbit_s"] = await _plain(lab, 10_000_000)
    return results


def show(report: Report, results: dict[str, Any]) -> None:
    """The rows and checks of what `measure` returned."""
    bulk_share = results["near_bulk_mbit_s"] / results["near_plain_mbit_s"]
    stream_share = results["far_stream_mbit_s"] / results["far_plain_mbit_s"]
    behind = results["lossy_beside_bulk_p90_ms"] / results["lossy_idle_p90_ms"]
    for name, key, unit in (
        ("4 ms, 100 Mbit/s: 16 KiB one way, p90", "near_idle_p90_ms", "ms"),
        ("  the same behind endless 32 MiB", "near_beside_bulk_p90_ms", "ms"),
        ("  bulk meanwhile", "near_bulk_mbit_s", "Mbit/s"),
        ("100 ms, 100 Mbit/s: one stream", "far_stream_mbit_s", "Mbit/s"),
        ("60 ms, 1 % loss: 16 KiB one way, p90", "lossy_idle_p90_ms", "ms"),
        ("  the same beside endless 32 MiB", "lossy_beside_bulk_p90_ms", "ms"),
        ("  bulk meanwhile", "lossy_bulk_mbit_s", "Mbit/s"),
    ):
        plain = results[key.split("_")[0] + "_plain_mbit_s"] if unit == "Mbit/s" else ""
        report.rows.append((name, float(results[key]), plain, unit))
    report.checks += [
        Check("16 KiB behind bulk at 100 Mbit/s, p90", results["near_beside_bulk_p90_ms"], "ms", 30.0),
        Check("bulk meanwhile, beside plain TCP", bulk_share, "times", 0.9, "at least"),
        Check("one stream at 100 ms, beside plain TCP", stream_share, "times", 0.85, "at least"),
    ]
    if results["wan_congestion_control"] == "bbr":
        report.checks.append(Check("16 KiB beside bulk at 1 % loss, beside idle, p90", behind, "times", 2.0))


async def _beside_bulk(lab: Lab, address: str, name: str, seconds: float) -> dict[str, Any]:
    idle = await _send(lab, address, str(seconds / 2), 0)
    busy = await _send(lab, address, str(seconds), 1)
    return {
        f"{name}_idle_p90_ms": idle["p90_ms"],
        f"{name}_beside_bulk_p50_ms": busy["p50_ms"],
        f"{name}_beside_bulk_p90_ms": busy["p90_ms"],
        f"{name}_bulk_mbit_s": busy["bulk_mbit_s"],
    }


def _congestion_control() -> str:
    """What petalite's sockets get here: BBR if it may be asked for."""
    allowed = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return "bbr" if "bbr" in allowed else allowed[0]


# -- processes on the lab's hosts ------------------------------------------------------------------


@asynccontextmanager
async def _peers(links: tuple[HostSpec, ...]) -> AsyncIterator[tuple[Lab, str]]:
    """The lab with both receivers, petalite's and plain TCP's, on `b`; the former's address."""
    async with Lab(links) as lab:
        receiver = await _start(lab, "b", "benchmarks.net_wan", "receive", f"/ip4/{lab.address('b')}/tcp/0")
        plain = await _start(lab, "b", "benchmarks.lab.probe", "echo", PORT)
        assert receiver.stdout is not None and plain.stdout is not None
        address = (await receiver.stdout.readline()).decode().strip()
        await plain.stdout.readline()
        yield lab, address
        for process in (receiver, plain):
            process.kill()
            await process.wait()


async def _start(lab: Lab, host: str, module: str, *arguments: str) -> Process:
    command = lab.command(host, [sys.executable, "-m", module, *arguments])
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE)


async def _send(lab: Lab, address: str, seconds: str, bulk: int) -> dict[str, Any]:
    process = await _start(lab, "a", "benchmarks.net_wan", "send", address, seconds, str(bulk))
    output, _ = await process.communicate()
    result: dict[str, Any] = json.loads(output)
    return result


async def _plain(lab: Lab, size: int) -> float:
    """Mbit/s of one plain TCP connection."""
    process = await _start(lab, "a", "benchmarks.lab.probe", "flood", lab.address("b"), PORT, str(size))
    output, _ = await process.communicate()
    return size * 8 / float(output) / 1e6


# -- what they run ---------------------------------------------------------------------------------


async def receive(listen: str) -> None:
    async with Host(Identity.generate()) as host:

        async def messages(call: Call) -> Message:
            """Times each message's way, from the clock in its body."""
            late_s = array.array("d")
            while (message := await call.receive()) is not None:
                late_s.append(monotonic() - message.body["sent_s"])
            return Message({}, [late_s])

        async def swallow(call: Call) -> dict[str, Any]:
            while await call.receive() is not None:
                pass
            return {}

        async def received(_call: Call) -> dict[str, Any]:
            return {"bytes": host.metrics()["petalite_net_received_bytes_total"]}

        for method in (messages, swallow, received):
            host.serve(method.__name__, method)
        [address] = await host.listen([Multiaddr.parse(listen)])
        print(address, flush=True)
        await asyncio.Event().wait()


async def send(to: str, seconds: str, bulk: str) -> None:
    address = Multiaddr.parse(to)
    async with Host(Identity.generate()) as host:
        await host.connect(address)
        result = await (
            _one_stream(host, address)
            if seconds == "stream"
            else _talk(host, address, float(seconds), bulk == "1")
        )
    print(json.dumps(result), flush=True)


async def _one_stream(host: Host, address: Multiaddr) -> dict[str, float]:
    data = os.urandom(STREAM_BYTES // 4)
    began_s = monotonic()
    async with await host.open(address, "swallow") as call:
        for _ in range(4):
            await call.send({}, [data])
        await call.finish()
        await call.receive()
    return {"mbit_s": STREAM_BYTES * 8 / (monotonic() - began_s) / 1e6}


async def _talk(host: Host, address: Multiaddr, seconds: float, bulk: bool) -> dict[str, float]:
    """Messages for so long, beside bulk or not."""
    flood = asyncio.create_task(_flood(host, address)) if bulk else None
    await asyncio.sleep(WARM_UP_S)

    async def received() -> float:
        count: float = (await host.call(address, "received", timeout_s=30)).body["bytes"]
        return count

    before, began_s, sent = await received(), monotonic(), 0
    async with await host.open(address, "messages", priority=Priority.INTERACTIVE) as call:
        data = os.urandom(MESSAGE_BYTES)
        while monotonic() - began_s < seconds:
            sent += 1
            await asyncio.sleep(max(0.0, began_s + sent * MESSAGE_EVERY_S - monotonic()))
            await call.send({"sent_s": monotonic()}, [data])
        await call.finish()
        reply = await call.receive()
    took_bytes = await received() - before - sent * MESSAGE_BYTES
    elapsed_s = monotonic() - began_s
    if flood is not None:
        flood.cancel()
    assert reply is not None
    late_ms = [1e3 * late_s for late_s in memoryview(reply.buffers[0]).cast("d")]
    found = quantiles(late_ms)
    return {"p50_ms": found["p50"], "p90_ms": found["p90"], "bulk_mbit_s": took_bytes * 8 / elapsed_s / 1e6}


async def _flood(host: Host, address: Multiaddr) -> None:
    data = os.urandom(TENSOR_BYTES)
    async with await host.open(address, "swallow", priority=Priority.BULK) as call:
        while True:
            await call.send({}, [data])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run({"receive": receive, "send": send}[sys.argv[1]](*sys.argv[2:]))
