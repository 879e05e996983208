"""Coverage-guided fuzzing of all that reads a stranger's bytes: `python -m tests.net.fuzz all --seconds 20`.

Needs atheris (extra `fuzz`). Each target takes any bytes and may raise the one error that its parser is
allowed to raise; whatever else comes out is a finding, which libFuzzer writes beside the corpus. Seeds are
valid bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found,unused-ignore]

with atheris.instrument_imports(include=["petalite"]):
    from petalite.errors import BadMessage, HandshakeFailed, InvalidAddress, RemoteProtocolError
    from petalite.net import frames, messages
    from petalite.net.connection import Connection
    from petalite.net.credit import Windows
    from petalite.net.frames import MAX_DATA_BYTES, U32, U64, FrameType
    from petalite.net.handshake import Handshake, Hello
    from petalite.net.identity import Identity
    from petalite.net.multiaddr import Multiaddr
    from petalite.net.noise import AES_GCM
    from petalite.net.records import OVERHEAD_BYTES, PREFIX_BYTES, Opener, Sealer
    from petalite.net.streams import Stream

IDENTITY = Identity.from_seed(bytes(32))
HELLO = Hello(bytes(16), 0, 65536, 65536, 4)
WINDOWS = Windows(8192, 20_000, 4, 16_384, 40_000, 10_000)


def handshake(data: bytes) -> None:
    """The responder's end, in two pieces."""
    with contextlib.suppress(HandshakeFailed):
        responder = Handshake(IDENTITY, HELLO, initiator=False)
        half = len(data) // 2
        responder.receive(data[:half])
        responder.receive(data[half:])


def records(data: bytes) -> None:
    """A box under a known key; only what was sealed opens."""
    opener = Opener(AES_GCM, bytes(32))
    box = memoryview(bytearray(data.ljust(17, b"\0")))
    with contextlib.suppress(RemoteProtocolError):
        opener.open(box, box[:-16])
        assert _sealed(bytes(box[:-16])) == bytes(data)


def connection(data: bytes) -> None:
    """Records of any frames, each behind a byte with its length; what is kept and sent keeps its bounds."""
    core = Connection(False, WINDOWS, WINDOWS)
    position = 0
    with contextlib.suppress(RemoteProtocolError):
        while position < len(data):
            end = position + 1 + data[position]
            record = data[position + 1 : end]
            target = core.receiver.target(len(record))
            if target is not None:
                target[:] = record
            core.receive(memoryview(record), 0.0)
            position = end
            for stream in list(core.streams.values()):
                assert 0 <= stream.consumed <= stream.received < stream.window.limit + MAX_DATA_BYTES
                if stream.id % 4 == 1:
                    _read(core, stream)
    held = sum(stream.received - stream.consumed for stream in core.streams.values())
    assert held <= 40_000 + 10_000 + MAX_DATA_BYTES
    assert sum(map(len, core.sender.next_records(1 << 20))) < 100_000


def _read(core: Connection, stream: Stream) -> None:
    """As a call does."""
    taken = core.receiver.take(stream) if stream.target is None else None
    if taken is None:
        return
    with contextlib.suppress(BadMessage):
        sizes = messages.decode_header(taken[0])[2]
        if len(taken[1]) == taken[2]:
            messages.split(sizes, taken[1])
    if len(taken[1]) < taken[2] < 1 << 16:
        core.receiver.expect(stream, taken[1], memoryview(bytearray(taken[2])))


def header(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        messages.decode_header(data)


def multiaddr(data: bytes) -> None:
    with contextlib.suppress(InvalidAddress, UnicodeDecodeError):
        address = Multiaddr.parse(data.decode())
        assert Multiaddr.parse(str(address)) == address


def _sealed(plain: bytes) -> bytes:
    record = bytearray(len(plain) + OVERHEAD_BYTES)
    Sealer(AES_GCM, bytes(32)).seal(plain, memoryview(record))
    return bytes(record[PREFIX_BYTES:])


def _record(*parts: bytes) -> bytes:
    plain = b"".join(parts)
    return bytes([len(plain)]) + plain


_OPEN = frames.encode(FrameType.MESSAGE, 1, flags=frames.opening(2))
_HEADER = messages.encode([1, {"a": [1, 2.5, None, b"x", "y"]}, None, "echo", 9], [b"buffer"])[0]
_MESSAGE = frames.encode(FrameType.MESSAGE, 1, _HEADER + b"buffer", aux=len(_HEADER))
_HEAD = frames.encode(FrameType.HEAD, 1, U64.pack(6) + _HEADER)
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "handshake": (handshake, [Handshake(IDENTITY, HELLO, initiator=True).receive()]),
    "records": (records, [_sealed(b"text")]),
    "connection": (
        connection,
        [
            _record(_OPEN, _MESSAGE) + _record(_MESSAGE, frames.encode(FrameType.MESSAGE, 1, flags=1)),
            _record(_OPEN, _HEAD, frames.encode(FrameType.BLOCK, 1, U32.pack(6), 1)) + _record(b"buffer"),
            *(
                _record(_OPEN, frames.encode(kind, int(kind.on_stream), bytes(kind.low)))
                for kind in FrameType
            ),
        ],
    ),
    "header": (header, [_HEADER]),
    "multiaddr": (multiaddr, [f"/ip4/1.2.3.4/tcp/5/p2p/{IDENTITY.peer_id}".encode(), b"/dns/a.b/tcp/1"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    arguments = parser.parse_args()
    if arguments.target == "all":
        for target in TARGETS:
            command = [sys.executable, "-m", "tests.net.fuzz", target, "--seconds", str(arguments.seconds)]
            subprocess.run(command, check=True)
        return
    function, seeds = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(seeds):
            (Path(corpus) / str(index)).write_bytes(seed)
        options = [
            f"-max_total_time={arguments.seconds}",
            "-max_len=4096",
            "-verbosity=0",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], function)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
