"""The handshake's messages: whole, byte by byte, and every way in which a stranger may lie in them."""

from __future__ import annotations

import msgpack
import pytest

from petalite.errors import HandshakeFailed, LocalProtocolError, WrongPeer
from petalite.net import handshake as module
from petalite.net.handshake import FLAG_SWARM_KEY, MAGIC, Handshake, Hello, Secured
from petalite.net.identity import Identity
from petalite.net.noise import AES_GCM, CHACHA_POLY, Suite

ALICE, BOB, EVE = (Identity.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))
HELLO = Hello(bytes(16), 0, 65536, 65536, 16, "test/1", ("/ip4/1.2.3.4/tcp/5",))
KEY = b"k" * 32


def initiator(identity: Identity = ALICE, **options: object) -> Handshake:
    return Handshake(identity, HELLO, initiator=True, **{"expected": BOB.peer_id, **options})  # type: ignore[arg-type]


def responder(identity: Identity = BOB, swarm_key: bytes | None = None) -> Handshake:
    return Handshake(identity, HELLO, initiator=False, swarm_key=swarm_key)


def shake(first: Handshake, second: Handshake) -> tuple[Secured, Secured]:
    second.receive(first.receive(second.receive(first.receive())))
    assert first.secured is not None
    assert second.secured is not None
    return first.secured, second.secured


@pytest.mark.parametrize("suite", [AES_GCM, CHACHA_POLY], ids=lambda suite: suite.name)
@pytest.mark.parametrize("swarm_key", [None, KEY])
def test_both_ends_know_each_other(suite: Suite, swarm_key: bytes | None) -> None:
    first, second = shake(initiator(suite=suite, swarm_key=swarm_key), responder(swarm_key=swarm_key))
    assert (first.peer_id, second.peer_id) == (BOB.peer_id, ALICE.peer_id)
    assert first.hello == second.hello == HELLO
    assert first.binding == second.binding
    record = bytearray(20 + 5)
    first.sealer.seal(b"hello", memoryview(record))
    plain = bytearray(5)
    second.opener.open(memoryview(record)[4:], memoryview(plain))
    assert plain == b"hello"


def test_byte_by_byte_and_with_records_behind_it() -> None:
    first, second = initiator(), responder()
    sent = first.receive()
    for turn in (second, first, second):
        answer = b"".join(turn.receive(sent[index : index + 1]) for index in range(len(sent)))
        sent = answer
    assert first.secured is not None
    assert second.secured is not None
    assert second.leftover == b""

    first, second = initiator(), responder()
    second.receive(first.receive(second.receive(first.receive())) + b"the first record")
    assert second.leftover == b"the first record"


def test_sessions_differ() -> None:
    """Fresh ephemeral keys: two handshakes of the same two peers share neither binding nor bytes."""
    assert shake(initiator(), responder())[0].binding != shake(initiator(), responder())[0].binding


def test_another_peer_at_the_address_is_told_apart() -> None:
    first, second = initiator(expected=EVE.peer_id), responder()
    with pytest.raises(WrongPeer, match=str(BOB.peer_id)):
        first.receive(second.receive(first.receive()))


def test_our_own_identity_at_the_address() -> None:
    first, second = initiator(expected=None), responder(ALICE)
    with pytest.raises(WrongPeer, match="our own"):
        first.receive(second.receive(first.receive()))


def test_reflection_fails() -> None:
    """An attacker who sends our own messages back gets nowhere: the role is signed."""
    first = initiator(expected=None)
    with pytest.raises(HandshakeFailed):
        first.receive(first.receive()[module.PRELUDE_BYTES :])


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, None), (None, KEY)], ids=["public host", "private host"])
def test_private_and_public_swarms_do_not_talk(ours: bytes | None, theirs: bytes | None) -> None:
    """The responder answers nothing at all."""
    first, second = initiator(swarm_key=ours), responder(swarm_key=theirs)
    with pytest.raises(HandshakeFailed, match="swarm"):
        second.receive(first.receive())


def test_without_the_swarm_key_nothing_after_the_first_message_is_answered() -> None:
    """The second message authenticates no key; the third, made with another one, gets silence."""
    first, second = initiator(swarm_key=b"x" * 32), responder(swarm_key=KEY)
    third = first.receive(second.receive(first.receive()))
    with pytest.raises(HandshakeFailed):
        second.receive(third)
    assert second.secured is None


@pytest.mark.parametrize(
    "prelude",
    [
        b"GET / HT",
        b"\x16\x03\x01\x02\0\x01\0\x01",  # a TLS client's first bytes
        MAGIC + bytes([2, 1, 0, 0]),
        MAGIC + bytes([1, 3, 0, 0]),
        MAGIC + bytes([1, 1, 0x82, 0]),
        MAGIC + bytes([1, 1, 0, 1]),
    ],
)
def test_a_prelude_that_is_not_ours_is_refused(prelude: bytes) -> None:
    with pytest.raises(HandshakeFailed):
        responder().receive(prelude + bytes(34))


