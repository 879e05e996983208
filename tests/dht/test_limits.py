"""Checked against the token bucket's definition: never more than burst + rate × time in any interval."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalite.dht.limits import RateLimiter


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), max_size=60))
def test_no_interval_lets_more_through(steps: list[tuple[float, int]]):
    limiter = RateLimiter(per_s=5.0, burst=20.0, remembered=10)
    now_s, allowed = 0.0, []
    for pause_s, cost in steps:
        now_s += pause_s
        if limiter.allow("peer", cost, now_s):
            allowed.append((now_s, cost))
    for i, (start_s, _) in enumerate(allowed):
        for j in range(i, len(allowed)):
            taken = sum(cost for _, cost in allowed[i : j + 1])
            assert taken <= 20.0 + 5.0 * (allowed[j][0] - start_s) + 1e-6


def test_callers_do_not_share_and_memory_is_bounded():
    limiter = RateLimiter(per_s=1.0, burst=1.0, remembered=3)
    assert all(limiter.allow(caller, 1, 0.0) for caller in range(10))
    assert not limiter.allow(9, 1, 0.0)
    assert len(limiter._tokens) == 3
