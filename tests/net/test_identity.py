"""Peer ids against the libp2p specification's own vector, keys against RFC 8032, and files that are wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import InvalidAddress, InvalidIdentity
from petalite.net.identity import Identity, PeerId

# libp2p/specs peer-ids/peer-ids.md, "Test vectors", Ed25519: the protobuf-encoded private and public key.
SPEC_PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_the_specs_key_pair() -> None:
    """The private key's first half is the RFC 8032 seed, its second the public key."""
    seed, public = SPEC_PRIVATE[4:36], SPEC_PRIVATE[36:]
    identity = Identity.from_seed(seed)
    assert identity.peer_id.public_key == public == SPEC_PUBLIC[4:]
    assert identity.seed == seed


def test_text_is_the_identity_multihash_in_base58() -> None:
    """Checked against a base58 written another way (repeated division of bytes) over the spec's encoding."""
    multihash = b"\x00\x24" + SPEC_PUBLIC
    digits = list(multihash)
    letters = ""
    while any(digits):
        remainder, quotient = 0, []
        for digit in digits:
            remainder = remainder * 256 + digit
            quotient.append(remainder // 58)
            remainder %= 58
        digits = quotient
        letters = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"[remainder] + letters
    assert str(PeerId(SPEC_PUBLIC[4:])) == "1" + letters
    assert letters.startswith("2D3KooW")


def test_signature_of_rfc8032_test_1() -> None:
    """RFC 8032 §7.1, TEST 1: the empty message."""
    identity = Identity.from_seed(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    signature = identity.sign(b"")
    assert signature == bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert identity.peer_id.verify(signature, b"")
    assert not identity.peer_id.verify(signature, b"x")
    assert not identity.peer_id.verify(b"", b"")


@given(st.binary(min_size=32, max_size=32))
def test_text_round_trip(key: bytes) -> None:
    peer_id = PeerId(key)
    assert PeerId.parse(str(peer_id)) == peer_id
    assert len(str(peer_id)) == 52


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3Koo",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA peer's SHA-256 multihash
        "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXT0",  # '0' is not a base58 letter
        "z2D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
        "1" * 52,
        "z" * 52,
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidAddress):
        PeerId.parse(text)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_invalid_address(text: str) -> None:
    with contextlib.suppress(InvalidAddress):
        assert str(PeerId.parse(text)) == text


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity"
    identity = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == identity.peer_id
    assert "private" not in repr(identity).lower()


def test_save_never_replaces_an_identity(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    first = Identity.load_or_create(path)
    with pytest.raises(InvalidIdentity):
        Identity.generate().save(path)
    assert Identity.load(path).peer_id == first.peer_id
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_file_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidIdentity, match="expected 32 bytes"):
        Identity.load(path)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    Identity.generate().save(path)
    path.chmod(0o644)
    with pytest.raises(InvalidIdentity, match="chmod 600"):
        Identity.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidIdentity, match="nowhere"):
        Identity.load(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_have_32_bytes(size: int) -> None:
    with pytest.raises(InvalidAddress):
        PeerId(bytes(size))
    with pytest.raises(InvalidIdentity):
        Identity.from_seed(bytes(size))
