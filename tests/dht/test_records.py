"""The layout is checked against a second writing of it in this file;
signatures against `cryptography` itself."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht import records
from petalite.dht.records import (
    CLOCK_TOLERANCE_S,
    MAX_NAME_BYTES,
    MAX_TTL_S,
    MAX_VALUE_BYTES,
    Record,
    RecordChecker,
)
from petalite.errors import BadRecord, ForgedRecord, InvalidArgument
from petalite.net.identity import Identity, PeerId

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2))
NOW = 1_750_000_000


def accept(owner: PeerId, name: bytes, value: bytes) -> None:
    if value == b"bad":
        raise BadRecord("a bad value")
    if value == b"crash":
        raise KeyError("spans")


def signed(**changes: object) -> Record:
    arguments: dict[str, object] = {"sequence": 7, "issued_at": NOW, "ttl_s": 60, **changes}
    identity = arguments.pop("identity", ALICE)
    value = arguments.pop("value", b"hello")
    namespace = arguments.pop("namespace", "servers")
    return Record.sign(identity, namespace, arguments.pop("name", b"model/0"), value, **arguments)  # type: ignore[arg-type]


def resigned(record: Record, identity: Identity = ALICE) -> Record:
    """Signed again as it is, rules or no rules: what a hostile owner can do."""
    return replace(record, signature=identity.sign(b"petalite-dht-record-v1" + record._signed_part()))


@pytest.fixture
def checker() -> RecordChecker:
    return RecordChecker({"servers": accept, "models": accept})


def test_the_bytes_are_the_documented_layout():
    record = signed()
    body = (
        b"\1\7servers\0\7model/0" + ALICE.peer_id.public_key + struct.pack(">QQI", 7, NOW, 60) + b"\0\5hello"
    )
    assert record.encode() == body + record.signature
    key = Ed25519PublicKey.from_public_bytes(ALICE.peer_id.public_key)
    key.verify(record.signature, b"petalite-dht-record-v1" + body)


@given(
    st.text(min_size=1, max_size=10),
    st.binary(max_size=MAX_NAME_BYTES),
    st.binary(max_size=300),
    st.integers(0, 2**64 - 1),
    st.integers(1, MAX_TTL_S),
)
def test_encoding_round_trips(namespace: str, name: bytes, value: bytes, sequence: int, ttl_s: int):
    record = Record.sign(ALICE, namespace, name, value, sequence=sequence, issued_at=NOW, ttl_s=ttl_s)
    assert Record.decode(record.encode()) == record


@given(st.binary(max_size=400))
def test_hostile_bytes_are_a_record_or_refused(data: bytes):
    try:
        record = Record.decode(data)
    except BadRecord:
        return
    assert record.encode() == data


@given(st.data())
def test_a_changed_byte_never_passes(data: st.DataObject):
    good = bytearray(signed().encode())
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadRecord):
        RecordChecker({"servers": accept}).check(bytes(good), NOW)


@pytest.mark.parametrize("cut", [0, 1, 2, 9, 11, 30, 80, -65, -64, -1])
def test_a_truncated_record_is_refused(cut: int):
    with pytest.raises(BadRecord):
        Record.decode(signed().encode()[:cut])


def test_bytes_after_the_record_are_refused():
    with pytest.raises(BadRecord):
        Record.decode(signed().encode() + b"x")


def test_signing_refuses_what_peers_would():
    for changes in (
        {"value": bytes(MAX_VALUE_BYTES + 1)},
        {"name": bytes(MAX_NAME_BYTES + 1)},
        {"namespace": ""},
        {"ttl_s": 0},
        {"ttl_s": MAX_TTL_S + 1},
    ):
        with pytest.raises(InvalidArgument):
            signed(**changes)


def test_a_good_record_is_believed_and_the_second_time_costs_no_signature(
    checker: RecordChecker, monkeypatch: pytest.MonkeyPatch
):
    data = signed().encode()
    assert checker.check(data, NOW) == signed()
    monkeypatch.setattr(records.Record, "verify", lambda self: pytest.fail("verified twice"))
    assert checker.check(data, NOW + 30) == signed()


def test_memory_of_good_records_is_bounded():
    checker = RecordChecker({"servers": accept}, remembered=2)
    for sequence in range(5):
        checker.check(signed(sequence=sequence).encode(), NOW)
    assert len(checker._good) == 2


def test_a_record_under_another_owner_is_forged(checker: RecordChecker):
    """A subkey is its owner's: the same bytes under another peer's key carry no valid signature."""
    with pytest.raises(ForgedRecord):
        checker.check(replace(signed(), owner=BOB.peer_id).encode(), NOW)


def test_a_record_moved_to_another_name_or_namespace_is_forged(checker: RecordChecker):
    for moved in (replace(signed(), name=b"model/1"), replace(signed(), namespace="models")):
        with pytest.raises(ForgedRecord):
            checker.check(moved.encode(), NOW)


def test_unknown_namespaces_and_broken_schemas_are_refused(checker: RecordChecker):
    with pytest.raises(BadRecord, match="'games' is unknown; known: models, servers"):
        checker.check(signed(namespace="games").encode(), NOW)
    with pytest.raises(BadRecord, match="a bad value"):
        checker.check(signed(value=b"bad").encode(), NOW)


def test_a_schema_taken_by_surprise_refuses(checker: RecordChecker):
    with pytest.raises(BadRecord, match="breaks its schema"):
        checker.check(signed(value=b"crash").encode(), NOW)


def test_a_tombstone_needs_no_schema(checker: RecordChecker):
    assert checker.check(signed(value=b"").encode(), NOW).is_tombstone


@pytest.mark.parametrize("ttl_s", [0, MAX_TTL_S + 1, 2**32 - 1])
def test_a_life_beyond_bounds_is_refused_even_if_signed(checker: RecordChecker, ttl_s: int):
    record = resigned(replace(signed(), ttl_s=ttl_s))
    with pytest.raises(BadRecord, match="wants to live"):
        checker.check(record.encode(), NOW)


@pytest.mark.parametrize("off_s", [-1200, -600, 0, 600, 1200])
def test_both_clocks_may_be_ten_minutes_off(checker: RecordChecker, off_s: int):
    checker.check(signed().encode(), NOW + off_s)
    checker.check(signed().encode(), NOW + off_s, from_owner=True)


def test_beyond_that_a_record_is_of_the_past_or_the_future(checker: RecordChecker):
    data = signed(ttl_s=60).encode()
    with pytest.raises(BadRecord, match="in the future"):
        checker.check(data, NOW - CLOCK_TOLERANCE_S - 1)
    # A reader allows for the life it had at its holder; the holder itself hears from the owner, now.
    checker.check(data, NOW + CLOCK_TOLERANCE_S + 59)
    with pytest.raises(BadRecord, match="too old"):
        checker.check(data, NOW + CLOCK_TOLERANCE_S + 61)
    with pytest.raises(BadRecord, match="too old"):
        checker.check(data, NOW + CLOCK_TOLERANCE_S + 1, from_owner=True)


def test_the_higher_sequence_ranks_higher_then_the_later_then_any_one_of_both():
    assert signed(sequence=8, issued_at=NOW - 5).rank > signed().rank
    assert signed(issued_at=NOW + 1).rank > signed().rank
    one, two = signed(value=b"1"), signed(value=b"2")
    assert (one.rank > two.rank) != (two.rank > one.rank)
