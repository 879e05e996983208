"""One server's session service over real sockets on loopback, and clients that dial it."""

from __future__ import annotations

from contextlib import AsyncExitStack

import torch

from petalite.errors import Unreachable
from petalite.model.compute import ComputeThread
from petalite.model.span import BlockSpan
from petalite.net.credit import Windows
from petalite.net.host import Host, HostSettings
from petalite.net.identity import Identity, PeerId
from petalite.net.multiaddr import Multiaddr
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.server.backend import Backend
from petalite.server.doors import Doors
from petalite.server.sessions import SessionService, SessionSettings
from petalite.swarm.codecs import CODECS
from petalite.swarm.messages import (
    FROM_SERVER,
    SESSION_METHOD,
    OpenSession,
    SessionOpened,
    Step,
    StepDone,
    read,
    write,
)
from tests.helpers.waiting import until

MODEL_ID = "tiny@0"
CACHE_TOKENS = 64
OPEN = OpenSession(MODEL_ID, start=1, end=4, rows=2, max_length=16)
F32 = CODECS["f32"]


class Serving:
    """One server's session service, and hosts of clients that dial it."""

    def __init__(self, span: BlockSpan, stack: AsyncExitStack, settings: SessionSettings) -> None:
        self.span = span
        thread = ComputeThread()
        stack.callback(thread.close)
        self.backend = Backend(span, cache_tokens=CACHE_TOKENS, thread=thread)
        self._settings = settings
        self._stack = stack

    async def listen(self) -> None:
        host = await self._stack.enter_async_context(Host(Identity.generate()))
        (self.address,) = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        self.host = host
        self.known: dict[PeerId, Multiaddr] = {}  # where servers say they are
        self.service = SessionService(self.backend, MODEL_ID, host, self._resolve, self._settings)
        self.service._doors = Doors(patience_s=0.5)

    async def _resolve(self, peer: PeerId) -> None:
        if peer not in self.known:
            raise Unreachable(f"{peer.short()} is nobody here")
        self.host.book.add(peer, [self.known[peer]])

    async def client(self, windows: Windows | None = None) -> Host:
        return await self._stack.enter_async_context(
            Host(Identity.generate(), HostSettings(windows=windows or Windows()))
        )

    async def open(self, client: Host, request: OpenSession = OPEN) -> Call:
        call = await client.open(self.address, SESSION_METHOD, encode(request), timeout_s=20)
        self._stack.callback(call.end)
        message = await call.receive()
        assert message is not None
        assert decode(SessionOpened, message.body).codec == "f32"
        return call

    async def until_free(self) -> None:
        """Every row is given back, and all of the budget with it."""
        await until(lambda: not self.service.count and self.backend.free_tokens() == CACHE_TOKENS)


def hidden(span: BlockSpan, n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, span.config.hidden_size, generator=torch.Generator().manual_seed(seed))


async def step(
    call: Call, states: torch.Tensor, *rows: tuple[int, int, int], output: str = "all"
) -> torch.Tensor:
    await call.send(write(Step(rows, "f32", 4, output)), [F32.encode(states)])
    message = await call.receive()
    assert message is not None
    assert isinstance(read(FROM_SERVER, message.body), StepDone)
    return F32.decode(message.buffers[0], states.shape[1]) if message.buffers else states[:0]


async def heard(call: Call) -> tuple[object, list[memoryview]]:
    message = await call.receive()
    assert message is not None
    return read(FROM_SERVER, message.body), list(message.buffers)
