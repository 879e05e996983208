"""The connection core: two ends joined in memory, against a model of plain bytes."""

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
from petalite.net.frames import MAX_DATA_BYTES, FrameType
from petalite.net.states import RECEIVE_STEPS, SEND_STEPS, STATE_STEPS, Event, Receive, Send, State, Step
from petalite.net.streams import Priority, Stream

from .pair import Pair, open_pair, read_all, take

SMALL = Windows(8192, 20_000, 4, 16_384, 40_000, 10_000)


# -- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[0], [1], [4095], [4096], [100, 70_000, 3], [5000] * 30, [1] * 5000])
def test_bytes_arrive_in_order_and_whole(sizes: list[int]) -> None:
    pair, ours, theirs = open_pair()
    data = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    pair.ends[0].core.write(ours, data, fin=True)
    pair.drive()
    assert read_all(pair.ends[1], theirs) == b"".join(data)
    assert theirs.receive is Receive.FINISHED and not theirs.buffered
    assert Event.READABLE in {event for event, _ in pair.ends[1].events}


def test_a_large_payload_has_records_of_its_own_and_a_small_one_does_not() -> None:
    """The rule that lets a tensor be sealed from its own memory; the rest is copied, with its tail."""
    pair, ours, _ = open_pair()
    core = pair.ends[0].core
    tensor = memoryview(bytearray(200_000))
    core.write(ours, [b"head", tensor, b"tail"])
    records = core.next_records(1 << 20)
    own = [record for record in records if isinstance(record, memoryview)]
    assert [len(record) for record in own] == [MAX_DATA_BYTES, 200_000 - MAX_DATA_BYTES]
    assert all(record.obj is tensor.obj for record in own)
    assert [len(record) for record in records if record not in own] == [12 + 4 + 16, 16, 12 + 4]


def test_a_payload_is_opened_into_its_readers_memory() -> None:
    pair, ours, theirs = open_pair()
    target = bytearray(100_000)
    assert not pair.ends[1].core.expect(theirs, memoryview(target))
    pair.ends[0].core.write(ours, [bytes(range(250)) * 400])
    pair.drive()
    assert target == bytes(range(250)) * 400
    assert not theirs.chunks


def test_a_target_larger_than_any_window_fills_because_its_credit_is_given_at_once() -> None:
    pair, ours, theirs = open_pair(SMALL)
    target = bytearray(1_000_000)
    pair.ends[1].core.expect(theirs, memoryview(target))
    pair.ends[0].core.write(ours, [b"\x07" * 1_000_000])
    pair.drive()
    assert target == b"\x07" * 1_000_000


def test_a_reader_that_does_not_read_stops_its_sender_alone() -> None:
    pair, ours, theirs = open_pair(SMALL)
    core = pair.ends[0].core
    core.write(ours, [bytes(100_000)])
    pair.drive()
    assert theirs.buffered == SMALL.stream_bytes
    other = core.open_stream(Priority.NORMAL)
    core.write(other, [b"x" * 5000], fin=True)
    pair.drive()
    seen = pair.ends[1].core.streams[other.id]
    assert read_all(pair.ends[1], seen) == b"x" * 5000


def test_windows_grow_when_they_are_used_up_within_two_round_trips() -> None:
    pair, ours, theirs = open_pair()
    reader = pair.ends[1].core
    reader.rtt_s, now = 1.0, 100.0
    before = theirs.window.size
    for _ in range(8):
        pair.ends[0].core.write(ours, [bytes(200_000)])
        pair.drive(now)
        read_all(pair.ends[1], theirs)
        now += 0.1
    assert theirs.window.size > 4 * before
    pair.drive(now)
    grown = theirs.window.size
    for _ in range(8):
        now += 1000.0
        pair.ends[0].core.write(ours, [bytes(200_000)])
        pair.drive(now)
        read_all(pair.ends[1], theirs)
    assert theirs.window.size == grown


def test_memory_held_unread_has_a_bound() -> None:
    """Every stream full and nobody reading: the window and the allowance, and not a byte more."""
    windows = Windows(1 << 20, 1 << 20, 64, 1 << 20, 4 << 20, 2 << 20)
    pair = Pair(windows, windows)
    core = pair.ends[0].core
    for _ in range(64):
        core.write(core.open_stream(Priority.NORMAL), [bytes(1 << 20)])
    pair.drive()
    held = sum(stream.buffered for stream in pair.ends[1].core.streams.values())
    assert 2 << 20 <= held <= (2 << 20) + (4 << 20)


def test_classes_are_strict_and_the_last_is_not_starved() -> None:
    """Over a long batch: control before interactive before normal, and bulk still has its sixteenth."""
    huge = Windows(1 << 30, 1 << 30, 8)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    streams = {priority: core.open_stream(priority) for priority in reversed(Priority)}
    for stream in streams.values():
        core.write(stream, [bytes(64 << 20)])
    core.next_records(1)
    for _ in range(300):
        core.next_records(128 * 1024)
    sent = {priority: stream.sent for priority, stream in streams.items()}
    total = sum(sent.values())
    assert sent[Priority.CONTROL] > 0.75 * total
    assert sent[Priority.BULK] > total / 40


