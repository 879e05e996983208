"""Which servers a session is given, by what they say of themselves and what was measured."""

from __future__ import annotations

import asyncio
import collections
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from petalite.client.outlook import LEAVING_S, Outlook
from petalite.client.settings import RING, ROUTES, Routing
from petalite.errors import ShuttingDown
from petalite.net.identity import PeerId
from petalite.sim import loop
from petalite.swarm.bans import Bans
from petalite.swarm.directory import ServerEntry
from petalite.swarm.records import LinkTo, ServerRecord
from petalite.swarm.routing import Hop
from petalite.swarm.spans import Span
from tests.client.fakes import peer

WHOLE = Span(0, 4)
PLAIN = ServerRecord(0, 4, (), "float32", "none", 1.0, 1000, "0")
TOKEN_BYTES = 4096


def links(bytes_per_s: float) -> tuple[LinkTo, ...]:
    return (LinkTo(peer(99), 1.0, bytes_per_s),)


def outlook(records: dict[int, ServerRecord], rtt_s: dict[int, float], route: str = RING) -> Outlook:
    entries = [ServerEntry(peer(number), record) for number, record in records.items()]
    known = {peer(number): seconds for number, seconds in rtt_s.items()}
    host: Any = SimpleNamespace(rtt_s=known.get, book=SimpleNamespace(add=lambda who, where: None))
    directory: Any = SimpleNamespace(servers=entries)
    return Outlook(host, directory, Bans(), Routing(route), TOKEN_BYTES)


def chosen(view: Outlook, replayed_tokens: int = 0) -> PeerId:
    async def main() -> PeerId:
        [hop] = view.chain(WHOLE, replayed_tokens)
        return hop.peer

    return loop.run(main())


@pytest.mark.parametrize("route", ROUTES)
def test_a_short_prompt_takes_the_near_server_and_a_long_replay_the_wide_link(route: str) -> None:
    records = {1: replace(PLAIN, links=links(1e5)), 2: replace(PLAIN, links=links(1e8))}
    view = outlook(records, {1: 0.005, 2: 0.4}, route)
    assert chosen(view) == peer(1)
    assert chosen(view, 10_000) == peer(2)


def test_a_long_replay_takes_the_server_that_is_fast_at_prefills() -> None:
    """One computes a token at once in 1 ms, many in 1 ms each; the other in 2 ms, and 0.01 ms each."""
    records = {1: replace(PLAIN, prefill_ms=1.0), 2: replace(PLAIN, block_ms=2.0, prefill_ms=0.01)}
    view = outlook(records, {1: 0.01, 2: 0.01})
    assert chosen(view, 10) == peer(1)
    assert chosen(view, 5000) == peer(2)


def test_a_queue_is_waited_for_once() -> None:
    busy = replace(PLAIN, waiting_tokens=500, tokens_per_s=100.0)
    assert chosen(outlook({1: busy, 2: replace(PLAIN, block_ms=3.0)}, {1: 0.01, 2: 0.01})) == peer(2)


def test_a_server_behind_a_relay_is_used_where_nobody_else_is() -> None:
    address = f"/ip4/192.0.2.1/tcp/1/p2p/{peer(50)}/p2p-circuit/p2p/{peer(2)}"
    records = {1: replace(PLAIN, block_ms=1.2), 2: replace(PLAIN, addresses=(address,))}
    assert chosen(outlook(records, {})) == peer(1)
    assert chosen(outlook({2: records[2]}, {})) == peer(2)


def test_equal_clients_spread_over_equal_servers() -> None:
    view = outlook({1: PLAIN, 2: PLAIN, 3: PLAIN}, {})
    counts = collections.Counter(chosen(view) for _ in range(300))
    assert len(counts) == 3 and min(counts.values()) > 50


def test_a_change_has_to_pay_for_its_replay() -> None:
    """Three times as fast: worth it with a short history, and not with one that takes longer to send than the
    steps ahead save."""
    fast = replace(PLAIN, block_ms=5.0, prefill_ms=0.1, links=links(1e6))
    view = outlook({1: replace(PLAIN, block_ms=15.0), 2: fast}, {1: 0.001, 2: 0.001})

    async def main(history: int) -> bool:
        return view.is_much_better_than([Hop(peer(1), WHOLE)], history)

    assert loop.run(main(20))
    assert not loop.run(main(2000))


def test_who_left_long_ago_is_forgotten() -> None:
    view = outlook(dict.fromkeys(range(8), PLAIN), {})

    async def main() -> None:
        for number in range(8):
            view.failed(peer(number), ShuttingDown("it leaves"))
            await asyncio.sleep(LEAVING_S / 2)
        assert len(view._leaving) <= 2

    loop.run(main())
