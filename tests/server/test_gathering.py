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
    for gathering in (taught(0.9), taught(5.0), Gathering()):
        gathering.answered("a", 10.0)
        assert gathering.wait_s(10.0) == 0


def test_who_has_left_is_not_waited_for() -> None:
    gathering = taught(0.1)
    gathering.answered("a", 10.0)
    gathering.left("a")
    assert gathering.wait_s(10.0) == 0


def test_who_cannot_share_the_pass_is_not_waited_for() -> None:
    """Decode steps wait for those of their blocks and adapter; what takes long lets all go first."""
    gathering = taught(0.1)
    gathering.answered("a", 10.0, "these blocks")
    assert gathering.wait_s(10.0, "other blocks") == 0
    assert gathering.wait_s(10.0, "these blocks") > 0
    assert gathering.wait_s(10.0, None) > 0


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


def passes_of(away_s: dict[str, float], first_s: dict[str, float], n_passes: int = 20) -> list[int]:
    """How many of some sessions share each pass of 1 s: they first come at `first_s`, and come back
    `away_s` after their answers."""
    gathering = Gathering()
    arrivals = dict(first_s)
    waiting: set[str] = set()
    now_s, passes = 0.0, []
    for _ in range(n_passes):
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
        gathering.began()
        now_s += 1.0
        gathering.passed(1.0)
        for session in waiting:
            gathering.answered(session, now_s)
            arrivals[session] = now_s + away_s[session]
        waiting = set()
    return passes


def test_two_sessions_that_alternated_share_every_pass() -> None:
    assert passes_of({"a": 0.1, "b": 0.1}, {"a": 0.0, "b": 0.5})[-10:] == [2] * 10


def test_eight_that_come_back_one_after_the_other_share_every_pass() -> None:
    """One process answers them in turn, so that the last is back after more than half a pass."""
    away_s = {name: 0.08 * (number + 1) for number, name in enumerate("abcdefgh")}
    passes = passes_of(away_s, {name: 0.01 * number for number, name in enumerate("abcdefgh")})
    assert passes[0] == 1, "nobody is known when the first one comes"
    assert passes[-10:] == [8] * 10


def test_one_that_stays_away_longer_than_a_pass_holds_nobody_up() -> None:
    """The near two go on without it, at their own pace."""
    passes = passes_of({"a": 0.1, "b": 0.1, "far": 1.6}, {"a": 0.0, "b": 0.5, "far": 0.2}, 60)
    assert passes.count(1) <= 2
    assert sum(passes) / 60 > 2.2, "every third pass has all three"


def test_a_pause_is_soon_forgotten() -> None:
    gathering = taught(0.1)
    for now_s, away_s in ((10.0, 300.0), (400.0, 0.1)):
        gathering.answered("a", now_s)
        gathering.came("a", now_s + away_s)
    gathering.answered("a", 500.0)
    assert gathering.wait_s(500.0) > 0
