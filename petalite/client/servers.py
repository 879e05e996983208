"""A swarm's servers as sessions use them: planned from the DHT and what was measured, opened over RPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from petalite.client.adapters import AdapterSource
from petalite.client.hops import NOTHING_MORE, Answer, Listener, Opening, Wanted
from petalite.client.outlook import Outlook
from petalite.client.remote_training import RemoteTraining
from petalite.client.settings import RING, Routing, TrainingSettings
from petalite.errors import (
    BadMessage,
    ConnectionLost,
    MissingBlocks,
    NetworkError,
    PetaliteError,
    RemoteError,
)
from petalite.net.host import Host
from petalite.net.identity import PeerId
from petalite.net.messages import Buffer, Message
from petalite.net.rpc import Call
from petalite.net.schema import decode, encode
from petalite.net.streams import Priority
from petalite.swarm.bans import Bans
from petalite.swarm.codecs import Codec, pack, session_codec
from petalite.swarm.directory import Directory
from petalite.swarm.messages import (
    DECODE_TOKENS,
    FROM_SERVER,
    SESSION_METHOD,
    FromClient,
    LinkDown,
    OpenSession,
    Probe,
    Progress,
    SessionOpened,
    Step,
    StepDone,
    read,
    write,
)
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span

FRESH_S = 10.0  # a directory read so recently serves a new session
KNOWN_S = 120.0  # one read so recently serves to replace a server; whoever left since is found out
LOOK_S = 5.0  # for a look at the DHT by who knows servers already
POLL_S = 0.5  # between looks for a server of missing blocks; grows to POLL_MOST_S
POLL_MOST_S = 5.0


class SwarmServers:
    """Implements `hops.Servers` over a host and a directory."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        bans: Bans | None = None,
        routing: Routing = Routing(),
        *,
        token_bytes: int = 0,
    ) -> None:
        """`token_bytes`: of one token's hidden states on the wire, to weigh links by."""
        self.outlook = Outlook(host, directory, bans or Bans(), routing, token_bytes)
        self._host = host
        self._directory = directory

    @property
    def pushing(self) -> bool:
        return self.outlook.routing.route == RING

    @property
    def model_id(self) -> str:
        return self._directory.model_id

    async def plan(
        self,
        span: Span,
        *,
        fresh: bool,
        timeout_s: float,
        replayed_tokens: int = 0,
        wanted: Wanted = NOTHING_MORE,
    ) -> list[Hop]:
        """A chain over `span`; waits for missing blocks until the time is up. Where nobody of the DHT
        answers, what is known serves; raises that error if it is nothing.

        `fresh` asks for another chain than the last: from what is known, if that has servers that did not
        fail lately, else from a new look at the DHT.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        pause_s = POLL_S
        if fresh and self._directory.age_s <= KNOWN_S:
            try:
                return self.outlook.chain(span, replayed_tokens, wanted, banned=False)
            except MissingBlocks:
                pass  # nobody is left whom we know
        # A training loop plans many passes, and one that meets a server that is gone survives it.
        unheard = None
        if fresh or self._directory.age_s > (KNOWN_S if wanted.training_tokens else FRESH_S):
            unheard = await self._look(deadline_s)
        while True:
            try:
                return self.outlook.chain(span, replayed_tokens, wanted)
            except MissingBlocks as missing:
                left_s = deadline_s - asyncio.get_running_loop().time()
                if left_s <= 0:
                    if unheard is not None and not self._directory.servers:
                        raise unheard from missing
                    raise missing from unheard
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_MOST_S)
            unheard = await self._look(deadline_s)

    async def _look(self, deadline_s: float) -> PetaliteError | None:
        """Read the DHT anew. Where nobody there answers, what is known stays, and the error is returned."""
        left_s = deadline_s - asyncio.get_running_loop().time()
        if self._directory.servers:  # most of the time is for trying them
            left_s = min(left_s, LOOK_S)
        try:
            await self._directory.refresh(timeout_s=max(left_s, 1.0))
        except (NetworkError, RemoteError) as error:
            return error
        return None

    def training(self, peer: PeerId, settings: TrainingSettings) -> RemoteTraining:
        return RemoteTraining(self._host, peer, self.model_id, settings)

    async def bring(self, hop: Hop, adapter: AdapterSource) -> None:
        part = adapter.part(hop.span)
        if part is not None and part.blob is not None:
            await self.training(hop.peer, TrainingSettings()).put_adapter(part.blob, ask=True)

    async def open(self, hop: Hop, opening: Opening, listener: Listener) -> RemoteHop:
        part = None if opening.adapter is None else opening.adapter.part(hop.span)
        request = OpenSession(
            self._directory.model_id,
            hop.span.start,
            hop.span.end,
            opening.rows,
            opening.max_length,
            opening.token,
            opening.successor,
            opening.wait_s,
            opening.codec,
            None if part is None else part.digest,
        )
        call = await self._host.open(hop.peer, SESSION_METHOD, encode(request), priority=Priority.INTERACTIVE)
        try:
            message = await call.receive()
            if message is None:
                raise ConnectionLost("the server ended the session unasked")
            return RemoteHop(call, session_codec(decode(SessionOpened, message.body).codec), listener)
        except BaseException:
            call.end()
            raise

    def failed(self, peer: PeerId, error: Exception) -> None:
        self.outlook.failed(peer, error)

    def succeeded(self, peer: PeerId) -> None:
        self.outlook.succeeded(peer)

    async def is_much_better_than(self, chain: Sequence[Hop], history_tokens: int) -> bool:
        """Whether to change to another chain, at the price of a replay, as far as is known.

        Mostly the answer is no, and a turn that begins does not wait for a look at the DHT to hear that.
        """
        if self._directory.age_s > KNOWN_S:
            await self._directory.refresh(timeout_s=LOOK_S)
        is_better = self.outlook.is_much_better_than(chain, history_tokens)
        if is_better and self._directory.age_s > FRESH_S:
            await self._directory.refresh(timeout_s=LOOK_S)
            is_better = self.outlook.is_much_better_than(chain, history_tokens)
        return is_better


class RemoteHop:
    """A session at a server, over one stream, which a task reads until the session ends."""

    def __init__(self, call: Call, codec: Codec, listener: Listener) -> None:
        self.codec = codec
        self._call = call
        self._listener = listener
        self._probed: asyncio.Future[Progress] | None = None
        self._reading = asyncio.create_task(self._read())

    async def send(self, message: FromClient, data: memoryview | None = None) -> None:
        if isinstance(message, Step) and data is not None:
            longest = max([n_tokens for _, _, n_tokens in message.rows])
            self._call.priority = Priority.INTERACTIVE if longest <= DECODE_TOKENS else Priority.BULK
            codec = session_codec(message.codec)
            packed: Buffer = await pack(codec, data) if codec.is_packed else data
            await self._call.send(message.body(), (packed,))
        else:
            await self._call.send(write(message))

    @property
    def traffic(self) -> tuple[int, int]:
        return self._call.stream.queued, self._call.stream.filled

    async def probe(self) -> Progress:
        if self._probed is None or self._probed.done():
            self._probed = asyncio.get_running_loop().create_future()
            await self.send(Probe())
        return await asyncio.shield(self._probed)

    def close(self) -> None:
        self._reading.cancel()
        self._call.end()
        if self._probed is not None and not self._probed.done():
            self._probed.set_exception(ConnectionLost("the session there is over"))
            self._probed.exception()  # whoever asked may have gone

    async def _read(self) -> None:
        error: PetaliteError = ConnectionLost("the server ended the session unasked")
        self._call.eager = self._heard
        try:
            while (message := await self._call.receive()) is not None:
                self._heard(message)
        except PetaliteError as failure:
            error = failure
        self._listener.lost(error)

    def _heard(self, message: Message) -> bool:
        match said := read(FROM_SERVER, message.body):
            case StepDone():
                if len(message.buffers) > 1:
                    raise BadMessage(f"an answer carries one buffer, found {len(message.buffers)}")
                data = memoryview(message.buffers[0]) if message.buffers else memoryview(b"")
                self._listener.answered(Answer(said, data))
            case LinkDown():
                self._listener.link_down(said.epoch, said.reason)
            case Progress():
                if self._probed is not None and not self._probed.done():
                    self._probed.set_result(said)
        return True
