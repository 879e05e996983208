"""A session over a chain of servers: steps in, hidden states out, whatever dies in between.

A step that fails is tried again once the chain is mended (`client.chain`), from the tokens that every leg
has answered; a step's repeat is harmless at every hop. Knows rows and hidden states; knows neither tokens
nor sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalite.client.adapters import AdapterSource
from petalite.client.carrying import Carried, Carrier, Part
from petalite.client.chain import DOUBTFUL, Chain
from petalite.client.hops import Servers
from petalite.client.patience import Patience, PatienceSettings
from petalite.client.settings import SessionSettings
from petalite.client.stages import Answers, StageFailed
from petalite.errors import InvalidArgument, NetworkError, RemoteError, SessionGap, SessionLimit
from petalite.swarm.kept import Row
from petalite.swarm.messages import ALL
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span


@dataclass(slots=True)
class StepInput:
    """hidden (T, E), packed by `rows` of (row, position, n_tokens), and which outputs are wanted."""

    hidden: torch.Tensor
    rows: Sequence[Row]
    output: str = ALL
    forks: tuple[tuple[int, int], ...] = ()  # of (row, other row): the other begins as a copy of the row


class Session:
    """Rows of one client over the blocks of `span`, each up to `max_length` tokens.

    An async context manager: hops are opened on entering, and freed at every server on leaving.
    """

    def __init__(
        self,
        servers: Servers,
        span: Span,
        hidden_size: int,
        *,
        max_length: int,
        rows: int = 1,
        settings: SessionSettings = SessionSettings(),
        adapter: AdapterSource | None = None,
    ) -> None:
        """`adapter` is a LoRA that every step computes with."""
        self.span = span
        self.rows = rows
        self.max_length = max_length
        self.settings = settings
        self._servers = servers
        self._hidden_size = hidden_size
        patience = Patience(PatienceSettings(settings.step_s, settings.token_s))
        self._carrier = Carrier(Answers(), patience, hidden_size)
        self._chain = Chain(
            servers,
            span,
            hidden_size,
            rows=rows,
            max_length=max_length,
            carrier=self._carrier,
            settings=settings,
            adapter=adapter,
        )
        self.trace = self._chain.trace
        self._is_open = False
        self._is_stepping = False

    async def __aenter__(self) -> Session:
        await self._chain.mend(asyncio.get_running_loop().time() + self.settings.open_s)
        self._is_open = True
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._is_open = False
        if error_type is None:
            for stage in self._chain.stages:
                if stage.error is None:
                    self._servers.succeeded(stage.peer)
        self._chain.close()

    def length(self, row: int = 0) -> int:
        """Tokens of the row that every hop has seen."""
        return self._chain.length(row)

    @property
    def chain(self) -> list[Hop]:
        return [stage.hop for stage in self._chain.stages]

    @property
    def kept_bytes(self) -> int:
        """Memory that the inputs kept for replay take here."""
        return sum(stage.kept.nbytes for stage in self._chain.stages if stage.kept is not None)

    def rollback(self, length: int, row: int = 0) -> None:
        """Forget what the row holds at and after `length`; the hops follow with the next step."""
        self.check_idle()
        self._chain.truncate(row, length)

    def check_idle(self) -> None:
        """Raises InvalidArgument while a step is under way."""
        if self._is_stepping:
            raise InvalidArgument(
                "another step of this session is under way; await it first, or open a session for each"
            )

    # -- steps -------------------------------------------------------------------------------------------

    async def step(
        self,
        hidden: torch.Tensor,
        rows: Sequence[Row],
        output: str = ALL,
        forks: Sequence[tuple[int, int]] = (),
    ) -> torch.Tensor:
        """hidden (T, E), packed by `rows` of (row, position, n_tokens) -> the outputs asked for, (T', E).

        A position inside a row rolls it back to there first. Raises MissingBlocks when a block has had no
        live server for `recovery_s`; the rows then stand at their positions and the step can be tried again
        later. `forks` are pairs (row, other row): the step goes on in the other as if it were the row; if the
        step fails, the other row is left empty.
        """
        [outputs] = await self.steps([StepInput(hidden, rows, output, tuple(forks))])
        return outputs

    async def steps(self, inputs: Sequence[StepInput]) -> list[torch.Tensor]:
        """Several steps, in order; while one server computes a step, the one before it computes the next."""
        self.check_idle()
        self._is_stepping = True
        try:
            return await self._steps(inputs)
        finally:
            self._is_stepping = False

    async def _steps(self, inputs: Sequence[StepInput]) -> list[torch.Tensor]:
        counts = self._begin(inputs)
        codec = self._chain.legs[0].kept.codec
        parts = [
            Part(
                tuple(one.rows), n_tokens, memoryview(codec.encode(one.hidden)), codec, one.output, one.forks
            )
            for one, n_tokens in zip(inputs, counts, strict=True)
        ]
        carried = await self._survive(parts)
        self.trace.steps.extend([one.timing for one in carried])
        return [torch.zeros(0, self._hidden_size) if one.hidden is None else one.hidden for one in carried]

    async def reconsider(self) -> bool:
        """Change to a much better chain, if one has appeared; the next step then pays for a replay.

        For moments when nobody waits for a token, such as between two turns of a chat.
        """
        if not self._is_open or self._chain.gap is not None:
            return False
        try:
            if not await self._servers.is_much_better_than(self.chain, self._chain.n_tokens):
                return False
        except (NetworkError, RemoteError):
            return False  # whoever cannot look around goes on with what it has
        self._chain.abandon("a much better chain is there")
        return True

    async def _survive(self, parts: Sequence[Part]) -> list[Carried]:
        """Carry, mend, carry on: as long as there is progress, or time for it since a failure was noticed."""
        done: list[Carried] = []
        clock = asyncio.get_running_loop().time
        reached, doubts, deadline_s = -1, 0, clock() + self.settings.recovery_s
        while True:
            try:
                if self._chain.gap is not None:
                    await self._chain.mend(deadline_s)
                left = parts[len(done) :]
                if len(left) == 1:
                    done.append(await self._carrier.carry(self._chain.legs, left[0]))
                else:
                    await self._carrier.flow(self._chain.legs, left, done)
                return done
            except StageFailed as failure:
                self._chain.check_open()
                if len(done) > reached:
                    reached, doubts, deadline_s = len(done), 0, clock() + self.settings.recovery_s
                doubts += isinstance(failure.cause, DOUBTFUL)
                if doubts > 1 or clock() > deadline_s:
                    raise failure.cause from failure
                self._chain.blame(failure)

    def _begin(self, inputs: Sequence[StepInput]) -> list[int]:
        """Check the steps, and roll rows back to where they begin. Gives the tokens of each."""
        if not self._is_open:
            raise InvalidArgument("the session is not open; use it inside `async with`")
        lengths = self._check_forks(inputs) if any(one.forks for one in inputs) else {}
        cuts = [(target, 0) for target in lengths]  # hops differ about those until the step is through
        counts = []
        for one in inputs:
            n_tokens = sum([n for _, _, n in one.rows])
            counts.append(n_tokens)
            if one.hidden.shape != (n_tokens, self._hidden_size):
                raise InvalidArgument(
                    f"hidden states have shape {tuple(one.hidden.shape)}, the step's {n_tokens} tokens need "
                    f"({n_tokens}, {self._hidden_size})"
                )
            for row, position, n in one.rows:
                length = lengths.get(row)
                if length is None:
                    length = self._chain.length(row)
                    if position < length:
                        cuts.append((row, position))
                self._check_row(row, position, n, length)
                lengths[row] = position + n
        for row, position in cuts:
            self._chain.truncate(row, position)
        return counts

    def _check_forks(self, inputs: Sequence[StepInput]) -> dict[int, int]:
        """How long the rows are that begin as copies."""
        if len(inputs) > 1:
            raise InvalidArgument("a step that forks rows goes alone")
        [one, *_] = inputs
        positions = {row: position for row, position, _ in one.rows}
        sources, targets = {source for source, _ in one.forks}, [target for _, target in one.forks]
        known = all(0 <= row < self.rows for row in (*sources, *targets))
        if not known or sources & set(targets) or len(set(targets)) < len(targets):
            raise InvalidArgument(
                f"cannot fork {one.forks} in a session of {self.rows} rows; no row is copied to twice, or "
                f"both from and to"
            )
        if not positions.keys() >= set(targets):
            raise InvalidArgument(f"rows {targets} are forked to; the step has to go on in each")
        return {target: positions.get(source, self.length(source)) for source, target in one.forks}

    def _check_row(self, row: int, position: int, n_tokens: int, length: int) -> None:
        if not 0 <= row < self.rows or n_tokens < 1:
            raise InvalidArgument(
                f"the step names {n_tokens} tokens of row {row}; the session has {self.rows} rows"
            )
        if not 0 <= position <= length:
            raise SessionGap(f"row {row} holds {length} tokens, the step begins at {position}")
        if position + n_tokens > self.max_length:
            raise SessionLimit(
                f"the session was opened for {self.max_length} tokens, the step reaches "
                f"{position + n_tokens}; open it with a larger max_length"
            )
