"""Hosts over real sockets, on uvloop and on asyncio: calls, streams, errors and every kind of end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from petalite.errors import (
    BadMessage,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    ErrorCode,
    HandshakeFailed,
    InvalidArgument,
    LocalProtocolError,
    RemoteError,
    ResourceLimit,
    SessionGap,
    ShuttingDown,
    UnknownMethod,
    Unreachable,
    WrongPeer,
)
from petalite.net import Call, Host, HostSettings, Identity, MethodPolicy, Multiaddr, Priority
from petalite.net.credit import Windows
from petalite.net.limits import Limits
from petalite.net.link import Timers
from petalite.net.schema import Bounds

from .hosts import LOOPBACK, Net, echo, eventually

# -- calls -----------------------------------------------------------------------------------------


async def test_unary(two: tuple[Host, Host]) -> None:
    caller, server = two
    buffers = [b"", b"x", bytes(5000), bytearray(200_000), memoryview(b"view")]
    reply = await caller.call(server.peer_id, "echo", {"n": 1, "deep": [{"a": None}]}, buffers, timeout_s=5)
    assert reply.body == {"n": 1, "deep": [{"a": None}]}
    assert [bytes(buffer) for buffer in reply.buffers] == [bytes(buffer) for buffer in buffers]
    assert all(not buffer.readonly for buffer in reply.buffers)


async def test_many_calls_at_once_share_one_connection(two: tuple[Host, Host]) -> None:
    """More than the streams that the server allows at once: the rest wait for room."""
    caller, server = two
    replies = await asyncio.gather(
        *(caller.call(server.peer_id, "echo", {"i": i}, [b"x" * i], timeout_s=20) for i in range(1000))
    )
    assert [reply.body["i"] for reply in replies] == list(range(1000))
    assert caller.peers() == [server.peer_id]
    assert server.peers() == [caller.peer_id]


async def test_the_peer_and_its_address_are_known_to_the_handler(two: tuple[Host, Host]) -> None:
    caller, server = two

    async def who(call: Call) -> dict[str, Any]:
        return {"peer": str(call.peer), "host": call.remote_address.host, "left": call.remaining_s()}

    server.serve("who", who)
    body = (await caller.call(server.peer_id, "who", timeout_s=5)).body
    assert body["peer"] == str(caller.peer_id)
    assert body["host"] == "127.0.0.1"
    assert 4 < body["left"] <= 5


async def test_bidirectional(two: tuple[Host, Host]) -> None:
    caller, server = two
    async with await caller.open(server.peer_id, "stream", timeout_s=10) as call:
        for size in (0, 1, 16_384, 3_000_000):
            await call.send({"size": size}, [b"\x05" * size])
            reply = await call.receive()
            assert reply is not None
            assert bytes(reply.buffers[0]) == b"\x05" * size
        await call.finish()
        assert await call.receive() is None


async def test_server_stream_and_client_stream(two: tuple[Host, Host]) -> None:
    caller, server = two

    async def count(call: Call) -> None:
        for i in range(call.request.body["to"]):
            await call.send({"i": i})

    async def total(call: Call) -> dict[str, int]:
        result = 0
        while (message := await call.receive()) is not None:
            result += message.body["i"]
        return {"total": result}

    server.serve("count", count)
    server.serve("total", total)
    async with await caller.open(server.peer_id, "count", {"to": 500}) as call:
        seen = []
        while (message := await call.receive()) is not None:
            seen.append(message.body["i"])
    assert seen == list(range(500))
    async with await caller.open(server.peer_id, "total") as call:
        for i in range(500):
            await call.send({"i": i})
        await call.finish()
        reply = await call.receive()
        assert reply is not None
        assert reply.body == {"total": sum(range(500))}


async def test_a_handler_that_says_nothing_is_an_empty_answer(two: tuple[Host, Host]) -> None:
    caller, server = two

    async def silent(call: Call) -> None:
        return None

    server.serve("silent", silent)
    assert (await caller.call(server.peer_id, "silent", timeout_s=5)).body == {}


async def test_typed_requests_are_checked_at_the_border(two: tuple[Host, Host]) -> None:
    @dataclass(frozen=True)
    class Step:
        position: Annotated[int, Bounds(0, 100)]

    async def step(call: Call, request: Step) -> dict[str, int]:
        return {"next": request.position + 1}

    caller, server = two
    server.serve("step", step, request=Step)
    assert (await caller.call(server.peer_id, "step", {"position": 4}, timeout_s=5)).body == {"next": 5}
    with pytest.raises(BadMessage, match=r"Step\.position"):
        await caller.call(server.peer_id, "step", {"position": 101}, timeout_s=5)


async def test_errors_come_back_as_their_class(
    two: tuple[Host, Host], caplog: pytest.LogCaptureFixture
) -> None:
    caller, server = two

    async def gap(call: Call) -> None:
        raise SessionGap("position 7 of a row of length 3")

    async def broken(call: Call) -> None:
        raise KeyError("a secret of the server's")

    server.serve("gap", gap)
    server.serve("broken", broken)
    with pytest.raises(SessionGap, match="position 7"):
        await caller.call(server.peer_id, "gap", timeout_s=5)
    with pytest.raises(RemoteError) as raised:
        await caller.call(server.peer_id, "broken", timeout_s=5)
    assert "secret" not in str(raised.value)
    assert "secret" in caplog.text
    with pytest.raises(UnknownMethod, match="nowhere"):
        await caller.call(server.peer_id, "nowhere", timeout_s=5)
    async with await caller.open(server.peer_id, "gap") as call:
        with pytest.raises(SessionGap):
            await call.receive()
    assert (await caller.call(server.peer_id, "echo", timeout_s=5)).body == {}


async def test_policies_refuse_before_memory_is_taken(two: tuple[Host, Host]) -> None:
    caller, server = two
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def slow(call: Call) -> None:
        started.set()
        await go_on.wait()

    server.serve("small", echo, policy=MethodPolicy(max_message_bytes=1000, max_buffers=2))
    server.serve("one", slow, policy=MethodPolicy(max_concurrent=1))
    await caller.call(server.peer_id, "small", buffers=[bytes(500), bytes(500)], timeout_s=5)
    for buffers in ([bytes(1001)], [b"", b"", b""], [bytes(30_000_000)]):
        with pytest.raises(BadMessage, match="small"):
            await caller.call(server.peer_id, "small", buffers=buffers, timeout_s=5)
    first = asyncio.create_task(caller.call(server.peer_id, "one", timeout_s=5))
    await started.wait()
    with pytest.raises(ResourceLimit):
        await caller.call(server.peer_id, "one", timeout_s=5)
    go_on.set()
    await first


async def test_a_method_is_served_once(two: tuple[Host, Host]) -> None:
    with pytest.raises(InvalidArgument):
        two[1].serve("echo", echo)


async def test_what_a_caller_gets_wrong(two: tuple[Host, Host]) -> None:
    caller, server = two
    with pytest.raises(InvalidArgument):
        await caller.call(server.peer_id, "echo", {"bad": object()}, timeout_s=5)
    async with await caller.open(server.peer_id, "stream") as call:
        await call.finish()
        with pytest.raises(LocalProtocolError):
            await call.send({})
    assert (await caller.call(server.peer_id, "echo", timeout_s=5)).body == {}


# -- deadlines and giving up -----------------------------------------------------------------------


class Watched:
    """A handler that waits for ever and says how it ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: asyncio.Future[type[BaseException]] = asyncio.get_running_loop().create_future()

    async def __call__(self, call: Call) -> None:
        self.started.set()
        try:
            await self.wait(call)
        except BaseException as error:
            self.ended.set_result(type(error))
            raise

    async def wait(self, call: Call) -> None:
        await asyncio.Event().wait()


