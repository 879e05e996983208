"""Hosts over real sockets, on uvloop and on asyncio: every kind of beginning and end of a link."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from petalite.errors import (
    Cancelled,
    ConnectionLost,
    HandshakeFailed,
    InvalidAddress,
    InvalidArgument,
    ShuttingDown,
    Unreachable,
    WrongPeer,
)
from petalite.net import Call, Host, HostSettings, Identity, Multiaddr, accepting
from petalite.net.credit import Windows
from petalite.net.limits import Limits
from petalite.net.link import Timers

from .hosts import LOOPBACK, Net, Watched, echo, eventually

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


async def test_nobody_listens_who_closed_while_a_name_was_looked_up(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await net.host(listen=True)
    resolve = accepting.resolve

    async def resolve_late(address: Multiaddr) -> Any:
        places = await resolve(address)
        await host.close()
        return places

    monkeypatch.setattr(accepting, "resolve", resolve_late)
    with pytest.raises(ShuttingDown):
        await host.listen([LOOPBACK])


async def test_no_call_begins_while_a_host_closes(two: tuple[Host, Host]) -> None:
    """Nothing of it runs when `close` returns, whatever its peers did meanwhile."""
    caller, server = two
    started, ended = 0, [asyncio.Event(), asyncio.Event()]

    async def slow_to_end(call: Call) -> None:
        nonlocal started
        end = ended[started]
        started += 1
        try:
            await asyncio.Event().wait()
        finally:
            await end.wait()

    server.serve("slow", slow_to_end)
    link = await caller.connect(server.peer_id)
    first = await caller.open(server.peer_id, "slow")
    await eventually(lambda: started == 1)
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0)
    second = await caller.open(server.peer_id, "slow")
    await eventually(lambda: started == 2 or link.closed)
    ended[0].set()
    await closing
    handlers = len(server._handlers)
    ended[1].set()
    first.end()
    second.end()
    assert not handlers


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
    with pytest.raises(InvalidAddress, match="cannot listen"):
        await other.listen([server.addresses[0]])


async def test_listening_is_all_or_nothing(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a name's second place, or a later address, cannot be had, the ones before it are let go."""
    server, other = await net.host(listen=True), await net.host()
    taken = server.addresses[0]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        free = Multiaddr("ip4", "127.0.0.1", sock.getsockname()[1])
    with pytest.raises(InvalidAddress, match="cannot listen"):
        await other.listen([free, taken])
    with pytest.raises(InvalidAddress, match="cannot listen"):
        await other.listen([free, Multiaddr("dns", "no-such-host.invalid", 0)])
    resolve = accepting.resolve

    async def both(_address: Multiaddr) -> list[Any]:
        return [*await resolve(free), *await resolve(taken)]

    with monkeypatch.context() as patched, pytest.raises(InvalidAddress, match="cannot listen"):
        patched.setattr(accepting, "resolve", both)
        await other.listen([Multiaddr("dns", "two.places", 0)])
    assert other.addresses == []
    assert await other.listen([free]) == [free.with_peer(other.peer_id)]


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
