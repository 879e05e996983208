"""Hostile peers over real sockets. Each attack ends with its code, within its bound, and a good peer goes on.

The list is the project's threat model for this room (docs/protocol.md, "What a peer may not do"), with the
published weaknesses of other stacks by name. What comes before and in the handshake is in
test_handshake_attacks.py, lies inside its cryptography in test_handshake.py and test_noise.py, those inside
one record in test_connection.py and test_messages.py, against the cores alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
import tracemalloc
from pathlib import Path

import msgpack
import pytest

from petalite.errors import ErrorCode
from petalite.net import Call, Host, HostSettings, MethodPolicy
from petalite.net.credit import Windows
from petalite.net.frames import FIN, HEADER, MAX_DATA_BYTES, U32, U64, FrameType, encode
from petalite.net.limits import Limits
from petalite.net.link import Timers
from petalite.net.records import MAX_PLAINTEXT_BYTES

from .hostile import HELLO, STREAMS, Attacker, attacker, block, head, message, open_stream
from .hosts import Net, echo, eventually


def request(method: str, body: object = None, sizes: list[int] | None = None) -> bytes:
    header: bytes = msgpack.packb([1, body or {}, sizes or [], method, 0])
    return header


# -- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie", ["garbage", "flipped", "replayed", "reordered", "dropped", "too short", "oversized", "empty"]
)
async def test_records_that_lie(host: Host, lie: str) -> None:
    async with attacker(host) as enemy:
        good = [enemy.record(encode(FrameType.PAD, payload=bytes(index))) for index in range(1, 4)]
        await enemy.send_raw(
            {
                "garbage": os.urandom(4000),
                "flipped": good[0][:-1] + bytes([good[0][-1] ^ 1]),
                "replayed": good[0] + good[0],
                "reordered": good[1] + good[0],
                "dropped": good[0] + good[2],
                "too short": b"\0\0\0\x10" + bytes(16),
                "oversized": (MAX_PLAINTEXT_BYTES + 17).to_bytes(4, "big"),
                "empty": good[0] + good[1] + good[2] + enemy.record(b""),
            }[lie]
            + bytes(70_000)  # enough for whatever length the garbage claims
        )
        code, _ = await enemy.close_code()
        assert code == ErrorCode.PROTOCOL
    assert host._gate.reputation.ban_s(enemy.identity.peer_id, time.monotonic())


async def test_a_record_cut_off_by_the_end_of_the_connection(host: Host) -> None:
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1))
        await enemy.send_raw(enemy.record(message(1, bytes(1000)))[:500])
        await eventually(lambda: host.is_connected(enemy.identity.peer_id))
    await eventually(lambda: not host.is_connected(enemy.identity.peer_id))


async def test_a_record_a_byte_at_a_time_is_no_sign_of_life(net: Net) -> None:
    """Slowloris after the handshake: only whole records that authenticate count."""
    host = await net.host(HostSettings(timers=Timers(ping_every_s=0.1, dead_after_s=0.4)), listen=True)
    async with attacker(host) as enemy:
        record = enemy.record(encode(FrameType.PAD, payload=bytes(5000)))
        started = time.monotonic()
        for byte in record:
            try:
                await enemy.send_raw(bytes([byte]))
            except OSError:
                break
            await asyncio.sleep(0.02)
            if not host.peers() and time.monotonic() - started > 1:
                break
        assert time.monotonic() - started < 10


async def test_bytes_behind_the_close_are_not_looked_at(host: Host) -> None:
    async with attacker(host) as enemy:
        await enemy.send(encode(FrameType.CLOSE, payload=U32.pack(0)) + b"\xff" * 50, os.urandom(3000))
        await eventually(lambda: not host.is_connected(enemy.identity.peer_id))
    assert not host._gate.reputation.ban_s(enemy.identity.peer_id, time.monotonic())


# -- frames and streams ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "code"),
    [
        pytest.param(bytes([0x3F]) + bytes(11), ErrorCode.PROTOCOL, id="unknown critical type"),
        pytest.param(
            HEADER.pack(0, 0, 0, 1, 2**32 - 1),
            ErrorCode.FRAME_TOO_LARGE,
            id="oversized MESSAGE (py-libp2p GHSA-hmj8)",
        ),
        pytest.param(
            HEADER.pack(0x41, 0, 0, 0, 2**31), ErrorCode.FRAME_TOO_LARGE, id="oversized ignorable frame"
        ),
        pytest.param(
            open_stream(1) + HEADER.pack(0, 0, 0, 1, MAX_DATA_BYTES + 1),
            ErrorCode.FRAME_TOO_LARGE,
            id="OPEN with an oversized first frame (rust-yamux CVE-2026-32314)",
        ),
        pytest.param(message(1, b"x"), ErrorCode.PROTOCOL, id="MESSAGE never opened"),
        pytest.param(message(2, b"x"), ErrorCode.PROTOCOL, id="MESSAGE of the other parity"),
        pytest.param(
            open_stream(1) + message(1, b"", fin=True) + message(1, b"x"),
            ErrorCode.PROTOCOL,
            id="MESSAGE after FIN",
        ),
        pytest.param(open_stream(1) + block(1, 1), ErrorCode.PROTOCOL, id="BLOCK without HEAD"),
        pytest.param(
            open_stream(1) + head(1, b"x", 2**64 - 1) + message(1, b"x"),
            ErrorCode.PROTOCOL,
            id="MESSAGE in a message",
        ),
        pytest.param(
            b"".join(open_stream(2 * index + 1) for index in range(STREAMS + 1)),
            ErrorCode.STREAM_LIMIT,
            id="streams beyond the limit (go-libp2p CVE-2022-23492)",
        ),
        pytest.param(
            encode(FrameType.GOAWAY, payload=U32.pack(13)) + open_stream(1),
            ErrorCode.PROTOCOL,
            id="OPEN behind GOAWAY",
        ),
        pytest.param(encode(FrameType.PING, payload=bytes(8)) * 100, ErrorCode.FLOOD, id="ping flood"),
        pytest.param(
            encode(FrameType.MAX_STREAM_DATA, 9, U64.pack(2**64 - 1)),
            ErrorCode.PROTOCOL,
            id="credit never opened",
        ),
    ],
)
async def test_frames_that_break_a_rule(host: Host, record: bytes, code: ErrorCode) -> None:
    async with attacker(host) as enemy:
        await enemy.send(record)
        assert (await enemy.close_code())[0] == code
    await eventually(lambda: not host.is_connected(enemy.identity.peer_id))
    async with attacker(host, enemy.identity) as again:
        assert (await again.close_code())[0] == ErrorCode.BANNED


async def test_a_message_past_the_credit(host: Host) -> None:
    """Of a stream that nobody reads: 256 KiB are taken, and the next message is the end."""
    host.serve("deaf", _deaf)
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + message(1, request("deaf")))
        await eventually(lambda: bool(host._handlers))
        (link,) = [link for link in host._all_links if link.peer == enemy.identity.peer_id]
        stream = link.lanes[0].connection.streams[1]
        await eventually(lambda: stream.consumed > 0)
        while (left := 256 * 1024 - stream.received) > 0:
            received = stream.received
            await enemy.send(message(1, b"x", bytes(min(left, 64 * 1024) - 1)))
            await eventually(lambda received=received: stream.received > received)  # type: ignore[misc]
        await enemy.send(message(1, b"x"))
        assert (await enemy.close_code())[0] == ErrorCode.FLOW_CONTROL


async def _deaf(call: Call) -> None:
    await asyncio.Event().wait()


async def test_ten_thousand_opens_and_resets(host: Host) -> None:
    """HTTP/2's rapid reset (CVE-2023-44487): each costs a handler; beyond a rate it is a flood."""
    async with attacker(host) as enemy:
        reader = asyncio.create_task(enemy.close_code())
        try:
            for index in range(10_000):
                stream = 2 * index + 1
                await asyncio.sleep(0)
                if reader.done():
                    break
                await enemy.send(
                    open_stream(stream)
                    + head(stream, request("echo", sizes=[1]), 1)
                    + encode(FrameType.RESET_STREAM, stream, U32.pack(7))
                    + encode(FrameType.STOP_SENDING, stream, U32.pack(7))
                )
        except OSError:
            pass
        assert (await reader)[0] in (ErrorCode.FLOOD, ErrorCode.STREAM_LIMIT)
    await eventually(lambda: not host._handlers)


