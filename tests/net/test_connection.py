"""The connection core: two ends joined in memory, against a model of plain messages."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalite.errors import (
    ErrorCode,
    LocalProtocolError,
)
from petalite.net import frames
from petalite.net.connection import Connection
from petalite.net.credit import Window, Windows
from petalite.net.frames import MAX_DATA_BYTES, MESSAGE_COST, U32, U64, FrameType
from petalite.net.lane import BATCH_BYTES
from petalite.net.pool import SEND_BYTES
from petalite.net.records import OVERHEAD_BYTES
from petalite.net.states import RECEIVE_STEPS, SEND_STEPS, STATE_STEPS, Event, Receive, Send, State, Step
from petalite.net.streams import Priority, Stream

from .pair import End, Pair, open_pair, read_all, unread

SMALL = Windows(8192, 20_000, 4, 16_384, 40_000, 10_000)
OPEN_1 = frames.encode(FrameType.MESSAGE, 1, flags=frames.opening(2))


# -- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [[0], [1], [4095], [4096], [100, 70_000, 3], [32_767, 32_768], [5000] * 30, [1] * 5000]
)
@pytest.mark.parametrize("eager", [False, True])
def test_messages_arrive_in_order_and_whole(sizes: list[int], eager: bool) -> None:
    pair, ours, theirs = open_pair()
    sent = [(b"head %d" % index, bytes([index % 251]) * size) for index, size in enumerate(sizes)]
    for header, body in sent:
        pair.ends[0].core.sender.write(ours, header, [body])
        if eager:
            pair.drive()
            read_all(pair.ends[1], theirs)
    pair.ends[0].core.sender.finish(ours)
    pair.drive()
    while pair.ends[1].core.streams and len(read_all(pair.ends[1], theirs)) < len(sent):
        pair.drive()
    assert read_all(pair.ends[1], theirs) == sent
    assert theirs.receive is Receive.FINISHED
    assert Event.READABLE in {event for event, _ in pair.ends[1].events}


def test_large_buffers_have_records_of_their_own_and_small_ones_do_not() -> None:
    """The rule that lets a tensor be sealed from its own memory; what is small is copied."""
    pair, ours, _ = open_pair()
    core = pair.ends[0].core
    tensor = memoryview(bytearray(200_000))
    core.sender.write(ours, b"head", [b"12", tensor])
    core.sender.write(ours, b"head", [b"tail"])
    records = core.sender.next_records(1 << 20)
    own = [record for record in records if isinstance(record, memoryview)]
    assert [len(record) for record in own] == [MAX_DATA_BYTES, 200_000 - MAX_DATA_BYTES]
    assert all(record.obj is tensor.obj for record in own)
    rest = [len(record) for record in records if not isinstance(record, memoryview)]
    assert rest == [12 + 8 + 4 + 16, 2, 16, 16, 12 + 8]


@pytest.mark.parametrize("sizes", [[1] * 63 + [32_768], [15, 32_768], [MAX_DATA_BYTES - 1], [32_700]])
def test_a_batch_fits_the_buffer_that_it_is_sealed_into(sizes: list[int]) -> None:
    """However it is made up: of crumbs with records of their own, or of frames that just miss their turn's
    end.
    """
    huge = Windows(1 << 30, 1 << 30, 256)
    core = Connection(True, huge, huge)
    for _ in range(200):
        stream = core.open_stream(Priority.NORMAL)
        for _ in range(8):
            core.sender.write(stream, bytes(100), [bytes(size) for size in sizes])
    while records := core.sender.next_records(BATCH_BYTES):
        assert sum(len(record) + OVERHEAD_BYTES for record in records) <= SEND_BYTES


def test_buffers_are_opened_into_their_readers_memory() -> None:
    pair, ours, theirs = open_pair()
    first, second = pair.ends
    first.core.sender.write(ours, b"head", [bytes(range(250)) * 400])
    first.emit(1)
    while first.wire and not theirs.inbox:
        pair.deliver(0)
    taken = second.core.receiver.take(theirs)
    assert taken is not None
    assert taken[:3] == (b"head", b"", 100_000)
    target = bytearray(100_000)
    second.core.receiver.expect(theirs, taken[1], memoryview(target))
    pair.drive()
    assert target == bytes(range(250)) * 400
    assert theirs.filled == 100_000
    assert not taken[1]


def test_a_target_that_comes_between_a_block_and_its_record() -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + frames.encode(FrameType.HEAD, 1, U64.pack(5000) + b"head"))
    end.take(frames.encode(FrameType.BLOCK, 1, U32.pack(5000)))
    taken = end.core.receiver.take(end.core.streams[1])
    assert taken is not None
    target = bytearray(5000)
    end.core.receiver.expect(end.core.streams[1], taken[1], memoryview(target))
    end.take(bytes(range(250)) * 20)
    assert target == bytes(range(250)) * 20


def test_blocks_that_come_before_their_reader_go_to_its_memory_too() -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + frames.encode(FrameType.HEAD, 1, U64.pack(5000) + b"head"))
    for size in (3000, 1000):
        end.take(frames.encode(FrameType.BLOCK, 1, U32.pack(size)))
        end.take(bytes([size % 251]) * size)
    taken = end.core.receiver.take(end.core.streams[1])
    assert taken is not None
    target = bytearray(5000)
    end.core.receiver.expect(end.core.streams[1], taken[1], memoryview(target))
    end.take(frames.encode(FrameType.BLOCK, 1, U32.pack(1000)))
    end.take(bytes(1000))
    assert target == bytes([3000 % 251]) * 3000 + bytes([1000 % 251]) * 1000 + bytes(1000)
    assert end.core.receiver.consumed == end.core.receiver.received == MESSAGE_COST + 5000


def test_what_a_reader_takes_unfinished_and_gives_no_memory_for_is_dropped() -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + frames.encode(FrameType.HEAD, 1, U64.pack(5000) + b"head"))
    assert end.core.receiver.take(end.core.streams[1]) is not None
    end.take(frames.encode(FrameType.BLOCK, 1, U32.pack(5000)))
    end.take(bytes(5000))
    assert not end.core.streams[1].inbox


def test_a_stream_opens_with_its_first_message_where_nothing_stands_between() -> None:
    """One frame then; else a frame of its own goes before, in the order in which streams were opened."""
    core = Connection(True, Windows(), Windows())
    first, second = (core.open_stream(Priority.NORMAL) for _ in range(2))
    record = core.sender.express(second, b"head", [], True)
    assert record == (
        frames.encode(FrameType.MESSAGE, 1, flags=frames.opening(Priority.NORMAL))
        + frames.encode(FrameType.MESSAGE, 3, b"head", frames.opening(Priority.NORMAL) | frames.FIN, 4)
    )
    assert core.sender.express(first, b"head", [], True) == frames.encode(
        FrameType.MESSAGE, 1, b"head", frames.FIN, 4
    )
    assert not core.sender.waiting


def test_a_message_larger_than_any_window_comes_because_its_credit_is_given_at_once() -> None:
    pair, ours, theirs = open_pair(SMALL)
    pair.ends[0].core.sender.write(ours, b"head", [b"\x07" * 1_000_000])
    pair.drive()
    assert read_all(pair.ends[1], theirs) == []
    pair.drive()
    assert read_all(pair.ends[1], theirs) == [(b"head", b"\x07" * 1_000_000)]


def test_a_reader_that_does_not_read_stops_its_sender_alone() -> None:
    """The window, overdrawn by one frame at most."""
    pair, ours, theirs = open_pair(SMALL)
    core = pair.ends[0].core
    for _ in range(40):
        core.sender.write(ours, b"head", [bytes(1000)])
    pair.drive()
    assert SMALL.stream_bytes <= unread(theirs) < SMALL.stream_bytes + 1004
    other = core.open_stream(Priority.NORMAL)
    core.sender.write(other, b"head", [b"x" * 5000], fin=True)
    pair.drive()
    seen = pair.ends[1].happened(Event.OPENED)[1]
    assert seen is not None
    assert read_all(pair.ends[1], seen) == [(b"head", b"x" * 5000)]


def test_small_messages_take_credit_for_the_memory_they_are_kept_in() -> None:
    pair, ours, theirs = open_pair(SMALL)
    for _ in range(1000):
        pair.ends[0].core.sender.write(ours, b"x")
    pair.drive()
    assert len(theirs.inbox) == SMALL.stream_bytes // MESSAGE_COST


def test_windows_grow_when_they_are_used_up_within_two_round_trips() -> None:
    pair, ours, theirs = open_pair()
    reader = pair.ends[1].core
    reader.rtt_s, now = 1.0, 100.0
    before = theirs.window.size
    for _ in range(8):
        for _ in range(7):
            pair.ends[0].core.sender.write(ours, b"head", [bytes(30_000)])
        pair.drive(now)
        read_all(pair.ends[1], theirs)
        now += 0.1
    assert theirs.window.size > 4 * before
    pair.drive(now)
    grown = theirs.window.size
    for _ in range(8):
        now += 1000.0
        for _ in range(7):
            pair.ends[0].core.sender.write(ours, b"head", [bytes(30_000)])
        pair.drive(now)
        read_all(pair.ends[1], theirs)
    assert theirs.window.size == grown


def test_memory_held_unread_has_a_bound() -> None:
    """Every stream full and nobody reading: the window and the allowance, and less than a frame more."""
    windows = Windows(1 << 20, 1 << 20, 64, 1 << 20, 4 << 20, 2 << 20)
    pair = Pair(windows, windows)
    core = pair.ends[0].core
    for _ in range(64):
        core.sender.write(core.open_stream(Priority.NORMAL), b"head", [bytes(1 << 20)])
    pair.drive()
    held = sum(map(unread, pair.ends[1].core.streams.values()))
    assert 2 << 20 <= held < (2 << 20) + (4 << 20) + MAX_DATA_BYTES


def test_classes_are_strict_and_the_last_is_not_starved() -> None:
    """Over a long batch: control before interactive before normal, and bulk still has its sixteenth."""
    huge = Windows(1 << 30, 1 << 30, 8)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    streams = {priority: core.open_stream(priority) for priority in reversed(Priority)}
    for stream in streams.values():
        core.sender.write(stream, b"head", [bytes(64 << 20)])
    core.sender.next_records(1)
    for _ in range(300):
        core.sender.next_records(128 * 1024)
    sent = {priority: stream.sent for priority, stream in streams.items()}
    total = sum(sent.values())
    assert sent[Priority.CONTROL] > 0.75 * total
    assert sent[Priority.BULK] > total / 40


def test_an_urgent_message_waits_for_one_frame_at_most() -> None:
    huge = Windows(1 << 30, 1 << 30, 8)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    core.sender.write(core.open_stream(Priority.BULK), b"head", [bytes(32 << 20)])
    core.sender.next_records(1)
    urgent = core.open_stream(Priority.INTERACTIVE)
    core.sender.write(urgent, b"now")
    first = bytes(core.sender.next_records(1)[0])
    assert first.endswith(b"now")


def test_a_class_is_shared_fairly() -> None:
    """Jain's index (sum x)^2 / (n * sum x^2) of 200 streams' bytes, some writing crumbs and some tensors."""
    huge = Windows(1 << 30, 1 << 30, 256)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    streams = [core.open_stream(Priority.NORMAL) for _ in range(200)]
    for index, stream in enumerate(streams):
        for _ in range(1000 if index % 2 else 1):
            core.sender.write(stream, b"head", [bytes(1000 if index % 2 else 1 << 20)])
    core.sender.next_records(90 << 20)
    sent = [stream.sent for stream in streams]
    assert sum(sent) ** 2 / (len(sent) * sum(x * x for x in sent)) > 0.95


def test_priority_changes_travel_and_are_capped() -> None:
    pair, ours, theirs = open_pair()
    pair.ends[0].core.set_priority(ours, Priority.INTERACTIVE)
    pair.drive()
    assert theirs.priority is Priority.INTERACTIVE
    theirs.highest = Priority.NORMAL
    pair.ends[0].core.set_priority(ours, Priority.CONTROL)
    pair.drive()
    assert theirs.priority is Priority.NORMAL


def test_reset_and_stop_reach_the_other_end() -> None:
    pair, ours, theirs = open_pair()
    first, second = pair.ends
    first.core.sender.write(ours, b"head", [b"x" * 100_000])
    first.core.sender.reset(ours, ErrorCode.CANCELLED)
    second.core.receiver.stop(theirs, ErrorCode.BUSY)
    pair.drive()
    assert theirs.reset_code == ErrorCode.CANCELLED
    assert second.happened(Event.RESET) == [theirs]
    assert first.happened(Event.STOPPED) == []  # it had already given up
    second.core.sender.write(theirs, b"y", fin=True)
    pair.drive()
    assert read_all(first, ours) == [(b"y", b"")]
    assert not first.core.streams
    assert not second.core.streams


def test_stop_makes_the_sender_reset() -> None:
    pair, ours, theirs = open_pair()
    pair.ends[0].core.sender.write(ours, b"head", [bytes(1 << 20)])
    pair.drive()
    pair.ends[1].core.receiver.stop(theirs, ErrorCode.BUSY)
    pair.drive()
    assert pair.ends[0].happened(Event.STOPPED) == [ours]
    assert ours.stop_code == ErrorCode.BUSY
    assert not ours.outbox
    assert theirs.receive is Receive.RESET


@pytest.mark.parametrize("given", [False, True], ids=["unread", "taken"])
def test_stop_between_a_block_and_its_record_counts_it_once(given: bool) -> None:
    end = End(False, Windows(), Windows())
    end.take(OPEN_1 + frames.encode(FrameType.HEAD, 1, U64.pack(5000) + b"head"))
    stream, receiver = end.core.streams[1], end.core.receiver
    if given:
        taken = receiver.take(stream)
        assert taken is not None
        receiver.expect(stream, taken[1], memoryview(bytearray(5000)))
    end.take(frames.encode(FrameType.BLOCK, 1, U32.pack(5000)))
    receiver.stop(stream, ErrorCode.BUSY)
    assert receiver.consumed == MESSAGE_COST  # what has not come takes no credit back
    end.take(bytes(5000))
    assert receiver.consumed == receiver.received == stream.consumed == MESSAGE_COST + 5000


def test_streams_are_forgotten_and_their_places_given_again() -> None:
    """Far more streams than are allowed at once, one after another, and some that are reset."""
    pair = Pair(SMALL, SMALL)
    first, second = pair.ends
    for index in range(40):
        stream = first.core.open_stream(Priority.NORMAL)
        first.core.sender.write(stream, b"x", fin=True)
        pair.drive()
        seen = second.core.streams[stream.id]
        assert read_all(second, seen) == [(b"x", b"")]
        if index % 2:
            second.core.sender.reset(seen, 7)
        else:
            second.core.sender.finish(seen)
        pair.drive()
    assert not first.core.streams
    assert not second.core.streams


def test_no_more_streams_than_the_peer_allows() -> None:
    pair = Pair(SMALL, SMALL)
    core = pair.ends[0].core
    streams = [core.open_stream(Priority.NORMAL) for _ in range(SMALL.streams)]
    assert not core.can_open
    with pytest.raises(LocalProtocolError):
        core.open_stream(Priority.NORMAL)
    for stream in streams:
        core.sender.reset(stream, 7)
        core.receiver.stop(stream, 7)
    pair.drive()
    for seen in list(pair.ends[1].core.streams.values()):
        pair.ends[1].core.sender.reset(seen, 7)
    pair.drive()
    assert pair.ends[0].happened(Event.ROOM)
    assert core.can_open


def test_goaway_lets_streams_end_and_takes_no_more() -> None:
    pair, ours, theirs = open_pair()
    first, second = pair.ends
    late = first.core.open_stream(Priority.NORMAL)  # it crosses the GOAWAY
    second.core.goaway(ErrorCode.SHUTDOWN, "draining")
    pair.drive()
    assert first.core.peer_left
    assert not first.core.can_open
    assert late.reset_code == ErrorCode.SHUTDOWN
    second.core.sender.write(theirs, b"last", fin=True)
    pair.drive()
    assert read_all(first, ours) == [(b"last", b"")]


def test_close_says_why_and_ends_everything() -> None:
    pair, ours, _ = open_pair()
    first, second = pair.ends
    second.core.close(ErrorCode.BANNED, "go away")
    pair.drive()
    assert first.core.state is State.CLOSED
    assert (first.core.close_code, first.core.close_reason) == (ErrorCode.BANNED, "go away")
    first.core.sender.write(ours, b"head", [bytes(5000)])
    assert not first.core.sender.next_records(1 << 20)
    first.take(b"whatever comes now is not looked at")


def test_ping_measures_the_round_trip() -> None:
    pair = Pair()
    first = pair.ends[0]
    first.core.receiver.rtt_s = 0.5
    first.core.ping(10.0)
    pair.drive(now=10.1)
    assert first.core.receiver.rtt_s == pytest.approx(0.5 + (0.1 - 0.5) / 8)
    assert not first.core.pinging


def test_an_uninvited_pong_counts_for_nothing() -> None:
    pair = Pair()
    first = pair.ends[0]
    first.core.receiver.rtt_s = 0.5
    first.take(frames.encode(FrameType.PONG, payload=bytes(8)))
    assert first.core.receiver.rtt_s == 0.5


# -- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", Send)
@pytest.mark.parametrize("step", Step)
def test_sending_steps(state: Send, step: Step) -> None:
    """What is not in the table raises and changes nothing."""
    stream = Stream(1, Priority.NORMAL, 0, Window(0, 0, 0.0))
    stream.send = state
    if (state, step) in SEND_STEPS:
        stream.step_send(step)
        assert stream.send is SEND_STEPS[state, step]
    else:
        with pytest.raises(LocalProtocolError):
            stream.step_send(step)
        assert stream.send is state


@pytest.mark.parametrize("state", Receive)
@pytest.mark.parametrize("step", Step)
def test_receiving_steps(state: Receive, step: Step) -> None:
    stream = Stream(1, Priority.NORMAL, 0, Window(0, 0, 0.0))
    stream.receive = state
    if (state, step) in RECEIVE_STEPS:
        stream.step_receive(step)
        assert stream.receive is RECEIVE_STEPS[state, step]
    else:
        with pytest.raises(LocalProtocolError):
            stream.step_receive(step)
        assert stream.receive is state


@pytest.mark.parametrize("state", State)
def test_connection_steps(state: State) -> None:
    core = Connection(True, SMALL, SMALL)
    core.state = state
    if (state, "goaway") in STATE_STEPS:
        core.goaway(0, "")
    else:
        with pytest.raises(LocalProtocolError):
            core.goaway(0, "")


def test_writing_after_the_end_is_our_own_mistake() -> None:
    pair, ours, _ = open_pair()
    core = pair.ends[0].core
    core.sender.write(ours, b"x", fin=True)
    with pytest.raises(LocalProtocolError):
        core.sender.write(ours, b"y")
    pair.drive()
    core.sender.reset(ours, 7)  # too late, and no harm
    assert not core.sender.waiting


# -- any order of anything -------------------------------------------------------------------------


class Talk(RuleBasedStateMachine):
    """Two ends and a wire that delivers when it likes; the model is what each stream was given and read."""

    @initialize(first=st.sampled_from([SMALL, Windows()]), second=st.sampled_from([SMALL, Windows()]))
    def begin(self, first: Windows, second: Windows) -> None:
        self.pair = Pair(first, second)
        self.written: dict[tuple[int, int], list[tuple[bytes, bytes]]] = {}
        self.read: dict[tuple[int, int], list[tuple[bytes, bytes]]] = {}
        self.stopped: set[tuple[int, int]] = set()
        self.opened: tuple[list[Stream], list[Stream]] = [], []
        self.now = 0.0
        self.count = 0

    def pick(self, end: int, choice: int) -> Stream | None:
        streams = list(self.pair.ends[end].core.streams.values())
        return streams[choice % len(streams)] if streams else None

    @rule(end=st.integers(0, 1), priority=st.sampled_from(Priority))
    def open(self, end: int, priority: Priority) -> None:
        core = self.pair.ends[end].core
        if core.can_open:
            self.opened[end].append(core.open_stream(priority))

    @rule(
        end=st.integers(0, 1),
        choice=st.integers(0, 9),
        sizes=st.lists(st.sampled_from([0, 1, 300, 9000, 40_000, 150_000]), max_size=3),
        fin=st.booleans(),
        fast=st.booleans(),
    )
    def write(self, end: int, choice: int, sizes: list[int], fin: bool, fast: bool) -> None:
        stream = self.pick(end, choice)
        if stream is None or stream.send is not Send.OPEN:
            return
        self.count += 1
        header = b"%d" % self.count
        pieces = [(b"%d." % self.count * size)[:size] for size in sizes]
        core, wire = self.pair.ends[end].core, self.pair.ends[end].wire
        record = core.sender.express(stream, header, pieces, fin) if fast else None
        if record is not None:
            wire.append(record)
        else:
            core.sender.write(stream, header, pieces, fin)
        self.written.setdefault((end, stream.id), []).append((header, b"".join(pieces)))

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9))
    def finish(self, end: int, choice: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None and stream.send is Send.OPEN:
            self.pair.ends[end].core.sender.finish(stream)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), code=st.integers(1, 20))
    def reset(self, end: int, choice: int, code: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None:
            self.pair.ends[end].core.sender.reset(stream, code)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), code=st.integers(1, 20))
    def stop(self, end: int, choice: int, code: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None:
            self.stopped.add((end, stream.id))
            self.pair.ends[end].core.receiver.stop(stream, code)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9))
    def take(self, end: int, choice: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None and (end, stream.id) not in self.stopped:
            self.read[end, stream.id] = read_all(self.pair.ends[end], stream)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), priority=st.sampled_from(Priority))
    def reprioritize(self, end: int, choice: int, priority: Priority) -> None:
        stream = self.pick(end, choice)
        if stream is not None:
            self.pair.ends[end].core.set_priority(stream, priority)

    @rule(end=st.integers(0, 1), max_bytes=st.sampled_from([1, 5000, 200_000]))
    def emit(self, end: int, max_bytes: int) -> None:
        self.pair.ends[end].emit(max_bytes)

    @rule(end=st.integers(0, 1), times=st.integers(1, 5), late=st.floats(0, 1))
    def deliver(self, end: int, times: int, late: float) -> None:
        self.now += late
        for _ in range(times):
            self.pair.deliver(end, self.now)

    @rule(end=st.integers(0, 1))
    def ping(self, end: int) -> None:
        self.pair.ends[end].core.ping(self.now)

    @precondition(lambda self: hasattr(self, "pair"))
    @rule()
    def settle_down(self) -> None:
        self.pair.drive(self.now)

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        if not hasattr(self, "pair"):
            return
        for (end, stream_id), read in self.read.items():
            assert self.written.get((1 - end, stream_id), [])[: len(read)] == read

    @invariant()
    def credit_is_kept(self) -> None:
        """Nobody has sent more than the other end granted, but for a frame, and the two ends' books agree."""
        if not hasattr(self, "pair"):
            return
        for index, end in enumerate(self.pair.ends):
            other = self.pair.ends[1 - index].core
            core = end.core
            assert core.sender.sent < core.sender.limit + MAX_DATA_BYTES
            assert core.sender.limit <= other.receiver.window.limit
            assert other.receiver.received <= core.sender.sent
            assert (
                0
                <= core.receiver.consumed
                <= core.receiver.received
                < core.receiver.window.limit + MAX_DATA_BYTES
            )
            for stream in core.streams.values():
                assert stream.sent < stream.send_limit + MAX_DATA_BYTES
                assert (stream.queued > 0) is bool(stream.outbox)
                assert 0 <= stream.consumed <= stream.received < stream.window.limit + MAX_DATA_BYTES
                waiting = sum(cost + len(body) for _, body, _, cost in stream.inbox)
                announced = core.receiver._block_bytes if core.receiver.block is stream else 0
                assert waiting + announced == stream.received - stream.consumed

    def teardown(self) -> None:
        """Left alone, everything that was written and not given up is read, and credit comes back."""
        if not hasattr(self, "pair"):
            return
        self.pair.drive(self.now)
        for _ in range(50):
            for index, end in enumerate(self.pair.ends):
                theirs = [stream for stream in end.happened(Event.OPENED) if stream is not None]
                for stream in self.opened[index] + theirs:  # also of those that are over
                    if (index, stream.id) not in self.stopped:
                        self.read[index, stream.id] = read_all(end, stream)
            self.pair.drive(self.now)
        for index, end in enumerate(self.pair.ends):
            other = self.pair.ends[1 - index].core
            assert end.core.sender.sent == other.receiver.received == other.receiver.consumed
            for stream in end.core.streams.values():
                assert not stream.inbox
                assert not stream.outbox
        self.what_is_read_is_what_was_written()


TestTalk = Talk.TestCase
TestTalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
