"""Calls: one stream each, from a request to the last answer, an error, a cancellation or a deadline.

A call is unary (`Link.call`), or streams either way or both (`send`, `receive`, `finish`). Its deadline
travels with it. Either end may give up: `cancel` here is a raised error there. Knows messages and streams;
knows no socket and no address book.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

from petalite.errors import (
    BadMessage,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    ErrorCode,
    LocalProtocolError,
    PetaliteError,
    RateLimited,
    ResourceLimit,
    UnknownMethod,
    code_of,
    from_wire,
)
from petalite.net import messages, schema
from petalite.net.limits import TokenBucket
from petalite.net.messages import FAILURE, MESSAGE, REQUEST, Buffer, Header, Message
from petalite.net.multiaddr import Multiaddr
from petalite.net.states import READABLE, RECEIVING, SENDING, Event
from petalite.net.streams import Priority, Stream

if TYPE_CHECKING:
    from petalite.net.identity import PeerId
    from petalite.net.lane import Lane
    from petalite.net.link import Link

logger = logging.getLogger(__name__)

Body: TypeAlias = Mapping[str, Any] | None
Reply: TypeAlias = Message | Mapping[str, Any] | None
Handler: TypeAlias = Callable[..., Awaitable[Reply]]

REQUEST_TIMEOUT_S = 30.0  # from a stream's opening to the whole of its first message
UNRESERVED_BYTES = 64 * 1024  # a message up to this size needs no leave to be received
MAX_REPLY_BYTES = 1024 * 1024 * 1024  # of one message's buffers, where no method's policy says less


@dataclass(frozen=True, slots=True)
class MethodPolicy:
    """What a method's callers may ask for."""

    max_message_bytes: int = 256 * 1024 * 1024  # all buffers of one message
    max_buffers: int = 64  # per message
    max_concurrent: int = 1024  # calls at once, of all peers together
    calls_per_s: float = 5000.0  # of one peer, after a burst of as many
    priority: Priority = Priority.INTERACTIVE  # the highest class in which answers are sent


@dataclass(slots=True)
class Method:
    """A served method: its handler and what counts for it."""

    handler: Handler
    request: type | None
    policy: MethodPolicy
    running: int = 0