@pytest.mark.parametrize("frame", [FrameType.RESET_STREAM, FrameType.STOP_SENDING])
async def test_a_call_given_up_before_its_handler_began_is_forgotten(host: Host, frame: FrameType) -> None:
    """In the same record as it began: the handler never runs, and the stream ends."""
    ran: list[object] = []

    async def handler(call: Call) -> None:
        ran.append(call)

    host.serve("never", handler)
    async with attacker(host) as enemy:
        await enemy.send(
            open_stream(1)
            + message(1, request("never"), fin=frame is FrameType.STOP_SENDING)
            + encode(frame, 1, U32.pack(7))
            + open_stream(3)
            + message(3, request("echo"), fin=True)
        )
        await eventually(lambda: host.is_connected(enemy.identity.peer_id))
        connection = host._links[enemy.identity.peer_id].lanes[0].connection
        await eventually(lambda: connection._peer_ended == 2)
    assert not ran


async def test_a_peer_that_provokes_answers_and_never_reads(host: Host) -> None:
    """rust-yamux CVE-2024-32984: what waits for it has a bound, in frames and in bytes."""
    async with attacker(host) as enemy:
        tracemalloc.start()
        try:
            for _ in range(3000):
                await asyncio.wait_for(enemy.send(encode(FrameType.PING, payload=bytes(8)) * 8), 1)
        except (OSError, TimeoutError):
            pass
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 8_000_000


