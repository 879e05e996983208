"""Noise against an independent implementation (PyPI `noiseprotocol`), byte for byte, and against vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from petalite.errors import HandshakeFailed, LocalProtocolError
from petalite.net.noise import AES_GCM, CHACHA_POLY, SUITES, HandshakeState, Suite
from petalite.net.records import Opener, Sealer

VECTORS = json.loads((Path(__file__).parent / "noise_vectors.json").read_text())["vectors"]
SUITE_OF = {suite.name: suite for suite in SUITES.values()}
pytestmark = pytest.mark.filterwarnings("ignore:One of ephemeral keypairs is already set")
suites = pytest.mark.parametrize("suite", [AES_GCM, CHACHA_POLY], ids=lambda suite: suite.name)
psks = pytest.mark.parametrize("psk", [None, bytes(range(32))], ids=["XX", "XXpsk3"])
keys = st.binary(min_size=32, max_size=32)
PAYLOADS = [b"", b"second", b"third" * 20]


def private(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(seed)


def reference(suite: Suite, initiator: bool, prologue: bytes, psk: bytes | None, *seeds: bytes) -> Any:
    """The other implementation, with the same keys."""
    pattern = "XX" if psk is None else "XXpsk3"
    noise = NoiseConnection.from_name(f"Noise_{pattern}_25519_{suite.name}_SHA256".encode())
    noise.set_as_initiator() if initiator else noise.set_as_responder()
    noise.set_prologue(prologue)
    if psk is not None:
        noise.set_psks(psk=psk)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, seeds[0])
    noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, seeds[1])
    noise.start_handshake()
    return noise


def talk(sides: list[Any], payloads: list[bytes]) -> None:
    """Ours and theirs in turn, whichever is first."""
    for index, payload in enumerate(payloads):
        writer, reader = sides[index % 2], sides[1 - index % 2]
        if isinstance(writer, HandshakeState):
            message = writer.write(lambda _hash, payload=payload: payload)
            assert reader.read_message(message) == payload
        else:
            message = bytes(writer.write_message(payload))
            assert reader.read(message) == payload


@suites
@psks
@pytest.mark.parametrize("initiator", [True, False])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_equals_the_other_implementation(
    suite: Suite, psk: bytes | None, initiator: bool, data: st.DataObject
) -> None:
    """Both roles, random keys and prologues: each understands the other, and both end with equal keys."""
    seeds = [data.draw(keys) for _ in range(4)]
    prologue = data.draw(st.binary(max_size=40))
    ours = HandshakeState(suite, initiator, prologue, private(seeds[0]), psk, private(seeds[1]))
    theirs = reference(suite, not initiator, prologue, psk, seeds[2], seeds[3])
    talk([ours, theirs] if initiator else [theirs, ours], PAYLOADS)
    assert ours.finished
    assert ours.hash == theirs.get_handshake_hash()
    sending, receiving = ours.keys()
    sealer, opener = Sealer(suite, sending), Opener(suite, receiving)
    for text in (b"one", b"", b"three" * 100):
        record = bytearray(len(text) + 20)
        assert sealer.seal(text, memoryview(record)) == len(record)
        assert theirs.decrypt(bytes(record[4:])) == text
        plain = bytearray(len(text))
        opener.open(memoryview(bytearray(theirs.encrypt(text))), memoryview(plain))
        assert plain == text


@pytest.mark.parametrize(
    "vector", VECTORS, ids=lambda vector: f"{vector['protocol_name']} of {vector['source']}"
)
def test_vectors(vector: dict[str, Any]) -> None:
    """Every byte of both sides' messages, from fixed keys, and of the first transport messages."""
    _, pattern, _, cipher, _ = vector["protocol_name"].split("_")
    suite = SUITE_OF[cipher]
    psk = bytes.fromhex(vector["init_psks"][0]) if pattern == "XXpsk3" else None
    sides = [
        HandshakeState(
            suite,
            role == "init",
            bytes.fromhex(vector[f"{role}_prologue"]),
            private(bytes.fromhex(vector[f"{role}_static"])),
            psk,
            private(bytes.fromhex(vector[f"{role}_ephemeral"])),
        )
        for role in ("init", "resp")
    ]
    messages = [
        (bytes.fromhex(item["payload"]), bytes.fromhex(item["ciphertext"])) for item in vector["messages"]
    ]
    for index, (payload, ciphertext) in enumerate(messages[:3]):
        assert sides[index % 2].write(lambda _hash, payload=payload: payload) == ciphertext
        assert sides[1 - index % 2].read(ciphertext) == payload
        if index + 1 == vector["hash_after_messages"]:
            assert {side.hash.hex() for side in sides} == {vector["handshake_hash"]}
    sealers = [Sealer(suite, side.keys()[0]) for side in sides]
    for index, (payload, ciphertext) in enumerate(messages[3:], start=3):
        record = bytearray(len(payload) + 20)
        sealers[index % 2].seal(payload, memoryview(record))
        assert record[4:] == ciphertext


def pair(prologues: tuple[bytes, bytes] = (b"p", b"p")) -> list[HandshakeState]:
    return [
        HandshakeState(AES_GCM, index == 0, prologue, X25519PrivateKey.generate())
        for index, prologue in enumerate(prologues)
    ]


def test_another_prologue_fails_at_the_second_message() -> None:
    """The downgrade rule: what was named in the clear is in every later message's authentication."""
    initiator, responder = pair((b"suite 1", b"suite 2"))
    responder.read(initiator.write(lambda _: b""))
    with pytest.raises(HandshakeFailed):
        initiator.read(responder.write(lambda _: b""))


@pytest.mark.parametrize("message", [0, 1, 2])
def test_every_flipped_byte_and_every_truncation_is_noticed(message: int) -> None:
    """In the first message, which nothing protects, the damage shows in the second."""
    for cut in (False, True):
        position = 0
        while True:
            sides = pair()
            raised = False
            for index in range(3):
                sent = bytearray(sides[index % 2].write(lambda _: b"payload"))
                if index == message:
                    if position == len(sent):
                        break
                    sent = sent[:position] if cut else sent
                    if not cut:
                        sent[position] ^= 1
                try:
                    sides[1 - index % 2].read(bytes(sent))
                except HandshakeFailed:
                    raised = True
                    break
            else:
                raise AssertionError(f"byte {position} of message {message} may be changed")
            if not raised:
                break
            position += 1
        assert position > 30


# RFC 7748 §6.1 and https://cr.yp.to/ecdh.html#validate: points whose product with any key is zero.
LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_point_of_low_order_is_refused(point: str) -> None:
    _, responder = pair()
    responder.read(bytes.fromhex(point))
    with pytest.raises(HandshakeFailed, match="low order"):
        responder.write(lambda _: b"")


def test_turns_are_kept() -> None:
    initiator, responder = pair()
    with pytest.raises(LocalProtocolError):
        responder.write(lambda _: b"")
    with pytest.raises(LocalProtocolError):
        initiator.read(b"")
    with pytest.raises(LocalProtocolError):
        initiator.keys()


def test_the_payload_may_sign_the_transcript() -> None:
    """What the writer's callback sees is what the reader knows when the payload is out."""
    initiator, responder = pair()
    responder.read(initiator.write(lambda _: b""))
    seen: list[bytes] = []
    message = responder.write(lambda transcript: seen.append(transcript) or b"")  # type: ignore[func-returns-value]
    initiator.read(message)
    assert seen == [initiator.payload_hash] == [responder.payload_hash]
