"""The one exception tree, and the codes its members travel under.

Three branches, by whose fault it is: `UserError` (the caller of this library gave it something wrong),
`NetworkError` (the link or the clock), `RemoteError` (a peer broke a rule or refused). A peer's error
crosses the wire as a code and a text and is raised again here as the same class; no class name ever travels.

Every message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, ClassVar


class ErrorCode(IntEnum):
    """One u32 space for stream resets, connection closes and RPC errors. From 0x100 on: the swarm's own."""

    OK = 0
    INTERNAL = 1
    PROTOCOL = 2
    FLOW_CONTROL = 3
    STREAM_LIMIT = 4
    FRAME_TOO_LARGE = 5
    REFUSED = 6
    CANCELLED = 7
    DEADLINE = 8
    UNKNOWN_METHOD = 9
    RESOURCE_LIMIT = 10
    RATE_LIMITED = 11
    SUPPLANTED = 12
    SHUTDOWN = 13
    BANNED = 14
    FLOOD = 15
    IDLE = 16
    BAD_MESSAGE = 17
    RELAY_LIMIT = 18
    NO_RESERVATION = 19
    UNREACHABLE = 20

    BAD_RECORD = 0x100
    WRONG_MODEL = 0x101
    WRONG_SPAN = 0x102
    UNKNOWN_SESSION = 0x103
    SESSION_GAP = 0x104
    SESSION_LIMIT = 0x105
    BUSY = 0x106
    BAD_TENSOR = 0x107
    NOT_FINITE = 0x108
    UNKNOWN_ADAPTER = 0x109
    BAD_ADAPTER = 0x10A
    BATCH_TOO_LARGE = 0x10B
    NOT_KEPT = 0x10C


class PetaliteError(Exception):
    """Root of everything petalite raises on purpose."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def details(self) -> dict[str, Any]:
        """What travels beside the text, in msgpack's types."""
        return {}

    @classmethod
    def from_details(cls, text: str, details: Mapping[str, Any]) -> PetaliteError:
        """From what travelled. The details are a peer's word: whatever is wrong in them counts as absent."""
        del details
        return cls(text)


# -- what a caller got wrong -----------------------------------------------------------------------


class UserError(PetaliteError):
    """The caller can mend it: an argument, an address, a file, a setting."""


class InvalidArgument(UserError, ValueError):
    """An argument or a combination of settings that cannot work."""


class InvalidAddress(UserError, ValueError):
    """Text that is not a multiaddr or a peer id petalite can dial."""


class InvalidIdentity(UserError):
    """A key file that cannot be read, or that others can read."""


class InvalidCheckpoint(UserError):
    """A model folder with a missing, truncated or contradictory file."""


class UnsupportedModel(UserError):
    """A checkpoint petalite understands well enough to know that it cannot run it."""


class InvalidAdapter(UserError):
    """A LoRA that is broken, or does not belong to the model: a target, rank or shape that is not there."""


class PromptTooLong(UserError):
    """A prompt that does not fit the session or the model."""


class LocalProtocolError(PetaliteError):
    """Our own code asked a protocol state machine for an illegal step (h11's name for it)."""


# -- the link and the clock ------------------------------------------------------------------------


class NetworkError(PetaliteError):
    """Nobody broke a rule; bytes did not get through."""


class Unreachable(NetworkError):
    """No address of the peer answered."""

    code = ErrorCode.UNREACHABLE


class ConnectionLost(NetworkError):
    """The connection ended while something was still in flight."""


class DeadlineExceeded(NetworkError, TimeoutError):
    """The call's deadline passed."""

    code = ErrorCode.DEADLINE


class MissingBlocks(NetworkError):
    """No live server holds these blocks. `blocks` names them; the session can go on when one appears."""

    def __init__(self, message: str, blocks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)


# -- what a peer got wrong or refused --------------------------------------------------------------


class RemoteError(PetaliteError):
    """A peer broke a rule, failed inside, or said no."""


class RemoteProtocolError(RemoteError):
    """A peer's bytes broke the wire protocol; the connection does not survive it."""

    code = ErrorCode.PROTOCOL


class FlowControlViolation(RemoteProtocolError):
    code = ErrorCode.FLOW_CONTROL


class StreamLimitExceeded(RemoteProtocolError):
    code = ErrorCode.STREAM_LIMIT


class FrameTooLarge(RemoteProtocolError):
    code = ErrorCode.FRAME_TOO_LARGE


class Flood(RemoteProtocolError):
    code = ErrorCode.FLOOD


class HandshakeFailed(RemoteProtocolError):
    """The secure channel could not be agreed on: wrong suite, wrong swarm key, bad signature."""


class WrongPeer(HandshakeFailed):
    """Somebody else answered at that address."""


class BadMessage(RemoteError):
    """A message that parses as bytes but not as what the method expects."""

    code = ErrorCode.BAD_MESSAGE


class Refused(RemoteError):
    code = ErrorCode.REFUSED