async def test_tiny_messages_do_not_stop_the_loop(host: Host, net: Net) -> None:
    """A megabyte of them: other peers are served between the turns."""
    host.serve("patient", _swallow)
    good = await net.host()
    await good.call(host.addresses[0], "echo", timeout_s=5)
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + message(1, request("patient")))
        flood = asyncio.create_task(_flood(enemy, message(1, msgpack.packb([0, {}, []])) * 4000, 20))
        for _ in range(20):
            await good.call(host.peer_id, "echo", timeout_s=2)
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)


async def _swallow(call: Call) -> None:
    while await call.receive() is not None:
        pass


async def _flood(enemy: Attacker, plaintext: bytes, times: int) -> None:
    for _ in range(times):
        try:
            await enemy.send(plaintext)
        except OSError:
            return


async def test_a_reader_that_never_reads(host: Host) -> None:
    """A thousand answers of a megabyte that nobody takes: bounded by the peer's credit and the sockets."""
    answer = bytes(1_000_000)

    async def generous(call: Call) -> None:
        await call.send({}, [answer])

    host.serve("generous", generous)
    async with attacker(host) as enemy:
        before = resident_bytes()
        for index in range(STREAMS):
            stream = 2 * index + 1
            await enemy.send(open_stream(stream) + message(stream, request("generous"), fin=True))
        await eventually(lambda: len(host._handlers) == STREAMS)
        (link,) = [link for link in host._all_links if link.peer == enemy.identity.peer_id]
        assert link.lanes[0].connection.sender.sent <= HELLO.connection_bytes
        assert resident_bytes() - before < 64_000_000
    await eventually(lambda: not host._handlers)


async def test_a_window_that_stays_shut(host: Host) -> None:
    """Zero-window for ever: the handler waits where it sends, and ends with the connection."""
    ended = asyncio.Event()

    async def generous(call: Call) -> None:
        try:
            await call.send({}, [bytes(10_000_000)])
        finally:
            ended.set()

    host.serve("generous", generous)
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + message(1, request("generous"), fin=True))
        await eventually(lambda: bool(host._handlers))
        assert not ended.is_set()
    async with asyncio.timeout(5):
        await ended.wait()


