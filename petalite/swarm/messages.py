"""What clients and servers say to each other about sessions: the typed bodies of two RPC methods.

`session`, client to server: one bidirectional stream per hop and session; closing it closes the session.
The first message is `OpenSession`, answered by `SessionOpened`. Then the client sends `Step`s (one buffer:
hidden states), and now and then `Expect`, `Relink` or `Probe`; the server sends `StepDone`, `LinkDown` and
`Progress`.

`session.attach`, server to server: the ring. A server opens it to the hop after its own, naming the
one-time token that the client gave both, and pushes the steps on that it has computed. Only the last hop of
such a run answers the client; it is the one whose span ends at the step's `stop`.

A step's position beyond a row's length is a gap and an error; one inside a row truncates it there first. So
repeats are harmless and rolling back costs nothing. The epoch rises with each repair of the chain; a hop
ignores steps of an epoch before the latest that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

from petalite.errors import BadMessage
from petalite.net.identity import PeerId
from petalite.net.schema import between, decode, encode, length
from petalite.swarm.spans import MAX_BLOCKS

T = TypeVar("T")

SESSION_METHOD = "session"
ATTACH_METHOD = "session.attach"
MAX_ROWS = 256  # of one session
MAX_STEP_TOKENS = 4096  # packed in one step; longer prefills come in chunks
REPLAY_TOKENS = 512  # of one row, in one step of what a server replays
MAX_LENGTH = 1 << 20  # tokens a row may be opened for
TOKEN_BYTES = 16
DIGEST_BYTES = 32
# A step of no more tokens per row is a decode step, or a draft to verify; others are prefill.
DECODE_TOKENS = 16

# Which outputs of a step are wanted: every token's, each segment's last one, or none (a replay whose output
# is downstream already).
ALL, LAST, NONE = OUTPUTS = ("all", "last", "none")

Block = Annotated[int, between(0, MAX_BLOCKS)]
MAX_COUNT = 2**53
Count = Annotated[int, between(0, MAX_COUNT)]
Text = Annotated[str, length(0, 256)]
Token = Annotated[bytes, length(TOKEN_BYTES, TOKEN_BYTES)]
Digest = Annotated[bytes, length(DIGEST_BYTES, DIGEST_BYTES)]  # SHA-256, the name of a LoRA
Milliseconds = Annotated[float, between(0, 1e9)]
Rows: TypeAlias = tuple[tuple[int, int, int], ...]
"""1 to MAX_ROWS of (row, position, n_tokens)."""


@dataclass(frozen=True, slots=True)
class Successor:
    """The hop that a server pushes to, and the token that opens its door."""

    peer: PeerId
    token: Token


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Reserve `rows` cache rows of `max_length` tokens over blocks [start, end)."""

    model_id: Text
    start: Block
    end: Block
    rows: Annotated[int, between(1, MAX_ROWS)]
    max_length: Annotated[int, between(1, MAX_LENGTH)]
    token: Token | None = None  # whoever names it may attach as predecessor
    successor: Successor | None = None
    wait_s: Annotated[float, between(0, 600)] = 0.0  # in line, where there is no room now
    codec: Text | None = None  # to answer and push in; None: one that loses nothing of the compute dtype
    adapter: Digest | None = None  # of a LoRA that the server holds, for every step


@dataclass(frozen=True, slots=True)
class SessionOpened:
    codec: Text  # what this hop answers and pushes in, and is best sent


class HopReport(NamedTuple):
    """One hop's own account of a step."""

    queue_ms: float
    compute_ms: float
    nbytes: int = 0  # of hidden states that came in


# The two messages that every token takes are written and read by hand, in few operations of the interpreter:
# between two passes over a model's weights each finds its caches cold. What there are many of goes as flat
# lists of numbers. Not frozen, as that is slower; nobody changes them.


@dataclass(slots=True)
class Step:
    """Packed tokens: segments of (row, position, n_tokens), rows numbered from 0 within the session.

    `forks` are pairs (row, other row): before anything is computed, the other row becomes a copy of the row;
    the step then goes on in it from its position there. No row is both; so repeats are harmless here too.
    """

    KIND: ClassVar[str] = "step"
    rows: Rows
    codec: str  # of the buffer
    stop: int  # the hop whose span ends here answers; those before push on
    output: str = ALL
    number: int = 0  # comes back with the answer
    epoch: int = 0
    hops: tuple[HopReport, ...] = ()  # each hop on the way adds its own
    forks: tuple[tuple[int, int], ...] = ()

    def body(self) -> dict[str, Any]:
        body = {
            "kind": "step",
            "rows": list(chain.from_iterable(self.rows)),
            "codec": self.codec,
            "stop": self.stop,
            "output": self.output,
            "number": self.number,
            "epoch": self.epoch,
            "hops": list(chain.from_iterable(self.hops)),
        }
        if self.forks:
            body["forks"] = list(chain.from_iterable(self.forks))
        return body

    @staticmethod
    def of(body: Mapping[str, Any]) -> Step:
        """Raises BadMessage."""
        get = body.get
        codec, output = get("codec"), get("output", ALL)
        if not type(codec) is type(output) is str:
            raise BadMessage(f"a step in codec {_shown(codec)}, for output {_shown(output)}")
        counts: tuple[Any, Any, Any] = get("stop"), get("number", 0), get("epoch", 0)
        _check_counts("stop, number and epoch", counts, MAX_COUNT)
        stop, number, epoch = counts
        flat, forks = get("forks"), tuple[tuple[int, int]]()
        if flat:
            _check_list("forks", flat, 2, MAX_ROWS)
            _check_counts("forks", flat, MAX_ROWS - 1)
            forks = tuple(zip(flat[::2], flat[1::2], strict=True))
        return Step(_rows(get("rows")), codec, stop, output, number, epoch, _hops(get("hops")), forks)


