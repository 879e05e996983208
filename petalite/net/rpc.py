"""Calls: one stream each, from a request to the last answer, an error, a cancellation or a deadline.

A call is unary (`Host.call`), or streams either way or both (`send`, `receive`, `finish`). Its deadline
travels with it. Either end may give up: `cancel` here is a raised error there. Knows messages and streams;
knows no socket and no address book.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from petalite.errors import (
    BadMessage,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    ErrorCode,
    LocalProtocolError,
    PetaliteError,
    ResourceLimit,
    code_of,
    from_wire,
)
from petalite.net import messages, schema
from petalite.net.messages import FAILURE, MESSAGE, REQUEST, Buffer, Header, Message
from petalite.net.methods import Method, MethodPolicy, admit
from petalite.net.multiaddr import Multiaddr
from petalite.net.states import READABLE, RECEIVED, RECEIVING, SENDING, SENT, Event
from petalite.net.streams import Priority, Stream

if TYPE_CHECKING:
    from petalite.net.identity import PeerId
    from petalite.net.lane import Lane
    from petalite.net.link import Link

logger = logging.getLogger(__name__)

Body: TypeAlias = Mapping[str, Any] | None

NEAR_S = 2.5  # a deadline less far away has a timer
REQUEST_TIMEOUT_S = 30.0  # from a stream's opening to the whole of its first message


_REPLIES = MethodPolicy(max_message_bytes=1 << 30)  # what an answer may be


class Call:
    """One end of a call. Errors of the peer, the link and the clock are raised where it is waited for."""

    # fmt: off
    __slots__ = (
        "_begun", "_body", "_deadline", "_error", "_header", "_lane", "_left", "_link", "_methods",
        "_senders", "_served", "_timeout_s", "_timer", "_waiter", "eager", "method", "request", "stream",
        "task",
    )
    # fmt: on
    request: Message  # the server's end: the call's first message

    def __init__(
        self,
        link: Link,
        lane: Lane,
        stream: Stream,
        method: str = "",
        methods: Mapping[str, Method] | None = None,
    ) -> None:
        """`methods`, on the server's end: what a peer may call."""
        self._link, self._lane, self.stream = link, lane, stream
        self.method = method
        self.task: asyncio.Task[None] | None = None  # the server's end: the handler's
        self._methods = methods  # until a request names
        self._served: Method | None = None  # one of them
        self._begun = methods is None  # the request is out, or in
        self._header: Header = []  # of the request, or of the message whose buffers are on their way,
        self._body: memoryview | None = None  # into memory that was set aside for them
        self._error: PetaliteError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of whom receives
        # While `receive` waits, takes messages inside the event that brings them, a turn of the loop sooner;
        # what it returns False for, `receive` returns, and what it raises, `receive` raises.
        self.eager: Callable[[Message], bool] | None = None
        self._left: Message | None = None  # by it
        self._senders: list[asyncio.Future[None]] | None = None  # of those whose messages are not all sent
        self._timeout_s: float | None = None
        self._deadline: float | None = None  # on the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        stream.owner = self

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Left before its end, it is cancelled at the peer."""
        try:
            if kind is None:
                await self.finish()
        finally:
            self.end()

    @property
    def peer(self) -> PeerId:
        return self._link.peer

    @property
    def remote_address(self) -> Multiaddr:
        """Where the peer's packets come from, without its id."""
        return self._link.remote_address

    @property
    def priority(self) -> Priority:
        """The class that this end sends in; set by the caller's end, it also asks for the answers'."""
        return self.stream.priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._lane.connection.set_priority(self.stream, priority)

    def remaining_s(self) -> float | None:
        """How long the call may still take; None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - self._link.loop.time())

    # -- the caller's verbs ------------------------------------------------------------------------

    async def send(self, body: Body = None, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message. On return its buffers are sealed and the caller's again; until then a slow peer
        holds it.

        Cancelled inside a message that is partly sent, it ends the call: the rest can no longer follow.
        """
        self._write([MESSAGE, body or {}, None], buffers)
        if self.stream.queued:
            await self.sent()

    async def receive(self) -> Message | None:
        """The next message; None when the peer has finished."""
        try:
            while (message := self._left or self._poll()) is None:
                if self._error is not None:
                    raise self._error
                if self.stream.receive is RECEIVED:
                    return None
                if self._waiter is not None:
                    raise LocalProtocolError("two tasks wait for messages of one call")
                self._waiter = self._link.loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
        except (BadMessage, ResourceLimit) as bad:
            if self._begun:
                self.cancel(bad.code)
            raise
        self._left = None
        return message

    async def finish(self) -> None:
        """Say that no more messages follow; receiving goes on."""
        if self.stream.send is SENDING:
            self._lane.connection.sender.finish(self.stream)
            self._lane.flush()

    def cancel(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        """Give up: whoever waits for the call here is told, and the peer is."""
        self._fail(from_wire(code, "the call was given up here"), code)

    # -- what links and hosts use ------------------------------------------------------------------

    def set_deadline(self, timeout_s: float | None) -> None:
        """Let the call fail in so many seconds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timeout_s, self._deadline = timeout_s, None
        if timeout_s is not None:
            self._deadline = self._link.loop.time() + timeout_s
            if timeout_s < NEAR_S:
                self.watch_deadline()

    def watch_deadline(self) -> None:
        """Set the timer, if the deadline is near. A link asks every second, so most calls never need one."""
        if self._deadline is not None and self._timer is None:
            loop = self._link.loop
            if self._deadline - loop.time() < NEAR_S:
                self._timer = loop.call_at(self._deadline, self._expire)

    def end(self, *, keep_queued: bool = False) -> None:
        """Nobody uses this end any more: what is still open is cut off, and what waits to be sent with it."""
        self.set_deadline(None)
        if self._body is not None:
            self._release()
        stream, connection = self.stream, self._lane.connection
        stream.owner = self.eager = None
        over = Cancelled("the call is over")
        if self._waiter is not None or self._senders:  # another task waits
            self._fail(over)
        self._error = self._error or over
        if stream.send >= SENT and stream.receive >= RECEIVED and not stream.inbox:
            return  # as most calls end
        if stream.send is SENDING or (stream.queued and not keep_queued):
            connection.sender.reset(stream, ErrorCode.CANCELLED)
        if stream.receive is RECEIVING or stream.inbox:
            connection.receiver.stop(stream, ErrorCode.CANCELLED)
        if connection.sender.waiting:
            self._lane.flush()

    def on_event(self, event: Event) -> None:
        """What happened to the call's stream."""
        if event is READABLE:
            if self._waiter is not None and not self._waiter.done():
                self._arrived(self._waiter)
        elif event is Event.DRAINED:
            self._wake(None)
        elif event is Event.RESET:
            self._fail(from_wire(self.stream.reset_code, self._by_peer("gave up")))
        elif event is Event.STOPPED:
            error = from_wire(self.stream.stop_code, self._by_peer("no longer reads"))
            if self.task is not None:
                self._fail(error)  # the caller wants no answer
            else:
                self._wake(error)  # the answer may still come, and says more than this

    def lost(self, error: PetaliteError) -> None:
        """The link is gone."""
        lost = isinstance(error, ConnectionLost)
        self._fail(ConnectionLost(f"{self.peer.short()}: {error}") if lost else error)

    # -- within ------------------------------------------------------------------------------------

    def _arrived(self, waiter: asyncio.Future[None]) -> None:
        """Messages, or a part of one, or the end, while somebody waits in `receive`."""
        try:
            while self.eager is not None and (message := self._poll()) is not None:
                if not self.eager(message):
                    self._left = message
                    break
        except Exception as error:
            if not waiter.done():  # else the call was given up meanwhile
                waiter.set_exception(error)
        if not waiter.done() and (self.eager is None or self._left or self.stream.receive is RECEIVED):
            waiter.set_result(None)

    def _by_peer(self, did: str) -> str:
        return f"{self.peer.short()} {did} the call to {self.method!r}"

    def _admit(self, header: Header) -> None:
        """Whether a message whose header has come may go on, before memory is taken for its buffers."""
        if (header[0] == REQUEST) is not (self._methods is not None):
            raise BadMessage("a call begins with a request, and has one")
        if self._methods is not None:
            self.method = header[3]
            self._served = admit(self._methods, self.method, self._link.rates)
            self._methods, self._header = None, header
        if header[2]:
            policy = _REPLIES if self._served is None else self._served.policy
            policy.check(header[2], self.method)

    def _write(self, header: Header, buffers: Sequence[Buffer], fin: bool = False) -> None:
        if self._error is not None:
            raise self._error
        if self.stream.send is not SENDING:
            if self.stream.stop_code:
                raise from_wire(self.stream.stop_code, self._by_peer("no longer reads"))
            raise LocalProtocolError(f"send on a call to {self.method!r} that has finished")
        self._lane.write(self.stream, *messages.encode(header, buffers), fin)

    def _poll(self) -> Message | None:
        """The next message, if it is here as a whole; a failure is raised."""
        connection, stream = self._lane.connection, self.stream
        if self._body is None:
            taken = connection.receiver.take(stream)
            if taken is None:
                return None
            body: bytearray | memoryview
            packed, body, size, _ = taken
            header = messages.decode_header(packed)
            self._admit(header)
            if len(body) < size:
                self._header, self._body = header, self._set_aside(header[2], size)
                connection.receiver.expect(stream, body, self._body)
        if connection.sender.waiting:
            self._lane.flush()  # what was read is credit for the peer
        if self._body is not None:
            if stream.filled < len(self._body):
                return None
            header, body = self._header, self._body
            self._release()
        if header[0] == FAILURE:
            error = from_wire(header[3], header[4], header[1])
            self._error = self._error or error
            raise error
        return Message(header[1], messages.split(header[2], body))

    def _set_aside(self, sizes: list[int], size: int) -> memoryview:
        """Memory for buffers that are on their way."""
        if messages.body_bytes(sizes) != size:
            raise BadMessage(f"buffers of {messages.body_bytes(sizes)} bytes in a message that has {size}")
        if self._link.memory.reserve(size):
            with contextlib.suppress(MemoryError, OSError):
                return self._lane.allocate(size)
            self._link.memory.release(size)
        raise ResourceLimit(f"no memory for a message of {size} bytes now")

    def _release(self) -> None:
        """The message is whole, or will never be: its memory is its reader's."""
        assert self._body is not None
        self._link.memory.release(len(self._body))
        self._body = None

    async def sent(self) -> None:
        """Wait until all that is queued is sealed."""
        if not self.stream.queued:
            return
        if self._error is not None:
            raise self._error
        waiter = self._link.loop.create_future()
        self._senders = [*(self._senders or ()), waiter]
        self.stream.wants_drained = True
        try:
            await waiter
        except asyncio.CancelledError:
            if self.stream.queued:
                self.cancel()
            raise

    def _expire(self) -> None:
        text = f"{self.method!r} at {self.peer.short()} took longer than {self._timeout_s:.3g} s"
        self._fail(DeadlineExceeded(text), ErrorCode.DEADLINE)

    def _fail(self, error: PetaliteError, tell: ErrorCode | None = None) -> None:
        """End it with an error, raised in whoever waits for it; a handler that does not wait is cancelled."""
        if tell is not None:
            self._lane.connection.sender.reset(self.stream, tell)
            self._lane.connection.receiver.stop(self.stream, tell)
            self._lane.flush()
        if self._error is not None:
            return
        self._error = error
        told = self._wake(error)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        elif (
            self.task is not None
            and self._begun  # else it looks for an error itself, and a task that did not run would not `end`
            and not told
            and self.task is not asyncio.current_task(self._link.loop)
        ):
            self.task.cancel()

    def _wake(self, error: PetaliteError | None) -> bool:
        """Tell those who send that all is sent, or why it never will be; whether anybody was told."""
        waiters = [waiter for waiter in self._senders or () if not waiter.done()]
        self._senders = None
        for waiter in waiters:
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        return bool(waiters)

    # -- serving -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Read the request, run its handler, send what it returns or raises. A host's task runs this."""
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._error is None:
                raise  # the host is closing
            self._tell(self._error)
        except PetaliteError as error:
            self._tell(error)
        except Exception:
            logger.exception("the handler of %r failed", self.method)
            self._tell(PetaliteError("the handler failed"))
        finally:
            self.end(keep_queued=True)

    async def _serve(self) -> None:
        request = self._poll()  # most are here as a whole
        if request is None:
            self.set_deadline(REQUEST_TIMEOUT_S)
            request = await self.receive()
        method = self._served
        if request is None or method is None:
            raise BadMessage("a call without a request")
        if self._error is not None:
            raise self._error
        self.request, self._begun = request, True
        if method.running >= method.policy.max_concurrent:
            raise ResourceLimit(f"{self.method!r} already runs {method.running} calls")
        deadline_ms = self._header[4]
        self.set_deadline(deadline_ms / 1000 if deadline_ms else None)
        self.stream.highest = method.policy.priority
        if self.stream.priority < method.policy.priority:
            self.priority = method.policy.priority
        arguments = () if method.request is None else (schema.decode(method.request, request.body),)
        method.running += 1
        try:
            reply = await method.handler(self, *arguments)
        finally:
            method.running -= 1
        if self.stream.send is not SENDING:
            return
        if reply is None:
            await self.finish()
            return
        message = reply if isinstance(reply, Message) else Message(reply)
        self._write([MESSAGE, message.body, None], message.buffers, fin=True)
        if self.stream.queued:
            await self.sent()

    def _tell(self, error: PetaliteError) -> None:
        """Let the peer know why its call failed, if it can still hear it."""
        if self.stream.send is SENDING and not isinstance(self._error, ConnectionLost):
            header = [FAILURE, error.details(), None, int(code_of(error)), str(error)[:1000]]
            self._lane.write(self.stream, *messages.encode(header, ()), fin=True)