def test_an_urgent_message_waits_for_one_frame_at_most() -> None:
    huge = Windows(1 << 30, 1 << 30, 8)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    core.write(core.open_stream(Priority.BULK), [bytes(32 << 20)])
    core.next_records(1)
    urgent = core.open_stream(Priority.INTERACTIVE)
    core.write(urgent, [b"now"])
    first = bytes(core.next_records(1)[0])
    assert first.endswith(b"now")


def test_a_class_is_shared_fairly() -> None:
    """Jain's index (sum x)^2 / (n * sum x^2) of 200 streams' bytes, some writing crumbs and some tensors."""
    huge = Windows(1 << 30, 1 << 30, 256)
    pair = Pair(huge, huge)
    core = pair.ends[0].core
    streams = [core.open_stream(Priority.NORMAL) for _ in range(200)]
    for index, stream in enumerate(streams):
        core.write(stream, [bytes(1 << 20)] if index % 2 else [bytes(1000)] * 1000)
    core.next_records(90 << 20)
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
    first.core.write(ours, [b"x" * 100_000])
    first.core.reset(ours, ErrorCode.CANCELLED)
    second.core.stop(theirs, ErrorCode.BUSY)
    pair.drive()
    assert theirs.reset_code == ErrorCode.CANCELLED
    assert second.happened(Event.RESET) == [theirs]
    assert first.happened(Event.STOPPED) == []  # it had already given up
    second.core.write(theirs, [b"y"], fin=True)
    pair.drive()
    assert read_all(first, ours) == b"y"
    assert not first.core.streams
    assert not second.core.streams


def test_stop_makes_the_sender_reset() -> None:
    pair, ours, theirs = open_pair()
    pair.ends[0].core.write(ours, [bytes(1 << 20)])
    pair.drive()
    pair.ends[1].core.stop(theirs, ErrorCode.BUSY)
    pair.drive()
    assert pair.ends[0].happened(Event.STOPPED) == [ours]
    assert ours.stop_code == ErrorCode.BUSY
    assert not ours.outbox
    assert theirs.receive is Receive.RESET


def test_streams_are_forgotten_and_their_places_given_again() -> None:
    """Far more streams than are allowed at once, one after another, and some that are reset."""
    pair = Pair(SMALL, SMALL)
    first, second = pair.ends
    for index in range(40):
        stream = first.core.open_stream(Priority.NORMAL)
        first.core.write(stream, [b"x"], fin=True)
        pair.drive()
        seen = second.core.streams[stream.id]
        assert read_all(second, seen) == b"x"
        if index % 2:
            second.core.reset(seen, 7)
        else:
            second.core.write(seen, (), fin=True)
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
        core.reset(stream, 7)
        core.stop(stream, 7)
    pair.drive()
    for seen in list(pair.ends[1].core.streams.values()):
        pair.ends[1].core.reset(seen, 7)
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
    second.core.write(theirs, [b"last"], fin=True)
    pair.drive()
    assert read_all(first, ours) == b"last"


def test_close_says_why_and_ends_everything() -> None:
    pair, ours, _ = open_pair()
    first, second = pair.ends
    second.core.close(ErrorCode.BANNED, "go away")
    pair.drive()
    assert first.core.state is State.CLOSED
    assert (first.core.close_code, first.core.close_reason) == (ErrorCode.BANNED, "go away")
    first.core.write(ours, [bytes(5000)])
    assert not first.core.next_records(1 << 20)
    first.take(b"whatever comes now is not looked at")


def test_ping_measures_the_round_trip() -> None:
    pair = Pair()
    first = pair.ends[0]
    first.core.rtt_s = 0.5
    first.core.ping(10.0)
    pair.drive(now=10.1)
    assert first.core.rtt_s == pytest.approx(0.5 + (0.1 - 0.5) / 8)
    assert not first.core.pinging


def test_an_uninvited_pong_counts_for_nothing() -> None:
    pair = Pair()
    first = pair.ends[0]
    first.core.rtt_s = 0.5
    first.take(frames.encode(FrameType.PONG, payload=bytes(8)))
    assert first.core.rtt_s == 0.5


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
    core.write(ours, [b"x"], fin=True)
    with pytest.raises(LocalProtocolError):
        core.write(ours, [b"y"])
    pair.drive()
    core.reset(ours, 7)  # too late, and no harm
    assert not core.wants_write


# -- any order of anything -------------------------------------------------------------------------


