"""The Noise handshakes XX and XXpsk3 over X25519 and SHA-256, with AES-256-GCM or ChaCha20-Poly1305.

Implements revision 34 of https://noiseprotocol.org/noise.html, the sections named below, on the primitives of
`cryptography`. Bytes in, bytes out: knows no socket, no peer id and nothing of what the payloads mean.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct
from types import MappingProxyType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from petalite.errors import HandshakeFailed, LocalProtocolError

KEY_BYTES = 32  # of X25519, of both ciphers and of SHA-256
TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher, and how it writes the 64-bit counter into its 96-bit nonce (Noise §12.3 and §12.4)."""

    number: int  # as the prelude names it
    name: str  # as a Noise protocol name spells it
    aead: type[AESGCM] | type[ChaCha20Poly1305]
    nonce: Callable[[int], bytes]  # of a counter

    def rekeyed(self, key: bytes) -> bytes:
        """REKEY(k) of Noise §4.2."""
        return self.aead(key).encrypt(self.nonce(2**64 - 1), bytes(KEY_BYTES), None)[:KEY_BYTES]


AES_GCM = Suite(1, "AESGCM", AESGCM, Struct(">4xQ").pack)
CHACHA_POLY = Suite(2, "ChaChaPoly", ChaCha20Poly1305, Struct("<4xQ").pack)
SUITES = MappingProxyType({suite.number: suite for suite in (AES_GCM, CHACHA_POLY)})

# Message patterns (Noise §7.5 and §9); the initiator writes the even ones.
_PATTERNS = MappingProxyType(
    {
        "XX": (("e",), ("e", "ee", "s", "es"), ("s", "se")),
        "XXpsk3": (("e",), ("e", "ee", "s", "es"), ("s", "se", "psk")),
    }
)


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The 32 bytes of the public half."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _hkdf(chaining_key: bytes, material: bytes, outputs: int) -> list[bytes]:
    """HKDF of Noise §4.3."""
    secret = hmac.digest(chaining_key, material, "sha256")
    blocks: list[bytes] = []
    for index in range(1, outputs + 1):
        blocks.append(hmac.digest(secret, (blocks[-1] if blocks else b"") + bytes([index]), "sha256"))
    return blocks


