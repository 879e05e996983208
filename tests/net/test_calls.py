"""Calls over real sockets, on uvloop and on asyncio: unary and streams, errors, deadlines, backpressure."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from petalite.errors import (
    BadMessage,
    Cancelled,
    DeadlineExceeded,
    ErrorCode,
    InvalidArgument,
    LocalProtocolError,
    RemoteError,
    ResourceLimit,
    SessionGap,
    UnknownMethod,
    Unreachable,
)
from petalite.net import Call, Host, HostSettings, Message, MethodPolicy, Multiaddr, Priority
from petalite.net.credit import Windows
from petalite.net.schema import between

from .hosts import Net, Watched, echo, echo_stream

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


async def test_eager_takes_what_comes_while_somebody_waits(two: tuple[Host, Host]) -> None:
    """In the stream's order, whoever takes them; what it raises, and the end, come to who waits."""
    caller, server = two
    eager: list[int] = []
    taken: asyncio.Queue[int] = asyncio.Queue()

    def take(message: Message) -> bool:
        size: int = message.body["size"]
        if size == 13:
            raise SessionGap("no")
        if size % 2:
            return False
        eager.append(size)
        taken.put_nowait(size)
        return True

    async def read(call: Call) -> None:
        while (message := await call.receive()) is not None:
            assert len(message.buffers[0]) == message.body["size"]
            taken.put_nowait(message.body["size"])

    async with await caller.open(server.peer_id, "stream", timeout_s=10) as call:
        call.eager = take
        reading = asyncio.create_task(read(call))
        await asyncio.sleep(0)
        for sizes in ([0], [2, 400_000], [1], [4, 3, 6]):
            for size in sizes:
                await call.send({"size": size}, [bytes(size)])
            assert [await taken.get() for _ in sizes] == sizes
        await call.send({"size": 13}, [b""])
        with pytest.raises(SessionGap, match="no"):
            await reading
        reading = asyncio.create_task(read(call))
        await call.finish()
        await reading
        assert {0, 2, 400_000} <= set(eager)


async def test_eager_may_give_the_call_up(two: tuple[Host, Host]) -> None:
    """And raise, which comes too late: the link's other calls go on."""
    caller, server = two
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with await caller.open(server.peer_id, "stream", timeout_s=10) as call:

        def take(message: Message) -> bool:
            call.cancel()
            raise SessionGap("too late")

        call.eager = take
        reading = asyncio.create_task(call.receive())
        await call.send({})
        echoed = asyncio.create_task(caller.call(server.peer_id, "echo", timeout_s=5))
        with pytest.raises(Cancelled):
            await reading
        await echoed
    assert not reported


async def test_a_handler_that_says_nothing_is_an_empty_answer(two: tuple[Host, Host]) -> None:
    caller, server = two

    async def silent(call: Call) -> None:
        return None

    server.serve("silent", silent)
    assert (await caller.call(server.peer_id, "silent", timeout_s=5)).body == {}


async def test_typed_requests_are_checked_at_the_border(two: tuple[Host, Host]) -> None:
    @dataclass(frozen=True)
    class Step:
        position: Annotated[int, between(0, 100)]

    async def step(call: Call, request: Step) -> dict[str, int]:
        return {"next": request.position + 1}

    caller, server = two
    server.serve("step", step, request=Step)
    assert (await caller.call(server.peer_id, "step", {"position": 4}, timeout_s=5)).body == {"next": 5}
    with pytest.raises(BadMessage, match=r"Step: .*\.position"):
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


async def test_one_task_at_a_time_waits_for_messages(two: tuple[Host, Host]) -> None:
    caller, server = two
    async with await caller.open(server.peer_id, "stream") as call:
        first = asyncio.create_task(call.receive())
        await asyncio.sleep(0)
        with pytest.raises(LocalProtocolError, match="two tasks"):
            await call.receive()
        await call.send({"n": 1})
        message = await first
        assert message is not None
        assert message.body == {"n": 1}


async def test_who_waits_for_a_call_that_another_task_ends_is_told(two: tuple[Host, Host]) -> None:
    caller, server = two
    server.serve("deaf", Watched())
    call = await caller.open(server.peer_id, "deaf", timeout_s=60)
    waiting = [asyncio.create_task(call.receive()), asyncio.create_task(call.send({}, [bytes(30_000_000)]))]
    await asyncio.sleep(0)
    call.end()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [Cancelled, Cancelled]


class WatchedReceiving(Watched):
    async def wait(self, call: Call) -> None:
        await call.receive()
        await call.receive()


async def test_a_deadline_that_is_far_has_its_timer_in_time(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at first; the tick sets it."""
    monkeypatch.setattr("petalite.net.rpc.NEAR_S", 1.2)
    caller, server = two
    watched = Watched()
    server.serve("watched", watched)
    async with asyncio.timeout(10):
        with pytest.raises(DeadlineExceeded):
            await caller.call(server.peer_id, "watched", timeout_s=1.4)
        assert await watched.ended in (DeadlineExceeded, asyncio.CancelledError)


async def test_a_deadline_travels_and_ends_both_sides(two: tuple[Host, Host]) -> None:
    caller, server = two
    handler = Watched()
    server.serve("slow", handler)
    with pytest.raises(DeadlineExceeded, match="slow"):
        await caller.call(server.peer_id, "slow", timeout_s=0.05)
    assert await handler.ended is asyncio.CancelledError


async def test_what_a_call_waits_for_before_it_begins_counts(net: Net) -> None:
    """A place among the streams: what is left travels."""
    caller, server = await net.host(), await net.host(HostSettings(windows=Windows(streams=1)), listen=True)
    server.serve("stream", echo_stream)

    async def left(call: Call) -> dict[str, float | None]:
        return {"s": call.remaining_s()}

    server.serve("left", left)
    async with await caller.open(server.addresses[0], "stream"):
        waiting = asyncio.create_task(caller.call(server.peer_id, "left", timeout_s=10))
        await asyncio.sleep(0.05)
    assert (await waiting).body["s"] <= 9.95


async def test_a_deadline_holds_while_a_bulk_lane_is_dialled(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, server = two
    monkeypatch.setattr(caller, "open_bulk_lane", lambda _link: asyncio.Event().wait())
    async with asyncio.timeout(5):
        with pytest.raises(DeadlineExceeded):
            await caller.call(server.peer_id, "echo", timeout_s=0.05, priority=Priority.BULK)


async def test_without_time_nobody_is_dialled_for_long(net: Net) -> None:
    caller, other = await net.host(), await net.host()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Multiaddr("ip4", "127.0.0.1", silent.getsockname()[1], other.peer_id)
        async with asyncio.timeout(2):
            with pytest.raises(Unreachable):
                await caller.call(address, "echo", timeout_s=0.0)


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
