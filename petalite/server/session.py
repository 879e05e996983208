"""One session at one server: steps come from the client or the hop before, outputs go to the client or the
hop after.

Two streams may feed it (the client's, and its predecessor's in a ring) and two may carry its outputs. Steps
are computed one by one, in the order they came. What is pushed to a successor is kept, so that a
replacement of the successor can be brought to its state. Knows its streams and rows; who may open it is
`sessions`' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from petalite.errors import (
    BadMessage,
    BadTensor,
    ConnectionLost,
    IdleClosed,
    NetworkError,
    PetaliteError,
    RemoteError,
    ResourceLimit,
    SessionGap,
)
from petalite.model.cache import Segment
from petalite.net.messages import Buffer, Message
from petalite.net.rpc import Call
from petalite.net.schema import encode
from petalite.net.streams import Priority
from petalite.server.backend import Backend, Rows
from petalite.server.doors import Doors
from petalite.server.inbox import Inbox
from petalite.server.local import Onward
from petalite.server.patience import Patience
from petalite.server.steps import checked_forks, wanted_outputs
from petalite.swarm.codecs import RAW, Codec, Landing, pack, raw_codec, session_codec, unpack
from petalite.swarm.kept import KeptInputs
from petalite.swarm.messages import (
    ALL,
    DECODE_TOKENS,
    FROM_CLIENT,
    MAX_STEP_TOKENS,
    NONE,
    OUTPUTS,
    REPLAY_TOKENS,
    Expect,
    HopReport,
    LinkDown,
    OpenSession,
    Probe,
    Progress,
    Relink,
    SessionOpened,
    Step,
    StepDone,
    Successor,
    read,
    write,
)

# What waits to be computed here. A client that sends more steps ahead is at fault; one whose steps are large
# is held back, as a predecessor is.
INBOX_STEPS = 32
INBOX_BYTES = 64 << 20
LARGE_BYTES = 1 << 18  # what is larger is coded on the compute thread: the event loop must not stand still

Connect = Callable[[Successor], Awaitable[Onward]]
"""Attach to a successor: the open call, its first message sent."""

Work = tuple[Step, Message] | Relink


class Session:
    """Between its opening and its end; `run` is its life, and whatever ends that frees everything."""

    def __init__(
        self,
        call: Call,
        request: OpenSession,
        rows: Rows,
        backend: Backend,
        doors: Doors[Session],
        inbox: Inbox[Work],
        connect: Connect,
        idle_s: float,
    ) -> None:
        self.call = call
        self.request = request
        self._rows = rows
        self._backend = backend
        self._doors = doors
        self._connect = connect
        self._idle_s = idle_s
        self._patience = Patience(idle_s)  # of the worker
        self.codec: Codec = codec_of(request, backend)
        self.kept = KeptInputs(self.codec, backend.span.config.hidden_size)
        self._inbox = inbox
        self._epoch = 0
        self._received = 0
        self._sent = 0
        self._predecessor: Onward | None = None
        self._feeds_another = request.successor is not None
        self._onward: Onward | None = None  # to the successor
        self._link_down = False  # it was lost in this epoch
        self._landing: Landing | None = None
        self._over = False

    async def run(self) -> None:
        """Until the client finishes, or anything goes wrong that the session does not survive."""
        await self._send(self.call, encode(SessionOpened(self.codec.name)))
        if self.request.token is not None:
            self._doors.expect(self.request.token, self)
        try:
            await first_to_end(self._listen(), self._work())
        finally:
            self._over = True
            self._doors.forget(self)
            self._inbox.clear()
            self._patience.close()
            predecessor, self._predecessor = self._predecessor, None
            if predecessor is not None:
                predecessor.cancel()
            if self._onward is not None:
                self._onward.cancel()

    # -- what comes in -----------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """The client's stream, to its end."""
        self.call.eager = self._take
        while (message := await self.call.receive()) is not None:
            command = read(FROM_CLIENT, message.body)
            match command:
                case Step():
                    self._renew(command.epoch)
                    self._check_count()
                    if self._inbox.is_full:
                        await self._inbox.room()
                    self._accept(command, message)
                case Expect():
                    self._renew(command.epoch)
                    self._doors.expect(command.token, self)
                case Relink():
                    self._renew(command.epoch)
                    self._check_count()
                    self._let_go_of_successor()
                    self._inbox.put(command)
                case Probe():
                    await self._send(self.call, write(self._progress()))

    def _progress(self) -> Progress:
        source = self._predecessor
        coming = source.stream.filled if isinstance(source, Call) else 0
        return Progress(self._received, self._sent, self._backend.held_tokens(self._rows), coming)

    def _take(self, message: Message) -> bool:
        """A decode step that there is room for: by far the most of what comes."""
        command = None if len(self._inbox) else read(FROM_CLIENT, message.body)
        if not isinstance(command, Step):
            return False
        self._accept(command, message)
        return True

    def _check_count(self) -> None:
        if len(self._inbox) >= INBOX_STEPS:
            raise ResourceLimit(f"{len(self._inbox)} steps wait here; send no more before some are answered")

    async def follow(self, call: Call) -> None:
        """Take steps from a predecessor that named our token, until it ends or another takes its place."""
        self.take_place(call)
        call.eager = partial(self._take_push, call)
        while (message := await call.receive()) is not None:
            await self.push(call, message)

    def _take_push(self, source: Onward, message: Message) -> bool:
        if len(self._inbox) or self._predecessor is not source:
            return False
        self._accept(read({Step.KIND: Step}, message.body), message)
        return True

    def take_place(self, source: Onward) -> None:
        """From now on `source` is the predecessor; the one before is cut off. Raises ConnectionLost."""
        if self._over:  # since its door was opened
            raise ConnectionLost("the session after this one is over")
        before, self._predecessor = self._predecessor, source
        if before is not None:
            before.cancel()
        self._inbox.wake()

    def let_go(self, source: Onward) -> None:
        """`source` pushes no more."""
        if self._predecessor is source:
            self._predecessor = None
            self._inbox.wake()

    async def push(self, source: Onward, message: Message) -> None:
        """A predecessor's step. Waits for room. Raises ConnectionLost for who is not the predecessor now."""
        step = read({Step.KIND: Step}, message.body)
        if self._inbox.is_full:
            await self._inbox.room(lambda: self._predecessor is source)
        if self._predecessor is not source:
            raise ConnectionLost("the session after this one is over, or has another predecessor")
        self._accept(step, message)

    def _accept(self, step: Step, message: Message) -> None:
        if step.epoch >= self._epoch:
            self._renew(step.epoch)
            self._received = max(self._received, step.number)
            self._inbox.put((step, message), sum(map(len, message.buffers)))

    def _renew(self, epoch: int) -> None:
        """A new epoch: what waits here of older ones will be sent again, and is dropped."""
        if epoch > self._epoch:
            self._epoch = epoch
            self._link_down = False
            self._inbox.clear()

    # -- computing ---------------------------------------------------------------------------------------

    async def _work(self) -> None:
        if self.request.successor is not None:
            await self._link(self.request.successor)
        while True:
            with self._patience.until(self._be_idle):
                work = await self._inbox.get()
            if isinstance(work, Relink):
                await self._relink(work)
            elif work[0].epoch >= self._epoch:
                self._renew(work[0].epoch)
                await self._step(*work)

    def _be_idle(self) -> None:
        self._inbox.fail(IdleClosed(f"no step came for {self._idle_s:g} s; open another session"))

    async def _step(self, step: Step, message: Message) -> None:
        segments = [self._segment(*row) for row in step.rows]
        hidden = await self._hidden_of(step, message)
        if step.forks:
            await self._backend.fork(checked_forks(step, self._rows.numbers))
        output, timing = await self._backend.step(
            hidden,
            segments,
            self.request.start,
            self.request.end,
            peer=self.call.peer,
            adapter=self._rows.adapter,
        )
        report = HopReport(timing.queue_s * 1e3, timing.compute_s * 1e3, len(message.buffers[0]))
        hops = (*step.hops, report)
        pushed = await self._encoded(output) if self._feeds_another else bytearray()
        if step.stop == self.request.end:
            wanted = wanted_outputs(output, step.rows, step.output)
            await self._answer(step, hops, await self._encoded(wanted))
        elif not self._link_down:
            await self._push(step, hops, pushed)
        if self._feeds_another:
            # Also what is only answered: a replay to this hop stands for what its successor has had long
            # since. Now that the message has left, nobody waits for this.
            self._keep(step, pushed)

    async def _hidden_of(self, step: Step, message: Message) -> torch.Tensor:
        if step.output not in OUTPUTS:
            raise BadMessage(f"unknown output {step.output[:20]!r}; known are {', '.join(OUTPUTS)}")
        if step.stop < self.request.end or (step.stop > self.request.end and self.request.successor is None):
            raise BadMessage(
                f"a step to block {step.stop} does not end at this hop of blocks "
                f"{self.request.start}:{self.request.end}, and the session names no successor"
            )
        if len(message.buffers) != 1:
            raise BadMessage(f"a step carries one buffer of hidden states, found {len(message.buffers)}")
        n_tokens = sum([n for _, _, n in step.rows])
        if n_tokens > MAX_STEP_TOKENS:
            raise BadMessage(f"a step packs at most {MAX_STEP_TOKENS} tokens, found {n_tokens}")
        codec, hidden_size = session_codec(step.codec), self._backend.span.config.hidden_size
        data = message.buffers[0]
        if n_tokens == 1 and codec.name in RAW:
            if self._landing is None or self._landing.codec is not codec:
                self._landing = Landing(codec, hidden_size)
            return self._landing.put(data)
        data = await unpack(codec, data, codec.nbytes(n_tokens, hidden_size))
        hidden = codec.decode(data, hidden_size)
        if len(hidden) != n_tokens:
            raise BadTensor(f"the step names {n_tokens} tokens, its hidden states have {len(hidden)}")
        return hidden

    async def _encoded(self, hidden: torch.Tensor) -> bytearray:
        aside = hidden.nbytes > LARGE_BYTES or not hidden.is_cpu
        return await self._backend.aside(self.codec.encode, hidden) if aside else self.codec.encode(hidden)

    def _segment(self, row: int, position: int, n_tokens: int) -> Segment:
        numbers = self._rows.numbers
        if row >= len(numbers) or n_tokens < 1:
            raise BadMessage(
                f"{n_tokens} tokens of row {row} are no step; the session has {len(numbers)} rows"
            )
        return Segment(numbers[row], position, n_tokens)

    def _keep(self, step: Step, data: bytearray) -> None:
        for source, target in step.forks or ():
            self.kept.fork(source, target)
        if not self.kept.put(step.rows, memoryview(data)):
            raise SessionGap(f"rows {step.rows} do not go on from what was pushed of them before")

    # -- what goes out -----------------------------------------------------------------------------------

    async def _answer(self, step: Step, hops: tuple[HopReport, ...], data: bytearray | memoryview) -> None:
        done = StepDone(step.rows, self.codec.name, step.number, step.epoch, hops)
        _prioritize(self.call, step.rows)
        await self._pass_on(self.call, done, () if step.output == NONE else (data,))
        self._sent = max(self._sent, step.number)

    async def _push(self, step: Step, hops: tuple[HopReport, ...], data: bytearray | memoryview) -> None:
        onward = Step(
            step.rows, self.codec.name, step.stop, step.output, step.number, step.epoch, hops, step.forks
        )
        try:
            if self._onward is None:
                raise NetworkError("the session was told of no successor")
            _prioritize(self._onward, step.rows)
            await self._pass_on(self._onward, onward, (data,))
            self._sent = max(self._sent, step.number)
        except (NetworkError, RemoteError) as error:
            await self._report_down(step.epoch, error)

    async def _link(self, successor: Successor) -> None:
        try:
            self._onward = await self._connect(successor)
        except (NetworkError, RemoteError) as error:
            await self._report_down(self._epoch, error)

    async def _relink(self, relink: Relink) -> None:
        """Another successor, brought to where the old one was; or the client, to whom what was pushed
        returns.
        """
        if relink.epoch < self._epoch:
            return
        if relink.successor is not None and self.request.successor is None:
            raise BadMessage(
                "the session was opened without a successor: no room was reserved for what it pushes"
            )
        self._feeds_another = relink.successor is not None
        if relink.successor is not None:
            await self._link(relink.successor)
        lengths = (*relink.lengths, *(0 for _ in range(self.request.rows - len(relink.lengths))))
        replay = self.kept.replay(REPLAY_TOKENS, lengths)
        for number, (row, data) in enumerate(replay, relink.number):
            if self._link_down or relink.epoch < self._epoch:
                return
            to_client = relink.successor is None
            output = ALL if to_client else NONE
            step = Step((row,), self.codec.name, relink.stop, output, number, relink.epoch)
            if to_client:
                await self._answer(step, (HopReport(0.0, 0.0),), data)
            else:
                await self._push(step, (), data)

    def _let_go_of_successor(self) -> None:
        onward, self._onward = self._onward, None
        if onward is not None:
            onward.cancel()  # a push that is stuck there fails now

    async def _report_down(self, epoch: int, error: PetaliteError) -> None:
        if epoch >= self._epoch and not self._link_down:
            self._link_down = True
            await self._send(self.call, write(LinkDown(epoch, str(error)[:2000])))

    async def _pass_on(self, to: Call | Onward, message: Step | StepDone, buffers: Sequence[Buffer]) -> None:
        """As `_send`, for the worker."""
        if self.codec.is_packed:
            buffers = [await pack(self.codec, buffer) for buffer in buffers]
        with self._patience.until(to.cancel, IdleClosed.code):
            await to.send(message.body(), buffers)

    async def _send(self, to: Call | Onward, body: Mapping[str, Any], buffers: Sequence[Buffer] = ()) -> None:
        """Raises IdleClosed where nobody reads it for the idle time: rows must not be held for ever by who
        takes no answers.
        """
        timer = asyncio.get_running_loop().call_later(self._idle_s, to.cancel, IdleClosed.code)
        try:
            await to.send(body, buffers)
        finally:
            timer.cancel()


def codec_of(request: OpenSession, backend: Backend) -> Codec:
    """What a session answers and pushes in. Raises BadTensor for a codec that nobody knows."""
    return raw_codec(backend.span.dtype) if request.codec is None else session_codec(request.codec)


def _prioritize(call: Call | Onward, rows: Sequence[tuple[int, ...]]) -> None:
    """A decode step goes before prefills on the same link."""
    longest = max([n_tokens for _, _, n_tokens in rows])
    call.priority = Priority.INTERACTIVE if longest <= DECODE_TOKENS else Priority.BULK


async def first_to_end(*coroutines: Awaitable[None]) -> None:
    """Run them together until one ends; cancel the rest, wait for them, and raise what the first raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
