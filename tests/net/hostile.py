"""A peer that can shake hands correctly and then lies: raw records and frames over a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from petalite.net import Host, HostSettings, Identity
from petalite.net.credit import Windows
from petalite.net.frames import HEADER, HEADER_BYTES, U32, U64, FrameType, decode_reason, encode, opening
from petalite.net.handshake import Handshake, Hello
from petalite.net.limits import Limits
from petalite.net.records import LENGTH, OVERHEAD_BYTES

STREAMS = 1000
PROMPT = HostSettings(windows=Windows(streams=STREAMS), limits=Limits(handshake_s=0.3))
HELLO = Hello(b"hostile instance", 0, 1 << 20, 1 << 24, 4096, "attack/1")


async def dial(host: Host, source: str = "127.0.0.1") -> socket.socket:
    """A TCP connection to the host, and nothing said."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", host.addresses[0].port))
    return sock


async def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    try:
        while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


class Attacker:
    """The initiator's end of a secured connection, by hand."""

    def __init__(self, sock: socket.socket, identity: Identity, host: Host) -> None:
        self.sock = sock
        self.identity = identity
        self.handshake = Handshake(identity, HELLO, initiator=True, expected=host.peer_id)
        self._loop = asyncio.get_running_loop()
        self._buffer = b""

    async def shake(self) -> None:
        await self._loop.sock_sendall(self.sock, self.handshake.receive())
        while self.handshake.secured is None:
            answer = self.handshake.receive(await self._loop.sock_recv(self.sock, 4096))
            await self._loop.sock_sendall(self.sock, answer)
        self._buffer = self.handshake.leftover

    def record(self, plaintext: bytes) -> bytes:
        assert self.handshake.secured is not None
        record = bytearray(len(plaintext) + OVERHEAD_BYTES)
        self.handshake.secured.sealer.seal(plaintext, memoryview(record))
        return bytes(record)

    async def send_raw(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def send(self, *plaintexts: bytes) -> None:
        """One record each."""
        await self.send_raw(b"".join(map(self.record, plaintexts)))

    async def frames(self) -> AsyncIterator[tuple[int, int, bytes]]:
        """(type, stream, payload) of what the host sends, until it closes."""
        assert self.handshake.secured is not None
        while True:
            while len(self._buffer) >= 4 and len(self._buffer) >= 4 + LENGTH.unpack_from(self._buffer)[0]:
                end = 4 + LENGTH.unpack_from(self._buffer)[0]
                box = memoryview(bytearray(self._buffer[4:end]))
                self._buffer = self._buffer[end:]
                self.handshake.secured.opener.open(box, box[:-16])
                plain, position = bytes(box[:-16]), 0
                while position < len(plain):
                    kind, _flags, _aux, stream, length = HEADER.unpack_from(plain, position)
                    position += HEADER_BYTES + length
                    yield kind, stream, plain[position - length : position]
            try:
                data = await self._loop.sock_recv(self.sock, 65536)
            except ConnectionResetError:
                return
            if not data:
                return
            self._buffer += data

    async def close_code(self) -> tuple[int, str]:
        """Why the host closed the connection."""
        async with asyncio.timeout(10):
            async for kind, _stream, payload in self.frames():
                if kind == FrameType.CLOSE:
                    return decode_reason(memoryview(payload))
        raise AssertionError("closed without a word")

    async def answer_of(self, stream: int) -> bytes:
        """The MESSAGE, or the code of the reset, that the host sends on this stream."""
        async with asyncio.timeout(10):
            async for kind, number, payload in self.frames():
                if number == stream and kind in (FrameType.MESSAGE, FrameType.RESET_STREAM):
                    return payload
        raise AssertionError("closed")


@asynccontextmanager
async def attacker(
    host: Host, identity: Identity | None = None, source: str = "127.0.0.1"
) -> AsyncIterator[Attacker]:
    """Connected and secured."""
    sock = await dial(host, source)
    try:
        enemy = Attacker(sock, identity or Identity.generate(), host)
        await enemy.shake()
        yield enemy
    finally:
        sock.close()


def open_stream(stream: int, priority: int = 2) -> bytes:
    return encode(FrameType.MESSAGE, stream, flags=opening(priority))


def message(stream: int, header: bytes, body: bytes = b"", fin: bool = False) -> bytes:
    return encode(FrameType.MESSAGE, stream, header + body, int(fin), len(header))


def head(stream: int, header: bytes, size: int) -> bytes:
    """Of a message whose buffers have so many bytes."""
    return encode(FrameType.HEAD, stream, U64.pack(size) + header)


def block(stream: int, size: int) -> bytes:
    return encode(FrameType.BLOCK, stream, U32.pack(size))
