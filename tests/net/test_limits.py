"""The gate's arithmetic: budgets, rates, blame that fades, and whose handshake makes room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import ErrorCode
from petalite.net.limits import (
    BAN_SCORE,
    HALF_LIFE_S,
    VIOLATION,
    Budget,
    Gate,
    Limits,
    Reputation,
    TokenBucket,
    prefix_of,
)
from petalite.net.multiaddr import Multiaddr


def place(ip: str) -> Multiaddr:
    return Multiaddr("ip6" if ":" in ip else "ip4", ip, 1)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("1.2.3.4", "1.2.3.4", True),
        ("1.2.3.4", "1.2.3.5", False),
        ("2001:db8:1:2ff::1", "2001:db8:1:201::9", True),  # one /56
        ("2001:db8:1:2ff::1", "2001:db8:1:300::1", False),
        ("::ffff:1.2.3.4", "1.2.3.4", True),
    ],
)
def test_prefixes(first: str, second: str, same: bool) -> None:
    assert (prefix_of(place(first)) == prefix_of(place(second))) is same


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_exempt(text: str) -> None:
    assert prefix_of(place(text)) is None


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.5, 10), st.integers(1, 10))
def test_a_bucket_lets_through_its_burst_and_its_rate_and_no_more(
    gaps: list[float], rate: float, burst: int
) -> None:
    bucket, now, taken = TokenBucket(rate, burst, 0.0), 0.0, 0
    for gap in gaps:
        now += gap
        taken += bucket.take(now)
        assert taken <= burst + rate * now + 1e-6


def test_a_budget_is_part_of_its_parents() -> None:
    whole = Budget(100)
    parts = [Budget(70, whole), Budget(70, whole)]
    assert parts[0].reserve(60)
    assert not parts[0].reserve(11)
    assert not parts[1].reserve(41)
    assert parts[1].used == 0
    assert parts[1].reserve(40)
    parts[0].release(60)
    assert whole.used == 40


def test_a_ban_fades() -> None:
    """In the time that is stated; and a second violation weighs more than the first."""
    reputation = Reputation()
    reputation.blame("peer", VIOLATION, 0.0)
    ban_s = reputation.ban_s("peer", 0.0)
    assert ban_s == pytest.approx(HALF_LIFE_S)
    assert reputation.ban_s("peer", ban_s - 1)
    assert not reputation.ban_s("peer", ban_s + 1)
    reputation.blame("peer", VIOLATION, ban_s)
    assert reputation.ban_s("peer", ban_s) > HALF_LIFE_S
    assert not reputation.ban_s("other", 0.0)
    reputation.blame(None, 1e9, 0.0)
    assert not reputation.ban_s(None, 0.0)
    reputation.blame("mild", BAN_SCORE, 0.0)
    assert not reputation.ban_s("mild", 0.0)


def test_what_is_remembered_has_a_bound() -> None:
    reputation, gate = Reputation(), Gate(Limits())
    for number in range(10_000):
        reputation.blame(number, 1.0, 0.0)
        gate.knock(number, 0.0)
    assert len(reputation._scores) <= 4096
    assert len(gate._rates) <= 4096


def test_the_oldest_handshake_of_whoever_has_most_makes_room() -> None:
    """So a flood from one address ends its own, and never a stranger's."""
    gate = Gate(Limits(handshakes=6, handshakes_per_prefix=99))
    for token in range(5):
        assert gate.begin_handshake(token, "flood") is None
    assert gate.begin_handshake("good", "friend") is None
    assert [gate.begin_handshake(token, "flood") for token in range(5, 9)] == [0, 1, 2, 3]
    assert gate.begin_handshake("better", "friend") == 4
    gate.end_handshake("good")
    assert gate.begin_handshake(9, "flood") is None


def test_one_prefix_has_only_so_many_handshakes_and_connections() -> None:
    gate = Gate(Limits(handshakes_per_prefix=2, connections=4, connections_per_prefix=2))
    for token in range(2):
        assert gate.knock("a", 0.0) is ErrorCode.OK
        gate.begin_handshake(token, "a")
    assert gate.knock("a", 0.0) is ErrorCode.RESOURCE_LIMIT
    assert gate.knock("b", 0.0) is ErrorCode.OK
    assert [gate.enter("a") for _ in range(3)] == [True, True, False]
    assert [gate.enter(None) for _ in range(3)] == [True, True, False]
    gate.leave("a")
    assert gate.enter("b")


def test_knocking_too_fast_and_banned() -> None:
    gate = Gate(Limits(new_per_prefix_s=1.0))
    codes = [gate.knock("a", 0.0) for _ in range(11)]
    assert codes == [ErrorCode.OK] * 10 + [ErrorCode.RATE_LIMITED]
    assert gate.knock("a", 1.5) is ErrorCode.OK
    gate.reputation.blame("a", VIOLATION, 2.0)
    assert gate.knock("a", 2.0) is ErrorCode.BANNED
    assert all(gate.knock(None, 0.0) is ErrorCode.OK for _ in range(1000))