class Cancelled(RemoteError):
    """The other side stopped caring."""

    code = ErrorCode.CANCELLED


class UnknownMethod(RemoteError):
    code = ErrorCode.UNKNOWN_METHOD


class ResourceLimit(RemoteError):
    code = ErrorCode.RESOURCE_LIMIT


class RateLimited(RemoteError):
    code = ErrorCode.RATE_LIMITED


class Supplanted(RemoteError):
    """This connection gave way to another between the same two peers."""

    code = ErrorCode.SUPPLANTED


class ShuttingDown(RemoteError):
    code = ErrorCode.SHUTDOWN


class Banned(RemoteError):
    code = ErrorCode.BANNED


class IdleClosed(RemoteError):
    code = ErrorCode.IDLE


class BadRecord(RemoteError):
    """A DHT record whose signature, schema, size, owner or life is wrong."""

    code = ErrorCode.BAD_RECORD


class ForgedRecord(BadRecord):
    """A DHT record that its owner did not sign."""


class WrongModel(RemoteError):
    code = ErrorCode.WRONG_MODEL


class WrongSpan(RemoteError):
    code = ErrorCode.WRONG_SPAN


class UnknownSession(RemoteError):
    code = ErrorCode.UNKNOWN_SESSION


class SessionGap(RemoteError):
    """A step whose position lies beyond the row's length."""

    code = ErrorCode.SESSION_GAP


class SessionLimit(RemoteError):
    """More tokens or rows than the session was opened for."""

    code = ErrorCode.SESSION_LIMIT


class Busy(RemoteError):
    """The server has no room now. `retry_after_s` is its guess of when it will; None: never."""

    code = ErrorCode.BUSY

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def details(self) -> dict[str, Any]:
        return {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}

    @classmethod
    def from_details(cls, text: str, details: Mapping[str, Any]) -> Busy:
        retry_after_s = details.get("retry_after_s")
        is_time = isinstance(retry_after_s, float) and 0 <= retry_after_s < float("inf")
        return cls(text, retry_after_s if is_time else None)


class BadTensor(RemoteError):
    code = ErrorCode.BAD_TENSOR


class NotFinite(RemoteError):
    """Hidden states, logits or gradients with NaN or Inf in them. `given` is whether whoever says so was sent
    them like that, or made them; None where that is not known.
    """

    code = ErrorCode.NOT_FINITE

    def __init__(self, message: str, given: bool | None = None) -> None:
        super().__init__(message)
        self.given = given

    def details(self) -> dict[str, Any]:
        return {} if self.given is None else {"given": self.given}

    @classmethod
    def from_details(cls, text: str, details: Mapping[str, Any]) -> NotFinite:
        given = details.get("given")
        return cls(text, given if isinstance(given, bool) else None)


class UnknownAdapter(RemoteError):
    """The server holds no LoRA of this digest; send it, and repeat the call."""

    code = ErrorCode.UNKNOWN_ADAPTER


class BadAdapter(RemoteError):
    """A LoRA that the server does not take: not for these blocks, too large, or broken."""

    code = ErrorCode.BAD_ADAPTER


class BatchTooLarge(RemoteError):
    """More tokens than the server takes in one training call. `most_tokens` is what it takes of rows of this
    length; None where it does not say.
    """

    code = ErrorCode.BATCH_TOO_LARGE

    def __init__(self, message: str, most_tokens: int | None = None) -> None:
        super().__init__(message)
        self.most_tokens = most_tokens

    def details(self) -> dict[str, Any]:
        return {} if self.most_tokens is None else {"most_tokens": self.most_tokens}

    @classmethod
    def from_details(cls, text: str, details: Mapping[str, Any]) -> BatchTooLarge:
        most_tokens = details.get("most_tokens")
        return cls(text, most_tokens if type(most_tokens) is int and most_tokens > 0 else None)


class NotKept(RemoteError):
    """What backward was to go on from is no longer there; repeat the call with its inputs."""

    code = ErrorCode.NOT_KEPT


def _by_code() -> dict[int, type[PetaliteError]]:
    # Only classes that state a code of their own; a subclass that inherits one is a finer local name for it.
    table: dict[int, type[PetaliteError]] = {}
    pending: list[type[PetaliteError]] = [PetaliteError]
    while pending:
        cls = pending.pop()
        if "code" in vars(cls) and cls is not PetaliteError:
            table[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return table


_BY_CODE = _by_code()


def from_wire(code: int, text: str, details: Mapping[str, Any] = MappingProxyType({})) -> PetaliteError:
    """The exception that a peer's code and text stand for; an unknown code is a plain `RemoteError`."""
    cls = _BY_CODE.get(code)
    if cls is None:
        return RemoteError(text or f"the peer failed with code {code}")
    return cls.from_details(text or cls.__doc__ or cls.__name__, details)


def code_of(error: BaseException) -> ErrorCode:
    """The code under which `error` travels. What is not ours travels as INTERNAL."""
    return error.code if isinstance(error, PetaliteError) else ErrorCode.INTERNAL
