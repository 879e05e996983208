"""Hostile peers before the handshake and in it; what each runs into, and that others are served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import time

import pytest

from petalite.errors import PetaliteError
from petalite.net import Host, Identity
from petalite.net.handshake import Handshake
from petalite.net.multiaddr import Multiaddr

from .hostile import HELLO, dial, read_to_end
from .hosts import Net, echo, eventually


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"\0" * 10_000, b"petl" + b"\xff" * 100, os.urandom(1000)],
    ids=["http", "tls", "zeros", "magic", "noise"],
)
async def test_garbage_instead_of_a_handshake(host: Host, garbage: bytes) -> None:
    """Nothing is answered."""
    sock = await dial(host)
    with sock:
        await asyncio.get_running_loop().sock_sendall(sock, garbage)
        async with asyncio.timeout(5):
            assert await read_to_end(sock) == b""


async def test_a_peer_that_dials_and_says_nothing(host: Host) -> None:
    """Cut off at the handshake's deadline."""
    sock = await dial(host)
    with sock:
        async with asyncio.timeout(5):
            assert await read_to_end(sock) == b""
    assert host.journal.counts["handshake:failed", "PROTOCOL"] == 1


async def test_a_byte_at_a_time_does_not_stretch_the_deadline(host: Host) -> None:
    """Slowloris inside the handshake: what counts is its end, not the last sign of life."""
    sock = await dial(host)
    first = Handshake(Identity.generate(), HELLO, initiator=True).receive()
    started = time.monotonic()
    with sock:
        for byte in first:
            try:
                await asyncio.get_running_loop().sock_sendall(sock, bytes([byte]))
            except OSError:
                break
            await asyncio.sleep(0.05)
            if host.journal.counts["handshake:failed", "PROTOCOL"]:
                break
    assert time.monotonic() - started < 2 < 0.05 * len(first)


async def test_five_hundred_half_open_handshakes_and_a_good_peer(host: Host, net: Net) -> None:
    """From one address; who comes after them is served within a second."""
    socks = [await dial(host) for _ in range(500)]
    first = Handshake(Identity.generate(), HELLO, initiator=True).receive()
    for sock in socks[::2]:
        await asyncio.get_running_loop().sock_sendall(sock, first)
    good = await net.host()
    async with asyncio.timeout(1):
        await good.call(host.addresses[0], "echo", timeout_s=1)
    assert len(host._gate._handshakes) <= host.settings.limits.handshakes
    for sock in socks:
        sock.close()
    await eventually(lambda: not host._gate._handshakes)


@pytest.mark.parametrize("replay_first", [False, True])
async def test_a_replayed_handshake(host: Host, replay_first: bool) -> None:
    """The recorded third message of a good handshake, behind its own first or another, proves nothing."""
    loop = asyncio.get_running_loop()
    first, second = (Handshake(Identity.generate(), HELLO, initiator=True) for _ in range(2))
    opening, other = first.receive(), second.receive()
    sock = await dial(host)
    with sock:
        await loop.sock_sendall(sock, opening)
        third = first.receive(await loop.sock_recv(sock, 4096))
        await loop.sock_sendall(sock, third)
        await eventually(lambda: len(host.peers()) == 2)
    sock = await dial(host)
    with sock:
        await loop.sock_sendall(sock, opening if replay_first else other)
        await loop.sock_recv(sock, 4096)
        await loop.sock_sendall(sock, third)
        async with asyncio.timeout(5):
            assert await read_to_end(sock) == b""
    assert host.journal.counts["handshake:failed", "PROTOCOL"] == 1


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xff" + bytes(3000), b"\0\x1f" + bytes(31), b"\x01\0" + os.urandom(256), os.urandom(3000)],
    ids=["too long", "too short", "framed noise", "noise"],
)
async def test_garbage_inside_the_handshake(host: Host, garbage: bytes) -> None:
    """Behind a good first message: its answer is the last word."""
    loop = asyncio.get_running_loop()
    sock = await dial(host)
    with sock:
        await loop.sock_sendall(sock, Handshake(Identity.generate(), HELLO, initiator=True).receive())
        assert await loop.sock_recv(sock, 4096)
        with contextlib.suppress(OSError):
            await loop.sock_sendall(sock, garbage)
        async with asyncio.timeout(5):
            assert await read_to_end(sock) == b""
    assert host.journal.counts["handshake:failed", "PROTOCOL"] == 1


async def test_out_of_descriptors(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who comes when there are none waits in the backlog; those who are here are served meanwhile, and the
    loop does not spin."""
    monkeypatch.setattr("petalite.net.accepting._REST_S", 0.2)
    [good] = host.peers()
    socks = [socket.socket() for _ in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        for sock in socks:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", host.addresses[0].port))

        def rests() -> list[float]:
            return [record.created for record in caplog.records if "cannot accept" in record.message]

        await eventually(lambda: len(rests()) == 3)
        assert rests()[2] - rests()[0] > 0.35  # two rests
        assert host.is_connected(good)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await eventually(lambda: host.journal.counts["handshake:failed", "PROTOCOL"] == len(socks))
    for sock in socks:
        sock.close()


async def test_accepting_goes_on_whatever_it_raised(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives accept(2) the errors that a connection, or the network, met before."""
    monkeypatch.setattr("petalite.net.accepting._REST_S", 0.01)
    server, caller = await net.host(listen=True), await net.host()
    server.serve("echo", echo)
    knock, raised = (
        server._acceptor._knock,
        iter([OSError(errno.EPROTO, "odd"), OSError(errno.ENETDOWN, "down")]),
    )

    def knocked(sock: socket.socket, address: Multiaddr) -> None:
        for error in raised:
            sock.close()
            raise error
        knock(sock, address)

    monkeypatch.setattr(server._acceptor, "_knock", knocked)
    for _ in range(2):
        with pytest.raises(PetaliteError):
            await caller.call(server.addresses[0], "echo", {}, timeout_s=5)
    await caller.call(server.addresses[0], "echo", {}, timeout_s=5)


async def test_a_handshake_that_is_ended_before_it_began_leaves_no_socket(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, caller = await net.host(listen=True), await net.host()
    knock, socks = server._acceptor._knock, list[socket.socket]()

    def knocked(sock: socket.socket, address: Multiaddr) -> None:
        knock(sock, address)
        socks.append(sock)
        (task,) = server._gate._handshakes
        assert isinstance(task, asyncio.Task)
        task.cancel()

    monkeypatch.setattr(server._acceptor, "_knock", knocked)
    with pytest.raises(PetaliteError):
        await caller.connect(server.addresses[0])
    assert [sock.fileno() for sock in socks] == [-1]


async def test_connections_that_are_aborted_in_the_backlog_leave_the_loop_its_turns(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, turns, aborted = await net.host(listen=True), 0, list[int]()

    def knocked(sock: socket.socket, _address: Multiaddr) -> None:
        sock.close()
        aborted.append(turns)
        raise ConnectionAbortedError

    monkeypatch.setattr(server._acceptor, "_knock", knocked)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.addresses[0].port)))
        while len(aborted) < 10:
            turns += 1
            await asyncio.sleep(0)
    assert len(set(aborted)) == 10
