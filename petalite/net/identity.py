"""Who a peer is: an Ed25519 key, and the peer id that is read from it and that it can be read from.

A peer id is libp2p's for an Ed25519 key: base58btc over the identity multihash of the protobuf-encoded
public key (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), so a key has one `12D3Koo…`
name here and there.
Knows keys and files; knows no socket.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from petalite.errors import InvalidAddress, InvalidIdentity

# In front of the 32-byte key, as one number: identity multihash (0x00) of 36 bytes; protobuf
# PublicKey{Type = Ed25519 (1), Data = 32 bytes}.
_PREFIX = 0x002408011220
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {letter: value for value, letter in enumerate(_ALPHABET)}
_TEXT_LENGTH = 52  # of every Ed25519 peer id: 38 bytes in base58, the leading zero byte as one '1'


class PeerId(bytes):
    """A peer's name: its 32-byte Ed25519 public key. Compares and hashes as these; prints as `12D3Koo…`."""

    __slots__ = ()
    BYTES: ClassVar[int] = 32

    def __new__(cls, public_key: bytes) -> PeerId:
        if len(public_key) != cls.BYTES:
            raise InvalidAddress(f"a peer id holds a 32-byte Ed25519 key, found {len(public_key)} bytes")
        return super().__new__(cls, public_key)

    @property
    def public_key(self) -> bytes:
        return bytes(self)

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """From `12D3Koo…`. Raises InvalidAddress for anything else, other key types included."""
        if len(text) == _TEXT_LENGTH and _DIGITS.keys() >= set(text):
            number = 0
            for letter in text:
                number = number * 58 + _DIGITS[letter]
            prefix, key = divmod(number, 1 << 256)
            if prefix == _PREFIX:
                return cls(key.to_bytes(cls.BYTES, "big"))
        raise InvalidAddress(
            f"{text[:60]!r} is not a peer id; expected 12D3Koo…, the {_TEXT_LENGTH} base58 letters of a key"
        )

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether this peer signed `message`."""
        try:
            Ed25519PublicKey.from_public_bytes(self).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def short(self) -> str:
        """The last eight letters, for tables and log lines; the first are the same for every peer."""
        return "…" + str(self)[-8:]

    def __str__(self) -> str:
        number, letters = _PREFIX << 256 | int.from_bytes(self, "big"), ""
        while number:
            number, digit = divmod(number, 58)
            letters = _ALPHABET[digit] + letters
        return _ALPHABET[0] + letters

    def __repr__(self) -> str:
        return f"PeerId({str(self)!r})"


@dataclass(frozen=True, slots=False)
class Identity:
    """A private key. `peer_id` names it to others; `sign` proves it."""

    private_key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """From the 32-byte private seed of RFC 8032."""
        if len(seed) != 32:
            raise InvalidIdentity(f"an Ed25519 seed has 32 bytes, found {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """From a file that `save` wrote. Refuses one that others may read: its key is no secret."""
        path = Path(path)
        try:
            data = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise InvalidIdentity(f"cannot read the identity file {path}: {error.strerror}") from error
        if len(data) != 32:
            raise InvalidIdentity(f"{path} is not an identity file: expected 32 bytes, found {len(data)}")
        if os.name == "posix" and mode & 0o077:
            raise InvalidIdentity(
                f"{path} can be read by others (mode {mode & 0o777:o}); run: chmod 600 {path}"
            )
        return cls.from_seed(data)

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """The identity in `path`, generated and saved there first if there is no such file."""
        path = Path(path)
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity

    def save(self, path: str | Path) -> None:
        """Write the 32-byte seed with mode 0600; whole or not at all, and never over another identity."""
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(self.seed)
                os.link(scratch, path)
            finally:
                scratch.unlink()
        except OSError as error:
            raise InvalidIdentity(f"cannot write the identity file {path}: {error.strerror}") from error

    @property
    def seed(self) -> bytes:
        return self.private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    @cached_property
    def peer_id(self) -> PeerId:
        return PeerId(self.private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature (RFC 8032). Callers put a domain string before what they sign."""
        return self.private_key.sign(message)
