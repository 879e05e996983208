"""docs/protocol.md says what the code does: every table compared, every example rebuilt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from petalite.errors import ErrorCode
from petalite.net import frames, messages
from petalite.net.connection import Connection
from petalite.net.credit import Windows
from petalite.net.handshake import PRELUDE_BYTES, Handshake, Hello
from petalite.net.identity import Identity
from petalite.net.noise import HandshakeState
from petalite.net.states import RECEIVE_STEPS, SEND_STEPS, STATE_STEPS
from petalite.net.streams import Priority

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
EXAMPLES = {
    name: bytes.fromhex("".join(body.split()))
    for name, body in re.findall(r"```hex ([^\n]+)\n(.*?)```", TEXT, re.DOTALL)
}


def table(heading: str, columns: int) -> list[list[str]]:
    """The cells of the first table behind this text."""
    _, _, rest = TEXT.partition(heading)
    rows = []
    for line in rest.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")][:columns])
        elif rows:
            break
    return rows[2:]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_frame_types() -> None:
    stated = {}
    for kind, name, length, aux, on_stream in table("## Frames", 5):
        low, _, high = length.partition(" to ")
        stated[frames.FrameType[name]] = (
            int(kind, 16),
            number(low),
            number(high or low),
            number(aux.partition(" to ")[2] or aux),
            on_stream == "yes",
        )
    actual = {
        kind: (int(kind), kind.low, kind.high, kind.aux_high, kind.on_stream) for kind in frames.FrameType
    }
    assert stated == actual


@pytest.mark.parametrize(
    ("heading", "steps"),
    [
        ("The sending half:", SEND_STEPS),
        ("The receiving half:", RECEIVE_STEPS),
        ("The connection:", STATE_STEPS),
    ],
)
def test_states(heading: str, steps: dict[tuple[object, object], object]) -> None:
    def name(value: object) -> str:
        return getattr(value, "name", str(value))

    actual = {(name(state), name(step), name(after)) for (state, step), after in steps.items()}
    assert {tuple(row) for row in table(heading, 3)} == actual


def test_codes() -> None:
    stated = {name: int(code) for code, name in table("## Codes", 2)}
    assert stated == {code.name: code.value for code in ErrorCode if code < 0x100}


def test_hello_keys() -> None:
    stated = [row[0].strip("`") for row in table("Hello. Keys that are not listed", 1)]
    assert stated == list(Hello.__dataclass_fields__)


class Fixed(Handshake):
    """With the X25519 keys of the example."""

    def _new_noise(self, prelude: bytes) -> HandshakeState:
        first = 1 if self.initiator else 3
        static, ephemeral = (
            X25519PrivateKey.from_private_bytes(bytes([first + index]) * 32) for index in range(2)
        )
        return HandshakeState(self._suite, self.initiator, prelude, static, ephemeral=ephemeral)


def handshake() -> tuple[list[bytes], Fixed, Fixed]:
    """The three messages as sent, and both ends."""
    hello = Hello(bytes(16), 0, 262_144, 1_048_576, 256, "example")
    ours, theirs = (Identity.from_seed(bytes([seed]) * 32) for seed in (0x11, 0x22))
    first = Fixed(ours, hello, initiator=True, expected=theirs.peer_id)
    second = Fixed(theirs, hello, initiator=False)
    sent = [first.receive()]
    sent.append(second.receive(sent[0]))
    sent.append(first.receive(sent[1]))
    second.receive(sent[2])
    return sent, first, second


def first_plaintext() -> bytes:
    core = Connection(True, Windows(), Windows())
    plaintext = core.sender.express(core.open_stream(Priority.INTERACTIVE), b"hello", [], fin=True)
    assert plaintext is not None
    return plaintext


def sent_in_full(header: list[Any], buffers: list[bytes]) -> bytes:
    packed, segments = messages.encode(header, buffers)
    core = Connection(True, Windows(), Windows())
    stream = core.open_stream(Priority.NORMAL)
    core.sender.next_records(1000)
    record = core.sender.express(stream, packed, segments, fin=True)
    assert record is not None
    return record


def rebuilt() -> dict[str, bytes]:
    """What the examples must be."""
    sent, first, _ = handshake()
    assert first.secured is not None
    plaintext = first_plaintext()
    record = bytearray(len(plaintext) + 20)
    first.secured.sealer.seal(plaintext, memoryview(record))
    core = Connection(True, Windows(), Windows())
    stream = core.open_stream(Priority.INTERACTIVE)
    core.sender.next_records(1000)
    core.sender.write(stream, b"hello", [bytes(40_000)], fin=True)
    return {
        "block": bytes(core.sender.next_records(1000)[0]),
        "prelude": sent[0][:PRELUDE_BYTES],
        "message 1": sent[0][PRELUDE_BYTES:],
        "message 2": sent[1],
        "message 3": sent[2],
        "record": bytes(record),
        "frames": plaintext,
        "request": sent_in_full([1, {"n": 7}, None, "echo", 250], [b"hi", b"!"]),
        "failure": sent_in_full([2, {}, None, int(ErrorCode.BUSY), "no room"], []),
    }


@pytest.mark.parametrize(
    "name",
    ["prelude", "message 1", "message 2", "message 3", "record", "frames", "block", "request", "failure"],
)
def test_examples(name: str) -> None:
    assert EXAMPLES[name].hex() == rebuilt()[name].hex()


def test_there_is_no_example_that_is_not_checked() -> None:
    assert set(EXAMPLES) == set(rebuilt())
    assert "EXAMPLE" not in TEXT


def test_the_examples_first_record_opens_at_the_other_end() -> None:
    """With the responder's keys, from the bytes in the document."""
    _, _, second = handshake()
    assert second.secured is not None
    box = memoryview(bytearray(EXAMPLES["record"]))[4:]
    second.secured.opener.open(box, box[:-16])
    core = Connection(False, Windows(), Windows())
    core.receive(box[:-16], 0.0)
    assert core.streams[1].inbox[0][0] == b"hello"