class HandshakeState:
    """One end of a handshake (Noise §5.2, §5.3). Call `write` and `read` in turn until `finished`."""

    def __init__(
        self,
        suite: Suite,
        initiator: bool,
        prologue: bytes,
        static: X25519PrivateKey,
        psk: bytes | None = None,
        ephemeral: X25519PrivateKey | None = None,
    ) -> None:
        """`psk` (32 bytes) makes it XXpsk3. `ephemeral` is for test vectors alone; a fresh one is right."""
        if psk is not None and len(psk) != KEY_BYTES:
            raise LocalProtocolError(f"a pre-shared key has {KEY_BYTES} bytes, found {len(psk)}")
        pattern = "XX" if psk is None else "XXpsk3"
        name = f"Noise_{pattern}_25519_{suite.name}_SHA256".encode()
        # The transcript hash; once finished, a name for this session that no other session has.
        self.hash = name.ljust(32, b"\0") if len(name) <= 32 else sha256(name).digest()
        self.payload_hash = b""  # the transcript hash just before the payload last written or read
        self._suite, self._initiator, self._psk = suite, initiator, psk
        self._chaining_key, self._key, self._counter = self.hash, b"", 0
        self._messages = list(_PATTERNS[pattern])
        self._our_turn = initiator
        self._ours = {"s": static, "e": ephemeral or X25519PrivateKey.generate()}
        self._theirs: dict[str, bytes] = {}
        self._mix_hash(prologue)

    @property
    def finished(self) -> bool:
        return not self._messages

    def write(self, payload: Callable[[bytes], bytes]) -> bytes:
        """The next message. `payload` is called with the transcript hash up to it, which it may sign."""
        message = b""
        for token in self._next(ours=True):
            if token == "e":
                public = public_bytes(self._ours["e"])
                message += public
                self._mix_ephemeral(public)
            elif token == "s":
                message += self._seal(public_bytes(self._ours["s"]))
            else:
                self._mix_secret(token)
        self.payload_hash = self.hash
        return message + self._seal(payload(self.hash))

    def read(self, message: bytes) -> bytes:
        """The payload of the peer's next message. Raises HandshakeFailed, and is of no use from then on."""
        rest = message
        for token in self._next(ours=False):
            if token == "e":
                self._theirs["e"], rest = _cut(rest, KEY_BYTES)
                self._mix_ephemeral(self._theirs["e"])
            elif token == "s":
                box, rest = _cut(rest, KEY_BYTES + TAG_BYTES)
                self._theirs["s"] = self._open(box)
            else:
                self._mix_secret(token)
        self.payload_hash = self.hash
        return self._open(rest)

    def keys(self) -> tuple[bytes, bytes]:
        """(sending key, receiving key) of the transport, once finished: Split of Noise §5.2.

        It forgets the others.
        """
        if not self.finished:
            raise LocalProtocolError("the handshake has not finished")
        self._ours, self._psk = {}, None
        to_responder, to_initiator = _hkdf(self._chaining_key, b"", 2)
        return (to_responder, to_initiator) if self._initiator else (to_initiator, to_responder)

    def _next(self, ours: bool) -> tuple[str, ...]:
        if not self._messages or self._our_turn is not ours:
            raise LocalProtocolError(f"not the turn to {'write' if ours else 'read'} a handshake message")
        self._our_turn = not ours
        return self._messages.pop(0)

    def _mix_hash(self, data: bytes) -> None:
        self.hash = sha256(self.hash + data).digest()

    def _mix_key(self, material: bytes) -> None:
        self._chaining_key, self._key = _hkdf(self._chaining_key, material, 2)
        self._counter = 0

    def _mix_ephemeral(self, public: bytes) -> None:
        self._mix_hash(public)
        if self._psk is not None:  # Noise §9.2
            self._mix_key(public)

    def _mix_secret(self, token: str) -> None:
        if token == "psk":
            assert self._psk is not None
            self._chaining_key, mixed, self._key = _hkdf(self._chaining_key, self._psk, 3)
            self._counter = 0
            self._mix_hash(mixed)
            return
        # The first letter names the initiator's key, the second the responder's.
        ours, theirs = list(token if self._initiator else token[::-1])
        try:
            secret = self._ours[ours].exchange(X25519PublicKey.from_public_bytes(self._theirs[theirs]))
        except ValueError as error:  # a point of low order, whose secret is zero whatever our key
            raise HandshakeFailed("the peer sent a public key of low order") from error
        self._mix_key(secret)

    def _nonce(self) -> bytes:
        self._counter += 1
        return self._suite.nonce(self._counter - 1)

    def _seal(self, plaintext: bytes) -> bytes:
        """EncryptAndHash of Noise §5.2; without a key yet, in the clear."""
        box = plaintext
        if self._key:
            box = self._suite.aead(self._key).encrypt(self._nonce(), plaintext, self.hash)
        self._mix_hash(box)
        return box

    def _open(self, box: bytes) -> bytes:
        """DecryptAndHash of Noise §5.2."""
        plaintext = box
        if self._key:
            try:
                plaintext = self._suite.aead(self._key).decrypt(self._nonce(), box, self.hash)
            except InvalidTag as error:
                raise HandshakeFailed(
                    "a handshake message does not authenticate: another swarm key, suite or version, "
                    "or somebody changed it on its way"
                ) from error
        self._mix_hash(box)
        return plaintext


def _cut(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise HandshakeFailed(f"a handshake message ends {size - len(message)} bytes early")
    return message[:size], message[size:]
