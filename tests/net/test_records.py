"""Records: round trips through any splitting of memory, and what every kind of tampering ends in."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import RemoteProtocolError
from petalite.net.noise import AES_GCM, CHACHA_POLY, Suite
from petalite.net.records import MAX_PLAINTEXT_BYTES, OVERHEAD_BYTES, Opener, Sealer

KEY = bytes(range(32))
suites = pytest.mark.parametrize("suite", [AES_GCM, CHACHA_POLY], ids=lambda suite: suite.name)


def sealed(sealer: Sealer, plaintext: bytes) -> bytearray:
    record = bytearray(len(plaintext) + OVERHEAD_BYTES)
    assert sealer.seal(plaintext, memoryview(record)) == len(record)
    return record


def opened(opener: Opener, record: bytes | bytearray) -> bytes:
    box = memoryview(bytearray(record))[4:]
    opener.open(box, box[:-16])  # in place, as lanes do
    return bytes(box[:-16])


@suites
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.binary(max_size=3000), max_size=8))
def test_round_trip(suite: Suite, texts: list[bytes]) -> None:
    sealer, opener = Sealer(suite, KEY), Opener(suite, KEY)
    for text in texts:
        assert opened(opener, sealed(sealer, text)) == text


def test_nonces_are_the_counter_as_noise_writes_it() -> None:
    """Noise §12: AESGCM big-endian, ChaChaPoly little-endian, after four zero bytes; with the bare AEAD."""
    for suite, aead, order in ((AES_GCM, AESGCM, "big"), (CHACHA_POLY, ChaCha20Poly1305, "little")):
        sealer = Sealer(suite, KEY)
        for counter in range(300):
            record = sealed(sealer, b"x")
            nonce = bytes(4) + counter.to_bytes(8, order)  # type: ignore[arg-type]
            assert aead(KEY).decrypt(nonce, bytes(record[4:]), None) == b"x"


@suites
def test_rekeying_keeps_step_and_never_repeats_a_nonce_under_a_key(suite: Suite) -> None:
    """Noise §4.2's REKEY, computed here on its own, every eight records instead of every 2^20."""
    sealer, opener = Sealer(suite, KEY, rekey_every=8), Opener(suite, KEY, rekey_every=8)
    key, used = KEY, set()
    for counter in range(100):
        if counter and counter % 8 == 0:
            key = suite.aead(key).encrypt(suite.nonce(2**64 - 1), bytes(32), None)[:32]
        record = sealed(sealer, b"text")
        assert suite.aead(key).decrypt(suite.nonce(counter), bytes(record[4:]), None) == b"text"
        assert (key, counter) not in used
        used.add((key, counter))
        assert opened(opener, record) == b"text"


def test_the_longest_record_fits_its_length() -> None:
    record = sealed(Sealer(AES_GCM, KEY), bytes(MAX_PLAINTEXT_BYTES))
    assert record[:4] == (132 * 1024 + 16).to_bytes(4, "big")
    assert opened(Opener(AES_GCM, KEY), record) == bytes(MAX_PLAINTEXT_BYTES)


@suites
@pytest.mark.parametrize("lie", ["flip", "swap", "repeat", "drop", "cut", "other key"])
def test_tampering_is_noticed(suite: Suite, lie: str) -> None:
    sealer, opener = Sealer(suite, KEY), Opener(suite, KEY)
    records = [sealed(sealer, b"record %d" % index) for index in range(3)]
    if lie == "flip":
        records[0][7] ^= 0x80
    elif lie == "swap":
        records[0], records[1] = records[1], records[0]
    elif lie == "repeat":
        records[1] = records[0]
    elif lie == "drop":
        del records[0]
    elif lie == "cut":
        records[0] = records[0][:-1]
    else:
        opener = Opener(suite, KEY[::-1])
    with pytest.raises(RemoteProtocolError, match="does not authenticate"):
        for record in records:
            opened(opener, record)


@pytest.mark.parametrize("suite", [AES_GCM, CHACHA_POLY], ids=lambda suite: suite.name)
def test_every_flipped_bit_is_noticed(suite: Suite) -> None:
    record = sealed(Sealer(suite, KEY), b"hidden state")
    for bit in range(32, 8 * len(record)):
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            opened(Opener(suite, KEY), changed)
