"""The record layer: a 4-byte length, then one AEAD box, after the handshake and until the lane ends.

The nonce is a counter that lives in one place per direction and only ever grows; keys are renewed (Noise
§4.2) long before the limits of either cipher (RFC 9001 §6.6). Boxes are made from and opened into memory that
the caller names, so a tensor needs no copy of its own. Knows keys and bytes; knows nothing of what the bytes
mean.
"""

from __future__ import annotations

from struct import Struct

from cryptography.exceptions import InvalidTag

from petalite.errors import RemoteProtocolError
from petalite.net.noise import TAG_BYTES, Suite

LENGTH = Struct(">I")
PREFIX_BYTES = LENGTH.size
OVERHEAD_BYTES = PREFIX_BYTES + TAG_BYTES
MAX_PLAINTEXT_BYTES = 132 * 1024
REKEY_EVERY = 2**19  # records; at most 66 GiB under one key


class _Direction:
    """One key and its counter. `rekey_every` is a parameter for tests alone."""

    __slots__ = ("_aead", "_counter", "_key", "_nonce", "_rekey_at", "_rekey_every", "_suite")

    def __init__(self, suite: Suite, key: bytes, rekey_every: int = REKEY_EVERY) -> None:
        self._suite = suite
        self._key = key
        self._aead = suite.aead(key)
        self._nonce = suite.nonce
        self._counter = 0
        self._rekey_every = self._rekey_at = rekey_every

    def _advance_key(self) -> None:
        self._key = self._suite.rekeyed(self._key)
        self._aead = self._suite.aead(self._key)
        self._rekey_at += self._rekey_every


class Sealer(_Direction):
    """The sending direction."""

    __slots__ = ()

    def seal(self, plaintext: bytes | memoryview, out: memoryview) -> int:
        """Write the record of `plaintext` to the front of `out`; its whole length is the plaintext's + 20."""
        box_bytes = len(plaintext) + TAG_BYTES
        end = PREFIX_BYTES + box_bytes
        LENGTH.pack_into(out, 0, box_bytes)
        self._aead.encrypt_into(self._nonce(self._counter), plaintext, None, out[PREFIX_BYTES:end])
        self._counter += 1
        if self._counter == self._rekey_at:
            self._advance_key()
        return end

    def sealed(self, plaintext: bytes) -> bytes:
        """The record of a small `plaintext`, in memory of its own, which is faster than to name some."""
        box = self._aead.encrypt(self._nonce(self._counter), plaintext, None)
        self._counter += 1
        if self._counter == self._rekey_at:
            self._advance_key()
        return LENGTH.pack(len(box)) + box


class Opener(_Direction):
    """The receiving direction. After one failure it is of no further use: the lane ends."""

    __slots__ = ()

    def open(self, box: memoryview, out: memoryview) -> None:
        """Open `box` into `out`, which is 16 bytes shorter and may be the same memory."""
        try:
            self._aead.decrypt_into(self._nonce(self._counter), box, None, out)
        except InvalidTag as error:
            raise RemoteProtocolError(f"record {self._counter} does not authenticate") from error
        self._counter += 1
        if self._counter == self._rekey_at:
            self._advance_key()
