"""The net room between two processes on loopback, beside uvloop's plain TCP, unencrypted, in the same run;
and over long, narrow and lossy links (`benchmarks.net_wan`), where there is a lab.

The two take turns, round by round, and of each figure the best round counts: what else the machine does can
only add. The two processes are started apart, not forked: forked ones share their address layout, so that
each finds the branch predictor trained by the other, and an echo looks up to 1.7 times faster than it is. CPU
seconds are of the whole process, system time included; on loopback a sender's also hold the receiver's share
of TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from benchmarks import net_wan
from benchmarks.lab import LabUnavailable
from benchmarks.report import Check, Report
from petalite.net import Call, Host, HostSettings, Identity, Message, MethodPolicy, Multiaddr
from petalite.net.credit import Windows
from petalite.net.frames import MAX_DATA_BYTES
from petalite.net.handshake import Handshake, Hello
from petalite.net.limits import Limits
from petalite.net.loop import new_event_loop
from petalite.net.noise import AES_GCM
from petalite.net.records import OVERHEAD_BYTES, Sealer

ROUNDS = 8
ECHO_BYTES = 16 * 1024  # a decode step of 8,192 bfloat16 values
ECHOES = 500  # per round
TENSOR_BYTES = 16 * 1024 * 1024
TENSORS = 8  # per round
GIB = 1 << 30
STREAMS = 1000
CHUNK_BYTES, CHUNKS = 4096, 16  # of each of those streams
IDLE = 2000
HANDSHAKES = 100
DELAY_S = 0.05  # of the proxy that counts round trips, each way
LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
UNLIMITED = MethodPolicy(calls_per_s=1e9)
SETTINGS = HostSettings(windows=Windows(streams=STREAMS), limits=Limits(connections=2 * IDLE))

Samples = dict[str, list[float]]


def run() -> Report:
    _raise_descriptor_limit()
    results: dict[str, Any] = {}
    for measure in (
        _measure,
        _idle_bytes,
    ):  # each beside a fresh process, whose memory nobody has used before
        with _server() as pipe, asyncio.Runner(loop_factory=new_event_loop) as runner:
            results |= runner.run(measure(pipe))
    results["handshake_cpu_ms"] = _handshake_cpu_ms()
    results["aead_cpu_s_per_gib"] = _aead_cpu_s_per_gib()
    report = _report(results)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            far = runner.run(net_wan.measure())
    except LabUnavailable as reason:
        results["wan"] = f"skipped: {reason}"
        report.rows.append(("over the lab's links", "skipped", "", str(reason)))
    else:
        results |= far
        net_wan.show(report, far)
    return report


@contextlib.contextmanager
def _server() -> Iterator[Pipe]:
    """The other process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve_in_process, args=(theirs,), daemon=True)
    server.start()
    try:
        yield ours
    finally:
        server.kill()
        server.join()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- the other process -----------------------------------------------------------------------------


class _PlainEcho(asyncio.BufferedProtocol):
    """Returns what comes."""

    def __init__(self) -> None:
        self._buffer = bytearray(256 * 1024)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._transport.write(bytes(memoryview(self._buffer)[:nbytes]))


class _PlainSink(asyncio.BufferedProtocol):
    """Swallows rounds of tensors, and answers each round with its CPU time."""

    def __init__(self) -> None:
        self._buffer = bytearray(256 * 1024)
        self._received = 0
        self._began_s = _cpu_s()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._received:
            self._began_s = _cpu_s()
        self._received += nbytes
        if self._received >= TENSORS * TENSOR_BYTES:
            self._received = 0
            self._transport.write(f"{_cpu_s() - self._began_s}\n".encode())


async def _echo(call: Call) -> Message:
    return Message(call.request.body, call.request.buffers)


async def _echo_stream(call: Call) -> None:
    while (message := await call.receive()) is not None:
        await call.send(message.body, message.buffers)


async def _sink(call: Call) -> None:
    while (await call.receive()) is not None:
        began_s = _cpu_s()
        for _ in range(TENSORS):
            await call.receive()
        await call.send({"cpu_s": _cpu_s() - began_s})


async def _source(call: Call) -> None:
    for _ in range(CHUNKS):
        await call.send({}, [bytes(CHUNK_BYTES)])


def _serve_in_process(pipe: Pipe) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(pipe))


async def _serve(pipe: Pipe) -> None:
    _raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    async with Host(Identity.generate(), SETTINGS) as host:
        for method in (_echo, _echo_stream, _sink, _source):
            host.serve(method.__name__, method, policy=UNLIMITED)

        async def memory(call: Call) -> dict[str, Any]:
            return {"resident_bytes": _resident_bytes(), "peers": len(host.peers())}

        host.serve("memory", memory)
        [address] = await host.listen([LOOPBACK])
        plain = [await loop.create_server(kind, "127.0.0.1", 0) for kind in (_PlainEcho, _PlainSink)]
        pipe.send((str(address), *(server.sockets[0].getsockname()[1] for server in plain)))
        await asyncio.Event().wait()


