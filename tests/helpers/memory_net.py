"""Hosts joined in memory: the calls of `net.Host` without sockets, and faults at any message.

Messages cross as msgpack bytes and copied buffers, each after `latency_s` of the loop's time. A killed peer
is gone with everything that ran on it; a silent one keeps its connections and says nothing any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack

from petalite.errors import (
    Cancelled,
    ConnectionLost,
    ErrorCode,
    PetaliteError,
    Unreachable,
    code_of,
    from_wire,
)
from petalite.net.identity import PeerId
from petalite.net.messages import Message
from petalite.net.schema import decode
from petalite.net.streams import Priority


class MemoryCall:
    """One end of a call."""

    def __init__(self, net: MemoryNet, owner: PeerId, peer: PeerId, method: str) -> None:
        self.net, self.owner, self.peer, self.method = net, owner, peer, method
        self.priority = Priority.NORMAL
        self.stream = SimpleNamespace(queued=0, filled=0)  # messages are whole
        self.other: MemoryCall
        self.task: asyncio.Task[None] | None = None
        self.on_the_way: deque[Callable[[], None]] = deque()
        self._arrived: deque[Message | None] = deque()
        self._error: PetaliteError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of whom receives
        self.eager: Callable[[Message], bool] | None = None  # as `net.Call` has it
        self._over = False

    async def send(self, body: Mapping[str, Any], buffers: Sequence[Any] = ()) -> None:
        if self._error is not None:
            raise self._error
        wire = msgpack.packb(body)
        copies = [memoryview(bytearray(buffer)) for buffer in buffers]
        message = Message(msgpack.unpackb(wire, strict_map_key=True), copies)
        if not (copies and frozenset((self.owner, self.peer)) in self.net.swallowing):
            self.net.carry(self, lambda: self.other.put(message))
        await asyncio.sleep(0)
        if self._error is not None:
            raise self._error

    async def receive(self) -> Message | None:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._arrived.popleft()

    def end(self) -> None:
        if not self._over:
            self.fail(Cancelled("the call is over"))
            self.net.carry(self, lambda: self.other.fail(Cancelled(f"{self.owner.short()} gave up")))

    def cancel(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        self.fail(from_wire(code, "given up here"))
        self.net.carry(self, lambda: self.other.fail(from_wire(code, f"{self.owner.short()} gave up")))

    # -- the network's side

    def put(self, message: Message | None) -> None:
        if self._over:
            return
        waiter = None if message is None else self._waiting()
        if waiter is not None and message is not None and self.eager is not None:
            try:
                if self.eager(message):
                    return
            except Exception as error:
                if not waiter.done():  # else it gave the call up
                    waiter.set_exception(error)
                return
        self._arrived.append(message)
        self._wake()

    def _waiting(self) -> asyncio.Future[None] | None:
        return self._waiter if self._waiter is not None and not self._waiter.done() else None

    def _wake(self) -> None:
        if (waiter := self._waiting()) is not None:
            waiter.set_result(None)

    def fail(self, error: PetaliteError) -> None:
        if not self._over:
            self._over = True
            self._error = error
            self._wake()
            if self.task is not None:
                self.task.cancel()

    def finish(self, outcome: PetaliteError | None) -> None:
        """The handler has ended."""
        self._over = True
        if outcome is None:
            self.net.carry(self, lambda: self.other.put(None))
        else:
            error = from_wire(int(code_of(outcome)), str(outcome), outcome.details())
            self.net.carry(self, lambda: self.other.fail_after_messages(error))

    def fail_after_messages(self, error: PetaliteError) -> None:
        """What arrived before is read first."""
        if not self._over:
            self._error = error
            self._wake()


class MemoryHost:
    """The part of `net.Host` that sessions use."""

    def __init__(self, net: MemoryNet, peer: PeerId) -> None:
        self.net, self.peer_id = net, peer
        self.handlers: dict[str, tuple[Callable[..., Awaitable[None]], type]] = {}
        self.book = _Book()

    def serve(self, method: str, handler: Callable[..., Awaitable[None]], *, request: type) -> None:
        self.handlers[method] = handler, request

    def is_connected(self, peer: PeerId) -> bool:
        return False

    def rtt_s(self, peer: PeerId) -> float | None:
        return 2 * self.net.latency_s

    async def connect(self, peer: PeerId, *, timeout_s: float) -> None:
        await asyncio.sleep(2 * self.net.latency_s)
        self.net.check(self.peer_id, peer)

    async def open(self, peer: PeerId, method: str, body: Mapping[str, Any], **_: Any) -> MemoryCall:
        await self.connect(peer, timeout_s=1.0)
        ours = MemoryCall(self.net, self.peer_id, peer, method)
        theirs = MemoryCall(self.net, peer, self.peer_id, method)
        ours.other, theirs.other = theirs, ours
        self.net.calls += [ours, theirs]
        request = msgpack.unpackb(msgpack.packb(body))
        self.net.carry(ours, lambda: self.net.hosts[peer].start(theirs, request))
        return ours

    def start(self, call: MemoryCall, body: Mapping[str, Any]) -> None:
        call.task = self.net.spawn(self._handle(call, body))

    async def _handle(self, call: MemoryCall, body: Mapping[str, Any]) -> None:
        handler, request = self.handlers[call.method]
        try:
            await handler(call, decode(request, body))
            call.finish(None)
        except PetaliteError as error:
            call.finish(error)


class _Book:
    def add(self, peer: PeerId, addresses: Sequence[Any]) -> None:
        pass


class MemoryNet:
    """`on_message(number, source, target)` is told of each message before it leaves, and may do harm."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.hosts: dict[PeerId, MemoryHost] = {}
        self.calls: list[MemoryCall] = []
        self.dead: set[PeerId] = set()
        self.silent: set[PeerId] = set()
        self.cut: set[frozenset[PeerId]] = set()
        self.swallowing: set[frozenset[PeerId]] = set()  # links on which no tensor arrives, and all else does
        self.on_message: Callable[[int, PeerId, PeerId], None] = lambda number, source, target: None
        self.messages = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def host(self, peer: PeerId) -> MemoryHost:
        return self.hosts.setdefault(peer, MemoryHost(self, peer))

    def check(self, source: PeerId, target: PeerId) -> None:
        if target in self.dead or source in self.dead or frozenset((source, target)) in self.cut:
            raise Unreachable(f"{target.short()} is not reachable")

    def spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def carry(self, call: MemoryCall, deliver: Callable[[], None]) -> None:
        self.on_message(self.messages, call.owner, call.peer)
        self.messages += 1
        if {call.owner, call.peer} & (self.dead | self.silent):
            return
        loop = asyncio.get_running_loop()
        call.on_the_way.append(deliver)
        if self.latency_s:
            loop.call_later(self.latency_s, self._arrive, call)
        else:
            loop.call_soon(self._arrive, call)

    def _arrive(self, call: MemoryCall) -> None:
        deliver = call.on_the_way.popleft()  # timers of the same moment come in any order; messages do not
        if not {call.owner, call.peer} & (self.dead | self.silent):
            deliver()

    def at_message(self, number: int, harm: Callable[..., None], *arguments: Any) -> None:
        """Do harm before that message leaves."""

        def on_message(leaving: int, source: PeerId, target: PeerId) -> None:
            if leaving == number:
                harm(*arguments)

        self.on_message = on_message

    def kill(self, peer: PeerId) -> None:
        self.dead.add(peer)
        for call in [call for call in self.calls if peer in (call.owner, call.peer)]:
            call.fail(ConnectionLost(f"{peer.short()} died"))

    def cut_link(self, a: PeerId, b: PeerId) -> None:
        self.cut.add(frozenset((a, b)))
        for call in [call for call in self.calls if {call.owner, call.peer} == {a, b}]:
            call.fail(ConnectionLost("the link was cut"))
