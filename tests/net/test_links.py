"""Links between hosts: lanes for bulk, draining, bans, back-off, limits and their codes, counters, events."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from petalite.errors import (
    Banned,
    ConnectionLost,
    DeadlineExceeded,
    RateLimited,
    RemoteError,
    ResourceLimit,
    ShuttingDown,
    Unreachable,
)
from petalite.net import Call, Host, HostSettings, Identity, MethodPolicy, Multiaddr, Priority
from petalite.net.accepting import claimed_addresses
from petalite.net.credit import Windows
from petalite.net.handshake import Hello
from petalite.net.limits import VIOLATION, Limits
from petalite.net.link import Timers

from .hosts import Net, Watched, echo, echo_stream, eventually

# -- lanes -----------------------------------------------------------------------------------------


async def test_bulk_has_a_connection_of_its_own_opened_when_needed(two: tuple[Host, Host]) -> None:
    caller, server = two
    await caller.call(server.peer_id, "echo", {}, [bytes(100_000)], timeout_s=5)
    link = await caller.connect(server.peer_id)
    assert len(link.lanes) == 1
    data = bytes(range(256)) * 10_000
    replies = await asyncio.gather(
        *(
            caller.call(server.peer_id, "echo", {"i": i}, [data], timeout_s=10, priority=Priority.BULK)
            for i in range(5)
        )
    )
    assert all(bytes(reply.buffers[0]) == data for reply in replies)
    assert len(link.lanes) == 2
    assert link.lanes[1].connection.sender.sent > 5 * len(data)
    assert link.lanes[0].connection.sender.sent < len(data)
    await eventually(lambda: len(server._links[caller.peer_id].lanes) == 2)
    assert len(caller.peers()) == len(server.peers()) == 1


async def test_a_lost_bulk_lane_ends_its_own_calls_alone(two: tuple[Host, Host]) -> None:
    caller, server = two
    async with (
        await caller.open(server.peer_id, "stream", priority=Priority.BULK) as bulk,
        await caller.open(server.peer_id, "stream") as call,
    ):
        for each in (bulk, call):
            await each.send({"n": 1})
            assert await each.receive() is not None
        link = await caller.connect(server.peer_id)
        theirs = server._links[caller.peer_id]
        theirs.lanes[1].abort()
        theirs.lane_lost(theirs.lanes[1], ConnectionLost("cut"), guilty=False)
        with pytest.raises(ConnectionLost):
            await bulk.receive()
        await call.send({"n": 2})
        assert await call.receive() is not None
        assert len(link.lanes) == 1
    reply = await caller.call(server.peer_id, "echo", {"n": 3}, timeout_s=5, priority=Priority.BULK)
    assert reply.body == {"n": 3}
    assert len(link.lanes) == 2


@pytest.mark.parametrize("failing", ["receiving", "telling", "sending", "writing"])
async def test_a_lane_that_fails_inside_ends_its_calls_at_once(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """What its peer sent, or was to get, is lost then, and nobody should wait until a deadline to hear it."""
    caller, server = two
    lane = server._links[caller.peer_id].lanes[0]

    def fail(*_: object) -> None:
        raise MemoryError

    match failing:
        case "receiving":
            monkeypatch.setattr(lane.connection.receiver, "message", fail)
        case "telling":
            monkeypatch.setattr(server, "handle", fail)
        case "sending":
            monkeypatch.setattr(lane.connection.sender, "next_records", fail)
        case "writing":
            monkeypatch.setattr(lane, "_send", fail)
    events: list[str] = []
    server.journal.watch(events.append, caller.peer_id)
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionLost, match="closed the connection"):
            await caller.call(server.peer_id, "echo", {}, [bytes(100_000)], timeout_s=30)
        await eventually(lambda: not server._all_links)
    assert "this end of the connection failed" in events[-1]
    monkeypatch.undo()
    await caller.call(server.peer_id, "echo", timeout_s=5)
    assert not server._gate.reputation.score(caller.peer_id, time.monotonic())


async def test_a_link_that_fails_at_its_tick_stops_no_other_links_clock(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petalite.net.host._TICK_S", 0.01)
    caller, first, second = await net.host(), await net.host(listen=True), await net.host(listen=True)
    link, other = await caller.connect(first.addresses[0]), await caller.connect(second.addresses[0])
    monkeypatch.setattr(link, "tick", lambda _now: 1 / 0)
    await eventually(lambda: link.closed)
    ticked: list[float] = []
    monkeypatch.setattr(other, "tick", ticked.append)
    await eventually(lambda: len(ticked) > 1)
    assert not other.closed and ticked == sorted(ticked)


async def test_who_waits_for_a_place_on_a_bulk_lane_that_is_lost_goes_on_the_other(net: Net) -> None:
    settings = HostSettings(windows=Windows(streams=2))
    caller, server = await net.host(), await net.host(settings, listen=True)
    server.serve("echo", echo)
    server.serve("stream", echo_stream)
    calls = [
        await caller.open(server.addresses[0], "stream", priority=Priority.BULK, timeout_s=5)
        for _ in range(2)
    ]
    link = caller._links[server.peer_id]
    waiting = asyncio.create_task(link.lane_for(Priority.BULK, None))
    await asyncio.sleep(0)
    lane = link.lanes[1]
    lane.abort()
    link.lane_lost(lane, ConnectionLost("cut"), guilty=False)
    async with asyncio.timeout(5):
        assert await waiting is link.lanes[0]
    for call in calls:
        call.end()


async def test_bulk_goes_on_the_one_lane_where_no_other_can_be_opened(net: Net) -> None:
    """The accepting end, whose peer does not listen: there is nowhere to dial."""
    caller, server = await net.host(), await net.host(listen=True)
    caller.serve("echo", echo)
    await caller.connect(server.addresses[0])
    await eventually(lambda: bool(server.peers()))
    reply = await server.call(caller.peer_id, "echo", {"n": 1}, timeout_s=5, priority=Priority.BULK)
    assert reply.body == {"n": 1}
    assert server.journal.counts["lane:failed", ""] == 1


async def test_a_peer_that_was_restarted_gets_no_bulk_lane_of_its_former_self(two: tuple[Host, Host]) -> None:
    caller, server = two
    link = caller._links[server.peer_id]
    link.hello = replace(link.hello, instance=bytes(16))
    await caller.call(server.peer_id, "echo", timeout_s=5, priority=Priority.BULK)
    assert len(link.lanes) == len(caller._lanes) == 1
    assert caller.journal.counts["lane:failed", ""] == 1
    await eventually(lambda: server.journal.counts["handshake:failed", "PROTOCOL"] == 1)
    assert len(server._lanes) == 1


async def test_an_urgent_call_beside_bulk_does_not_wait_for_it(two: tuple[Host, Host]) -> None:
    """Calls that take a millisecond each go on while 200 MB are under way; by count, not by clock."""
    caller, server = two
    finished: list[str] = []

    async def bulk() -> None:
        async with await caller.open(server.peer_id, "sink", priority=Priority.BULK) as call:
            for _ in range(50):
                await call.send({}, [bytes(4_000_000)])
            await call.finish()
            await call.receive()
        finished.append("bulk")

    async def sink(call: Call) -> dict[str, Any]:
        while await call.receive() is not None:
            pass
        return {}

    server.serve("sink", sink)
    task = asyncio.create_task(bulk())
    for _ in range(10):
        await caller.call(server.peer_id, "echo", timeout_s=5, priority=Priority.INTERACTIVE)
    finished.append("urgent")
    await task
    assert finished == ["urgent", "bulk"]


async def test_a_lane_of_nobodys_link_is_refused(net: Net) -> None:
    caller, server = await net.host(), await net.host(listen=True)
    link = await caller.connect(server.addresses[0])
    await eventually(lambda: bool(server.peers()))
    caller._instance = bytes(16)
    await caller.open_bulk_lane(link)
    await eventually(lambda: len(link.lanes) == 1)
    assert server.journal.counts["link:refused", "REFUSED"] == 1
    assert not link.closed


# -- draining --------------------------------------------------------------------------------------


async def test_draining_lets_calls_end_and_takes_no_more(two: tuple[Host, Host]) -> None:
    caller, server = two
    go_on = asyncio.Event()
    started = asyncio.Event()

    async def slow(call: Call) -> dict[str, int]:
        started.set()
        await go_on.wait()
        return {"done": 1}

    server.serve("slow", slow)
    running = asyncio.create_task(caller.call(server.peer_id, "slow", timeout_s=10))
    await started.wait()
    draining = asyncio.create_task(server.drain(10))
    link = caller._links[server.peer_id]
    await eventually(lambda: not link.usable)
    with pytest.raises((Unreachable, ShuttingDown)):
        await caller.call(server.peer_id, "echo", timeout_s=5)
    go_on.set()
    assert (await running).body == {"done": 1}
    await draining


async def test_draining_ends_at_its_deadline(two: tuple[Host, Host]) -> None:
    caller, server = two
    started = asyncio.Event()

    async def stuck(call: Call) -> None:
        started.set()
        await asyncio.Event().wait()

    server.serve("stuck", stuck)
    running = asyncio.create_task(caller.call(server.peer_id, "stuck", timeout_s=50))
    await started.wait()
    async with asyncio.timeout(5):
        await server.drain(0.05)
    with pytest.raises(RemoteError):
        await running


# -- limits and bans -------------------------------------------------------------------------------


async def test_a_banned_peer_is_told_so_and_not_dialled(two: tuple[Host, Host]) -> None:
    caller, server = two
    server.blame(caller.peer_id, VIOLATION)
    await eventually(lambda: not caller.peers())
    with pytest.raises(Banned):
        await caller.call(server.peer_id, "echo", timeout_s=5)
    with pytest.raises(Banned, match="another"):
        await server.connect(caller.peer_id)


async def test_more_connections_than_allowed_are_refused_with_a_code(net: Net) -> None:
    server = await net.host(HostSettings(limits=Limits(connections=2)), listen=True)
    server.serve("echo", echo)
    callers = [await net.host() for _ in range(3)]
    for caller in callers[:2]:
        await caller.call(server.addresses[0], "echo", timeout_s=5)
    with pytest.raises(ResourceLimit, match="too many"):
        await callers[2].call(server.addresses[0], "echo", timeout_s=5)
    await callers[0].close()
    await eventually(lambda: len(server.peers()) == 1)
    another = await net.host()
    await another.call(server.addresses[0], "echo", timeout_s=5)


async def test_messages_beyond_the_memory_set_aside_are_refused(net: Net) -> None:
    limits = Limits(memory_bytes=10_000_000, peer_memory_bytes=4_000_000)
    server = await net.host(HostSettings(limits=limits), listen=True)
    server.serve("echo", echo)
    caller = await net.host()
    await caller.call(server.addresses[0], "echo", {}, [bytes(3_000_000)], timeout_s=5)
    with pytest.raises(ResourceLimit, match="no memory"):
        await caller.call(server.addresses[0], "echo", {}, [bytes(5_000_000)], timeout_s=5)
    await eventually(
        lambda: (
            server._gate.memory.used == server._links[caller.peer_id].lanes[0].connection.receiver.memory.used
        )
    )


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
async def test_memory_that_cannot_be_had_is_not_set_aside(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    caller, server = two

    def take(_size: int) -> memoryview:
        raise error

    lane = server._links[caller.peer_id].lanes[0]
    with monkeypatch.context() as patched:
        patched.setattr(lane, "allocate", take)
        with pytest.raises(ResourceLimit, match="no memory"):
            await caller.call(server.peer_id, "echo", {}, [bytes(3_000_000)], timeout_s=5)
    await eventually(lambda: server._gate.memory.used == lane.connection.receiver.memory.used)
    await caller.call(server.peer_id, "echo", {}, [bytes(3_000_000)], timeout_s=5)


async def test_a_message_that_stops_after_its_header_gives_its_memory_back(two: tuple[Host, Host]) -> None:
    """Reserved while it may still come; free as soon as its caller is gone."""
    caller, server = two
    call = await caller.open(server.peer_id, "echo")
    used = server._gate.memory.used
    async with await caller.open(server.peer_id, "stream") as stream:
        sending = asyncio.create_task(stream.send({}, [bytes(50_000_000)]))
        await eventually(lambda: server._gate.memory.used > used)
        sending.cancel()
    call.end()
    await eventually(lambda: server._gate.memory.used < 50_000_000)


async def test_what_a_lost_peer_left_unread_takes_no_memory_for_ever(net: Net) -> None:
    """It is dropped behind the loss, and to drop it is to read it, which lets the window grow."""
    windows = Windows(connection_bytes=65_536, allowance_bytes=0)
    server, caller = await net.host(HostSettings(windows=windows), listen=True), await net.host()
    watched = Watched()
    server.serve("deaf", watched)
    call = await caller.open(server.addresses[0], "deaf")
    await watched.started.wait()
    receiver = server._links[caller.peer_id].lanes[0].connection.receiver
    receiver.rtt_s = 10.0
    sending = asyncio.gather(*(call.send({}, [bytes(20_000)]) for _ in range(10)), return_exceptions=True)
    await eventually(lambda: receiver.received >= 65_536)
    await caller.close()
    await sending
    await eventually(lambda: not server._handlers)
    assert receiver.received == receiver.consumed
    assert server._gate.memory.used == 0


async def test_a_link_that_fell_silent_gives_each_lanes_memory_back_once(net: Net) -> None:
    """The interactive lane is given up; the bulk lane, which goes with it, has its turn in the same tick."""
    settings = HostSettings(windows=Windows(connection_bytes=65_536))
    server, caller = await net.host(settings, listen=True), await net.host()
    go_on, read = asyncio.Event(), asyncio.Event()

    async def slow(call: Call) -> None:
        await go_on.wait()
        for _ in range(10):
            await call.receive()
        read.set()
        await asyncio.Event().wait()

    server.serve("slow", slow)
    call = await caller.open(server.addresses[0], "slow", priority=Priority.BULK)
    for _ in range(10):
        await call.send({}, [bytes(20_000)])
    link = server._links[caller.peer_id]
    receiver = link.lanes[1].connection.receiver
    await eventually(lambda: receiver.received > 200_000)
    go_on.set()
    await read.wait()
    assert server._gate.memory.used == receiver.memory.used > 0
    link.lanes[0].connection.ping(0.0)
    link.lanes[0].last_received = float("-inf")
    link.tick(time.monotonic())
    assert link.closed
    assert server._gate.memory.used == 0
    call.end()


async def test_a_methods_rate_is_kept_per_peer(two: tuple[Host, Host]) -> None:
    caller, server = two
    server.serve("rare", echo, policy=MethodPolicy(calls_per_s=3))
    results = await asyncio.gather(
        *(caller.call(server.peer_id, "rare", timeout_s=5) for _ in range(5)), return_exceptions=True
    )
    assert [type(result) for result in results].count(RateLimited) == 2


async def test_a_peer_that_failed_is_left_alone_for_a_while_unless_it_is_named_by_address(net: Net) -> None:
    caller, other = await net.host(), await net.host()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = Multiaddr("ip4", "127.0.0.1", reserved.getsockname()[1], other.peer_id)
        for _ in range(2):
            with pytest.raises(Unreachable, match="answers"):
                await caller.connect(address)
        with pytest.raises(Unreachable, match="a moment ago"):
            await caller.connect(other.peer_id)


@pytest.mark.parametrize(
    ("seen", "claimed", "kept"),
    [
        ("8.8.8.8", "8.8.8.8", True),
        ("8.8.8.8", "0.0.0.0", True),  # it stands for 8.8.8.8
        ("8.8.8.8", "1.1.1.1", True),
        ("8.8.8.8", "127.0.0.1", False),
        ("8.8.8.8", "192.168.0.1", False),
        ("8.8.8.8", "169.254.169.254", False),  # a cloud's metadata
        ("192.168.0.7", "169.254.169.254", False),
        ("192.168.0.7", "192.168.0.8", True),
        ("192.168.0.7", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("8.8.8.8", "224.0.0.1", False),
    ],
)
def test_a_peer_cannot_send_us_where_only_we_can_reach(seen: str, claimed: str, kept: bool) -> None:
    """What its hello claims is dialled later: no loopback, link-local or private target for a stranger."""
    hello = Hello(
        bytes(16), 0, 4096, 4096, 1, "", (f"/ip4/{claimed}/tcp/5", "/dns/internal/tcp/80", "nonsense")
    )
    found = claimed_addresses(hello, Multiaddr("ip4", seen, 1234))
    assert [address.host for address in found] == (
        [seen if claimed == "0.0.0.0" else claimed] if kept else []
    )


async def test_a_cancelled_request_is_not_sent_to_its_end(two: tuple[Host, Host]) -> None:
    """What waited for credit is dropped with the call."""
    caller, server = two
    started = asyncio.Event()

    async def deaf(call: Call) -> None:
        started.set()
        await asyncio.Event().wait()

    server.serve("deaf", deaf)
    async with await caller.open(server.peer_id, "deaf") as call:
        await started.wait()
        sending = asyncio.create_task(call.send({}, [bytes(30_000_000)]))
        await asyncio.sleep(0)
        sending.cancel()
    task = asyncio.create_task(caller.call(server.peer_id, "nowhere", {}, [bytes(30_000_000)], timeout_s=5))
    await asyncio.sleep(0)
    task.cancel()
    link = caller._links[server.peer_id]
    await eventually(lambda: not link.calls)
    assert link.lanes[0].connection.sender.sent < 30_000_000


# -- what operators see ----------------------------------------------------------------------------


async def test_counters_and_events(net: Net) -> None:
    caller, server = await net.host(), await net.host(listen=True)
    server.serve("echo", echo)
    lines: list[str] = []
    others: list[str] = []
    stop = server.journal.watch(lines.append, caller.peer_id)
    server.journal.watch(others.append, Identity.generate().peer_id)
    await caller.call(server.addresses[0], "echo", {}, [bytes(1000)], timeout_s=5)
    metrics = server.metrics()
    assert metrics["petalite_net_links"] == 1
    assert metrics["petalite_net_received_bytes_total"] > 1000
    assert metrics['petalite_net_events_total{event="link:opened",code=""}'] == 1
    await caller.close()
    await eventually(lambda: not server._lanes)
    assert server.metrics()["petalite_net_received_bytes_total"] > 1000
    events = [json.loads(line) for line in lines]
    assert [event["name"] for event in events] == ["link:opened", "link:closed"]
    assert all(event["peer"] == str(caller.peer_id) and event["time"] > 1e9 for event in events)
    assert events[1]["code"] == "SHUTDOWN"
    stop()
    assert not others


async def test_a_thousand_streams_share_fairly(net: Net) -> None:
    """Jain's index of what each of 1,000 concurrent streams has got, when half of it all has come."""
    settings = HostSettings(windows=Windows(streams=1024))
    caller, server = await net.host(settings), await net.host(settings, listen=True)
    chunk, count, chunks = bytes(4096), 1000, 16
    received = [0] * count
    snapshot: list[int] = []

    async def source(call: Call) -> None:
        for _ in range(chunks):
            await call.send({}, [chunk])

    async def read(index: int) -> None:
        async with await caller.open(server.addresses[0], "source") as call:
            while await call.receive() is not None:
                received[index] += 1
                if not snapshot and sum(received) >= count * chunks // 2:
                    snapshot.extend(received)

    server.serve("source", source, policy=MethodPolicy(max_concurrent=count))
    await asyncio.gather(*(read(index) for index in range(count)))
    assert received == [chunks] * count
    assert sum(snapshot) ** 2 / (count * sum(x * x for x in snapshot)) >= 0.95