def test_a_downgrade_of_the_suite_breaks_the_handshake() -> None:
    """Somebody between the two changes the suite's number, and the responder speaks the other one."""
    first, second = initiator(suite=AES_GCM), responder()
    sent = bytearray(first.receive())
    sent[5] = CHACHA_POLY.number
    answer = second.receive(bytes(sent))
    with pytest.raises(HandshakeFailed):
        first.receive(answer)


@pytest.mark.parametrize("bit", [0, 1, 6])
def test_a_changed_flag_breaks_the_handshake(bit: int) -> None:
    first, second = initiator(), responder()
    sent = bytearray(first.receive())
    sent[6] ^= 1 << bit
    with pytest.raises(HandshakeFailed):
        first.receive(second.receive(bytes(sent)))
    assert FLAG_SWARM_KEY == 1


@pytest.mark.parametrize("length", [0, 31, 2049, 65535])
def test_lengths_are_checked_before_anything_is_kept(length: int) -> None:
    second = responder()
    with pytest.raises(HandshakeFailed, match="claims"):
        second.receive(MAGIC + bytes([1, 1, 0, 0]) + length.to_bytes(2, "big"))


def test_a_first_message_with_a_payload_is_refused() -> None:
    first, second = initiator(), responder()
    sent = bytearray(first.receive()) + b"early data"
    sent[8:10] = (32 + 10).to_bytes(2, "big")
    with pytest.raises(HandshakeFailed, match="payload"):
        second.receive(bytes(sent))


def payload_of(public: bytes, signature: bytes, hello: object = None) -> bytes:
    body = module.schema.encode(HELLO) if hello is None else hello
    return public + signature + msgpack.packb(body)


@pytest.mark.parametrize("who", ["initiator", "responder"])
@pytest.mark.parametrize(
    "lie",
    ["static only", "other role", "other session", "other key", "nothing", "short", "no map", "bad field"],
)
def test_identity_proofs_that_do_not_hold(monkeypatch: pytest.MonkeyPatch, who: str, lie: str) -> None:
    """Each with a key that Eve has: what is signed, by whom, for which role and session, all count."""
    public = EVE.peer_id.public_key
    recorded: list[bytes] = []
    honest = Handshake._prove

    def prove(self: Handshake, transcript: bytes) -> bytes:
        if self.initiator is not (who == "initiator"):
            return honest(self, transcript)
        recorded.append(transcript)
        right = module._signed(self.initiator, transcript)
        return {
            "static only": payload_of(public, EVE.sign(b"noise-libp2p-static-key:" + bytes(32))),
            "other role": payload_of(public, EVE.sign(module._signed(not self.initiator, transcript))),
            "other session": payload_of(public, EVE.sign(module._signed(self.initiator, bytes(32)))),
            "other key": payload_of(ALICE.peer_id.public_key, EVE.sign(right)),
            "nothing": b"",
            "short": (public + EVE.sign(right))[:-1],
            "no map": payload_of(public, EVE.sign(right), ["not", "a", "map"]),
            "bad field": payload_of(public, EVE.sign(right), {**module.schema.encode(HELLO), "streams": -1}),
        }[lie]

    monkeypatch.setattr(Handshake, "_prove", prove)
    first, second = initiator(EVE, expected=None), responder(EVE if who == "responder" else BOB)
    if who == "responder":
        first = initiator(ALICE, expected=None)
    with pytest.raises(HandshakeFailed):
        second.receive(first.receive(second.receive(first.receive())))
    assert recorded


def test_a_replayed_third_message_fails() -> None:
    first, second = initiator(), responder()
    third = first.receive(second.receive(first.receive()))
    second.receive(third)
    again = responder()
    fresh = initiator()
    again.receive(fresh.receive())
    with pytest.raises(HandshakeFailed):
        again.receive(third)


def test_misuse_is_our_own_mistake() -> None:
    first, second = initiator(), responder()
    shake(first, second)
    with pytest.raises(LocalProtocolError):
        first.receive(b"")


def test_messages_are_as_small_as_said() -> None:
    """A hello with eight long addresses still fits the limit on a message."""
    full = Hello(bytes(16), 0, 2**32 - 1, 2**32 - 1, 65536, "a" * 64, tuple("x" * 128 for _ in range(8)))
    first = Handshake(ALICE, full, initiator=True, expected=BOB.peer_id)
    second = Handshake(BOB, full, initiator=False)
    assert shake(first, second)[0].hello == full
