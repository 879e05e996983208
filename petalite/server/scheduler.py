"""What the device does next: requests and times in, batches out. A pure core; it runs nothing and reads no
clock.

One pass over the weights serves every ready request of the same blocks, so a batch packs as many as fit.
Which request leads is decided by when it is due, counted in passes: a decode step at once, a prefill chunk
after a few passes, a training call after more, and the further requests of one peer each one pass later
than its last. The earliest due goes first. So urgent work overtakes, but only work that is due later:
whoever waits is overtaken for a bounded number of passes, and a peer that asks for much delays itself and
not the others.

A prefill is taken in chunks, so long that one pass keeps within a target time as measured on the passes
before. A training call is taken in turns, of which each is a pass of its own: after one, all training lets
the others go first again. Among themselves training calls take turns by peer, one call of each at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

W = TypeVar("W")

MARGIN = 0.92  # of the target time, that chunks are sized for: passes are to stay under it, not around it
FORGET_FROM = 64  # peers


class Kind(IntEnum):
    """The classes of work, most urgent first."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    target_s: float = 0.1  # a pass with a prefill chunk in it takes about so long, seconds
    pass_tokens: int = 1024  # no pass packs more
    least_chunk_tokens: int = 16  # of a prefill, however slow the device is
    prefill_patience: int = 4  # passes that a prefill chunk lets decode steps go first
    training_patience: int = 16  # passes that a training call's turn lets others go first


@dataclass(slots=True, eq=False)
class Request(Generic[W]):
    """Work of `n_tokens` for one session. `group` says what may share a pass: equal spans and adapters."""

    work: W
    kind: Kind
    group: Hashable
    peer: Hashable
    n_tokens: int  # still to do; of a training call, turns
    deadline_s: float = float("inf")  # nobody wants it later, by the caller's clock
    due: int = 0  # the pass it is due in; set by the scheduler


@dataclass(slots=True)
class Part(Generic[W]):
    """The next `n_tokens` of a request, in one pass."""

    request: Request[W]
    n_tokens: int


class Scheduler(Generic[W]):
    """Requests wait here until all their tokens have been handed out."""

    def __init__(self, settings: SchedulerSettings = SchedulerSettings(), token_s: float = 0.0) -> None:
        """`token_s`: what a token of prefill takes, as far as is known before the first; 0: it is not."""
        self.settings = settings
        self.passes = 0
        self._waiting: list[Request[W]] = []
        self._last_due: dict[tuple[Hashable, Kind], int] = {}
        self._last_turn: dict[Hashable, int] = {}  # of each peer that trains: the pass
        self._token_s = token_s  # measured on passes with prefill in them, seconds per token

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Of sessions' steps."""
        return sum(request.n_tokens for request in self._waiting if request.kind is not Kind.TRAINING)

    @property
    def decoding(self) -> Hashable | None:
        """The group of the next pass, where decode steps lead it."""
        lead = min(self._waiting, key=lambda request: request.due, default=None)
        return lead.group if lead is not None and lead.kind is Kind.DECODE else None

    @property
    def chunk_tokens(self) -> int:
        """Of prefill, in one pass."""
        if self._token_s == 0.0:
            return self.settings.least_chunk_tokens
        fitting = int(MARGIN * self.settings.target_s / self._token_s)
        return min(max(fitting, self.settings.least_chunk_tokens), self.settings.pass_tokens)

    def add(self, request: Request[W]) -> None:
        patience = (0, self.settings.prefill_patience, self.settings.training_patience)[request.kind]
        key = (request.peer, request.kind)
        request.due = max(self.passes + patience, self._last_due.get(key, -1) + 1)
        self._last_due[key] = request.due
        self._waiting.append(request)

    def remove(self, request: Request[W]) -> bool:
        """Forget a request that nobody wants any more. False if nothing of it is left to do."""
        if request in self._waiting:
            self._waiting.remove(request)
            return True
        return False

    def expired(self, now_s: float) -> list[Request[W]]:
        """Take out the requests whose deadline has passed."""
        late = [request for request in self._waiting if request.deadline_s < now_s]
        for request in late:
            self._waiting.remove(request)
        return late

    def next_batch(self) -> list[Part[W]]:
        """The parts of the next pass, which all share a group; empty where nothing waits."""
        if not self._waiting:
            return []
        self.passes += 1
        if len(self._last_due) > FORGET_FROM:  # those that are over say nothing any more
            self._last_due = {key: due for key, due in self._last_due.items() if due >= self.passes}
        ordered = sorted(self._waiting, key=lambda request: request.due)  # stable: of equals, the older first
        lead = ordered[0]
        if lead.kind is Kind.TRAINING:
            return [self._turn()]
        parts = self._fill(lead, (other for other in ordered[1:] if other.group == lead.group))
        for part in parts:
            part.request.n_tokens -= part.n_tokens
            if part.request.n_tokens:
                part.request.due = self.passes + self.settings.prefill_patience
            else:
                self._waiting.remove(part.request)
        return parts

    def _turn(self) -> Part[W]:
        """A training call's: the first of the peer that has waited longest since its last."""
        training = [request for request in self._waiting if request.kind is Kind.TRAINING]
        lead = min(training, key=lambda request: self._last_turn.get(request.peer, -1))
        self._last_turn = {
            request.peer: self._last_turn[request.peer]
            for request in training
            if request.peer in self._last_turn
        } | {lead.peer: self.passes}
        lead.n_tokens -= 1
        if not lead.n_tokens:
            self._waiting.remove(lead)
        for request in training:
            request.due = max(request.due, self.passes + self.settings.training_patience)
        return Part(lead, 1)

    def _fill(self, lead: Request[W], others: Iterable[Request[W]]) -> list[Part[W]]:
        """The lead, every decode step that fits beside it, and prefill if the lead is one."""
        room = self.settings.pass_tokens
        prefill_room = self.chunk_tokens if lead.kind is Kind.PREFILL else 0
        parts: list[Part[W]] = []
        for request in (lead, *others):
            if request.kind is Kind.DECODE:
                # Whole or not at all: a step of few tokens gains nothing from being cut.
                n_tokens = request.n_tokens if request.n_tokens <= room or not parts else 0
            elif request.kind is Kind.PREFILL:
                n_tokens = min(request.n_tokens, prefill_room, room)
                prefill_room -= n_tokens
            else:
                n_tokens = 0
            if n_tokens > 0:
                parts.append(Part(request, n_tokens))
                room -= n_tokens
        return parts

    def observe(self, parts: Sequence[Part[W]], seconds: float) -> None:
        """What a pass took; sets the size of prefill chunks."""
        if parts[0].request.kind is not Kind.PREFILL:  # which leads every pass that it is in
            return
        token_s = seconds / sum(part.n_tokens for part in parts)
        # Follow a slower device at once and a faster one slowly: too long a pass hurts more than too short
        # a one.
        weight = 0.5 if token_s > self._token_s else 0.2
        self._token_s = token_s if self._token_s == 0.0 else (1 - weight) * self._token_s + weight * token_s
