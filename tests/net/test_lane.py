"""Lanes: records cut anywhere on their way, and memory that is given out again only when it is free."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from bisect import bisect_right
from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import ConnectionLost, PetaliteError, RemoteProtocolError
from petalite.net.connection import Connection
from petalite.net.credit import Windows
from petalite.net.handshake import Secured
from petalite.net.identity import PeerId
from petalite.net.lane import Lane
from petalite.net.noise import AES_GCM
from petalite.net.pool import POOL_BYTES, POOLED_BYTES, Scratch
from petalite.net.records import OVERHEAD_BYTES, PREFIX_BYTES, Opener, Sealer
from petalite.net.streams import Priority

from .hostile import HELLO

WINDOWS = Windows(stream_bytes=4 << 20, connection_bytes=4 << 20)


def test_pooled_memory_is_not_given_out_while_anybody_refers_to_it() -> None:
    """A view, a slice of it or a cast of that: each alone keeps the memory taken."""
    pool = Scratch()
    views = [pool.take(POOLED_BYTES) for _ in range(3)]
    assert len({id(view.obj) for view in views}) == 3
    kept = views[0][100:200].cast("B")
    first = id(views[0].obj)
    del views[0]
    gc.collect()
    assert id(pool.take(POOLED_BYTES).obj) != first
    del kept
    again = pool.take(POOLED_BYTES)
    assert id(again.obj) == first
    assert id(pool.take(POOLED_BYTES + 1).obj) != first


def test_the_pool_has_a_bound_and_forgets() -> None:
    pool = Scratch()
    views = [pool.take(POOL_BYTES // 4) for _ in range(6)]
    assert pool._kept_bytes == POOL_BYTES
    assert len(pool.take(POOL_BYTES + 1)) == POOL_BYTES + 1
    pool.trim(float("inf"))
    assert pool._kept_bytes == 0
    assert not pool._kept
    assert len({id(view.obj) for view in views}) == 6


class Owner:
    """What a lane tells."""

    def __init__(self) -> None:
        self.lost: list[tuple[PetaliteError, bool]] = []

    def lane_events(self, lane: Lane, events: object) -> None:
        """The test looks at the streams themselves."""

    def lane_lost(self, lane: Lane, error: PetaliteError, guilty: bool) -> None:
        self.lost.append((error, guilty))


def sent_records(sizes: list[int]) -> list[bytes]:
    """The plaintexts in which a peer sends payloads of those sizes on one stream."""
    core = Connection(True, WINDOWS, WINDOWS)
    stream = core.open_stream(Priority.NORMAL)
    for number, size in enumerate(sizes):
        core.sender.write(stream, b"%d" % number, [bytes([number % 251]) * size])
    return [bytes(record) for record in core.sender.next_records(1 << 30)]


def taken(core: Connection) -> object:
    """What came on the stream."""
    return [(stream.inbox, stream.due) for stream in core.streams.values()]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 100, 5000, 32 * 1024, 60_000, 200_000]), min_size=1, max_size=12),
    cuts=st.lists(st.floats(0, 1), max_size=20),
    end=st.one_of(st.just(1.0), st.floats(0, 1)),
    lie=st.booleans(),
)
def test_records_cut_anywhere_and_lost_anywhere(
    sizes: list[int], cuts: list[float], end: float, lie: bool
) -> None:
    """However the bytes are cut on their way and wherever they end or are changed, what came whole is taken,
    in order, and nothing behind it. Another core, given those records one by one, is the reference."""
    plaintexts = sent_records(sizes)
    sealer = Sealer(AES_GCM, bytes(32))
    records = []
    for plain in plaintexts:
        record = bytearray(len(plain) + OVERHEAD_BYTES)
        sealer.seal(plain, memoryview(record))
        records.append(bytes(record))
    wire = bytearray(b"".join(records))
    length = int(end * len(wire))
    whole = bisect_right(list(accumulate(map(len, records))), length)
    lie &= length < len(wire) and whole < len(records)
    if lie:  # one bit of a record, which then comes to its end
        start = sum(map(len, records[:whole]))
        wire[max(length, start + PREFIX_BYTES)] ^= 1
        length = len(wire)
    reference = Connection(False, WINDOWS, WINDOWS)
    for plain in plaintexts[:whole]:
        assert reference.receiver.target(len(plain)) is None
        reference.receive(memoryview(plain), 0.0)

    async def run() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        core, owner = Connection(False, WINDOWS, WINDOWS), Owner()
        key, peer = bytes(32), PeerId(bytes(32))
        secured = Secured(peer, HELLO, Sealer(AES_GCM, key), Opener(AES_GCM, key), b"")
        lane = Lane(ours, core, secured, Scratch(), owner)
        lane.start(b"")
        ends = sorted({*(int(cut * length) for cut in cuts), length})
        with theirs:
            for begin, piece_end in zip([0, *ends], ends, strict=False):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await asyncio.get_running_loop().sock_sendall(theirs, wire[begin:piece_end])
                await asyncio.sleep(0)
        await lane.gone.wait()
        assert taken(core) == taken(reference)
        [(error, guilty)] = owner.lost
        assert guilty is lie
        assert isinstance(error, RemoteProtocolError if lie else ConnectionLost)

    asyncio.run(run())
