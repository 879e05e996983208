"""The scheduler: what may share a pass, how long a pass may be, who goes first, and that nobody waits for
ever.
"""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from petalite.server.scheduler import Kind, Part, Request, Scheduler, SchedulerSettings

SPAN, OTHER = (0, 8), (8, 16)


def request(
    work: str, kind: Kind = Kind.DECODE, n_tokens: int = 1, group: object = SPAN, peer: str = ""
) -> Request[str]:
    return Request(work, kind, group, peer or work, n_tokens)


def served(parts: list[Part[str]]) -> dict[str, int]:
    return {part.request.work: part.n_tokens for part in parts}


def test_decode_steps_of_one_span_share_a_pass() -> None:
    scheduler: Scheduler[str] = Scheduler()
    for work in "abc":
        scheduler.add(request(work))
    scheduler.add(request("d", group=OTHER))
    assert served(scheduler.next_batch()) == {"a": 1, "b": 1, "c": 1}
    assert served(scheduler.next_batch()) == {"d": 1}
    assert scheduler.next_batch() == []


def test_what_the_next_pass_decodes() -> None:
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(prefill_patience=1))
    assert scheduler.decoding is None
    scheduler.add(request("long", Kind.PREFILL, 64))
    assert scheduler.decoding is None
    scheduler.add(request("a", group=OTHER))
    assert scheduler.decoding == OTHER
    for expected in ({"a": 1}, {"long": 16}):
        assert served(scheduler.next_batch()) == expected
    assert scheduler.decoding is None


def test_a_prefill_lets_decode_steps_pass_but_not_for_ever() -> None:
    """With a decode step always ready, a chunk comes every patience + 1 passes, and the steps ride in it."""
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(least_chunk_tokens=8, prefill_patience=3))
    scheduler.add(request("long", Kind.PREFILL, 24))
    chunks = []
    for number in range(16):
        scheduler.add(request(f"step {number}"))
        batch = served(scheduler.next_batch())
        assert batch[f"step {number}"] == 1
        if "long" in batch:
            assert batch["long"] == 8
            chunks.append(number)
    assert [b - a for a, b in itertools.pairwise(chunks)] == [4, 4]


def test_nothing_waits_when_nothing_else_is_there() -> None:
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(least_chunk_tokens=8))
    scheduler.add(request("long", Kind.PREFILL, 20))
    assert [served(scheduler.next_batch()) for _ in range(3)] == [{"long": 8}, {"long": 8}, {"long": 4}]
    scheduler.add(request("train", Kind.TRAINING, 2))
    assert [served(scheduler.next_batch()) for _ in range(3)] == [{"train": 1}, {"train": 1}, {}]


def test_training_comes_last_and_alone() -> None:
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(training_patience=2))
    scheduler.add(request("train", Kind.TRAINING, 2))
    order = []
    for number in range(7):
        scheduler.add(request(f"step {number}"))
        order.append(served(scheduler.next_batch()))
    assert order[:4] == [{"step 0": 1}, {"step 1": 1}, {"train": 1}, {"step 2": 1, "step 3": 1}]
    assert order[4:] == [{"step 4": 1}, {"train": 1}, {"step 5": 1, "step 6": 1}]


def test_however_much_trains_it_has_one_turn_before_the_others_go() -> None:
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(training_patience=2))
    for number in range(8):
        scheduler.add(request(f"train {number}", Kind.TRAINING, 5, peer=number))
    for _ in range(10):
        scheduler.next_batch()
    for number in range(2):
        scheduler.add(request(f"step {number}"))
        assert served(scheduler.next_batch()) == {f"step {number}": 1}


def test_training_takes_turns_by_peer() -> None:
    """One peer's eight calls get as many turns as the other's one; each peer's calls go one by one."""
    scheduler: Scheduler[str] = Scheduler()
    for number in range(8):
        scheduler.add(request(f"greedy {number}", Kind.TRAINING, 3, peer="greedy"))
    scheduler.add(request("modest", Kind.TRAINING, 3, peer="modest"))
    order = [name for _ in range(9) for name in served(scheduler.next_batch())]
    assert order[:6] == ["greedy 0", "modest"] * 3
    assert order[6:] == ["greedy 1"] * 3
    assert scheduler.waiting_tokens == 0


