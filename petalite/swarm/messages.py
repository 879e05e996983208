"""What clients and servers say to each other about sessions: the typed bodies of the RPC `session`.

One bidirectional stream per hop and session. The client's first message is `OpenSession`, the server's answer
`SessionOpened`; from then on each `Step` (one buffer: the hidden states, encoded) has one `StepDone` (one
buffer, or none where no output was asked for), in order. Closing the stream closes the session.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from petalite.net.schema import Bounds
from petalite.swarm.spans import MAX_BLOCKS

SESSION_METHOD = "session"
MAX_ROWS = 256  # of one session
MAX_STEP_TOKENS = 4096  # packed in one step; longer prefills come in chunks
MAX_LENGTH = 1 << 20  # tokens a row may be opened for

# Which outputs of a step are wanted: every token's, each segment's last one, or none (a replay whose output
# is downstream already).
ALL, LAST, NONE = OUTPUTS = ("all", "last", "none")

Block = Annotated[int, Bounds(0, MAX_BLOCKS)]
Text = Annotated[str, Bounds(0, 256)]
RowSegment = Annotated[tuple[Annotated[int, Bounds(0, MAX_LENGTH)], ...], Bounds(3, 3)]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Reserve `rows` cache rows of `max_length` tokens over blocks [start, end)."""

    model_id: Text
    start: Block
    end: Block
    rows: Annotated[int, Bounds(1, MAX_ROWS)]
    max_length: Annotated[int, Bounds(1, MAX_LENGTH)]


@dataclass(frozen=True, slots=True)
class SessionOpened:
    codec: Text  # loses nothing of the server's compute dtype; a step may use any the server knows


@dataclass(frozen=True, slots=True)
class Step:
    """Packed tokens: segments of (row, position, n_tokens), rows numbered from 0 within the session.

    A position beyond a row's length is a gap and an error; one inside it truncates the row there first, so a
    repeat is harmless and a rollback is free.
    """

    rows: Annotated[tuple[RowSegment, ...], Bounds(1, MAX_ROWS)]
    codec: Text
    output: Text = ALL


@dataclass(frozen=True, slots=True)
class StepDone:
    """The server's own account of the step, milliseconds."""

    queue_ms: float
    compute_ms: float
