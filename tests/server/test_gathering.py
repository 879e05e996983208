"""Waiting for sessions that are about to come back: only for those, only a moment, and it packs them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalite.server.gathering import SHARE, Gathering


def taught(away_s: float, pass_s: float = 1.0) -> Gathering:
    """It knows a session that comes back after `away_s`, and passes of `pass_s`."""
    gathering = Gathering()
    gathering.passed(pass_s)
    gathering.answered("a", 0.0)
    gathering.came("a", away_s)
    return gathering


def test_a_session_that_comes_back_at_once_is_waited_for() -> None:
    gathering = taught(0.1)
    gathering.answered("a", 10.0)
    assert 0 < gathering.wait_s(10.0) <= SHARE
    gathering.came("a", 10.08)
    assert gathering.wait_s(10.08) == 0


def test_who_stays_away_is_not_waited_for() -> None:
    for gathering in (taught(0.5), Gathering()):
        gathering.answered("a", 10.0)
        assert gathering.wait_s(10.0) == 0


def test_who_has_left_is_not_waited_for() -> None:
    gathering = taught(0.1)
    gathering.answered("a", 10.0)
    gathering.left("a")
    assert gathering.wait_s(10.0) == 0


def test_a_session_alone_never_waits() -> None:
    """Its own step is what is there to do."""
    gathering = taught(0.1)
    gathering.answered("a", 10.0)
    gathering.came("a", 10.1)
    assert gathering.wait_s(10.1) == 0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.3)), max_size=30),
    st.floats(0.01, 2),
    st.floats(0, 2),
)
def test_no_pass_waits_longer_than_its_share(
    visits: list[tuple[int, float]], pass_s: float, later_s: float
) -> None:
    """Whatever sessions did before, from the first moment that there was something to do."""
    gathering, now_s = Gathering(), 0.0
    gathering.passed(pass_s)
    for session, away_s in visits:
        gathering.answered(session, now_s)
        now_s += away_s
        gathering.came(session, now_s)
    for session in range(6):
        gathering.answered(session, now_s)
    first = gathering.wait_s(now_s)
    assert 0 <= first <= SHARE * pass_s + 1e-9
    assert gathering.wait_s(now_s + later_s) <= max(0.0, SHARE * pass_s - later_s) + 1e-9


def test_two_sessions_that_alternated_share_every_pass() -> None:
    """Passes of 1 s, two sessions that come back 0.1 s after their answers, out of step at first."""
    gathering = Gathering()
    arrivals = {"a": 0.0, "b": 0.5}  # when each one's next step comes
    waiting: set[str] = set()
    now_s, passes = 0.0, []
    for _ in range(20):
        now_s = max(now_s, min(arrivals.values(), default=now_s)) if not waiting else now_s
        while True:
            for session in [session for session, at_s in arrivals.items() if at_s <= now_s]:
                gathering.came(session, arrivals.pop(session))
                waiting.add(session)
            wait_s = gathering.wait_s(now_s)
            if wait_s <= 0:
                break
            now_s = min([now_s + wait_s, *arrivals.values()])
        passes.append(len(waiting))
        now_s += 1.0
        gathering.passed(1.0)
        for session in waiting:
            gathering.answered(session, now_s)
            arrivals[session] = now_s + 0.1
        waiting = set()
    assert passes[-10:] == [2] * 10
