"""State is asserted after every attack: who has how much, and that honest owners still have theirs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from petalite.dht.keys import DhtKey
from petalite.dht.records import CLOCK_TOLERANCE_S, Record
from petalite.dht.storage import Outcome, Storage, StorageSettings
from petalite.net.identity import PeerId

NOW = 1_750_000_000


def record(owner: int = 1, name: int = 0, value: bytes = b"v", sequence: int = 1, ttl_s: int = 60) -> Record:
    """Unsigned: storage is given checked records and looks at no signature."""
    peer_id = PeerId(owner.to_bytes(32))
    signature = sequence.to_bytes(32) + value[:32].ljust(32, b"\0")
    return Record("servers", name.to_bytes(4), peer_id, value, sequence, NOW, ttl_s, signature)


def put(storage: Storage, item: Record, now_s: float = 0.0, group: bytes | None = None) -> Outcome:
    return storage.put(item.encode(), item, now_s, group)


def values(storage: Storage, name: int = 0, now_s: float = 0.0) -> list[bytes]:
    return sorted(held.record.value for held in storage.get(record(name=name).key, now_s))


def test_every_owner_has_one_record_under_a_name():
    storage = Storage()
    assert put(storage, record(owner=1, value=b"a")) is Outcome.STORED
    assert put(storage, record(owner=2, value=b"b")) is Outcome.STORED
    assert put(storage, record(owner=1, value=b"c", sequence=2)) is Outcome.STORED
    assert values(storage) == [b"b", b"c"]
    assert len(storage) == 2


def test_the_newest_sequence_wins_in_whatever_order_they_come():
    storage = Storage()
    put(storage, record(sequence=5, value=b"new"))
    assert put(storage, record(sequence=4, value=b"old")) is Outcome.STALE
    assert values(storage) == [b"new"]


def test_a_life_ends_on_the_moment_and_is_not_prolonged_by_repeating():
    storage = Storage()
    put(storage, record(ttl_s=60), 100.0)
    assert put(storage, record(ttl_s=60), 150.0) is Outcome.UNCHANGED
    assert values(storage, now_s=159.9) == [b"v"]
    assert values(storage, now_s=160.0) == []


def test_what_has_expired_or_was_withdrawn_cannot_be_replayed():
    storage = Storage()
    old, tombstone = record(sequence=1, ttl_s=60), record(sequence=2, value=b"", ttl_s=60)
    put(storage, old, 0.0)
    put(storage, tombstone, 10.0)
    assert put(storage, old, 20.0) is Outcome.STALE
    storage.sweep(100.0)
    assert len(storage) == 0
    assert put(storage, old, 101.0) is Outcome.STALE
    assert put(storage, tombstone, 101.0) is Outcome.STALE
    # By the time the memory ends, the record's date alone refuses it.
    storage.sweep(101.0 + 2 * CLOCK_TOLERANCE_S + 60)
    assert storage._floors == {}


def test_sweeping_gives_back_everything():
    storage = Storage()
    for owner in range(1, 50):
        put(storage, record(owner=owner, name=owner % 5), 0.0, bytes([owner % 3]))
    storage.sweep(60.0)
    assert (len(storage), storage.nbytes) == (0, 0)
    assert (storage._groups, storage._owners) == ({}, {})


def test_one_owner_cannot_flood():
    storage = Storage(StorageSettings(per_owner_records=10, per_owner_bytes=6000))
    outcomes = [put(storage, record(owner=1, name=name)) for name in range(100)]
    assert outcomes == [Outcome.STORED] * 10 + [Outcome.NO_ROOM] * 90
    big = [put(storage, record(owner=2, name=name, value=bytes(2000))) for name in range(5)]
    assert big == [Outcome.STORED] * 2 + [Outcome.NO_ROOM] * 3
    assert put(storage, record(owner=3)) is Outcome.STORED
    assert put(storage, record(owner=1, name=3, sequence=2)) is Outcome.STORED  # its own it may renew


def test_a_thousand_ids_in_one_prefix_cannot_flood_a_key():
    storage = Storage(StorageSettings(per_key_group_records=16))
    honest = [put(storage, record(owner=owner), group=bytes((20, owner))) for owner in range(1, 11)]
    flood = [put(storage, record(owner=owner), group=b"\x66\x06") for owner in range(1000, 2000)]
    late = put(storage, record(owner=11), group=bytes((20, 11)))
    assert {*honest, late} == {Outcome.STORED}
    assert flood.count(Outcome.STORED) == 16
    assert len(storage.get(record().key, 0.0)) == 11 + 16


def test_a_full_key_gives_the_newcomer_the_largest_groups_place():
    storage = Storage(StorageSettings(per_key_records=20, per_key_group_records=16))
    for owner in range(100, 116):
        put(storage, record(owner=owner), group=b"big")
    for owner in range(1, 5):
        put(storage, record(owner=owner), group=bytes([owner]))
    assert put(storage, record(owner=5), group=b"\5") is Outcome.STORED
    groups = [held.group for held in storage.get(record().key, 0.0)]
    assert groups.count(b"big") == 15
    assert put(storage, record(owner=99), group=b"big") is Outcome.NO_ROOM


def test_a_flood_of_one_prefix_over_many_keys_leaves_others_their_room():
    limits = StorageSettings(total_bytes=200_000, per_group_bytes=150_000, per_owner_bytes=150_000)
    storage = Storage(limits)
    for name in range(1000):
        put(storage, record(owner=1000 + name, name=name), group=b"\x66\x06")
    assert storage.nbytes <= limits.per_group_bytes
    honest = [put(storage, record(owner=n, name=2000 + n), group=bytes((20, n))) for n in range(1, 201)]
    assert honest == [Outcome.STORED] * 200
    assert storage.nbytes <= limits.total_bytes
    assert all(storage.get(record(name=2000 + n).key, 0.0) for n in range(1, 201))
    # The largest group gave way; and what it gets back comes out of nobody else's share.
    again = [put(storage, record(owner=3000 + n, name=n), group=b"\x66\x06") for n in range(300)]
    assert Outcome.NO_ROOM in again
    assert all(storage.get(record(name=2000 + n).key, 0.0) for n in range(1, 201))


_NARROW = StorageSettings(total_bytes=4000, per_key_records=2)
_OFFERS = st.tuples(
    st.integers(1, 5), st.integers(0, 1), st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([1, 500, 1500])
)


@given(st.lists(_OFFERS, min_size=6, max_size=24))
@settings(max_examples=300, deadline=None)
def test_who_is_refused_takes_nobody_s_place(offers: list[tuple[int, int, bytes, int]]):
    """Owners come from one group and then another, with records that grow: where all is full, somebody gives
    way to what is stored and nobody to what is not, and no bound is ever passed."""
    storage = Storage(_NARROW)
    for sequence, (owner, name, group, size) in enumerate(offers):
        before = {held.data for of_key in storage._keys.values() for held in of_key.values()}
        item = record(owner, name, bytes(size), sequence)
        outcome = put(storage, item, group=group)
        after = {held.data for of_key in storage._keys.values() for held in of_key.values()}
        assert outcome in (Outcome.STORED, Outcome.NO_ROOM)
        assert item.encode() in after if outcome is Outcome.STORED else after == before
        assert storage.nbytes <= _NARROW.total_bytes
        assert len(storage.get(item.key, 0.0)) <= _NARROW.per_key_records


def test_who_moves_to_another_network_may_take_its_own_old_place():
    """Its old record is the oldest of the largest group, and there is no other room."""
    storage = Storage(StorageSettings(total_bytes=3000))
    for owner in range(1, 5):
        put(storage, record(owner=owner), group=b"big")
    new = record(owner=1, value=bytes(1000), sequence=2)
    assert put(storage, new, group=b"small") is Outcome.STORED
    assert storage.standing(new, 0.0) is not None


def test_where_prefixes_say_nothing_every_owner_is_its_own_group():
    storage = Storage(StorageSettings(per_key_group_records=2))
    assert {put(storage, record(owner=owner)) for owner in range(1, 100)} == {Outcome.STORED}


def test_refusal_foretells_put_and_changes_nothing():
    storage = Storage(StorageSettings(per_owner_records=1))
    put(storage, record(sequence=2))
    for item, expected in (
        (record(sequence=2), Outcome.UNCHANGED),
        (record(sequence=1), Outcome.STALE),
        (record(name=1), Outcome.NO_ROOM),
        (record(sequence=3), None),
    ):
        assert storage.refusal(item.encode(), item, 0.0) is expected
    assert values(storage) == [b"v"]


def test_a_sample_is_all_there_is_or_a_fair_random_part():
    storage = Storage()
    for owner in range(1, 21):
        put(storage, record(owner=owner, name=0))
    for owner in range(1, 4):
        put(storage, record(owner=owner, name=1))
    keys = [record(name=0).key, record(name=1).key, DhtKey(5)]
    size = len(record().encode())
    everything = storage.sample(keys, 0.0, 100 * size, Random(1))
    assert [len(everything[key]) for key in keys] == [20, 3, 0]
    part = storage.sample(keys, 0.0, 10 * size, Random(1))
    assert [len(part[key]) for key in keys] == [7, 3, 0]
    other = storage.sample(keys, 0.0, 10 * size, Random(2))
    assert {held.data for held in part[keys[0]]} != {held.data for held in other[keys[0]]}
    assert storage.sample(keys, 60.0, 10 * size, Random(1)) == {key: [] for key in keys}


class StorageMachine(RuleBasedStateMachine):
    """Any sequence of offers and waits, against a dict of the newest live record of each owner and name."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = Storage(StorageSettings(total_bytes=1 << 40))
        self.model: dict[tuple[int, int], tuple[Record, float]] = {}
        self.now_s = 0.0

    @rule(
        owner=st.integers(1, 3), name=st.integers(0, 2), sequence=st.integers(1, 5), ttl_s=st.integers(1, 50)
    )
    def offer(self, owner: int, name: int, sequence: int, ttl_s: int) -> None:
        item = record(owner, name, sequence=sequence, ttl_s=ttl_s)
        outcome = put(self.storage, item, self.now_s)
        known = self.model.get((owner, name))
        if outcome is Outcome.STORED:
            assert known is None or known[0].sequence <= sequence
            self.model[owner, name] = item, self.now_s + ttl_s
        else:
            assert known is not None
            assert known[0].sequence >= sequence

    @rule(pause_s=st.floats(0, 60))
    def wait(self, pause_s: float) -> None:
        self.now_s += pause_s

    @rule()
    def sweep(self) -> None:
        self.storage.sweep(self.now_s)

    @invariant()
    def shows_what_lives(self) -> None:
        for name in range(3):
            alive = {
                item.encode()
                for (_, n), (item, end_s) in self.model.items()
                if n == name and end_s > self.now_s
            }
            assert {held.data for held in self.storage.get(record(name=name).key, self.now_s)} == alive

    @invariant()
    def accounts_agree(self) -> None:
        held = [held for of_key in self.storage._keys.values() for held in of_key.values()]
        assert self.storage.nbytes == sum(one.cost_bytes for one in held)
        for shares in (self.storage._groups, self.storage._owners):
            assert sum(share.nbytes for share in shares.values()) == self.storage.nbytes
            assert sum(len(share.held) for share in shares.values()) == len(held)


TestStorageMachine = StorageMachine.TestCase
TestStorageMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_replicas_agree_whatever_the_order(order: tuple[int, int]):
    """Two records of one sequence: every holder keeps the same one."""
    storage = Storage()
    items = {1: record(value=b"a"), 2: record(value=b"b")}
    for number in order:
        put(storage, items[number])
    assert values(storage) == [max(items.values(), key=lambda item: item.rank).value]