async def test_an_answer_before_the_question_is_read(host: Host) -> None:
    """And no credit for the rest of it: the call is over, and holds neither its buffers nor its place."""
    async with attacker(host) as enemy:
        await eventually(lambda: host.is_connected(enemy.identity.peer_id))
        calling = asyncio.create_task(
            host.call(enemy.identity.peer_id, "ask", buffers=[bytes(8 * HELLO.stream_bytes)], timeout_s=5)
        )
        link = host._links[enemy.identity.peer_id]
        await eventually(lambda: link.calls == 1)
        await enemy.send(message(2, msgpack.packb([0, {"early": 1}, []]), fin=True))
        assert (await calling).body == {"early": 1}
        await eventually(lambda: not link.calls)


async def test_everything_urgent_gains_nothing(host: Host) -> None:
    """A peer's class orders its own answers, up to what the method allows."""
    seen: list[int] = []

    async def which(call: Call) -> None:
        seen.append(call.priority)

    host.serve("which", which, policy=MethodPolicy(priority=2))  # type: ignore[arg-type]
    async with attacker(host) as enemy:
        await enemy.send(
            open_stream(1, 0) + message(1, request("which"), fin=True) + encode(FrameType.PRIORITY, 1, aux=0)
        )
        await eventually(lambda: bool(seen))
    assert seen == [2]


# -- calls -----------------------------------------------------------------------------------------


def failed_with(payload: bytes) -> int:
    """The code in a failure's header."""
    header = msgpack.unpackb(payload)
    assert header[0] == 2
    code: int = header[3]
    return code


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(message(1, b"\xdd\xff\xff\xff\xff"), ErrorCode.BAD_MESSAGE, id="array32 of 2^32-1"),
        pytest.param(message(1, b"\x91" * 60_000), ErrorCode.BAD_MESSAGE, id="depth bomb"),
        pytest.param(message(1, b"\x90" * 60_000), ErrorCode.BAD_MESSAGE, id="width bomb"),
        pytest.param(message(1, b"", bytes(100)), ErrorCode.BAD_MESSAGE, id="no header"),
        pytest.param(message(1, request("nowhere")), ErrorCode.UNKNOWN_METHOD, id="unknown method"),
        pytest.param(
            message(1, request("x" * 10_000)), ErrorCode.BAD_MESSAGE, id="method of 10,000 characters"
        ),
        pytest.param(
            message(1, request("small", sizes=[1001]), bytes(1001)),
            ErrorCode.BAD_MESSAGE,
            id="beyond the method's limit",
        ),
        pytest.param(
            head(1, request("small", sizes=[1001]), 1001),
            ErrorCode.BAD_MESSAGE,
            id="beyond the method's limit, announced",
        ),
        pytest.param(
            head(1, request("echo", sizes=[2**62, 2**62]), 2**63),
            ErrorCode.BAD_MESSAGE,
            id="sizes that overflow",
        ),
        pytest.param(
            head(1, request("echo", sizes=[5]), 2**20), ErrorCode.BAD_MESSAGE, id="more than its sizes say"
        ),
        pytest.param(
            message(1, request("echo", sizes=[5]), b"four"),
            ErrorCode.BAD_MESSAGE,
            id="less than its sizes say",
        ),
        pytest.param(head(1, request("echo", sizes=[2**28]), 2**28), None, id="a header, and then nothing"),
        pytest.param(message(1, msgpack.packb([0, {}, []])), ErrorCode.BAD_MESSAGE, id="no request"),
    ],
)
async def test_requests_that_lie(host: Host, frame: bytes, code: ErrorCode | None) -> None:
    """The call ends with the code; the connection, and other calls on it, go on."""
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + frame)
        if code is not None:
            assert failed_with(await enemy.answer_of(1)) == code
        else:
            await eventually(lambda: host._gate.memory.used >= 2**28)
            await enemy.send(encode(FrameType.RESET_STREAM, 1, U32.pack(7)))
            await eventually(lambda: host._gate.memory.used < 2**28)
        await enemy.send(open_stream(3) + message(3, request("echo", {"still": 1}), fin=True))
        answer = await enemy.answer_of(3)
        assert msgpack.unpackb(answer)[1] == {"still": 1}
    assert not host._gate.reputation.ban_s(enemy.identity.peer_id, time.monotonic())


