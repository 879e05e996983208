"""Control frames that wait to be sent: in order, before all data, and few of them whatever a peer provokes.

Knows frames and counts; knows no stream.
"""

from __future__ import annotations

from petalite.errors import Flood
from petalite.net import frames
from petalite.net.frames import U32, U64, FrameType

MAX_PONGS = 8  # unsent
MAX_PROVOKED = 1024  # unsent frames in front of one more that the peer makes us send
MAX_BATCH = 2048  # frames in one record; they have 20 bytes, but for CLOSE and GOAWAY


class ControlQueue:
    """`waiting` is 0 when no frame waits, and never less than how many do."""

    __slots__ = ("_frames", "_grants", "_pongs", "waiting")

    def __init__(self) -> None:
        self._frames: list[bytes | memoryview] = []
        self._grants: dict[tuple[FrameType, int], int] = {}  # only the newest limit of each kind and stream
        self._pongs = 0
        self.waiting = 0

    def send(self, kind: FrameType, stream: int = 0, payload: bytes = b"", aux: int = 0) -> None:
        self._frames.append(frames.encode(kind, stream, payload, aux=aux))
        self.waiting += 1

    def grant(self, kind: FrameType, stream: int, limit: int) -> None:
        """A new limit, in the place of one that has not gone out."""
        self._grants[kind, stream] = limit
        self.waiting += 1

    def answer(self, kind: FrameType, stream: int, payload: bytes) -> None:
        """What the peer makes us send. Raises Flood when it makes us send too much and reads none of it."""
        self._pongs += kind is FrameType.PONG
        if self._pongs > MAX_PONGS:
            raise Flood(f"more than {MAX_PONGS} pings at once")
        if len(self._frames) >= MAX_PROVOKED:
            raise Flood(f"more than {MAX_PROVOKED} control frames wait to be read by the peer")
        self.send(kind, stream, payload)

    def take(self) -> list[bytes | memoryview]:
        """The frames for the next record."""
        for (kind, stream), limit in self._grants.items():
            width = U32 if kind is FrameType.MAX_STREAMS else U64
            self.send(kind, stream, width.pack(limit))
        self._grants.clear()
        self._pongs = 0
        taken, self._frames = self._frames[:MAX_BATCH], self._frames[MAX_BATCH:]
        self.waiting = len(self._frames)
        return taken
