"""The secure channel's beginning: prelude, three Noise messages, and in them who each end is and what it
grants.

    prelude  "petl" | u8 version | u8 suite | u8 flags | 0        8 bytes, and the Noise prologue
    message  u16 length | Noise message                           three times: initiator, responder, initiator
    payload  32-byte Ed25519 key | 64-byte signature | msgpack    in the second and the third

The signature is over a domain string, the signer's role and the transcript hash, so it holds for this
handshake and this end of it alone. Sans I/O: bytes in, bytes out. Knows no socket and no clock.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from struct import Struct
from typing import Annotated

import msgpack
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from petalite.errors import BadMessage, HandshakeFailed, LocalProtocolError, WrongPeer
from petalite.net import schema
from petalite.net.credit import Windows
from petalite.net.identity import Identity, PeerId
from petalite.net.noise import AES_GCM, SUITES, HandshakeState, Suite
from petalite.net.records import Opener, Sealer
from petalite.net.schema import between, length

LENGTH = Struct(">H")  # of a handshake message
MAGIC = b"petl"
VERSION = 1
PRELUDE_BYTES = 8
FLAG_SWARM_KEY = 0x01
MAX_MESSAGE_BYTES = 2048
_DOMAIN = b"petalite-noise-v1"
_PROOF_BYTES = 32 + 64
_U32 = 2**32 - 1
_Address = Annotated[str, length(0, 128)]


@dataclass(frozen=True, slots=True)
class Hello:
    """What each end tells the other under the handshake's cover."""

    instance: Annotated[
        bytes, length(16, 16)
    ]  # random per host: a restarted peer is told from its former self
    lane: Annotated[int, between(0, 1)]  # 0: interactive, which stands for the connection; 1: bulk, beside it
    stream_bytes: Annotated[int, between(4096, _U32)]  # the credit of a new stream
    connection_bytes: Annotated[int, between(4096, _U32)]  # the credit of all streams together
    streams: Annotated[int, between(1, 65536)]  # how many the other end may have open
    agent: Annotated[str, length(0, 64)] = ""  # software and version, for logs
    listen: Annotated[tuple[_Address, ...], length(0, 8)] = ()  # where it says it listens

    def windows(self) -> Windows:
        """What the peer grants, in our terms."""
        return Windows(self.stream_bytes, self.connection_bytes, self.streams)


@dataclass(frozen=True, slots=True)
class Secured:
    """What a finished handshake leaves."""

    peer_id: PeerId
    hello: Hello
    sealer: Sealer
    opener: Opener
    binding: bytes  # the transcript hash: a name for this session that both ends know, and no other has


