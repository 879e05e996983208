"""What a server's record may say, and what storing peers refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from petalite.errors import BadRecord
from petalite.net.identity import Identity
from petalite.net.schema import encode
from petalite.swarm.records import (
    MAX_LINKS,
    LinkTo,
    ServerRecord,
    check_server,
    pack,
    unpack,
)
from petalite.swarm.spans import Span

OWNER = Identity.from_seed(bytes(32)).peer_id
RECORD = ServerRecord(8, 12, (f"/ip4/1.2.3.4/tcp/5/p2p/{OWNER}",), "float32", "none", 1.0, 100, "0")
LINKS = tuple(LinkTo(Identity.from_seed(bytes([n]) * 32).peer_id, 1.5) for n in range(MAX_LINKS))


def check(value: bytes) -> None:
    check_server(OWNER, b"tiny@0/1", value)


def test_everything_said_comes_back() -> None:
    record = replace(
        RECORD, tokens_per_s=5.0, links=LINKS, serving=False, pinned=True, claim_start=0, claim_end=4
    )
    check(pack(record))
    assert unpack(ServerRecord, pack(record)) == record
    assert (record.span, record.claim, RECORD.claim) == (Span(8, 12), Span(0, 4), None)


def test_the_fullest_record_fits_the_dht() -> None:
    """4 KiB; addresses through a relay are the longest there are."""
    relayed = f"/dns/{'a' * 60}.example.org/tcp/31330/p2p/{OWNER}/p2p-circuit/p2p/{OWNER}"
    assert len(pack(replace(RECORD, links=LINKS, addresses=(relayed,) * 8))) <= 4096


@pytest.mark.parametrize(
    "change",
    [
        {"start": 12},
        {"start": 0, "end": 8},  # another segment
        {"claim_start": 4, "claim_end": 4},
        {"claim_start": 5, "claim_end": 4},
        {"claim_end": 2000},
        {"links": [encode(link) for link in LINKS] * 2},
        {"links": [{"peer": b"short", "rtt_ms": 1.0}]},
        {"links": [{"peer": bytes(32), "rtt_ms": -1.0}]},
        {"tokens_per_s": -1.0},
        {"tokens_per_s": float("nan")},
        {"tokens_per_s": 1e300},
        {"prefill_ms": float("inf")},
        {"waiting_tokens": -1},
        {"serving": 1},
        {"pinned": None},
        {"addresses": ["/ip4/1.2.3.4/tcp/5"]},
    ],
)
def test_what_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        check(msgpack.packb(dict(encode(RECORD)) | change))
