"""The KV cache's verbs against a plain record of what each row was fed, and its memory against arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from petalite.errors import (
    BadMessage,
    InvalidArgument,
    PetaliteError,
    SessionGap,
    SessionLimit,
    UnknownSession,
    WrongSpan,
)
from petalite.kernels import native
from petalite.kernels.native.span import NativeSpan
from petalite.model.cache import Segment
from petalite.model.checkpoint import Checkpoint
from petalite.model.span import BlockSpan, load_span
from tests.helpers.checkpoints import tiny_llama

TOKEN_BYTES = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16, float32; per block
MAX_LENGTH = 100


@pytest.fixture(scope="module", params=["native", "python"])
def span(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    """Steps that run in one native call, and block by block."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no native kernels are built, or torch's are forced")
    span = load_span(Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("cache"))), 0, 3)
    if request.param == "python":
        span._native = None
    return span


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class CacheMachine(RuleBasedStateMachine):
    """Any order of steps, forks, truncations and drops: what comes out is what a fresh sequence gives."""

    span: BlockSpan

    @initialize()
    def begin(self) -> None:
        self.cache = self.span.new_cache()
        self.fed: dict[int, Tensor] = {}  # what each row holds
        self.seed = 0

    def noise(self, count: int) -> Tensor:
        self.seed += 1
        return tokens(count, self.seed)

    @precondition(lambda self: len(self.fed) < 4)
    @rule()
    def open_row(self) -> None:
        self.fed[self.cache.open_row(MAX_LENGTH)] = torch.zeros(0, 64)

    @precondition(lambda self: self.fed)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Some rows, each at its end or rolled back, one token or many."""
        rows = data.draw(st.lists(st.sampled_from(sorted(self.fed)), min_size=1, unique=True))
        segments, parts = [], []
        for row in rows:
            position = data.draw(st.integers(0, len(self.fed[row])))
            room = MAX_LENGTH - position
            if room:
                count = data.draw(st.integers(1, min(room, 40)))
                segments.append(Segment(row, position, count))
                parts.append(self.noise(count))
        if not segments:
            return
        output = self.span.forward(torch.cat(parts), segments, self.cache)
        for segment, part, result in zip(
            segments, parts, output.split([s.n_tokens for s in segments]), strict=True
        ):
            self.fed[segment.row] = torch.cat((self.fed[segment.row][: segment.position], part))
            whole = self.span.forward_stateless(self.fed[segment.row].unsqueeze(0))[0]
            close(result, whole[segment.position :])

    @precondition(lambda self: self.fed)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.fed)))
        length = data.draw(st.integers(0, len(self.fed[row])))
        self.cache.truncate(row, length)
        self.fed[row] = self.fed[row][:length]

    @precondition(lambda self: 0 < len(self.fed) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.fed)))
        self.fed[self.cache.fork(row)] = self.fed[row]

    @precondition(lambda self: len(self.fed) > 1)
    @rule(data=st.data())
    def fork_onto(self, data: st.DataObject) -> None:
        source, target, *_ = data.draw(st.permutations(sorted(self.fed)))
        self.cache.fork_onto(source, target)
        self.fed[target] = self.fed[source]

    @precondition(lambda self: self.fed)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.fed)))
        self.cache.drop(row)
        del self.fed[row]

    @precondition(lambda self: self.fed)
    @rule(data=st.data(), wrong=st.sampled_from(["gap", "limit", "unknown", "twice", "empty", "span"]))
    def refused(self, data: st.DataObject, wrong: str) -> None:
        """A step with one bad segment is refused whole; the good one beside it leaves nothing behind."""
        row = data.draw(st.sampled_from(sorted(self.fed)))
        length = len(self.fed[row])
        bad = {
            "gap": Segment(row, length + 1, 1),
            "limit": Segment(row, length, MAX_LENGTH + 1),
            "unknown": Segment(10_000, 0, 1),
            "twice": Segment(row, 0, 1),
            "empty": Segment(row, 0, 0),
            "span": Segment(row, 0, 1),
        }[wrong]
        others = [r for r in sorted(self.fed) if r != row][:1]
        segments = [Segment(other, 0, 1) for other in others] + [bad]
        if wrong == "twice":
            segments.append(bad)
        count = sum(segment.n_tokens for segment in segments)
        if not count:
            return
        with pytest.raises(PetaliteError):
            self.span.forward(tokens(count), segments, self.cache, start=1 if wrong == "span" else None)

    @invariant()
    def lengths_and_memory_agree(self) -> None:
        if not hasattr(self, "fed"):
            return
        assert self.cache.rows == len(self.fed)
        for row, fed in self.fed.items():
            assert self.cache.length(row) == len(fed)
        assert self.cache.reserved_bytes == len(self.fed) * MAX_LENGTH * 3 * TOKEN_BYTES


def test_rows_in_any_order(span: BlockSpan) -> None:
    machine = type("Machine", (CacheMachine,), {"span": span})
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
    case("runTest").runTest()


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory"
)
def test_memory_follows_use(span: BlockSpan) -> None:
    """64 rows are promised 50 MB each. What they take is as many tokens as they have, in whole pages for each
    head; and all of it goes back with them.
    """
    cache, hidden = span.new_cache(), tokens(300)
    first = cache.open_row(1 << 16)
    outputs = [
        span.forward(hidden[start : start + 20], [Segment(first, start, 20)], cache)
        for start in range(0, 300, 20)
    ]
    close(torch.cat(outputs), span.forward_stateless(hidden.unsqueeze(0))[0])
    before = resident_bytes()
    rows = [cache.fork(first) for _ in range(64)]
    assert cache.reserved_bytes == 65 * (1 << 16) * 3 * TOKEN_BYTES
    taken = resident_bytes() - before
    page_tokens = 4096 // (16 * 4)
    used = 300 * 3 * TOKEN_BYTES * len(rows)
    assert used - SLACK_BYTES <= taken <= used * (300 + page_tokens) / 300 + SLACK_BYTES
    for row in rows:
        cache.drop(row)
    assert resident_bytes() - before <= SLACK_BYTES


SLACK_BYTES = 2 << 20  # of the rest of the process; a seventh of what the rows take


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_row_never_outgrows_its_promise(span: BlockSpan) -> None:
    cache = span.new_cache()
    row = cache.open_row(70)
    span.forward(tokens(69), [Segment(row, 0, 69)], cache)
    span.forward(tokens(1), [Segment(row, 69, 1)], cache)
    assert cache.reserved_bytes == 70 * 3 * TOKEN_BYTES == cache.row_bytes(70)
    with pytest.raises(SessionLimit, match="opened for 70"):
        span.forward(tokens(1), [Segment(row, 70, 1)], cache)


def test_a_fork_goes_its_own_way(span: BlockSpan) -> None:
    cache = span.new_cache()
    first = cache.open_row(64)
    start, left, right = tokens(10), tokens(5, 1), tokens(5, 2)
    span.forward(start, [Segment(first, 0, 10)], cache)
    second = cache.fork(first)
    output = span.forward(torch.cat((left, right)), [Segment(first, 10, 5), Segment(second, 10, 5)], cache)
    for result, own in zip(output.split(5), (left, right), strict=True):
        close(result, span.forward_stateless(torch.cat((start, own)).unsqueeze(0))[0, 10:])
    empty = cache.fork(cache.open_row(8))
    assert cache.length(empty) == 0


def test_a_step_that_fails_midway_can_be_sent_again(span: BlockSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = span.new_cache()
    row, other = cache.open_row(64), cache.open_row(64)
    start, more = tokens(20), tokens(6, 1)
    span.forward(torch.cat((start, start)), [Segment(row, 0, 20), Segment(other, 0, 20)], cache)
    rolled_back = [Segment(row, 20, 3), Segment(other, 15, 3)]

    def fails(*args: object) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        if span._native is None:
            patch.setattr(type(span._blocks[2]), "__call__", half_way(span, fails))
        else:
            patch.setattr(NativeSpan, "step", then(NativeSpan.step, fails))
        with pytest.raises(RuntimeError):
            span.forward(more, rolled_back, cache)
    assert cache.length(row) == 20
    assert cache.length(other) == 15  # rolled back first, as the step asked
    output = span.forward(more, rolled_back, cache)
    close(output[:3], span.forward_stateless(torch.cat((start, more[:3])).unsqueeze(0))[0, 20:])
    close(output[3:], span.forward_stateless(torch.cat((start[:15], more[3:])).unsqueeze(0))[0, 15:])


def half_way(span: BlockSpan, fails):
    whole = type(span._blocks[0]).__call__

    def call(block, hidden, step):
        return fails() if block.index == 2 else whole(block, hidden, step)

    return call


def then(whole, fails):
    def call(*args):
        whole(*args)  # the worst of moments: everything was written
        fails()

    return call


def test_a_row_that_the_system_has_no_memory_for(span: BlockSpan) -> None:
    """More than a process has addresses for: nothing is opened, and the cache goes on."""
    cache = span.new_cache()
    with pytest.raises(MemoryError, match="addresses"):
        cache.open_row(1 << 50)
    assert cache.rows == 0
    span.forward(tokens(3), [Segment(cache.open_row(8), 0, 3)], cache)


def test_rows_over_a_part_of_the_span(span: BlockSpan) -> None:
    cache = span.new_cache()
    row = cache.open_row(64, 1, 3)
    assert cache.reserved_bytes == 64 * 2 * TOKEN_BYTES
    with pytest.raises(WrongSpan, match="row 0 caches blocks 1:3, the step is over 0:3"):
        span.forward(tokens(2), [Segment(row, 0, 2)], cache)
    span.forward(tokens(2), [Segment(row, 0, 2)], cache, start=1)
    assert cache.length(row) == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda cache: cache.open_row(0), InvalidArgument),
        (lambda cache: cache.open_row(8, 2, 2), WrongSpan),
        (lambda cache: cache.open_row(8, 0, 4), WrongSpan),
        (lambda cache: cache.length(7), UnknownSession),
        (lambda cache: cache.drop(7), UnknownSession),
        (lambda cache: cache.fork(7), UnknownSession),
        (lambda cache: cache.truncate(cache.open_row(8), 1), SessionGap),
        (lambda cache: cache.truncate(cache.open_row(8), -1), SessionGap),
    ],
)
def test_refusals(span: BlockSpan, call, error) -> None:
    with pytest.raises(error):
        call(span.new_cache())


def test_a_step_without_segments(span: BlockSpan) -> None:
    cache = span.new_cache()
    with pytest.raises(BadMessage), cache.step([], 0, 3):
        pass


def test_places_are_where_tokens_lie(span: BlockSpan) -> None:
    """Counted from the model's block 0, wherever a row begins."""
    cache = span.new_cache()
    whole, part = cache.open_row(10), cache.open_row(7, 1, 3)
    for row, start, end, position in ((whole, 0, 3, 4), (part, 1, 3, 2)):
        span.forward(tokens(position), [Segment(row, 0, position)], cache, start=start, end=end)
        with cache.step([Segment(row, position, 2)], start, end) as step:
            places = step.places()
        capacity = cache.max_length(row)
        assert [place[1:] for place in places] == [(capacity, position), (capacity, position + 1)]
        (origin,) = {place[0] for place in places}
        for block in range(start, end):
            address = origin + block * capacity * TOKEN_BYTES
            assert address == cache._row(row).blocks[block - start].data_ptr()


def test_row_numbers_are_never_used_twice(span: BlockSpan) -> None:
    cache = span.new_cache()
    first = cache.open_row(8)
    cache.drop(first)
    assert cache.open_row(8) != first


def test_the_file_may_go_once_loaded(tmp_path: Path) -> None:
    """Blocks own their weights: nothing is read from the folder after loading."""
    folder = tiny_llama(tmp_path)
    loaded = load_span(Checkpoint.open(folder), 0, 1)
    before = loaded.forward_stateless(tokens(3).unsqueeze(0))
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded.forward_stateless(tokens(3).unsqueeze(0)), before)
