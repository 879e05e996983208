"""Bans grow by doubling, run out, and are forgotten; no clock is read."""

from __future__ import annotations

from petalite.net.identity import PeerId
from petalite.swarm.bans import PENALTY_S, Bans, BanSettings

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


def test_each_failure_doubles_the_ban_up_to_the_longest() -> None:
    bans = Bans(BanSettings(first_s=10, longest_s=70))
    assert [bans.failed(A, now_s=0.0) for _ in range(5)] == [10, 20, 40, 70, 70]


def test_a_ban_is_a_penalty_that_runs_out() -> None:
    bans = Bans(BanSettings(first_s=10))
    bans.failed(A, now_s=100.0)
    assert bans.penalty_s(A, 109.9) == PENALTY_S
    assert bans.penalty_s(A, 110.0) == 0.0
    assert bans.penalty_s(B, 100.0) == 0.0


def test_among_banned_peers_the_one_that_failed_less_is_preferred() -> None:
    bans = Bans()
    bans.failed(A, 0.0)
    bans.failed(B, 0.0)
    bans.failed(B, 0.0)
    assert bans.penalty_s(A, 1.0) < bans.penalty_s(B, 1.0)


def test_success_and_time_forget() -> None:
    bans = Bans(BanSettings(first_s=10, longest_s=20))
    bans.failed(A, 0.0)
    bans.succeeded(A)
    assert bans.failed(A, 1.0) == 10
    bans.failed(B, 0.0)
    assert bans.failed(B, 100.0) == 10, "thirty seconds of good behaviour after the ban start anew"