class Handshake:
    """One end. Both begin with `receive()`, and send what it returns, until `secured` is set."""

    def __init__(
        self,
        identity: Identity,
        hello: Hello,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        swarm_key: bytes | None = None,
        suite: Suite = AES_GCM,
    ) -> None:
        """`expected` is who the initiator dialled; `suite` is the initiator's choice."""
        self.initiator = initiator
        self.secured: Secured | None = None
        self._identity, self._hello, self._expected = identity, hello, expected
        self._swarm_key, self._suite = swarm_key, suite
        self._buffer = bytearray()  # what came and was not taken
        self._talk = self._initiate() if initiator else self._respond()

    @property
    def leftover(self) -> bytes:
        """What came behind the last handshake message: the front of the first records."""
        return bytes(self._buffer)

    def receive(self, data: bytes = b"") -> bytes:
        """Take what came; what to send in answer. Raises HandshakeFailed, after which nothing may be sent."""
        if self.secured is not None:
            raise LocalProtocolError("the handshake has finished")
        self._buffer += data
        return next(self._talk)

    # Both ends are told as they go: each `yield` says something and waits for more to come.

    def _initiate(self) -> Generator[bytes, None, None]:
        flags = FLAG_SWARM_KEY if self._swarm_key is not None else 0
        prelude = MAGIC + bytes([VERSION, self._suite.number, flags, 0])
        noise = self._new_noise(prelude)
        second = yield from self._next(prelude + _framed(noise.write(lambda _hash: b"")))
        peer = self._verify(noise.read(second), noise.payload_hash)
        third = _framed(noise.write(self._prove))
        self._finish(noise, *peer)
        yield third

    def _respond(self) -> Generator[bytes, None, None]:
        while len(self._buffer) < PRELUDE_BYTES and MAGIC.startswith(bytes(self._buffer[: len(MAGIC)])):
            yield b""
        prelude = self._cut(PRELUDE_BYTES)
        self._suite = self._suite_of(prelude)
        noise = self._new_noise(prelude)
        first = yield from self._next(b"")
        if noise.read(first):
            raise HandshakeFailed("the first handshake message carries a payload, which nothing protects")
        third = yield from self._next(_framed(noise.write(self._prove)))
        self._finish(noise, *self._verify(noise.read(third), noise.payload_hash))
        yield b""

    def _next(self, answer: bytes) -> Generator[bytes, None, bytes]:
        """Say `answer`, and wait for the next message."""
        while len(self._buffer) < LENGTH.size:
            yield answer
            answer = b""
        (length,) = LENGTH.unpack(self._cut(LENGTH.size))
        if not 32 <= length <= MAX_MESSAGE_BYTES:
            raise HandshakeFailed(
                f"a handshake message claims {length} bytes; they have 32 to {MAX_MESSAGE_BYTES}"
            )
        while len(self._buffer) < length:
            yield answer
            answer = b""
        return self._cut(length)

    def _cut(self, size: int) -> bytes:
        """The next bytes, so many of them if they have come."""
        cut = bytes(self._buffer[:size])
        del self._buffer[:size]
        return cut

    def _new_noise(self, prelude: bytes) -> HandshakeState:
        static = X25519PrivateKey.generate()
        return HandshakeState(self._suite, self.initiator, prelude, static, psk=self._swarm_key)

    def _suite_of(self, prelude: bytes) -> Suite:
        if not prelude.startswith(MAGIC):
            raise HandshakeFailed(f"not a petalite peer: its first bytes are {prelude[: len(MAGIC)]!r}")
        version, number, flags, reserved = prelude[len(MAGIC) :]
        if version != VERSION or reserved or flags & ~FLAG_SWARM_KEY or number not in SUITES:
            raise HandshakeFailed(
                f"prelude {prelude.hex()} is not of version {VERSION} and a suite known here"
            )
        if bool(flags & FLAG_SWARM_KEY) is not (self._swarm_key is not None):
            private = "private" if self._swarm_key is not None else "public"
            raise HandshakeFailed(f"this host is in a {private} swarm, and the peer is not")
        return SUITES[number]

    def _finish(self, noise: HandshakeState, peer_id: PeerId, hello: Hello) -> None:
        sending, receiving = noise.keys()
        sealer, opener = Sealer(self._suite, sending), Opener(self._suite, receiving)
        self.secured = Secured(peer_id, hello, sealer, opener, noise.hash)

    def _prove(self, transcript: bytes) -> bytes:
        signature = self._identity.sign(_signed(self.initiator, transcript))
        hello: bytes = msgpack.packb(schema.encode(self._hello))
        return self._identity.peer_id.public_key + signature + hello

    def _verify(self, payload: bytes, transcript: bytes) -> tuple[PeerId, Hello]:
        if len(payload) < _PROOF_BYTES:
            raise HandshakeFailed("a handshake payload is too short for a key and a signature")
        peer_id, signature = PeerId(payload[:32]), payload[32:_PROOF_BYTES]
        if not peer_id.verify(signature, _signed(not self.initiator, transcript)):
            raise HandshakeFailed(f"the signature of {peer_id} does not hold for this handshake")
        if peer_id == self._identity.peer_id:
            raise WrongPeer("this address is our own: the peer there has our identity")
        if self._expected is not None and peer_id != self._expected:
            raise WrongPeer(f"expected the peer {self._expected}, found {peer_id} at that address")
        return peer_id, _decode_hello(payload[_PROOF_BYTES:])


def _signed(initiator: bool, transcript: bytes) -> bytes:
    return _DOMAIN + (b"initiator" if initiator else b"responder") + transcript


def _framed(message: bytes) -> bytes:
    assert len(message) <= MAX_MESSAGE_BYTES
    return LENGTH.pack(len(message)) + message


def _decode_hello(data: bytes) -> Hello:
    try:
        body = msgpack.unpackb(data, max_map_len=64, max_array_len=64)
        if type(body) is not dict:
            raise BadMessage("Hello is not a map")
        return schema.decode(Hello, body)
    except (ValueError, msgpack.UnpackException, BadMessage) as error:
        raise HandshakeFailed(f"the peer's hello does not parse: {error}") from error