class WatchedReceiving(Watched):
    async def wait(self, call: Call) -> None:
        await call.receive()
        await call.receive()


async def test_a_deadline_travels_and_ends_both_sides(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("slow", handler)
    with pytest.raises(DeadlineExceeded, match="slow"):
        await caller.call(server.peer_id, "slow", timeout_s=0.05)
    assert await handler.ended is asyncio.CancelledError


async def test_a_cancelled_caller_ends_the_handler(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("slow", handler)
    task = asyncio.create_task(caller.call(server.peer_id, "slow", timeout_s=50))
    await handler.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await handler.ended is asyncio.CancelledError


async def test_cancel_of_a_stream_reaches_a_handler_that_receives(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = WatchedReceiving()
    server.serve("slow", handler)
    async with await caller.open(server.peer_id, "slow") as call:
        await handler.started.wait()
        call.cancel()
        with pytest.raises(Cancelled):
            await call.receive()
        with pytest.raises(Cancelled):
            await call.send({})
    assert await handler.ended is Cancelled


async def test_leaving_a_stream_early_ends_the_handler(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("slow", handler)
    with pytest.raises(ZeroDivisionError):
        async with await caller.open(server.peer_id, "slow"):
            await handler.started.wait()
            raise ZeroDivisionError
    assert await handler.ended is asyncio.CancelledError


async def test_a_server_may_give_up_too(two: tuple[Host, Host]) -> None:
    caller, server = two

    async def refuse(call: Call) -> None:
        await call.receive()
        call.cancel(ErrorCode.BUSY)

    server.serve("refuse", refuse)
    async with await caller.open(server.peer_id, "refuse") as call:
        await call.send({})
        with pytest.raises(RemoteError) as raised:
            await call.receive()
        assert raised.value.code is ErrorCode.BUSY


async def test_a_call_cut_off_while_it_sends_harms_no_other(two: tuple[Host, Host]) -> None:
    """Cancelled in the middle of a large message to a peer that does not read it."""
    caller, server = two
    handler = Watched()
    server.serve("deaf", handler)
    async with await caller.open(server.peer_id, "deaf") as call:
        await handler.started.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call.send({}, [bytes(20_000_000)])
        with pytest.raises(Cancelled):
            await call.send({})
    reply = await caller.call(server.peer_id, "echo", {}, [bytes(1000)], timeout_s=5)
    assert bytes(reply.buffers[0]) == bytes(1000)


# -- backpressure ----------------------------------------------------------------------------------


async def test_a_slow_reader_stops_its_sender_and_nobody_else(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("deaf", handler)
    async with await caller.open(server.peer_id, "deaf") as call:
        await handler.started.wait()
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await call.send({}, [bytes(100_000)])
                sent += 100_000

        sender = asyncio.create_task(send())
        for _ in range(50):
            await caller.call(server.peer_id, "echo", timeout_s=5)
        assert sent < 1_000_000
        sender.cancel()


async def test_buffers_are_the_callers_again_when_send_returns(two: tuple[Host, Host]) -> None:
    """The same tensor, overwritten after each send."""
    caller, server = two
    tensor = bytearray(1_000_000)
    async with await caller.open(server.peer_id, "stream", timeout_s=20) as call:
        reader = asyncio.create_task(collect(call, 10))
        for i in range(10):
            tensor[:] = bytes([i]) * len(tensor)
            await call.send({}, [tensor])
        assert await reader == [bytes([i]) * 1_000_000 for i in range(10)]


async def collect(call: Call, count: int) -> list[bytes]:
    replies = []
    for _ in range(count):
        message = await call.receive()
        assert message is not None
        replies.append(bytes(message.buffers[0]))
    return replies


# -- the end of a link -----------------------------------------------------------------------------


async def test_closing_the_server_ends_its_calls_at_once(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("slow", handler)
    task = asyncio.create_task(caller.call(server.peer_id, "slow", timeout_s=50))
    await handler.started.wait()
    await server.close()
    with pytest.raises((ShuttingDown, Cancelled)):
        await task
    assert await handler.ended is asyncio.CancelledError
    assert not caller.is_connected(server.peer_id)
    with pytest.raises(Unreachable):
        await caller.call(server.peer_id, "echo", timeout_s=5)


async def test_a_closed_host_says_so(two: tuple[Host, Host]) -> None:
    caller, server = two
    await caller.close()
    with pytest.raises(ShuttingDown):
        await caller.call(server.peer_id, "echo", timeout_s=5)


CHILD = """
import asyncio, sys
from petalite.net import Host, Identity, Message, Multiaddr
async def main():
    async with Host(Identity.from_seed(bytes([7]) * 32)) as host:
        async def echo(call): return Message(call.request.body, call.request.buffers)
        async def hang(call): await call.send({"here": 1}); await asyncio.Event().wait()
        host.serve("echo", echo); host.serve("hang", hang)
        [address] = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        print(address, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], Multiaddr]]:
    """A host in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Multiaddr.parse(process.stdout.readline().strip())
        process.kill()


async def test_a_killed_peer_is_noticed_at_once(
    net: Net, child: tuple[subprocess.Popen[str], Multiaddr]
) -> None:
    """SIGKILL: the kernel says so, and every call on the link hears it long before any deadline."""
    process, address = child
    caller = await net.host()
    async with contextlib.AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(await caller.open(address, "hang")) for _ in range(5)]
        for call in calls:
            assert await call.receive() is not None
        waiting = [asyncio.create_task(call.receive()) for call in calls]
        await asyncio.sleep(0)
        process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(2):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ConnectionLost] * 5
        with pytest.raises(ConnectionLost):
            await calls[0].send({})
    assert not caller.peers()


async def test_a_stopped_peer_is_given_up_after_the_stated_silence(
    net: Net, child: tuple[subprocess.Popen[str], Multiaddr]
) -> None:
    """SIGSTOP: the socket stays open and nothing answers."""
    process, address = child
    caller = await net.host(HostSettings(timers=Timers(ping_every_s=0.1, dead_after_s=0.5)))
    async with await caller.open(address, "hang") as call:
        assert await call.receive() is not None
        process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                with pytest.raises(ConnectionLost, match="no sign of life"):
                    await call.receive()
        finally:
            process.send_signal(signal.SIGCONT)


async def test_an_idle_link_is_closed_by_who_dialled(net: Net) -> None:
    server = await net.host(listen=True)
    caller = await net.host(HostSettings(timers=Timers(idle_close_s=0.1)))
    link = await caller.connect(server.addresses[0])
    async with asyncio.timeout(10):
        await link.lanes[0].gone.wait()
    assert link.closed


# -- finding and choosing peers --------------------------------------------------------------------


async def test_the_wrong_peer_at_an_address(net: Net) -> None:
    caller, server, other = await net.host(), await net.host(listen=True), await net.host()
    with pytest.raises(WrongPeer, match=str(server.peer_id)):
        await caller.connect(server.addresses[0].with_peer(other.peer_id))
    assert not caller.peers()


async def test_nobody_at_an_address(net: Net) -> None:
    caller, other = await net.host(), await net.host()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        address = Multiaddr("ip4", "127.0.0.1", port, other.peer_id)
        with pytest.raises(Unreachable, match=str(port)):
            await caller.connect(address)


async def test_a_peer_of_which_nothing_is_known(net: Net) -> None:
    caller, other = await net.host(), await net.host()
    with pytest.raises(Unreachable, match="no address"):
        await caller.call(other.peer_id, "echo", timeout_s=5)
    with pytest.raises(InvalidArgument, match="which peer"):
        await caller.connect(LOOPBACK)
    with pytest.raises(Unreachable):
        await caller.connect(caller.peer_id)


async def test_something_that_is_no_peer_at_an_address(net: Net) -> None:
    caller, other = await net.host(), await net.host()

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(hello, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(HandshakeFailed):
            await caller.connect(Multiaddr("ip4", "127.0.0.1", port, other.peer_id))


async def test_a_peer_that_accepts_and_says_nothing(net: Net) -> None:
    """The deadline of the handshake, not of the caller's patience."""
    caller = await net.host(HostSettings(limits=Limits(handshake_s=0.1)))
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = Multiaddr("ip4", "127.0.0.1", deaf.getsockname()[1], Identity.generate().peer_id)
        async with asyncio.timeout(5):
            with pytest.raises(Unreachable):
                await caller.connect(address)


async def test_several_addresses_the_good_one_wins(net: Net) -> None:
    """One refuses, one accepts and says nothing, one is a name and right: a quarter of a second each."""
    caller, server = await net.host(), await net.host(listen=True)
    with socket.socket() as deaf, socket.socket() as reserved:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        reserved.bind(("127.0.0.1", 0))
        addresses = [Multiaddr("ip4", "127.0.0.1", sock.getsockname()[1]) for sock in (reserved, deaf)]
        right = server.addresses[0]
        caller.book.add(server.peer_id, [*addresses, Multiaddr("dns", "localhost", right.port)])
        async with asyncio.timeout(5):
            link = await caller.connect(server.peer_id)
        assert link.peer == server.peer_id
    assert caller.book.addresses(server.peer_id)[0].protocol == "dns"


async def test_ipv6(net: Net) -> None:
    caller, server = await net.host(), await net.host()
    server.serve("echo", echo)
    try:
        [address] = await server.listen([Multiaddr.parse("/ip6/::1/tcp/0")])
    except Exception:
        pytest.skip("no IPv6 on loopback here")
    assert (await caller.call(address, "echo", {"a": 1}, timeout_s=5)).body == {"a": 1}


async def test_one_dial_for_many_callers(two: tuple[Host, Host], net: Net) -> None:
    server = two[1]
    caller = await net.host()
    links = await asyncio.gather(*(caller.connect(server.addresses[0]) for _ in range(20)))
    assert len(set(map(id, links))) == 1


async def test_a_cancelled_caller_does_not_cancel_anothers_dial(net: Net) -> None:
    caller, server = await net.host(), await net.host(listen=True)
    first = asyncio.create_task(caller.connect(server.addresses[0]))
    second = asyncio.create_task(caller.connect(server.addresses[0]))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).peer == server.peer_id


async def test_simultaneous_dials_end_in_one_link(net: Net) -> None:
    """Both directions at once, many times: the calls all succeed, and both ends keep the same connection."""
    for _ in range(10):
        hosts = [await net.host(listen=True) for _ in range(2)]
        for host in hosts:
            host.serve("echo", echo)
        first, second = hosts
        await asyncio.gather(
            first.call(second.addresses[0], "echo", timeout_s=5),
            second.call(first.addresses[0], "echo", timeout_s=5),
        )
        await asyncio.gather(
            first.call(second.peer_id, "echo", timeout_s=5), second.call(first.peer_id, "echo", timeout_s=5)
        )
        ours, theirs = first._links[second.peer_id], second._links[first.peer_id]
        assert ours.outbound is not theirs.outbound


async def test_a_restarted_peer_replaces_what_it_left_behind(net: Net) -> None:
    """The same identity in a new host: the old link ends at once, although its socket is still open."""
    identity = Identity.generate()
    server = await net.host(listen=True)
    server.serve("echo", echo)
    old = await net.host(identity=identity)
    await old.call(server.addresses[0], "echo", timeout_s=5)
    link = server._links[identity.peer_id]
    new = await net.host(identity=identity)
    await new.call(server.addresses[0], "echo", timeout_s=5)
    assert link.closed
    assert server.peers() == [identity.peer_id]
    await eventually(lambda: not old.peers())


async def test_a_peer_that_dialled_us_can_be_dialled_back(net: Net) -> None:
    """Its listening address came with its hello."""
    caller, server = await net.host(listen=True), await net.host(listen=True)
    caller.serve("echo", echo)
    link = await caller.connect(server.addresses[0])
    await eventually(lambda: bool(server.peers()))
    assert (await server.call(caller.peer_id, "echo", {"back": 1}, timeout_s=5)).body == {"back": 1}
    link.close()
    await link.lanes[0].gone.wait()
    await eventually(lambda: not server.peers())
    assert (await server.call(caller.peer_id, "echo", {"again": 1}, timeout_s=5)).body == {"again": 1}


# -- private swarms --------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(None, b"a" * 32), (b"a" * 32, None), (b"a" * 32, b"b" * 32)])
async def test_swarm_keys_that_differ(net: Net, keys: tuple[bytes | None, bytes | None]) -> None:
    caller, server = await net.host(swarm_key=keys[0]), await net.host(swarm_key=keys[1], listen=True)
    server.serve("echo", echo)
    with pytest.raises((HandshakeFailed, ConnectionLost), match="swarm"):
        await caller.call(server.addresses[0], "echo", timeout_s=5)
    assert not server.peers()


async def test_swarm_keys_that_agree(net: Net) -> None:
    caller, server = await net.host(swarm_key=b"a" * 32), await net.host(swarm_key=b"a" * 32, listen=True)
    server.serve("echo", echo)
    await caller.call(server.addresses[0], "echo", timeout_s=5)
    with pytest.raises(InvalidArgument):
        Host(Identity.generate(), swarm_key=b"short")


# -- small things ----------------------------------------------------------------------------------


async def test_listening_where_somebody_listens(net: Net) -> None:
    server, other = await net.host(listen=True), await net.host()
    with pytest.raises(Exception, match="cannot listen"):
        await other.listen([server.addresses[0]])


async def test_priorities_reach_the_answers(two: tuple[Host, Host]) -> None:
    caller, server = two
    seen: list[Priority] = []

    async def which(call: Call) -> None:
        seen.append(call.priority)

    server.serve("free", which)
    server.serve("capped", which, policy=MethodPolicy(priority=Priority.BULK))
    for method in ("free", "capped"):
        await caller.call(server.peer_id, method, timeout_s=5, priority=Priority.INTERACTIVE)
    assert seen == [Priority.INTERACTIVE, Priority.BULK]


async def test_a_connection_needs_little(net: Net) -> None:
    """Windows as small as can be, and a message much larger than both."""
    tiny = HostSettings(windows=Windows(4096, 8192, 2, 4096, 8192, 0))
    caller, server = await net.host(tiny), await net.host(tiny, listen=True)
    server.serve("echo", echo)
    reply = await caller.call(server.addresses[0], "echo", {}, [b"z" * 300_000], timeout_s=4)
    assert bytes(reply.buffers[0]) == b"z" * 300_000


async def test_sockets_do_not_leak(net: Net) -> None:
    server = await net.host(listen=True)
    gc.collect()
    for _ in range(3):
        async with Host(Identity.generate()) as caller:
            await caller.connect(server.addresses[0])
    await eventually(lambda: not server.peers())
    assert not server._all_links
