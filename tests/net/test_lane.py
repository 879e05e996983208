"""Lanes: records cut anywhere on their way, and memory that is given out again only when it is free."""

from __future__ import annotations

import gc

from petalite.net.lane import POOL_BYTES, POOLED_BYTES, BufferPool


def test_pooled_memory_is_not_given_out_while_anybody_refers_to_it() -> None:
    """A view, a slice of it or a cast of that: each alone keeps the memory taken."""
    pool = BufferPool()
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
    pool = BufferPool()
    views = [pool.take(POOL_BYTES // 4) for _ in range(6)]
    assert pool._kept_bytes == POOL_BYTES
    assert len(pool.take(POOL_BYTES + 1)) == POOL_BYTES + 1
    pool.trim(float("inf"))
    assert pool._kept_bytes == 0
    assert not pool._kept
    assert len({id(view.obj) for view in views}) == 6
