"""The memory of training calls: what each takes, how large its pieces are, and what there is for all.

It is part of what sessions' caches have, reserved before a call begins. For N tokens over n blocks, E and the
dtype's bytes d, pieces of C tokens, and `activation_bytes` a of one token in one block:

    forward                     2 N E d                   + C a + factors
    backward, from the inputs   (n + 3) N E d             + C a + factors
    backward, nothing twice     3 N E d          + N n a  + C a + factors

Factors are three times the float32 bytes of prompts and adapter: themselves stacked, and their gradients
twice. The last line is taken where there is room at once; the second one decides how many tokens a call may
have. What a forward keeps for its backward is the last line, too, out of what nobody uses, and given back
as soon as somebody would. A piece has as many tokens as were seen to take about `piece_s`. Knows sizes and
seconds; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from petalite.errors import BatchTooLarge, WrongSpan
from petalite.model.span import BlockSpan
from petalite.model.walk import Hold, activation_bytes
from petalite.server.adapters import HeldAdapter
from petalite.server.backend import Backend
from petalite.server.budget import Budget
from petalite.swarm.spans import Span
from petalite.swarm.training import SpanInputs

_FIRST_PIECE_TOKENS = 256  # before anything was measured
_PIECE_TOKENS = (64, 4096)  # at least and at most
_USUAL_ROW_TOKENS = 128
_NEVER_SPARE = 0.25  # of the memory: what nobody uses, but a session may any moment


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    share: float = 0.5  # of the memory for caches: what training may have of it; 0: no training
    limit_bytes: int | None = None  # and no more than this
    most_tokens: int = 8192  # in one call
    most: int = 64  # calls at once, waiting ones too
    most_per_peer: int = 16  # of them, one peer's
    calls_bytes: int = 1 << 30  # that calls under way have brought, all together; one is always taken
    longest_wait_s: float = 60.0  # in line for memory
    kept_s: float = 120.0  # what a forward held on to is let go of then
    # A piece takes about so long, as a prefill chunk does; a decode step waits for one at most.
    piece_s: float = 0.1
    adapter_bytes: int = 512 << 20  # for adapters that clients sent


@dataclass(frozen=True, slots=True)
class CallSize:
    """What a call's memory follows from."""

    n_blocks: int
    n_rows: int
    row_tokens: int
    factor_bytes: int  # of prompts and adapter, three times over
    token_bytes: int  # of one token's hidden states
    activation_bytes: int  # of one token in one block
    piece_rows: int = 1

    @classmethod
    def of(
        cls,
        span: BlockSpan,
        n_blocks: int,
        n_rows: int,
        row_tokens: int,
        given_bytes: int = 0,
        *,
        adapted: bool = True,
    ) -> CallSize:
        return cls(
            n_blocks,
            n_rows,
            row_tokens,
            3 * given_bytes,
            span.config.hidden_size * span.dtype.itemsize,
            activation_bytes(span, row_tokens, adapted=adapted),
        )

    @property
    def n_pieces(self) -> int:
        return self.n_blocks * -(-self.n_rows // self.piece_rows)

    def nbytes(self, hold: Hold) -> int:
        """As this module's first lines have it."""
        n_tokens = self.n_rows * self.row_tokens
        piece = min(self.piece_rows * self.row_tokens, n_tokens) * self.activation_bytes
        hidden = n_tokens * self.token_bytes
        return (
            self.factor_bytes
            + {
                Hold.NOTHING: 2 * hidden + piece,
                Hold.INPUTS: (self.n_blocks + 3) * hidden + piece,
                Hold.EVERYTHING: 3 * hidden + n_tokens * self.n_blocks * self.activation_bytes + piece,
            }[hold]
        )


class TrainingMemory:
    """What one backend's budget has for training."""

    def __init__(self, backend: Backend, settings: TrainingSettings) -> None:
        self._blocks = backend.span
        self._shared = backend.budget
        room = int(backend.budget.total_bytes * settings.share)
        limit = room if settings.limit_bytes is None else min(room, settings.limit_bytes)
        self.budget = Budget(limit, "the training call")
        self._settings = settings
        self.kept_bytes = 0  # for backwards that may come, beyond the budget
        self._token_s = 0.0  # of one token in one block, as measured

    @property
    def most_tokens(self) -> int:
        """What one call may have of them, over the whole span, in rows of a usual length."""
        n_blocks = self._blocks.end - self._blocks.start
        return self._most_tokens(CallSize.of(self._blocks, n_blocks, 1, _USUAL_ROW_TOKENS))

    def size(self, span: Span, inputs: SpanInputs, held: HeldAdapter | None) -> CallSize:
        """Raises WrongSpan, BadTensor, BatchTooLarge."""
        blocks = self._blocks
        if not blocks.start <= span.start < span.end <= blocks.end:
            raise WrongSpan(f"this server holds blocks {blocks.start}:{blocks.end}, the call is for {span}")
        blocks.check_sequences(inputs.hidden, inputs.prompts, len(span))
        n_rows, n_tokens, _ = inputs.hidden.shape
        given = 0 if inputs.prompts is None else inputs.prompts.numel() * 4
        given += 0 if held is None else held.adapter.nbytes
        size = CallSize.of(blocks, len(span), n_rows, n_tokens, given, adapted=held is not None)
        most_tokens = self._most_tokens(size)
        check_batch(n_rows, n_tokens, most_tokens)
        return replace(size, piece_rows=self._piece_rows(size))

    def observe(self, n_tokens: int, seconds: float) -> None:
        """What a piece took; sets the size of those of later calls."""
        token_s = seconds / n_tokens
        # Backward takes about twice as long as forward; what the longer ones take is what matters.
        weight = 0.5 if token_s > self._token_s else 0.1
        self._token_s = token_s if not self._token_s else (1 - weight) * self._token_s + weight * token_s

    async def reserve(self, size: CallSize, hold: Hold, timeout_s: float) -> int:
        """The bytes, once there is room, after waiting in line for it. Raises Busy."""
        nbytes = size.nbytes(hold)
        await self.budget.reserve(nbytes, min(timeout_s, self._settings.longest_wait_s))
        try:
            # Never in the sessions' line, where it would keep those behind it waiting.
            await self._shared.reserve(nbytes, 0.0)
        except BaseException:
            self.budget.release(nbytes)
            raise
        return nbytes

    def has_room(self, size: CallSize, hold: Hold) -> bool:
        """At once."""
        return size.nbytes(hold) <= min(self.budget.free_bytes, self._shared.free_bytes)

    def release(self, nbytes: int) -> None:
        self._shared.release(nbytes)
        self.budget.release(nbytes)

    def reserve_spare(self, size: CallSize) -> int:
        """The bytes of what a forward may keep, out of what is free; 0 where so much cannot be spared."""
        nbytes = size.nbytes(Hold.EVERYTHING)
        spare = self._shared.free_bytes - int(self._shared.total_bytes * _NEVER_SPARE)
        if self._settings.limit_bytes is not None:
            spare = min(spare, self._settings.limit_bytes - self.kept_bytes)
        if self._shared.waiting or self.budget.total_bytes == 0 or nbytes > spare:
            return 0
        self._shared.take(nbytes)
        self.kept_bytes += nbytes
        return nbytes

    def release_spare(self, nbytes: int) -> None:
        self.kept_bytes -= nbytes
        self._shared.release(nbytes)

    def _most_tokens(self, size: CallSize) -> int:
        """For pieces of one row."""
        room = self.budget.total_bytes - size.factor_bytes - size.row_tokens * size.activation_bytes
        return max(0, min(room // ((size.n_blocks + 3) * size.token_bytes), self._settings.most_tokens))

    def _piece_rows(self, size: CallSize) -> int:
        """As many as take about `piece_s`, if they and the call's inputs leave room for each other."""
        least, most = _PIECE_TOKENS
        wanted = int(self._settings.piece_s / self._token_s) if self._token_s else _FIRST_PIECE_TOKENS
        room = self.budget.total_bytes - replace(size, piece_rows=0).nbytes(Hold.INPUTS)
        fitting = min(room, self.budget.total_bytes // 4) // size.activation_bytes
        return max(1, min(max(least, wanted), most, fitting) // size.row_tokens)


def check_batch(n_rows: int, row_tokens: int, most_tokens: int) -> None:
    """Raises BatchTooLarge, saying how many tokens in whole rows may come at once."""
    most_rows = most_tokens // row_tokens
    if n_rows > most_rows:
        raise BatchTooLarge(
            f"{n_rows} rows of {row_tokens} tokens are more than this server takes in one call: at most "
            f"{most_tokens} tokens",
            most_rows * row_tokens or None,
        )