# -- this process ----------------------------------------------------------------------------------


class _PlainClient(asyncio.BufferedProtocol):
    """Sends, and waits for so many bytes back."""

    def __init__(self) -> None:
        self._buffer = bytearray(256 * 1024)
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._missing -= nbytes
        if self._missing <= 0:
            self._back.set_result(bytes(memoryview(self._buffer)[:nbytes]))

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def expect(self, size: int) -> asyncio.Future[bytes]:
        self._missing = size
        self._back: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        return self._back

    async def write(self, data: bytes) -> None:
        self.transport.write(data)
        await self._room.wait()


async def _measure(pipe: Pipe) -> dict[str, Any]:
    text, echo_port, sink_port = await asyncio.to_thread(pipe.recv)
    address = Multiaddr.parse(text)
    loop = asyncio.get_running_loop()
    _, plain_echo = await loop.create_connection(_PlainClient, "127.0.0.1", echo_port)
    _, plain_sink = await loop.create_connection(_PlainClient, "127.0.0.1", sink_port)
    plain_sink.transport.set_write_buffer_limits(high=1 << 20)
    samples: Samples = defaultdict(list)
    async with Host(Identity.generate(), SETTINGS) as host:
        echo, sink = [await host.open(address, method) for method in ("_echo_stream", "_sink")]
        async with echo as stream, sink:
            for _ in range(ROUNDS):
                await _echo_round(samples, plain_echo, stream, host, address)
                await _bulk_round(samples, plain_sink, sink)
        fairness = await _fairness(host, address)
        round_trips = await _round_trips(address)
    best = {name: max(values) if name.endswith("per_s") else min(values) for name, values in samples.items()}
    return best | {"jain_index": fairness, "first_reply_round_trips": round_trips}


async def _p50_us(times: int, action: Callable[[], Awaitable[object]]) -> float:
    samples = []
    for _ in range(times):
        began_s = time.perf_counter()
        await action()
        samples.append(time.perf_counter() - began_s)
    return statistics.median(samples) * 1e6


async def _echo_round(
    samples: Samples, plain: _PlainClient, stream: Call, host: Host, address: Multiaddr
) -> None:
    data = os.urandom(ECHO_BYTES)

    async def through_plain() -> None:
        back = plain.expect(ECHO_BYTES)
        plain.transport.write(data)
        await back

    async def through_stream() -> None:
        await stream.send({"step": 1}, [data])
        await stream.receive()

    samples["plain_echo_us"].append(await _p50_us(ECHOES, through_plain))
    samples["echo_us"].append(await _p50_us(ECHOES, through_stream))
    samples["unary_us"].append(
        await _p50_us(ECHOES, lambda: host.call(address, "_echo", {"step": 1}, timeout_s=10))
    )


async def _bulk_round(samples: Samples, plain: _PlainClient, sink: Call) -> None:
    tensor = os.urandom(TENSOR_BYTES)
    gib = TENSORS * TENSOR_BYTES / GIB

    began_s, cpu_s, back = time.perf_counter(), _cpu_s(), plain.expect(1)
    for _ in range(TENSORS):
        await plain.write(tensor)
    their_cpu_s = float(await back)
    samples["plain_gib_per_s"].append(gib / (time.perf_counter() - began_s))
    samples["plain_send_cpu_s_per_gib"].append((_cpu_s() - cpu_s) / gib)
    samples["plain_receive_cpu_s_per_gib"].append(their_cpu_s / gib)

    await sink.send()
    began_s, cpu_s = time.perf_counter(), _cpu_s()
    for _ in range(TENSORS):
        await sink.send({}, [tensor])
    reply = await sink.receive()
    assert reply is not None
    samples["gib_per_s"].append(gib / (time.perf_counter() - began_s))
    samples["send_cpu_s_per_gib"].append((_cpu_s() - cpu_s) / gib)
    samples["receive_cpu_s_per_gib"].append(reply.body["cpu_s"] / gib)


async def _fairness(host: Host, address: Multiaddr) -> float:
    """Jain's index of what each stream has got when half of it all has come."""
    received, snapshot = [0] * STREAMS, list[int]()

    async def read(index: int) -> None:
        async with await host.open(address, "_source") as call:
            while await call.receive() is not None:
                received[index] += 1
                if not snapshot and sum(received) * 2 >= STREAMS * CHUNKS:
                    snapshot.extend(received)

    await asyncio.gather(*(read(index) for index in range(STREAMS)))
    return sum(snapshot) ** 2 / (STREAMS * sum(value * value for value in snapshot))


