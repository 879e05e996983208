"""Two connection cores joined by a link that delivers records whole, late, or not at all."""

from __future__ import annotations

from collections import deque

from petalite.net.connection import Connection
from petalite.net.credit import Windows
from petalite.net.states import Event
from petalite.net.streams import Priority, Stream


class End:
    """A core, what it sent and nobody has delivered yet, and what it said happened."""

    def __init__(self, initiator: bool, ours: Windows, theirs: Windows) -> None:
        self.core = Connection(initiator, ours, theirs)
        self.wire: deque[bytes] = deque()
        self.events: list[tuple[Event, Stream | None]] = []

    def emit(self, max_bytes: int = 128 * 1024) -> bool:
        """Let it send one batch; whether there was anything."""
        records = self.core.sender.next_records(max_bytes)
        self.wire.extend(bytes(record) for record in records)
        self.collect()
        return bool(records)

    def take(self, record: bytes, now: float = 0.0) -> None:
        """Give it a record as a lane does: straight into its reader's memory where there is a target."""
        target = self.core.receiver.target(len(record))
        if target is not None:
            target[:] = record
        self.core.receive(memoryview(record), now)
        self.collect()

    def collect(self) -> None:
        self.events += self.core.events
        self.core.events.clear()

    def happened(self, event: Event) -> list[Stream | None]:
        return [stream for kind, stream in self.events if kind is event]


class Pair:
    def __init__(self, first: Windows | None = None, second: Windows | None = None) -> None:
        first, second = first or Windows(), second or Windows()
        self.ends = (End(True, first, second), End(False, second, first))

    def deliver(self, sender: int, now: float = 0.0) -> bool:
        """The oldest record that `sender` sent reaches the other end."""
        wire = self.ends[sender].wire
        if not wire:
            return False
        self.ends[1 - sender].take(wire.popleft(), now)
        return True

    def drive(self, now: float = 0.0) -> None:
        """Until nobody has anything to say."""
        busy = True
        while busy:
            busy = False
            for sender in (0, 1):
                busy |= self.ends[sender].emit()
                while self.deliver(sender, now):
                    busy = True


class Reader:
    """Takes the messages of a stream as a call does: headers, and buffers into memory for them."""

    def __init__(self, core: Connection, stream: Stream) -> None:
        self._core, self._stream = core, stream
        self._header = b""
        self._target: bytearray | None = None
        self.messages: list[tuple[bytes, bytes]] = []

    def poll(self) -> list[tuple[bytes, bytes]]:
        """All the messages that have come whole."""
        while True:
            if self._target is not None:
                if self._stream.filled < len(self._target):
                    return self.messages
                self.messages.append((self._header, bytes(self._target)))
                self._target = None
            taken = self._core.receiver.take(self._stream)
            if taken is None:
                return self.messages
            self._header, body, size, _ = taken
            if len(body) == size:
                self.messages.append((self._header, bytes(body)))
            else:
                self._target = bytearray(size)
                self._core.receiver.expect(self._stream, body, memoryview(self._target))


def read_all(end: End, stream: Stream) -> list[tuple[bytes, bytes]]:
    """The messages that have come on the stream, each a header and its buffers' bytes."""
    if stream.owner is None:
        stream.owner = Reader(end.core, stream)
    messages: list[tuple[bytes, bytes]] = stream.owner.poll()
    return messages


def unread(stream: Stream) -> int:
    """How much credit is used by what nobody has read."""
    return stream.received - stream.consumed


def open_pair(windows: Windows | None = None) -> tuple[Pair, Stream, Stream]:
    """A pair with one stream, as both ends see it."""
    pair = Pair(windows, windows)
    ours = pair.ends[0].core.open_stream(Priority.NORMAL)
    pair.drive()
    (theirs,) = pair.ends[1].happened(Event.OPENED)
    assert theirs is not None
    return pair, ours, theirs
