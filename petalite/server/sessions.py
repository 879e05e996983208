"""The RPC methods of sessions: who may open one, who may attach to one, and how they end together.

One stream is one session, and its cache rows live exactly as long. Everything a client says is checked before
anything is reserved or computed; what is wrong ends that session with a code, and no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from petalite.errors import IdleClosed, ResourceLimit, Unreachable, WrongModel, WrongSpan
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.server.adapters import Adapters, HeldAdapter
from petalite.server.backend import Backend
from petalite.server.doors import Doors
from petalite.server.inbox import Inbox, Waiting
from petalite.server.local import LocalEdge, Onward
from petalite.server.open_calls import OpenCalls
from petalite.server.session import INBOX_BYTES, INBOX_STEPS, Session, Work, codec_of
from petalite.swarm.messages import (
    ATTACH_METHOD,
    SESSION_METHOD,
    Attach,
    OpenSession,
    Successor,
)

CONNECT_S = 10.0  # to reach a successor

Resolve = Callable[[PeerId], Awaitable[None]]
"""See to it that the host's address book knows the peer, if anybody does."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    idle_s: float = 600.0  # a session without a step for so long is closed, seconds
    longest_s: float = 86400.0  # a session is closed then, however busy, seconds
    most: int = 256  # sessions open at once
    most_per_peer: int = 32  # of them, one peer's
    longest_wait_s: float = 60.0  # in line for cache room, whatever the client offers to wait
    waiting_bytes: int = 256 << 20  # of steps that wait to be computed, all sessions together


class SessionService:
    """Serves sessions over one backend's blocks."""

    def __init__(
        self,
        backend: Backend,
        model_id: str,
        host: Host,
        resolve: Resolve,
        settings: SessionSettings = SessionSettings(),
        adapters: Adapters | None = None,
    ) -> None:
        self._adapters = adapters or Adapters(0)
        self._backend = backend
        self._model_id = model_id
        self._host = host
        self._resolve = resolve
        self._settings = settings
        self._open = OpenCalls()
        self._sessions: set[Session] = set()  # those that have got room
        self._doors: Doors[Session] = Doors()
        self._waiting = Waiting(settings.waiting_bytes)
        host.serve(SESSION_METHOD, self._serve, request=OpenSession)
        host.serve(ATTACH_METHOD, self._attached, request=Attach)

    @property
    def count(self) -> int:
        """Sessions open now."""
        return len(self._open)

    @property
    def kept_bytes(self) -> int:
        """What sessions keep of what they pushed on."""
        return sum(session.kept.nbytes for session in self._sessions)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new sessions and wait for the open ones; what outlasts `timeout_s` is cut with a code."""
        await self._open.drain(timeout_s)

    def suspend(self) -> None:
        """After draining: let go of the blocks. Sessions are refused until others are given to `resume`."""
        self._open.check_drained()
        del self._backend

    def resume(self, backend: Backend) -> None:
        """Serve new sessions over these blocks."""
        self._backend = backend
        self._open.resume()

    async def _serve(self, call: Call, request: OpenSession) -> None:
        self._admit(call.peer, request)
        with self._open.entered(call), self._adapters.use(request.adapter) as adapter:
            await self._run(call, request, adapter)

    async def _run(self, call: Call, request: OpenSession, adapter: HeldAdapter | None) -> None:
        span = self._backend.span
        token_bytes = codec_of(request, self._backend).nbytes(1, span.config.hidden_size)
        pushed_bytes = token_bytes * request.max_length * request.rows
        rows = await self._backend.open_rows(
            request.rows,
            request.max_length,
            request.start,
            request.end,
            extra_bytes=pushed_bytes if request.successor is not None else 0,
            wait_s=min(request.wait_s, self._settings.longest_wait_s),
            adapter=adapter,
        )
        try:
            inbox: Inbox[Work] = Inbox(INBOX_STEPS, INBOX_BYTES, self._waiting)
            session = Session(
                call, request, rows, self._backend, self._doors, inbox, self._connect, self._settings.idle_s
            )
            self._sessions.add(session)
            try:
                await self._within_its_time(session)
            finally:
                self._sessions.discard(session)
        finally:
            self._backend.drop_rows(rows)

    async def _within_its_time(self, session: Session) -> None:
        try:
            async with asyncio.timeout(self._settings.longest_s) as limit:
                await session.run()
        except TimeoutError:
            if not limit.expired():
                raise
            raise IdleClosed(
                f"the session has been open for {self._settings.longest_s:g} s, the longest here; open anew"
            ) from None

    def _admit(self, peer: PeerId, request: OpenSession) -> None:
        self._open.check_open()
        span = self._backend.span
        if request.model_id != self._model_id:
            raise WrongModel(f"this server holds {self._model_id}, the session is for {request.model_id}")
        if not span.start <= request.start < request.end <= span.end:
            raise WrongSpan(
                f"this server holds blocks {span.start}:{span.end}, "
                f"the session is for {request.start}:{request.end}"
            )
        if len(self._open) >= self._settings.most:
            raise ResourceLimit(f"{self._settings.most} sessions are open, the most this server takes")
        if self._open.of(peer) >= self._settings.most_per_peer:
            raise ResourceLimit(
                f"{self._settings.most_per_peer} sessions of yours are open, the most one peer may have"
            )

    # -- the ring ----------------------------------------------------------------------------------------

    async def _attached(self, call: Call, request: Attach) -> None:
        session = await self._doors.knock(request.token, call.peer)
        await session.follow(call)

    async def _connect(self, successor: Successor) -> Onward:
        """Attach to the hop after a session of ours. Raises NetworkError or RemoteError."""
        peer, token = successor.peer, successor.token
        if peer == self._host.peer_id:
            return LocalEdge(await self._doors.knock(token, peer))
        try:
            async with asyncio.timeout(CONNECT_S):
                if not self._host.is_connected(peer):
                    await self._resolve(peer)
                    await self._host.connect(peer, timeout_s=CONNECT_S)
                return await self._host.open(peer, ATTACH_METHOD, encode(Attach(token)))
        except TimeoutError:
            raise Unreachable(f"{peer.short()} did not answer within {CONNECT_S:g} s") from None
