"""The address book on a clock of ours, and the race, with attempts that end when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from petalite.net import Host, Identity
from petalite.net.dialing import MAX_ADDRESSES, MAX_BACKOFF_S, MAX_PEERS, AddressBook, race
from petalite.net.identity import PeerId
from petalite.net.multiaddr import Multiaddr

PEER = PeerId(bytes(32))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def address(port: int) -> Multiaddr:
    return Multiaddr("ip4", "1.2.3.4", port)


def test_what_worked_last_comes_first() -> None:
    clock = Clock()
    book = AddressBook(clock)
    book.add(PEER, [address(port).with_peer(PEER) for port in (1, 2, 3)])
    book.failed(PEER, address(1))
    clock.now = 5.0
    book.worked(PEER, address(3).with_peer(PEER))
    assert book.addresses(PEER) == [address(3), address(2), address(1)]
    book.worked(PEER, address(1))
    clock.now = 6.0
    book.worked(PEER, address(2))
    assert book.addresses(PEER)[0] == address(2)


def test_the_wait_doubles_with_jitter_up_to_a_bound_and_ends_with_success() -> None:
    clock = Clock()
    book = AddressBook(clock)
    book.add(PEER, [address(1)])
    assert book.wait_s(PEER, address(1)) == 0.0
    for failure in range(12):
        book.failed(PEER, address(1))
        middle = min(MAX_BACKOFF_S, 2.0**failure)
        assert 0.5 * middle <= book.wait_s(PEER, address(1)) <= 1.5 * middle
    clock.now += 1.5 * MAX_BACKOFF_S
    assert book.wait_s(PEER, address(1)) == 0.0
    book.failed(PEER, address(1))
    book.worked(PEER, address(1))
    assert book.wait_s(PEER, address(1)) == 0.0
    assert book.wait_s(PeerId(bytes(31) + b"x"), address(1)) == 0.0


def test_the_book_is_bounded() -> None:
    """GHSA-gcq9-qqwx-rgj3: addresses of peers never met must not fill the memory."""
    book = AddressBook(Clock())
    book.add(PEER, [address(port) for port in range(1, 1000)])
    assert len(book.addresses(PEER)) == MAX_ADDRESSES
    for number in range(MAX_PEERS + 10):
        book.add(PeerId(number.to_bytes(32, "big")), [address(1)])
    assert len(book._peers) == MAX_PEERS
    book.add(PEER, [Multiaddr("ip4", "1.2.3.4", 0)])
    assert address(0) not in book.addresses(PEER)


Attempt = Callable[[], Coroutine[Any, Any, str]]


def succeed(name: str, log: list[str]) -> Attempt:
    async def attempt() -> str:
        log.append(name)
        return name

    return attempt


def fail(name: str, log: list[str]) -> Attempt:
    async def attempt() -> str:
        log.append(name)
        raise OSError(name)

    return attempt


def hang(name: str, log: list[str]) -> Attempt:
    async def attempt() -> str:
        log.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            log.append(f"{name} cancelled")
        return name

    return attempt


async def test_the_first_that_succeeds_wins_and_the_rest_is_cancelled() -> None:
    log: list[str] = []
    attempts = [fail("a", log), hang("b", log), succeed("c", log), succeed("d", log)]
    result, errors = await race(attempts, log.append)
    assert result == "c"
    assert [str(error) for error in errors] == ["a"]
    assert log == ["a", "b", "c", "b cancelled"]


async def test_all_failing_is_told_one_by_one() -> None:
    log: list[str] = []
    result, errors = await race([fail("a", log), fail("b", log)], log.append)
    assert result is None
    assert [str(error) for error in errors] == ["a", "b"]


async def test_a_cancelled_race_leaves_nothing_running_and_nothing_open() -> None:
    log: list[str] = []
    started = asyncio.Event()
    discarded: list[str] = []

    async def late() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "too late"  # it had its socket already
        return "never"

    task = asyncio.create_task(race([late], discarded.append))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert discarded == ["too late"]
    assert not log


async def test_a_name_is_dialled_at_all_its_addresses(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 8305: the first of them does not answer at all, which is known only after the deadline."""
    _, server = two
    silent = socket.socket()
    fillers = [socket.socket() for _ in range(3)]  # with which its backlog is full
    with contextlib.ExitStack() as stack:
        for sock in (silent, *fillers):
            stack.enter_context(sock).setblocking(False)
        silent.bind(("127.0.0.2", 0))
        silent.listen(0)
        for filler in fillers:
            with contextlib.suppress(BlockingIOError):
                filler.connect(silent.getsockname())
        places = [silent.getsockname(), ("127.0.0.1", server.addresses[0].port)]

        async def resolve(_address: Multiaddr) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]

        monkeypatch.setattr("petalite.net.dialing.resolve", resolve)
        async with Host(Identity.generate()) as caller:
            link = await caller.connect(Multiaddr("dns", "name", 1, server.peer_id), timeout_s=4)
            assert link.remote_address == Multiaddr("ip4", *places[1])