async def test_many_idle_connections(net: Net) -> None:
    """200 of them: both ends, and a host for each caller, in less than 128 KiB of this process's memory."""
    server = await net.host(listen=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    callers = [await net.host() for _ in range(200)]
    for caller in callers:
        await caller.connect(server.addresses[0])
    await eventually(lambda: len(server.peers()) == 200)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 128  # KiB


async def test_a_deadline_holds_while_waiting_for_room(net: Net) -> None:
    tiny = HostSettings(windows=Windows(streams=1), timers=Timers())
    caller, server = await net.host(), await net.host(tiny, listen=True)
    server.serve("stream", echo_stream)
    async with await caller.open(server.addresses[0], "stream"):
        with pytest.raises(DeadlineExceeded, match="room"):
            await caller.call(server.peer_id, "stream", timeout_s=0.05)


@pytest.mark.parametrize("smaller_dials", [True, False])
async def test_another_connection_takes_over_when_ids_run_out(
    net: Net, monkeypatch: pytest.MonkeyPatch, smaller_dials: bool
) -> None:
    """Whichever end dialled first, and whichever runs out."""
    monkeypatch.setattr("petalite.net.connection.MAX_OPENED", 3)
    identities = sorted((Identity.generate() for _ in range(2)), key=lambda identity: identity.peer_id)
    first, second = [await net.host(identity=identity, listen=True) for identity in identities]
    for host in (first, second):
        host.serve("echo", echo)
    dialler, server = (first, second) if smaller_dials else (second, first)
    await dialler.connect(server.addresses[0])
    await server.connect(dialler.addresses[0])
    for _ in range(8):
        await server.call(dialler.peer_id, "echo", timeout_s=5)
    used_up = dialler._links[server.peer_id]
    for _ in range(8):
        await dialler.call(server.peer_id, "echo", timeout_s=5)
    assert dialler._links[server.peer_id] is not used_up