@dataclass(slots=True)
class StepDone:
    """The answer to a step, with one buffer of hidden states unless NONE were wanted."""

    KIND: ClassVar[str] = "done"
    rows: Rows
    codec: str
    number: int
    epoch: int
    hops: tuple[HopReport, ...]  # at least one

    def body(self) -> dict[str, Any]:
        return {
            "kind": "done",
            "rows": list(chain.from_iterable(self.rows)),
            "codec": self.codec,
            "number": self.number,
            "epoch": self.epoch,
            "hops": list(chain.from_iterable(self.hops)),
        }

    @staticmethod
    def of(body: Mapping[str, Any]) -> StepDone:
        """Raises BadMessage."""
        get = body.get
        codec, hops = get("codec"), _hops(get("hops"))
        if type(codec) is not str or not hops:
            raise BadMessage(f"an answer in codec {_shown(codec)} from {len(hops)} hops")
        counts: tuple[Any, Any] = get("number"), get("epoch")
        _check_counts("number and epoch", counts, MAX_COUNT)
        return StepDone(_rows(get("rows")), codec, *counts, hops)


@dataclass(frozen=True, slots=True)
class Expect:
    """From now on the holder of this token is the predecessor; whoever was it is cut off."""

    KIND: ClassVar[str] = "expect"
    token: Token
    epoch: Count


@dataclass(frozen=True, slots=True)
class Relink:
    """Push to another hop; first replay what was pushed of each row, up to `lengths`, as steps that end at
    `stop`.

    Without a successor the replay goes to the client. Each of its steps has REPLAY_TOKENS of one row, or the
    row's rest, and a number of its own.
    """

    KIND: ClassVar[str] = "relink"
    successor: Successor | None
    number: Count  # of the replay's first step; the others follow
    epoch: Count
    stop: Block
    lengths: Annotated[tuple[Annotated[int, between(0, MAX_LENGTH)], ...], length(1, MAX_ROWS)]


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The successor cannot be reached, or is gone."""

    KIND: ClassVar[str] = "linkdown"
    epoch: Count
    reason: Annotated[str, length(0, 2000)]


@dataclass(frozen=True, slots=True)
class Probe:
    """Where are you? Asked when an answer is late, and while a replay goes on."""

    KIND: ClassVar[str] = "probe"


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of the last step that came in, and of the last that went out, to client or successor; and
    what shows, within a step, that it is at work.
    """

    KIND: ClassVar[str] = "progress"
    received: Count
    sent: Count
    held: Count = 0  # tokens, in the caches of all its rows
    coming: Count = 0  # bytes that are here of what the predecessor sends


@dataclass(frozen=True, slots=True)
class Attach:
    """The first message of `session.attach`."""

    token: Token


FromClient: TypeAlias = Step | Expect | Relink | Probe
FromServer: TypeAlias = StepDone | LinkDown | Progress
FROM_CLIENT: dict[str, type[FromClient]] = {cls.KIND: cls for cls in (Step, Expect, Relink, Probe)}
FROM_SERVER: dict[str, type[FromServer]] = {cls.KIND: cls for cls in (StepDone, LinkDown, Progress)}
_INTEGERS, _NUMBERS = frozenset((int,)), frozenset((int, float))


def write(message: FromClient | FromServer) -> dict[str, Any]:
    """The body of a message that follows the first one of a session."""
    if isinstance(message, Step | StepDone):
        return message.body()
    return {"kind": message.KIND, **encode(message)}


def read(known: Mapping[str, type[T]], body: Mapping[str, Any]) -> T:
    """The message that `body` spells, of one of the `known` kinds. Raises BadMessage."""
    kind = body.get("kind")
    cls = known.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise BadMessage(f"unknown kind of message {str(kind)[:20]!r}; expected {', '.join(known)}")
    by_hand: Callable[[Mapping[str, Any]], T] | None = getattr(cls, "of", None)
    return decode(cls, body) if by_hand is None else by_hand(body)


def _rows(flat: Any) -> Rows:
    _check_list("rows", flat, 3, MAX_ROWS)
    _check_counts("rows", flat, MAX_LENGTH)
    numbers = iter(flat)
    return tuple(zip(numbers, numbers, numbers, strict=True))


def _hops(flat: Any) -> tuple[HopReport, ...]:
    if not flat:
        return ()
    _check_list("hops", flat, 3, MAX_BLOCKS)
    # Nor are NaN and Inf of such a sum, wherever they stand.
    if not (_NUMBERS.issuperset(map(type, flat)) and min(flat) >= 0 and sum(flat) <= MAX_COUNT):
        raise BadMessage(f"hops have numbers of 0 to {MAX_COUNT}, found {_shown(flat)}")
    numbers = iter(flat)
    return tuple(map(HopReport._make, zip(numbers, numbers, numbers, strict=True)))


def _check_list(what: str, flat: Any, each: int, most: int) -> None:
    """Whether it is a list of 1 to `most` times `each`."""
    if type(flat) is not list or len(flat) % each or not 0 < len(flat) <= most * each:
        raise BadMessage(f"{what} are 1 to {most} times {each} in one list, found {_shown(flat)}")


def _check_counts(what: str, numbers: Sequence[Any], high: int) -> None:
    if not (_INTEGERS.issuperset(map(type, numbers)) and min(numbers) >= 0 and max(numbers) <= high):
        raise BadMessage(f"{what} are whole numbers of 0 to {high}, found {_shown(numbers)}")


def _shown(value: object) -> str:
    return repr(value)[:60]
