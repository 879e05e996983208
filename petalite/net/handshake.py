"""The secure channel's beginning: prelude, three Noise messages, and in them who each end is and what it
grants.

    prelude  "petl" | u8 version | u8 suite | u8 flags | 0        8 bytes, and the Noise prologue
    message  u16 length | Noise message                           three times: initiator, responder, initiator
    payload  32-byte Ed25519 key | 64-byte signature | msgpack    in the second and the third

The signature is over a domain string, the signer's role and the transcript hash, so it holds for this
handshake and this end of it alone. Sans I/O: bytes in, bytes out. Knows no socket and no clock.
"""

from __future__ import annotations

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
from petalite.net.schema import Bounds

LENGTH = Struct(">H")  # of a handshake message
MAGIC = b"petl"
VERSION = 1
PRELUDE_BYTES = 8
FLAG_SWARM_KEY = 0x01
MAX_MESSAGE_BYTES = 2048
_DOMAIN = b"petalite-noise-v1"
_PROOF_BYTES = 32 + 64
_U32 = 2**32 - 1
_Address = Annotated[str, Bounds(0, 128)]


@dataclass(frozen=True, slots=True)
class Hello:
    """What each end tells the other under the handshake's cover."""

    instance: Annotated[
        bytes, Bounds(16, 16)
    ]  # random per host: a restarted peer is told from its former self
    lane: Annotated[int, Bounds(0, 1)]  # 0: interactive, which stands for the connection; 1: bulk, beside it
    stream_bytes: Annotated[int, Bounds(4096, _U32)]  # the credit of a new stream
    connection_bytes: Annotated[int, Bounds(4096, _U32)]  # the credit of all streams together
    streams: Annotated[int, Bounds(1, 65536)]  # how many the other end may have open
    agent: Annotated[str, Bounds(0, 64)] = ""  # software and version, for logs
    listen: Annotated[tuple[_Address, ...], Bounds(0, 8)] = ()  # where it says it listens

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
    """One end. The initiator sends `start()`; both send what `receive` returns, until `secured` is set."""

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
        self._identity = identity
        self._hello = hello
        self.initiator = initiator
        self._expected = expected
        self._swarm_key = swarm_key
        self._suite = suite
        self._noise: HandshakeState | None = None
        self._messages_read = 0
        self._buffer = bytearray()
        self._peer: tuple[PeerId, Hello] | None = None
        self.secured: Secured | None = None

    @property
    def leftover(self) -> bytes:
        """What came behind the last handshake message: the front of the first records."""
        return bytes(self._buffer)

    def start(self) -> bytes:
        """The initiator's prelude and first message."""
        if not self.initiator or self._noise is not None:
            raise LocalProtocolError("only the initiator starts a handshake, and once")
        flags = FLAG_SWARM_KEY if self._swarm_key is not None else 0
        prelude = MAGIC + bytes([VERSION, self._suite.number, flags, 0])
        self._noise = self._new_noise(prelude)
        return prelude + _framed(self._noise.write(lambda _hash: b""))

    def receive(self, data: bytes) -> bytes:
        """Take what came; what to send in answer. Raises HandshakeFailed, after which nothing may be sent."""
        if self.secured is not None:
            raise LocalProtocolError("the handshake has finished")
        if self.initiator and self._noise is None:
            raise LocalProtocolError("start() comes first")
        self._buffer += data
        if self._noise is None and not self._read_prelude():
            return b""
        answer = b""
        while self.secured is None and (message := self._cut_message()) is not None:
            answer += self._read_message(message)
        return answer

    def _new_noise(self, prelude: bytes) -> HandshakeState:
        static = X25519PrivateKey.generate()
        return HandshakeState(self._suite, self.initiator, prelude, static, psk=self._swarm_key)

    def _read_prelude(self) -> bool:
        prelude = bytes(self._buffer[:PRELUDE_BYTES])
        if not MAGIC.startswith(prelude[: len(MAGIC)]):
            raise HandshakeFailed(f"not a petalite peer: its first bytes are {prelude[:4]!r}")
        if len(prelude) < PRELUDE_BYTES:
            return False
        version, number, flags, reserved = prelude[len(MAGIC) :]
        if version != VERSION or reserved or flags & ~FLAG_SWARM_KEY:
            raise HandshakeFailed(
                f"prelude {prelude.hex()} is not of version {VERSION}, which is spoken here"
            )
        suite = SUITES.get(number)
        if suite is None:
            raise HandshakeFailed(f"suite {number} is unknown; known are {sorted(SUITES)}")
        if bool(flags & FLAG_SWARM_KEY) is not (self._swarm_key is not None):
            private = "private" if self._swarm_key is not None else "public"
            raise HandshakeFailed(f"this host is in a {private} swarm, and the peer is not")
        self._suite = suite
        self._noise = self._new_noise(prelude)
        del self._buffer[:PRELUDE_BYTES]
        return True

    def _cut_message(self) -> bytes | None:
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if not 32 <= length <= MAX_MESSAGE_BYTES:
            raise HandshakeFailed(
                f"a handshake message claims {length} bytes; they have 32 to {MAX_MESSAGE_BYTES}"
            )
        end = LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[LENGTH.size : end])
        del self._buffer[:end]
        return message

    def _read_message(self, message: bytes) -> bytes:
        noise = self._noise
        assert noise is not None
        payload = noise.read(message)
        self._messages_read += 1
        if not self.initiator and self._messages_read == 1:
            if payload:
                raise HandshakeFailed("the first handshake message carries a payload, which nothing protects")
            return _framed(noise.write(self._prove))
        self._peer = self._verify(payload, noise.payload_hash)
        answer = _framed(noise.write(self._prove)) if self.initiator else b""
        sending, receiving = noise.keys()
        self.secured = Secured(
            *self._peer, Sealer(self._suite, sending), Opener(self._suite, receiving), noise.hash
        )
        return answer

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