@contextlib.asynccontextmanager
async def _delayed(port: int) -> AsyncIterator[int]:
    """The port of a proxy that lets bytes through a little later."""
    loop = asyncio.get_running_loop()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            loop.call_later(DELAY_S, writer.write, data)

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        writer.close()
        far_writer.close()

    server = await asyncio.start_server(join, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _round_trips(address: Multiaddr) -> float:
    """From nothing to the first reply, in round trips: TCP's own, which nothing delays, and the rest."""
    async with _delayed(address.port) as port, Host(Identity.generate()) as caller:
        far = Multiaddr("ip4", "127.0.0.1", port, address.peer_id)
        began_s = time.perf_counter()
        await caller.call(far, "_echo", {}, timeout_s=10)
        elapsed_s = time.perf_counter() - began_s
    return 1 + elapsed_s / (2 * DELAY_S)


async def _idle_bytes(pipe: Pipe) -> dict[str, Any]:
    """What an idle connection costs the process that accepted it."""
    address = Multiaddr.parse((await asyncio.to_thread(pipe.recv))[0])
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(Host(Identity.generate()))

        async def memory() -> dict[str, Any]:
            return dict((await host.call(address, "memory", timeout_s=30)).body)

        before = await memory()
        for _ in range(IDLE):
            caller = await stack.enter_async_context(Host(Identity.generate()))
            await caller.connect(address)
        after = await memory()
        count = after["peers"] - before["peers"]
        stack.pop_all()  # to close each in turn would take longer than the process has left
    grown = after["resident_bytes"] - before["resident_bytes"]
    return {"idle_connections": count, "idle_connection_kib": grown / count / 1024}


def _handshake_cpu_ms() -> float:
    """Both sides, Ed25519 and X25519 included, without a socket."""
    hello = Hello(bytes(16), 0, 1 << 20, 1 << 20, 256)
    ours, theirs = Identity.generate(), Identity.generate()
    samples = []
    for _ in range(HANDSHAKES):
        began_s = time.process_time()
        first = Handshake(ours, hello, initiator=True, expected=theirs.peer_id)
        second = Handshake(theirs, hello, initiator=False)
        second.receive(first.receive(second.receive(first.receive())))
        samples.append(time.process_time() - began_s)
    return min(samples) * 1e3


def _aead_cpu_s_per_gib() -> float:
    """The cipher's own part of one side's work."""
    sealer, plain = Sealer(AES_GCM, bytes(32)), bytes(MAX_DATA_BYTES)
    out = memoryview(bytearray(MAX_DATA_BYTES + OVERHEAD_BYTES))
    samples = []
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(1000):
            sealer.seal(plain, out)
        samples.append(time.process_time() - began_s)
    return min(samples) * GIB / (1000 * MAX_DATA_BYTES)


def _report(results: dict[str, Any]) -> Report:
    report = Report("net", ("figure", "petalite", "plain TCP", "unit"), results=results)
    for name, key, unit in (
        ("echo of 16 KiB, p50", "echo_us", "µs"),
        ("unary call, p50", "unary_us", "µs"),
        ("one way, 16 MiB tensors", "gib_per_s", "GiB/s"),
        ("sender's CPU", "send_cpu_s_per_gib", "s/GiB"),
        ("receiver's CPU", "receive_cpu_s_per_gib", "s/GiB"),
        ("AES-256-GCM alone", "aead_cpu_s_per_gib", "s/GiB"),
        ("handshake, both sides", "handshake_cpu_ms", "ms CPU"),
        ("first reply", "first_reply_round_trips", "round trips"),
        (f"{STREAMS} streams, Jain's index", "jain_index", ""),
        (f"{results['idle_connections']:.0f} idle connections", "idle_connection_kib", "KiB each"),
    ):
        report.rows.append((name, float(results[key]), results.get(f"plain_{key}", ""), unit))
    rate = results["gib_per_s"] / results["plain_gib_per_s"]
    report.checks += [
        Check("echo of 16 KiB beside plain TCP", results["echo_us"] / results["plain_echo_us"], "times", 3.0),
        Check("unary call", results["unary_us"], "µs", 150.0),
        Check("bytes/s beside plain TCP", rate, "times", 0.4, "at least"),
        Check("sender's CPU", results["send_cpu_s_per_gib"], "s/GiB", 0.45),
        Check("receiver's CPU", results["receive_cpu_s_per_gib"], "s/GiB", 0.45),
        Check("handshake, both sides", results["handshake_cpu_ms"], "ms CPU", 1.0),
        Check("first reply", results["first_reply_round_trips"], "round trips", 3.3),
        Check("Jain's index", results["jain_index"], "", 0.95, "at least"),
        Check("idle connection", results["idle_connection_kib"], "KiB", 64.0),
    ]
    return report