class Talk(RuleBasedStateMachine):
    """Two ends and a wire that delivers when it likes; the model is what each stream was given and read."""

    @initialize(first=st.sampled_from([SMALL, Windows()]), second=st.sampled_from([SMALL, Windows()]))
    def begin(self, first: Windows, second: Windows) -> None:
        self.pair = Pair(first, second)
        self.written: dict[tuple[int, int], bytearray] = {}
        self.read: dict[tuple[int, int], bytearray] = {}
        self.targets: dict[tuple[int, int], bytearray] = {}
        self.now = 0.0
        self.count = 0

    def pick(self, end: int, choice: int) -> Stream | None:
        streams = list(self.pair.ends[end].core.streams.values())
        return streams[choice % len(streams)] if streams else None

    @rule(end=st.integers(0, 1), priority=st.sampled_from(Priority))
    def open(self, end: int, priority: Priority) -> None:
        core = self.pair.ends[end].core
        if core.can_open:
            core.open_stream(priority)

    @rule(
        end=st.integers(0, 1),
        choice=st.integers(0, 9),
        sizes=st.lists(st.integers(0, 9000), max_size=4),
        fin=st.booleans(),
    )
    def write(self, end: int, choice: int, sizes: list[int], fin: bool) -> None:
        stream = self.pick(end, choice)
        if stream is None or stream.send is not Send.OPEN:
            return
        self.count += 1
        pieces = [(b"%d." % self.count * size)[:size] for size in sizes]
        self.pair.ends[end].core.write(stream, pieces, fin)
        self.written.setdefault((end, stream.id), bytearray()).extend(b"".join(pieces))

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), code=st.integers(1, 20))
    def reset(self, end: int, choice: int, code: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None:
            self.pair.ends[end].core.reset(stream, code)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), code=st.integers(1, 20))
    def stop(self, end: int, choice: int, code: int) -> None:
        stream = self.pick(end, choice)
        if stream is not None:
            self.settle(end, stream)
            self.targets.pop((end, stream.id), None)
            self.pair.ends[end].core.stop(stream, code)

    def settle(self, end: int, stream: Stream) -> None:
        """Count a target that was filled as read."""
        key = (end, stream.id)
        target = self.targets.get(key)
        if target is not None and stream.target is None:
            del self.targets[key]
            if stream.receive is not Receive.RESET:
                self.read.setdefault(key, bytearray()).extend(target)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), size=st.integers(1, 5000))
    def take(self, end: int, choice: int, size: int) -> None:
        stream = self.pick(end, choice)
        if stream is None or stream.target is not None:
            return
        self.settle(end, stream)
        taken = take(self.pair.ends[end].core, stream, min(size, stream.buffered))
        self.read.setdefault((end, stream.id), bytearray()).extend(taken)

    @rule(end=st.integers(0, 1), choice=st.integers(0, 9), size=st.integers(1, 20_000))
    def expect(self, end: int, choice: int, size: int) -> None:
        stream = self.pick(end, choice)
        if stream is None or stream.target is not None or stream.receive is not Receive.OPEN:
            return
        self.settle(end, stream)
        target = bytearray(size)
        if self.pair.ends[end].core.expect(stream, memoryview(target)):
            self.read.setdefault((end, stream.id), bytearray()).extend(target)
        else:
            self.targets[end, stream.id] = target

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
            assert self.written.get((1 - end, stream_id), b"").startswith(read)

    @invariant()
    def credit_is_kept(self) -> None:
        """Nobody has sent more than the other end granted, and the two ends' books agree."""
        if not hasattr(self, "pair"):
            return
        for index, end in enumerate(self.pair.ends):
            other = self.pair.ends[1 - index].core
            core = end.core
            assert core.sent <= core.send_limit <= other.window.limit
            assert other.received <= core.sent
            assert 0 <= core.consumed <= core.received <= core.window.limit
            for stream in core.streams.values():
                assert stream.sent <= stream.send_limit
                assert stream.queued == sum(map(len, stream.outbox))
                assert stream.buffered == sum(map(len, stream.chunks)) - stream.skip
                assert stream.received <= stream.window.limit

    def teardown(self) -> None:
        """Left alone, everything that was written and not given up is read, and credit comes back."""
        if not hasattr(self, "pair"):
            return
        for _ in range(200):
            self.pair.drive(self.now)
            for index, end in enumerate(self.pair.ends):
                for stream in list(end.core.streams.values()):
                    self.settle(index, stream)
                    if stream.target is None and stream.buffered:
                        self.read.setdefault((index, stream.id), bytearray()).extend(read_all(end, stream))
        for index, end in enumerate(self.pair.ends):
            other = self.pair.ends[1 - index].core
            assert end.core.sent == other.received
            for stream in end.core.streams.values():
                assert not stream.buffered
                assert stream.send is not Send.OPEN or not stream.queued
        self.what_is_read_is_what_was_written()


TestTalk = Talk.TestCase
TestTalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