class Call:
    """One end of a call. Errors of the peer, the link and the clock are raised where it is waited for."""

    # fmt: off
    __slots__ = (
        "_deadline", "_error", "_lane", "_link", "_max_buffers", "_max_bytes", "_messages", "_methods",
        "_midway", "_reserved", "_senders", "_served", "_stream", "_timer", "_waiter", "method", "request",
        "task",
    )
    # fmt: on

    def __init__(
        self,
        link: Link,
        lane: Lane,
        stream: Stream,
        method: str = "",
        methods: Mapping[str, Method] | None = None,
    ) -> None:
        """`methods`, on the server's end: what a peer may call."""
        self._link, self._lane, self._stream = link, lane, stream
        self.method = method
        self.request = Message()  # the server's end: the call's first message
        self.task: asyncio.Task[None] | None = None  # the server's end: the handler's
        self._methods = methods
        self._served: Method | None = None  # which of them
        self._max_bytes, self._max_buffers = MAX_REPLY_BYTES, messages.MAX_BUFFERS
        self._messages = messages.read_messages(lane.connection, stream, self._admit, lane.allocate)
        self._error: PetaliteError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of whom receives
        self._senders: list[asyncio.Future[None]] = []  # of those whose messages are not all sent
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reserved = 0  # bytes of memory for the message under way
        self._midway = False  # it was waited for the next message: some of it may be here
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
        return self._stream.priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._lane.connection.set_priority(self._stream, priority)

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
        if self._stream.queued:
            await self._sent()

    async def receive(self) -> Message | None:
        """The next message; None when the peer has finished."""
        try:
            received = await self._next()
        except (BadMessage, ResourceLimit) as bad:
            self.cancel(bad.code)
            raise
        if received is None:
            return None
        header, buffers = received
        if header[0] == FAILURE:
            error = from_wire(header[3], header[4], header[1])
            self._error = self._error or error
            raise error
        return Message(header[1], buffers)

    async def finish(self) -> None:
        """Say that no more messages follow; receiving goes on."""
        if self._stream.send is SENDING:
            self._lane.write(self._stream, [], fin=True)

    def cancel(self, code: ErrorCode = ErrorCode.CANCELLED) -> None:
        """Give up: whoever waits for the call here is told, and the peer is."""
        self._fail(from_wire(code, "the call was given up here"), code)

    # -- what links and hosts use ------------------------------------------------------------------

    def set_deadline(self, timeout_s: float | None) -> None:
        """Let the call fail in so many seconds."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._deadline = None
        if timeout_s is not None:
            loop = self._link.loop
            self._deadline = loop.time() + timeout_s
            self._timer = loop.call_at(self._deadline, self._expire, timeout_s)

    async def begin(self, body: Body, buffers: Sequence[Buffer], fin: bool = False) -> None:
        """Send the request; without `fin` return when it is sealed."""
        left_s = self.remaining_s()
        deadline_ms = 0 if left_s is None else min(max(1, int(left_s * 1000)), 2**31)
        self._write([REQUEST, body or {}, None, self.method, deadline_ms], buffers, fin)
        if self._stream.queued and not fin:
            await self._sent()

    def end(self, *, keep_queued: bool = False) -> None:
        """Nobody uses this end any more: what is still open is cut off, and what waits to be sent with it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reserved:
            self._release()
        stream, connection = self._stream, self._lane.connection
        if stream.send is SENDING or (stream.queued and not keep_queued and stream.receive is RECEIVING):
            connection.reset(stream, ErrorCode.CANCELLED)
        if stream.receive is RECEIVING or stream.buffered:
            connection.stop(stream, ErrorCode.CANCELLED)
        if connection.wants_write:
            self._lane.flush()
        self._error = self._error or Cancelled("the call is over")
        stream.owner = None
        self._messages.close()  # no cycle is left for the garbage collector

    def on_event(self, event: Event) -> None:
        """What happened to the call's stream."""
        if event is READABLE:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        elif event is Event.DRAINED:
            self._wake(self._senders, None)
        elif event is Event.RESET:
            self._fail(from_wire(self._stream.reset_code, self._by_peer("gave up")))
        elif event is Event.STOPPED:
            error = from_wire(self._stream.stop_code, self._by_peer("no longer reads"))
            if self.task is not None:
                self._fail(error)  # the caller wants no answer
            else:
                self._wake(self._senders, error)  # the answer may still come, and says more than this

    def lost(self, error: PetaliteError) -> None:
        """The link is gone."""
        lost = isinstance(error, ConnectionLost)
        self._fail(ConnectionLost(f"{self.peer.short()}: {error}") if lost else error)

    # -- within ------------------------------------------------------------------------------------

    def _by_peer(self, did: str) -> str:
        return f"{self.peer.short()} {did} the call to {self.method!r}"

    def _admit(self, header: Header) -> None:
        """Whether a message whose header has come may go on; its memory is set aside."""
        if (header[0] == REQUEST) is not (self._methods is not None):
            raise BadMessage("a call begins with a request, and has one")
        if self._methods is not None:
            self._served = self._admit_request(header[3], self._methods)
            self._methods = None
        sizes = header[2]
        if not sizes:
            return
        size = sum(sizes)
        if len(sizes) > self._max_buffers or size > self._max_bytes:
            raise BadMessage(
                f"a message of {len(sizes)} buffers with {size} bytes; {self.method or 'a call'} takes "
                f"{self._max_buffers} with {self._max_bytes}"
            )
        if size > UNRESERVED_BYTES:
            if not self._link.memory.reserve(size):
                raise ResourceLimit(f"no memory for a message of {size} bytes now")
            self._reserved = size

    def _admit_request(self, name: str, methods: Mapping[str, Method]) -> Method:
        self.method = name
        method = methods.get(name)
        if method is None:
            raise UnknownMethod(f"there is no method {name!r} here")
        policy, now, rates = method.policy, monotonic(), self._link.rates
        bucket = rates.get(name)
        if bucket is None:
            bucket = rates[name] = TokenBucket(policy.calls_per_s, policy.calls_per_s, now)
        if not bucket.take(now):
            raise RateLimited(f"more than {policy.calls_per_s:g} calls to {name!r} a second")
        self._max_bytes, self._max_buffers = policy.max_message_bytes, policy.max_buffers
        return method

    def _release(self) -> None:
        """The message is whole, or will never be: its memory is its reader's."""
        self._link.memory.release(self._reserved)
        self._reserved = 0

    def _write(self, header: Header, buffers: Sequence[Buffer], fin: bool = False) -> None:
        if self._error is not None:
            raise self._error
        if self._stream.send is not SENDING:
            if self._stream.stop_code:
                raise from_wire(self._stream.stop_code, self._by_peer("no longer reads"))
            raise LocalProtocolError(f"send on a call to {self.method!r} that has finished")
        self._lane.write(self._stream, messages.encode(header, buffers), fin)

    async def _next(self) -> tuple[Header, list[memoryview]] | None:
        """The next header and its buffers; None when the peer has finished."""
        connection, stream = self._lane.connection, self._stream
        while True:
            if self._midway or stream.buffered or stream.receive is not RECEIVING:
                message = next(self._messages, ())
                if connection.wants_write:
                    self._lane.flush()  # what was read is credit for the peer
                if message:
                    self._midway = False
                    if self._reserved:
                        self._release()
                    return message
                if message is not None and self._error is None:
                    return None
            else:
                stream.need = 1
            if self._error is not None:
                raise self._error
            if self._waiter is not None:
                raise LocalProtocolError("two tasks wait for messages of one call")
            self._waiter, self._midway = self._link.loop.create_future(), True
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def _sent(self) -> None:
        """Wait until all that is queued is sealed."""
        if self._error is not None:
            raise self._error
        waiter = self._link.loop.create_future()
        self._senders.append(waiter)
        self._stream.wants_drained = True
        try:
            await waiter
        except asyncio.CancelledError:
            if self._stream.queued:
                self.cancel()
            raise

    def _expire(self, timeout_s: float) -> None:
        text = f"{self.method!r} at {self.peer.short()} took longer than {timeout_s:.3g} s"
        self._fail(DeadlineExceeded(text), ErrorCode.DEADLINE)

    def _fail(self, error: PetaliteError, tell: ErrorCode | None = None) -> None:
        """End it with an error, raised in whoever waits for it; a handler that does not is cancelled."""
        if tell is not None:
            self._lane.connection.reset(self._stream, tell)
            self._lane.connection.stop(self._stream, tell)
            self._lane.flush()
        if self._error is not None:
            return
        self._error = error
        waiters = self._senders if self._waiter is None else [*self._senders, self._waiter]
        if self._wake(waiters, error) or self.task is None:
            return
        if self.task is not asyncio.current_task(self._link.loop):
            self.task.cancel()

    def _wake(self, waiters: list[asyncio.Future[None]], error: PetaliteError | None) -> bool:
        """Whether anybody waited."""
        waiters = [waiter for waiter in waiters if not waiter.done()]
        self._senders = []
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
        if self._stream.receive is RECEIVING:  # most requests are here as a whole, and need no timer
            self.set_deadline(REQUEST_TIMEOUT_S)
        first, method = await self._next(), self._served
        if first is None or method is None:
            raise BadMessage("a call without a request")
        if method.running >= method.policy.max_concurrent:
            raise ResourceLimit(f"{self.method!r} already runs {method.running} calls")
        header, buffers = first
        self.request = Message(header[1], buffers)
        self.set_deadline(header[4] / 1000 if header[4] else None)
        self._stream.highest = method.policy.priority
        self.priority = self._stream.priority
        arguments = () if method.request is None else (schema.decode(method.request, header[1]),)
        method.running += 1
        try:
            reply = await method.handler(self, *arguments)
        finally:
            method.running -= 1
        if self._stream.send is not SENDING:
            return
        if reply is None:
            await self.finish()
            return
        message = reply if isinstance(reply, Message) else Message(reply)
        self._write([MESSAGE, message.body, None], message.buffers, fin=True)
        if self._stream.queued:
            await self._sent()

    def _tell(self, error: PetaliteError) -> None:
        """Let the peer know why its call failed, if it can still hear it."""
        if self._stream.send is SENDING and not isinstance(self._error, ConnectionLost):
            header = [FAILURE, error.details(), None, int(code_of(error)), str(error)[:1000]]
            self._lane.write(self._stream, messages.encode(header, ()), fin=True)