async def test_a_header_that_promises_memory_holds_none_of_it(host: Host) -> None:
    """Fifteen promises of 64 MiB each: set aside by count, and not a page of it taken from the machine."""
    async with attacker(host) as enemy:
        before = resident_bytes()
        for index in range(15):
            stream = 2 * index + 1
            await enemy.send(open_stream(stream) + head(stream, request("echo", sizes=[2**26]), 2**26))
        await eventually(lambda: host._gate.memory.used >= 15 * 2**26)
        assert resident_bytes() - before < 2**25
    await eventually(lambda: host._gate.memory.used < 2**26)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_more_promises_than_the_peers_share(net: Net) -> None:
    limits = Limits(memory_bytes=2**28, peer_memory_bytes=2**27)
    host = await net.host(HostSettings(limits=limits), listen=True)
    host.serve("echo", echo)
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + head(1, request("echo", sizes=[2**27]), 2**27))
        await enemy.send(open_stream(3) + head(3, request("echo", sizes=[2**20]), 2**20))
        assert failed_with(await enemy.answer_of(3)) == ErrorCode.RESOURCE_LIMIT
        async with attacker(host) as other:
            await other.send(open_stream(1) + head(1, request("echo", sizes=[2**20]), 2**20))
            await eventually(lambda: host._gate.memory.used == 2**27 + 2**20)


@pytest.mark.parametrize("begun", [b"", head(1, request("echo", sizes=[9]), 9)], ids=["nothing", "its head"])
async def test_a_request_that_never_ends(host: Host, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    """A byte at a time, or none: given up at the request's deadline."""
    monkeypatch.setattr("petalite.net.rpc.REQUEST_TIMEOUT_S", 0.1)
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + begun)
        assert U32.unpack(await enemy.answer_of(1))[0] == ErrorCode.DEADLINE
    await eventually(lambda: not host._handlers)


async def test_a_call_that_ends_before_its_request(host: Host) -> None:
    async with attacker(host) as enemy:
        await enemy.send(open_stream(1) + encode(FrameType.MESSAGE, 1, flags=FIN))
        assert failed_with(await enemy.answer_of(1)) == ErrorCode.BAD_MESSAGE
    await eventually(lambda: not host._handlers)


async def test_unread_data_has_a_bound_however_many_streams_hold_it(net: Net) -> None:
    """A handler that never reads, 64 streams, and a peer that fills every window it is given."""
    windows = Windows(1 << 18, 1 << 20, 64, 1 << 20, 4 << 20, 2 << 20)
    host = await net.host(HostSettings(windows=windows), listen=True)
    host.serve("deaf", _deaf)
    caller = await net.host(HostSettings(windows=Windows(streams=64)))
    async with asyncio.TaskGroup() as group:

        async def fill() -> None:
            async with await caller.open(host.addresses[0], "deaf") as call:
                async with asyncio.timeout(0.5):
                    await call.send({}, [bytes(4_000_000)])

        async def tolerate() -> None:
            with contextlib.suppress(TimeoutError):
                await fill()

        senders = [group.create_task(tolerate()) for _ in range(60)]
        most = 0
        while not all(sender.done() for sender in senders):
            for link in host._links.values():
                streams = link.lanes[0].connection.streams.values()
                most = max(most, sum(stream.received - stream.consumed for stream in streams))
            await asyncio.sleep(0.01)
    assert 1 << 20 <= most <= (2 << 20) + (4 << 20) + MAX_DATA_BYTES
