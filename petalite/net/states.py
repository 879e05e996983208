"""The states of streams and connections, and every legal step between them (after RFC 9000 §3).

These tables are the whole truth about a life; a step that is not in them raises. docs/protocol.md prints
them.
"""

from __future__ import annotations

from enum import IntEnum, auto
from types import MappingProxyType


class Send(IntEnum):
    """The sending half."""

    OPEN = auto()
    FINISHING = auto()  # the last bytes are written and not all of them sent
    FINISHED = auto()  # FIN is sent
    RESET = auto()


class Receive(IntEnum):
    """The receiving half."""

    OPEN = auto()
    STOPPED = auto()  # nobody reads any more; what still comes is thrown away
    FINISHED = auto()  # FIN has come; bytes may still wait to be read
    RESET = auto()


class Step(IntEnum):
    FINISH = auto()  # the application has written its last byte
    FIN = auto()  # a frame with FIN went out, or came in
    RESET = auto()  # RESET_STREAM went out, or came in
    STOP = auto()  # the application stopped reading


SEND_STEPS = MappingProxyType(
    {
        (Send.OPEN, Step.FINISH): Send.FINISHING,
        (Send.OPEN, Step.FIN): Send.FINISHED,
        (Send.OPEN, Step.RESET): Send.RESET,
        (Send.FINISHING, Step.FIN): Send.FINISHED,
        (Send.FINISHING, Step.RESET): Send.RESET,
    }
)
RECEIVE_STEPS = MappingProxyType(
    {
        (Receive.OPEN, Step.FIN): Receive.FINISHED,
        (Receive.OPEN, Step.RESET): Receive.RESET,
        (Receive.OPEN, Step.STOP): Receive.STOPPED,
        (Receive.STOPPED, Step.FIN): Receive.FINISHED,
        (Receive.STOPPED, Step.RESET): Receive.RESET,
    }
)


class Event(IntEnum):
    """What happened; the stream's or the connection's state says the rest."""

    OPENED = auto()  # the peer opened this stream
    READABLE = auto()  # the first message that waits, the whole target, or the end has come
    RESET = auto()  # the peer gave up sending: `reset_code`
    STOPPED = auto()  # the peer stopped reading: `stop_code`
    DRAINED = auto()  # the outbox is empty
    ROOM = auto()  # more streams may be opened; or, with `peer_left`, none any more


class State(IntEnum):
    OPEN = auto()
    LEAVING = auto()  # GOAWAY went out: streams end, none begin
    CLOSED = auto()


# What each call or frame does to the connection; anything else raises.
STATE_STEPS = MappingProxyType(
    {
        (State.OPEN, "goaway"): State.LEAVING,
        (State.OPEN, "close"): State.CLOSED,
        (State.LEAVING, "goaway"): State.LEAVING,
        (State.LEAVING, "close"): State.CLOSED,
        (State.CLOSED, "close"): State.CLOSED,
    }
)

# Names for what every call passes: to find a member in its enum costs ten times as much as to find a name.
SENDING, FINISHING, SENT = Send.OPEN, Send.FINISHING, Send.FINISHED
RECEIVING, RECEIVED = Receive.OPEN, Receive.FINISHED
FINISH, FIN_STEP = Step.FINISH, Step.FIN
OPENED, READABLE = Event.OPENED, Event.READABLE
TAKING, CLOSED = State.OPEN, State.CLOSED