def test_a_peer_that_asks_for_much_delays_itself() -> None:
    """Ten prefills of one peer came first; the other's, which came last, is among the first two chunks."""
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(least_chunk_tokens=8))
    for number in range(10):
        scheduler.add(request(f"greedy {number}", Kind.PREFILL, 8, peer="greedy"))
    scheduler.add(request("modest", Kind.PREFILL, 8))
    assert "modest" in served(scheduler.next_batch()) | served(scheduler.next_batch())


def test_the_pass_budget_holds_and_a_step_is_never_cut() -> None:
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(pass_tokens=16))
    for work, n_tokens in (("a", 10), ("b", 10), ("c", 6)):
        scheduler.add(request(work, n_tokens=n_tokens))
    assert served(scheduler.next_batch()) == {"a": 10, "c": 6}
    assert served(scheduler.next_batch()) == {"b": 10}


def test_chunks_follow_the_measured_speed() -> None:
    """At 1 ms a token a chunk for 100 ms has some 90 tokens; a device ten times slower gets a tenth, and none
    less than sixteen.
    """
    scheduler: Scheduler[str] = Scheduler(SchedulerSettings(target_s=0.1))
    for token_s, expected in ((0.001, 92), (0.01, 16)):
        for _ in range(20):
            scheduler.add(request("long", Kind.PREFILL, 64))
            batch = scheduler.next_batch()
            while batch:
                scheduler.observe(batch, token_s * sum(part.n_tokens for part in batch))
                batch = scheduler.next_batch()
        assert 0.95 * expected <= scheduler.chunk_tokens <= expected
    scheduler = Scheduler(SchedulerSettings(target_s=0.1), token_s=0.001)
    scheduler.observe([Part(request("step"), 1)], 9.0)
    assert scheduler.chunk_tokens == 92, "decode steps say nothing about prefill"


def test_deadlines_and_removal() -> None:
    scheduler: Scheduler[str] = Scheduler()
    late = request("late")
    late.deadline_s = 5.0
    gone = request("gone")
    for one in (late, gone, request("stays")):
        scheduler.add(one)
    assert scheduler.expired(5.0) == []
    assert scheduler.expired(5.1) == [late]
    assert scheduler.remove(gone)
    assert not scheduler.remove(gone)
    assert served(scheduler.next_batch()) == {"stays": 1}


adds = st.tuples(
    st.sampled_from(list(Kind)),
    st.integers(1, 60),
    st.sampled_from([SPAN, OTHER, (0, 4)]),
    st.sampled_from("xyz"),
)


@given(st.lists(st.lists(adds, max_size=4), max_size=40))
def test_no_request_starves(arrivals: list[list[tuple[Kind, int, object, str]]]) -> None:
    """The bound of the module's first lines: begun by pass due + (requests due no later); all tokens once."""
    scheduler: Scheduler[int] = Scheduler(SchedulerSettings(least_chunk_tokens=8, pass_tokens=32))
    everything: list[Request[int]] = []
    first_due: dict[int, int] = {}
    begun: dict[int, int] = {}
    done: dict[int, int] = {}
    pending = iter(arrivals)
    while True:
        new = next(pending, None)
        for kind, n_tokens, group, peer in new or ():
            n_tokens = min(n_tokens, 16) if kind is Kind.DECODE else n_tokens
            one = Request(len(everything), kind, group, peer, n_tokens)
            scheduler.add(one)
            first_due[one.work] = one.due
            everything.append(one)
        batch = scheduler.next_batch()
        if not batch and new is None:
            break
        assert len({part.request.group for part in batch}) <= 1
        assert len(batch) == 1 or sum(part.n_tokens for part in batch) <= 32
        assert len(batch) == 1 or all(part.request.kind is not Kind.TRAINING for part in batch)
        for part in batch:
            begun.setdefault(part.request.work, scheduler.passes)
            done[part.request.work] = done.get(part.request.work, 0) + part.n_tokens
    wanted = [n for step in arrivals for n in step]
    assert len(begun) == len(wanted)
    turns = sum(n for kind, n, _, _ in wanted if kind is Kind.TRAINING)
    for one in everything:
        kind, n_tokens, _, _ = wanted[one.work]
        assert done[one.work] == (min(n_tokens, 16) if kind is Kind.DECODE else n_tokens)
        rivals = sum(due <= first_due[one.work] for due in first_due.values())
        if kind is Kind.TRAINING:  # others' turns, each of which lets everybody else go first
            rivals += (scheduler.settings.training_patience + 1) * turns
        assert begun[one.work] <= first_due[one.work] + rivals
